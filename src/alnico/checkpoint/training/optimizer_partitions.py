"""Reads a model from the partitions of DeepSpeed's ZeRO optimizer, stages 1 to 3: the float32 master weights.

    zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's part of the optimizer, among others its part of the weights
    mp_rank_00_model_states.pt                    stages 1 and 2: names and shapes, buffers, frozen parameters
    zero_pp_rank_R_mp_rank_00_model_states.pt     stage 3: the same, and rank R's part of the frozen parameters

Stages 1 and 2 lay the parameters of an optimizer group one after the other, fill up the end, and cut the whole into a run
for each of W ranks. Stage 3 cuts each parameter of n elements into W runs of ``ceil(n / W)``, the last filled up; a rank's runs
follow on each other.
Format: https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.pickle_parser import PickledObject
from alnico.checkpoint.pickles import Pickle, PickledTensor, is_size, load_pickle
from alnico.checkpoint.training.model_states import (
    CLASSES,
    MODEL_FILE,
    ModelStates,
    StoredPartitions,
    frozen_tables,
    open_states,
    other_tables,
    refuse_divided,
)
from alnico.checkpoint.training.optimizer_steps import stated_steps
from alnico.checkpoint.training.piece_table import PieceTable, flat_table
from alnico.checkpoint.training.recognise import PARTITION
from alnico.checkpoint.training.sharded_model import ShardedModel, closed_on_failure
from alnico.checkpoint.training.trainer_names import choose_model, list_groups
from alnico.errors import ModelError

GROUPS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Keys of a rank's master weights: of stages 1 and 2, and of stage 3."""


@dataclass(frozen=True)
class RankOptimizer:
    """What one rank's optimizer holds: master weights of each group, and where DeepSpeed says that parameters are in them."""

    path: Path
    pickle: Pickle
    groups: tuple[PickledTensor, ...]
    is_stage_3: bool
    partitions: int
    slices: Sequence[Any]
    steps: Mapping[str, str]
    """What the file states of its step, by the keys that lead to it."""


FlatRun = tuple[str, int, int]
"""Elements of a stored tensor: its name, the first, and how many."""

MAX_RANKS = 1_000_000


def open_partitions(label: str, folder: Path, part: str = "") -> ShardedModel:
    """Open the partitions of all ranks as one model; reads the pickles, not the tensors.

    Trained parameters are read in float32, frozen ones and buffers as they are stored. Errors: ModelError for a missing rank,
    ranks of different runs or steps, partitions that do not hold the parameters, models that are divided among devices, too,
    and a pickle with more than data.
    """
    ranks = _open_ranks(label, folder)
    states = _open_states(label, folder, ranks)
    stored = StoredPartitions()
    tables = _trained(label, ranks, states[0], stored)
    trained = len(tables)
    tables |= frozen_tables(label, states if ranks[0].is_stage_3 else states[:1], stored)
    copied = other_tables(states[0], tables, stored, is_stage_3=ranks[0].is_stage_3)
    tables |= copied
    tables |= {alias: tables[name] for alias, name in states[0].shared.items() if name in tables}
    chosen = choose_model(list(tables), {}, part, label)
    pickles = {rank.path: rank.pickle for rank in ranks} | {state.path: state.pickle for state in states}
    files = FileModel(label, folder, stored.shards(pickles))
    kept = [name for name, table in copied.items() if name not in states[0].shared and table.pieces]
    left = ["the optimizer's states", *([list_groups(states[0].others)] if states[0].others else [])]
    notes = [
        *chosen.notes(label),
        f"{label}: {trained} tensors are the master weights that {len(ranks)} ranks of ZeRO "
        f"{'3' if ranks[0].is_stage_3 else '1 or 2'} keep, in float32; the output is float32, too, unless the recipe says otherwise.",
        *([f"{label}: read as the file of the model has them: {list_groups(kept)}."] if kept else []),
        f"{label}: left out, as they are not tensors of the model: {', '.join(left)}.",
    ]
    with closed_on_failure(files):
        own = {name: tables[saved] for name, saved in chosen.names.items()}
        return ShardedModel(label, folder, files, own, notes)


def _trained(
    label: str, ranks: Sequence[RankOptimizer], states: ModelStates, stored: StoredPartitions
) -> dict[str, PieceTable]:
    """The trained parameters. Errors: ModelError."""
    runs = _trained_runs(label, ranks, states, stored)
    dtype = ranks[0].groups[0].dtype if ranks[0].groups else "F32"
    shapes = {name: shape for group in states.shapes for name, shape in group.items()}
    return {name: flat_table(dtype, shapes[name], own) for name, own in runs.items()}


