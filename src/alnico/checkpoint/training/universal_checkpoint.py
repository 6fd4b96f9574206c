"""Reads a universal checkpoint of DeepSpeed: the float32 master weights, in a folder for each parameter.

    zero/NAME/fp32.pt                            a parameter: a tensor, or a dict that has it under "param"
    mp_rank_00_model_states.pt                   names and shapes, buffers, frozen parameters
    zero_pp_rank_R_mp_rank_00_model_states.pt    the same of ZeRO 3, and rank R's part of the frozen parameters

ds_to_universal.py makes such a folder of the partitions of all ranks. Parameters that were partitioned by ZeRO 3 are flat in it.
Format: https://deepspeed.readthedocs.io/en/latest/universal-checkpointing.html
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.pickles import Pickle, PickledTensor, load_pickle
from alnico.checkpoint.training.model_states import (
    CLASSES,
    MODEL_FILE,
    StoredPartitions,
    frozen_tables,
    open_states,
    other_tables,
    refuse_divided,
)
from alnico.checkpoint.training.piece_table import PieceTable, flat_table
from alnico.checkpoint.training.recognise import MODEL_STATES, UNIVERSAL_FOLDER
from alnico.checkpoint.training.sharded_model import ShardedModel, closed_on_failure
from alnico.checkpoint.training.trainer_names import choose_model, list_groups
from alnico.errors import ModelError

WEIGHTS = "fp32.pt"
PARAMETER = "param"
"""The key of a parameter in a file of weights."""
RANK = re.compile(r"zero_pp_rank_(\d{1,6})_.*")


def open_universal(label: str, folder: Path, part: str = "") -> ShardedModel:
    """Open a universal checkpoint as a model; reads the pickles, not the tensors.

    Trained parameters are read in float32, frozen ones and buffers as they are stored. Errors: ModelError for a parameter without
    a file, files of another run, models that are divided among devices, too, and a pickle with more than data.
    """
    names = os.listdir(folder)
    refuse_divided(label, names)
    is_stage_3 = MODEL_FILE not in names
    ranks = [
        int(match[1]) for n in names if MODEL_STATES.fullmatch(n) and (match := RANK.fullmatch(n)) is not None
    ]
    files = [f"zero_pp_rank_{r}_{MODEL_FILE}" for r in range(max(ranks, default=0) + 1)]
    states = open_states(label, folder, files if is_stage_3 else [MODEL_FILE])
    stored = StoredPartitions()
    shapes = {name: shape for group in states[0].shapes for name, shape in group.items()}
    pickles = {state.path: state.pickle for state in states}
    tables = _trained(label, folder, shapes, stored, pickles)
    trained = len(tables)
    tables |= frozen_tables(label, states, stored)
    copied = other_tables(states[0], tables, stored, is_stage_3=is_stage_3)
    tables |= copied
    tables |= {alias: tables[name] for alias, name in states[0].shared.items() if name in tables}
    chosen = choose_model(list(tables), {}, part, label)
    kept = [name for name, table in copied.items() if name not in states[0].shared and table.pieces]
    left = ["the optimizer's states", *([list_groups(states[0].others)] if states[0].others else [])]
    notes = [
        *chosen.notes(label),
        f"{label}: {trained} tensors are the master weights of a universal checkpoint of DeepSpeed, in float32; the output is float32, too, "
        "unless the recipe says otherwise.",
        *([f"{label}: read as the file of the model has them: {list_groups(kept)}."] if kept else []),
        f"{label}: left out, as they are not tensors of the model: {', '.join(left)}.",
    ]
    model = FileModel(label, folder, stored.shards(pickles))
    with closed_on_failure(model):
        own = {name: tables[saved] for name, saved in chosen.names.items()}
        return ShardedModel(label, folder, model, own, notes)


def _trained(
    label: str,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    stored: StoredPartitions,
    pickles: dict[Path, Pickle],
) -> dict[str, PieceTable]:
    """The trained parameters; their pickles are added to ``pickles``. Errors: ModelError."""
    check_inside(folder / UNIVERSAL_FOLDER, folder)
    with os.scandir(folder / UNIVERSAL_FOLDER) as entries:
        there = {entry.name for entry in entries if os.path.lexists(os.path.join(entry.path, WEIGHTS))}
    missing, others = sorted(shapes.keys() - there), sorted(there - shapes.keys())
    if missing or others:
        what = (
            f"{UNIVERSAL_FOLDER}/{missing[0][:80]}/{WEIGHTS} is missing"
            if missing
            else f"{UNIVERSAL_FOLDER}/{others[0][:80]} is of no parameter of the model states"
        )
        raise ModelError(
            f"{label}: {what}; expected the weights of the {len(shapes)} parameters that the model states name. Copy the checkpoint again."
        )
    tables = {}
    for name, shape in shapes.items():
        path = folder / UNIVERSAL_FOLDER / name / WEIGHTS
        check_inside(path, folder)
        loaded = load_pickle(path, CLASSES)
        tensor = loaded.value.get(PARAMETER) if isinstance(loaded.value, dict) else loaded.value
        found = tensor.shape if isinstance(tensor, PickledTensor) else None
        if not isinstance(tensor, PickledTensor) or found not in (shape, (math.prod(shape),)):
            raise ModelError(
                f"{path}: holds {'no tensor' if found is None else f'a tensor of {list(found)}'}; expected {name[:80]} {list(shape)}. The files "
                "are of different runs; copy the checkpoint again."
            )
        pickles[path] = loaded
        run = (stored.add(path, name, tensor), 0, math.prod(shape))
        tables[name] = flat_table(tensor.dtype, shape, [run])
    return tables
