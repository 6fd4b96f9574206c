"""Reads what DeepSpeed saves of a model beside its optimizer: names and shapes, frozen parameters, buffers.

    mp_rank_00_model_states.pt                    stages 1 and 2
    zero_pp_rank_R_mp_rank_00_model_states.pt     stage 3: the same, and rank R's part of the frozen parameters

Format: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.files import check_inside, is_text
from alnico.checkpoint.header import MAX_DIMENSIONS
from alnico.checkpoint.pickles import Pickle, PickledTensor, is_size, load_pickle, shard_of
from alnico.checkpoint.source import Shard
from alnico.checkpoint.training.piece_table import PieceTable, flat_table
from alnico.checkpoint.training.recognise import PARTITION
from alnico.errors import ModelError

CLASSES = re.compile(r"(deepspeed|torch\.distributed)(\.|$)")
"""Modules of what DeepSpeed saves besides tensors, such as its loss scaler. Known by name; nothing of them is run."""

MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class ModelStates:
    """What a file of model states holds."""

    path: Path
    pickle: Pickle
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    """Names and shapes of the parameters of each optimizer group, in order."""
    frozen: Mapping[str, tuple[int, ...]]
    fragments: Mapping[str, PickledTensor]
    module: Mapping[str, PickledTensor]
    shared: Mapping[str, str]
    step: object
    others: Sequence[str]


OTHER_PARALLELISM = re.compile(
    r"layer_.*_states\.pt|expp_rank_.*\.pt|(?!.*mp_rank_00)(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt"
)
"""Files of a model that is divided in other ways, too: into layers, experts, or parts of matrices."""


def refuse_divided(label: str, names: Sequence[str]) -> None:
    """Refuse a model that is divided in other ways, too, by the names of its files. Errors: ModelError."""
    partitions = [match for name in names if (match := PARTITION.fullmatch(name)) is not None]
    divided = [name for name in names if OTHER_PARALLELISM.fullmatch(name)]
    divided += [match[0] for match in partitions if int(match["model_rank"])]
    if divided:
        raise ModelError(
            f"{label}: has {min(divided)}, so the model is divided into layers, experts or parts of matrices, too; expected data parallelism "
            "alone (mp_rank_00). Convert it with the tool of its trainer."
        )


def open_states(label: str, folder: Path, names: Sequence[str]) -> list[ModelStates]:
    """Read files of model states, which must be of one step. Errors: ModelError."""
    absent = next((name for name in names if not os.path.lexists(folder / name)), None)
    if absent is not None:
        raise ModelError(
            f"{label}: {absent} is missing, which has the names of the parameters; expected it with the other files of the checkpoint. "
            "Copy the checkpoint again."
        )
    states = [_open_state(folder / name, folder) for name in names]
    for state in states:
        if (state.shapes, state.frozen, state.step) != (states[0].shapes, states[0].frozen, states[0].step):
            raise ModelError(
                f"{label}: {state.path.name} is of step {str(state.step)[:20]} and {states[0].path.name} of step {str(states[0].step)[:20]}, or "
                "they have other parameters; expected the ranks of one step. Copy the checkpoint again."
            )
    return states


def _open_state(path: Path, folder: Path) -> ModelStates:
    """Read one file of model states. Errors: ModelError."""
    check_inside(path, folder)
    loaded = load_pickle(path, CLASSES)
    state = loaded.value if isinstance(loaded.value, dict) else {}
    groups = state.get("param_shapes")
    shapes = [_shapes(group) for group in (groups if isinstance(groups, (list, tuple)) else [groups])]
    frozen = _shapes(state.get("frozen_param_shapes") or {})
    fragments, shared = state.get("frozen_param_fragments") or {}, state.get("shared_params") or {}
    pairs = (
        shared.items()
        if isinstance(shared, dict)
        else [p for p in shared if isinstance(p, (list, tuple)) and len(p) == 2]
    )
    if frozen is None or None in shapes or not isinstance(fragments, dict):
        raise ModelError(
            f"{path}: has no param_shapes that name the parameters of each group with their sizes; expected the model states of ZeRO. "
            "Convert the checkpoint with the zero_to_fp32.py that is next to it."
        )
    used = (
        "module",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "buffer_names",
    )
    return ModelStates(
        path,
        loaded,
        tuple(shape for shape in shapes if shape is not None),
        frozen,
        _tensors(fragments),
        _tensors(state.get("module")),
        {a: b for a, b in pairs if isinstance(a, str) and isinstance(b, str)},
        state.get("global_steps"),
        [str(key) for key in state if key not in used and state[key] is not None],
    )


def _shapes(group: Any) -> Mapping[str, tuple[int, ...]] | None:
    """Names and sizes of parameters; None for anything else."""
    if not isinstance(group, dict):
        return None
    for name, shape in group.items():
        is_shape = (
            isinstance(shape, (tuple, list)) and len(shape) <= MAX_DIMENSIONS and all(map(is_size, shape))
        )
        if not isinstance(name, str) or not is_text(name) or not is_shape or math.prod(shape) >= 1 << 60:
            return None
    return {name: tuple(shape) for name, shape in group.items()}


def _tensors(value: Any) -> dict[str, PickledTensor]:
    """The tensors of a dict by name."""
    items = value.items() if isinstance(value, dict) else ()
    return {name: t for name, t in items if isinstance(name, str) and isinstance(t, PickledTensor)}


def frozen_tables(
    label: str, states: Sequence[ModelStates], stored: StoredPartitions
) -> dict[str, PieceTable]:
    """The parameters that are not trained: whole in one file, or a run in the file of each rank. Errors: ModelError."""
    tables = {}
    for name, shape in states[0].frozen.items():
        fragments = [state.fragments.get(name) for state in states]
        count, first = math.prod(shape), fragments[0]
        share = -(-count // len(states))
        if first is None or any(
            f is None or math.prod(f.shape) != share or f.dtype != first.dtype for f in fragments
        ):
            found = [None if f is None else list(f.shape) for f in fragments]
            raise ModelError(
                f"{label}: the frozen parameter {name[:80]} {list(shape)} has the parts {str(found)[:120]}; expected {share} elements of one "
                f"dtype in each of {len(states)} files. The files are of different runs; copy the checkpoint again."
            )
        runs = [
            (stored.add(state.path, f"frozen/{name}", fragment), 0, max(0, min(share, count - rank * share)))
            for rank, (state, fragment) in enumerate(zip(states, fragments, strict=True))
            if fragment is not None
        ]
        tables[name] = flat_table(first.dtype, shape, runs)
    return tables


def other_tables(
    states: ModelStates, tables: Mapping[str, PieceTable], stored: StoredPartitions, *, is_stage_3: bool
) -> dict[str, PieceTable]:
    """What the file of the model has besides: buffers, and weights that are the same tensor as a trained one.

    In stage 3 the file has empty tensors in place of what is partitioned.
    """
    found = {}
    trained = {tensor: name for name, tensor in states.module.items() if name in tables}
    for name, tensor in states.module.items():
        if name in tables or name in states.shared or (is_stage_3 and not math.prod(tensor.shape)):
            continue
        if tensor in trained:
            found[name] = tables[trained[tensor]]
        else:
            run = (stored.add(states.path, name, tensor), 0, math.prod(tensor.shape))
            found[name] = flat_table(tensor.dtype, tensor.shape, [run])
    return found


class StoredPartitions:
    """The stored tensors that are read, by the file that has them."""

    def __init__(self) -> None:
        self._tensors: dict[Path, dict[str, PickledTensor]] = {}

    def add(self, path: Path, name: str, tensor: PickledTensor) -> str:
        """Read a tensor of a file; returns a name for it that no other has."""
        unique = f"{path.parent.name}/{path.name}/{name}"
        self._tensors.setdefault(path, {})[unique] = tensor
        return unique

    def shards(self, pickles: Mapping[Path, Pickle]) -> list[Shard]:
        """Locate the tensors in their files. Errors: ModelError."""
        return [shard_of(path, pickles[path], tensors) for path, tensors in self._tensors.items()]