def _open_ranks(label: str, folder: Path) -> list[RankOptimizer]:
    """Read the optimizers of all ranks. Errors: ModelError."""
    names = sorted(os.listdir(folder))
    refuse_divided(label, names)
    found = [match for name in names if (match := PARTITION.fullmatch(name)) is not None]
    by_rank = {int(match["rank"]): folder / match[0] for match in found}
    ranks = [_open_rank(by_rank[rank], folder) for rank in sorted(by_rank)]
    count = max(rank.partitions for rank in ranks)
    missing = [rank for rank in range(min(count, MAX_RANKS)) if rank not in by_rank]
    if missing or len(by_rank) != count or len(by_rank) != len(found):
        what = f"no file of rank {missing[0]}" if missing else f"{len(found)} files of optimizers"
        raise ModelError(
            f"{label}: has {what}; expected one *_optim_states.pt for each of {count} ranks. Copy the checkpoint again, with the files "
            "of all ranks and of one run."
        )
    first = ranks[0]
    for rank in ranks:
        kinds = [(r.is_stage_3, len(r.groups), *(g.dtype for g in r.groups)) for r in (first, rank)]
        if kinds[0] != kinds[1]:
            raise ModelError(
                f"{label}: {rank.path.name} has {len(rank.groups)} groups of master weights of ZeRO {'3' if rank.is_stage_3 else '1 or 2'}, "
                f"{first.path.name} {len(first.groups)} of ZeRO {'3' if first.is_stage_3 else '1 or 2'}; expected the ranks of one run. Copy "
                "the checkpoint again."
            )
        _check_step(label, first, rank)
    return ranks


def _check_step(label: str, first: RankOptimizer, other: RankOptimizer) -> None:
    """Refuse a rank of another step than the first. Errors: ModelError."""
    for key, stated in first.steps.items():
        if other.steps.get(key, stated) != stated:
            raise ModelError(
                f"{label}: {other.path.name} has {key} {other.steps[key]}, {first.path.name} {stated}; expected the ranks of one "
                "step. Copy the checkpoint again."
            )


def _open_rank(path: Path, folder: Path) -> RankOptimizer:
    """Read one rank's optimizer. Errors: ModelError."""
    check_inside(path, folder)
    loaded = load_pickle(path, CLASSES)
    state = loaded.value.get("optimizer_state_dict") if isinstance(loaded.value, dict) else None
    state = state if isinstance(state, dict) else {}
    key = next((k for k in GROUPS if k in state), "")
    groups = state.get(key)
    counts = state.get("partition_count")
    count = max((c for c in counts if is_size(c)), default=0) if isinstance(counts, list) else counts
    listed = groups if isinstance(groups, (list, tuple)) else []
    flat = [g for g in listed if isinstance(g, PickledTensor) and len(g.shape) == 1]
    is_flat = bool(flat) and len(flat) == len(listed) and len({g.dtype for g in flat}) == 1
    if not is_flat or not is_size(count) or not count:
        raise ModelError(
            f"{path}: has no flat master weights with a number of partitions (keys: {', '.join(map(str, list(state)[:6]))[:120] or 'none'}); "
            "expected an optimizer of ZeRO 1, 2 or 3. Convert the checkpoint with the zero_to_fp32.py that is next to it."
        )
    slices = state.get("param_slice_mappings")
    return RankOptimizer(
        path,
        loaded,
        tuple(flat),
        key == GROUPS[1],
        count,
        slices if isinstance(slices, list) else (),
        stated_steps(path, loaded),
    )


def _open_states(label: str, folder: Path, ranks: Sequence[RankOptimizer]) -> list[ModelStates]:
    """Read the model states: one file, or one of each rank in stage 3. Errors: ModelError."""
    if not ranks[0].is_stage_3:
        return open_states(label, folder, [MODEL_FILE])
    names = [r.path.name.removeprefix("bf16_").replace("_optim_states", "_model_states") for r in ranks]
    return open_states(label, folder, names)


def _trained_runs(
    label: str, ranks: Sequence[RankOptimizer], states: ModelStates, stored: StoredPartitions
) -> dict[str, list[FlatRun]]:
    """Where the elements of each trained parameter are. Errors: ModelError."""
    flat = [
        [(stored.add(rank.path, str(i), group), group.shape[0]) for i, group in enumerate(rank.groups)]
        for rank in ranks
    ]
    if ranks[0].is_stage_3:
        merged = {name: shape for group in states.shapes for name, shape in group.items()}
        return _runs_of_stage_3(label, merged, flat)
    runs: dict[str, list[FlatRun]] = {}
    if len(states.shapes) != len(ranks[0].groups):
        raise ModelError(
            f"{label}: has master weights of {len(ranks[0].groups)} groups and the names of {len(states.shapes)}; expected as many. The files "
            "are of different runs; copy the checkpoint again."
        )
    for i, shapes in enumerate(states.shapes):
        own = _runs_of_group(label, shapes, [groups[i] for groups in flat])
        for rank, groups in zip(ranks, flat, strict=True):
            _check_slices(label, rank, i, groups[i][0], own)
        runs |= own
    return runs


def _runs_of_group(
    label: str, shapes: Mapping[str, tuple[int, ...]], partitions: Sequence[tuple[str, int]]
) -> dict[str, list[FlatRun]]:
    """Stages 1 and 2: parameters one after the other, cut into the partitions. Errors: ModelError."""
    line = _Line(partitions)
    needed = sum(map(math.prod, shapes.values()))
    # The end is filled up to a multiple of twice the ranks, and the last partition may be saved without that.
    step = 2 * len(partitions)
    if needed > line.elements or -(-needed // step) != -(-line.elements // step):
        raise ModelError(
            f"{label}: the master weights of {len(partitions)} ranks have {line.elements} elements, the parameters {needed}; expected as many, "
            f"filled up to a multiple of {step}. The files are of different runs; copy the checkpoint again."
        )
    runs, begin = {}, 0
    for name, shape in shapes.items():
        runs[name] = list(line.runs(begin, math.prod(shape)))
        begin += math.prod(shape)
    return runs


def _runs_of_stage_3(
    label: str, shapes: Mapping[str, tuple[int, ...]], flat: Sequence[Sequence[tuple[str, int]]]
) -> dict[str, list[FlatRun]]:
    """Stage 3: each parameter cut into a run of each rank. Errors: ModelError."""
    lines = [_Line(groups) for groups in flat]
    needed = sum(-(-math.prod(shape) // len(lines)) for shape in shapes.values())
    for line in lines:
        if line.elements != needed:
            raise ModelError(
                f"{label}: a rank has {line.elements} elements of master weights; expected {needed}, its part of the parameters for "
                f"{len(lines)} ranks. The files are of different runs; copy the checkpoint again."
            )
    runs: dict[str, list[FlatRun]] = {}
    begin = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        share = -(-count // len(lines))
        left = [max(0, min(share, count - rank * share)) for rank in range(len(lines))]
        runs[name] = [run for line, n in zip(lines, left, strict=True) for run in line.runs(begin, n)]
        begin += share
    return runs


class _Line:
    """Flat tensors that follow on each other."""

    def __init__(self, parts: Sequence[tuple[str, int]]) -> None:
        self._names = [name for name, count in parts if count]
        self._begins = [0, *itertools.accumulate(count for _, count in parts if count)]

    @property
    def elements(self) -> int:
        return self._begins[-1]

    def runs(self, begin: int, count: int) -> Iterator[FlatRun]:
        """The stored elements of ``count`` elements from ``begin`` on."""
        end = begin + count
        i = bisect_right(self._begins, begin) - 1
        while begin < end:
            stop = min(end, self._begins[i + 1])
            yield self._names[i], begin - self._begins[i], stop - begin
            begin, i = stop, i + 1


def _check_slices(
    label: str, rank: RankOptimizer, group: int, stored: str, runs: Mapping[str, Sequence[FlatRun]]
) -> None:
    """Compare with where DeepSpeed says that parameters are in a rank's partition. Errors: ModelError."""
    stated = rank.slices[group] if group < len(rank.slices) else None
    for name, place in stated.items() if isinstance(stated, dict) else ():
        fields = place.fields() if isinstance(place, PickledObject) else {}
        own = [(first, count) for of, first, count in runs.get(name, ()) if of == stored]
        if [(fields.get("start"), fields.get("numel"))] != own:
            raise ModelError(
                f"{label}: {rank.path.name} says that {str(name)[:80]} is {str(fields.get('numel'))[:20]} elements from "
                f"{str(fields.get('start'))[:20]} on; expected {own or 'none'}, by the order of the parameters. The files are of different runs; "
                "copy the checkpoint again."
            )
