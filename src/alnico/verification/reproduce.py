"""Repeats a finished merge from its lock, and compares every byte."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.files import open_binary
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import check_twins
from alnico.checkpoint.shards import split_into_shards
from alnico.checkpoint.sidecars import SIGNATURE, module_stems
from alnico.checkpoint.source import Source
from alnico.checkpoint.weight_files import stem_of
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.stages import run_stages
from alnico.errors import OutputError, UncheckedError, VerificationError
from alnico.events import Watcher
from alnico.folders import owner_fault_at, remove
from alnico.kernels.clock import counts_compiling
from alnico.notebook import never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of, format_size
from alnico.output.lock import Lock, listed_files, read_lock
from alnico.output.recipe_file import RECIPE
from alnico.plan.job import Plan
from alnico.recipe.schema import Recipe
from alnico.recipe.stages import order_stages
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_DOWNLOAD_CACHE_BYTES, RunOptions, Size
from alnico.verification.devices import on_device_of
from alnico.verification.replan import (
    ReplanOptions,
    check_places,
    input_places,
    recipe_in,
    replan,
    stage_locks,
)
from alnico.verification.verify import check_headers, no_recipe_message, open_lock, open_output

COMPARE_BYTES = 1 << 20
TEXTS = (CARD, RECIPE, LOCK, SIGNATURE)
"""Files that are not compared byte by byte: they hold paths and versions, are completed by people, or sign
the others."""


@dataclass(frozen=True)
class Reproduction:
    """A merge that was repeated with the same bytes: ``files`` of ``byte_size`` bytes with ``tensors`` in
    them. ``again`` is the path of the second output, None if it was removed. ``versions`` are those of alnico
    that made the first and the second, ``devices`` those that computed them."""

    path: str
    again: str | None
    tensors: int
    files: int
    byte_size: int
    versions: tuple[str, str]
    seconds: float
    compile_seconds: float = field(default=0.0, compare=False)
    devices: tuple[str, str] = ("cpu", "cpu")

    def __repr__(self) -> str:
        return result_line(
            f"{self.path} reproduced with the same bytes",
            count_of(self.tensors, "tensor"),
            count_of(self.files, "file"),
            format_size(self.byte_size),
        )

    @never_fails
    def _repr_html_(self) -> str:
        first, second = self.versions
        return result_html(
            "Reproduced with the same bytes",
            facts=[
                ("merge", self.path),
                ("again", self.again or "removed"),
                ("tensors", self.tensors),
                ("files", self.files),
                ("size", format_size(self.byte_size)),
                ("versions", first if first == second else f"{first} and {second}"),
            ],
        )

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        return asdict(self)


@counts_compiling
@ieee_arithmetic()
def reproduce(
    out: str | os.PathLike[str],
    new: str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    restart: bool = False,
    offline: bool = False,
    stream: bool = False,
    download_cache: str | os.PathLike[str] | None = None,
    download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    device: Any = DEFAULT_DEVICE,
    watch: Watcher | None = None,
) -> Reproduction:
    """Repeat a finished merge from the recipe in its lock, and compare every byte.

    It is repeated on a device of the kind that merged it, if there is one. On another kind, a difference says nothing: it is an
    UncheckedError.

    Options:
        out: The directory of a finished merge.
        new: Directory that keeps the second merge; default: it is removed after the comparison.
        device: Where to merge again: auto, cpu, cuda, cuda:1 or cuda:all. auto is the kind of device that merged it, or cpu if
            no GPU can be used here.
    Errors: VerificationError for a difference; UncheckedError for inputs that are missing or are not those of
        the merge, and for a lock of another arithmetic; those of :func:`alnico.merge`.
    """
    run = RunOptions.of(
        memory=memory,
        threads=threads,
        offline=offline,
        stream=stream,
        download_cache=download_cache,
        download_cache_size=download_cache_size,
        watch=watch,
        device=device,
    )
    out, new = Path(merge_path(out, "reproduce")), None if new is None else Path(new)
    begin = time.perf_counter()
    lock = open_lock(out)
    if not lock.recipe:
        raise UncheckedError(no_recipe_message(out))
    run, is_same_kind = on_device_of(lock, run)
    options = ReplanOptions.of(inputs, run)
    check_places(lock, options)
    place = out if out.name not in ("", "..") else out.resolve()
    target = new or place.parent / f".{place.name}.alnico-again"
    if new is not None and new.resolve().is_relative_to(out.resolve()):
        raise OutputError(
            f"{new}: is inside {out}, with which it is compared; expected a separate place. Choose another output."
        )
    if new is None:
        check_twins(place, input_places(lock, options), (".alnico-again",))
        _remove_earlier(target)
    with open_output(out) as model:
        check_headers(out, lock, model)
        _merge(lock, options, target, model, restart)
    second = read_lock(target)
    _check_inputs(out, lock, second)
    try:
        files, size = _compare(out, target, lock, second)
    except VerificationError as error:
        if is_same_kind:
            raise
        raise UncheckedError(
            f"{out}: could not be reproduced: it was merged on {lock.device_text}, and again on {second.device_text}, whose last bits may "
            f"differ. {error} Repeat it on a machine with such a device, or run `alnico verify {out} --against-inputs`, which allows "
            "one unit in the last place."
        ) from None
    if new is None:
        shutil.rmtree(target, ignore_errors=True)
    seconds = time.perf_counter() - begin
    return Reproduction(
        str(out),
        str(new) if new else None,
        len(lock.tensors),
        files,
        size,
        (lock.version, __version__),
        seconds,
        devices=(lock.device_text, second.device_text),
    )


def _remove_earlier(target: Path) -> None:
    """Remove a second merge that a killed comparison left. Errors: OutputError if it is another user's, or
    cannot be removed."""
    try:
        fault = owner_fault_at(target)
        if fault is None:
            remove(target)
            return
    except FileNotFoundError:
        return
    except OSError as error:
        fault = f"cannot be removed ({error.strerror})"
    raise OutputError(
        f"{target}: is the place of the second merge, and {fault}; expected nothing there, or the leftover of your own comparison. Remove it, "
        "or give another place for the second merge."
    )


def _merge(lock: Lock, options: ReplanOptions, target: Path, like: FileModel, restart: bool) -> None:
    """Run the merge of a lock, with its stages."""
    locks = [(recipe_in(stage, options), stage) for stage in stage_locks(lock).values()]
    lock_of = {id(recipe): stage for recipe, stage in locks}

    def planner(recipe: Recipe, outputs: Mapping[str, Any], _: str | None) -> Plan:
        stage = lock_of[id(recipe)]
        stages_by_name = {
            model.label: open_stage(model.label, outputs[model.label])
            for model in stage.models
            if model.stage_lock is not None
        }
        plan = replan(stage, options, stages_by_name)
        return _cut_like(like, plan) if stage is lock else plan

    run_stages(
        order_stages([recipe for recipe, _ in locks]),
        planner,
        target,
        restart=restart,
        watch=options.run.watch,
    )


def open_stage(label: str, output: Any) -> Source:
    """Open the output of a stage: a path on the disk, or a planned model."""
    if not isinstance(output, str):
        return output  # type: ignore[no-any-return]
    model = open_model(output)
    assert isinstance(model, FileModel)
    model.label = label
    return model


def _cut_like(model: FileModel, plan: Plan) -> Plan:
    """Cut the plan into as many files as a model has, by the largest size that adds no tensor to any of them."""
    file_of = {t.name: i for i, shard in enumerate(model.shards) for t in shard.header.tensors}
    groups = [list(group) for _, group in groupby(plan.jobs, lambda job: file_of[job.name])]
    sizes = [sum(job.byte_size for job in group) for group in groups]
    folders = [model.shards[file_of[group[0].name]].prefix for group in groups]
    following = zip(sizes, groups[1:], folders, folders[1:], strict=False)
    limit = min(
        (
            size + after[0].byte_size - 1
            for size, after, folder, next_folder in following
            if folder == next_folder
        ),
        default=sum(sizes),
    )
    donor = plan.sources[plan.donor]
    tensors = [(j.name, j.dtype, j.shape) for j in plan.jobs]
    return dataclasses.replace(
        plan, shards=split_into_shards(tensors, max(limit, 1), None, stem_of(donor), module_stems(donor))
    )


def _check_inputs(out: Path, lock: Lock, second: Lock) -> None:
    """Compare the inputs of both merges by their hashes. Errors: UncheckedError naming the first tensor that
    differs."""
    for first, now in zip(lock.inputs, second.inputs, strict=True):
        if first.stage_lock is not None and now.stage_lock is not None:
            _check_inputs(out, first.stage_lock, now.stage_lock)
            continue
        name = next(
            (n for n in {**first.tensors, **now.tensors} if first.tensors.get(n) != now.tensors.get(n)), None
        )
        if name is not None:
            raise UncheckedError(
                f"{out}: could not be reproduced: {name} of {first.label} is not the one that was merged, by its hash in the lock; expected the same "
                f"model. Say where that is with --input {first.label}=PATH."
            )


def _compare(out: Path, target: Path, lock: Lock, second: Lock) -> tuple[int, int]:
    """Compare all files; returns their number and bytes. Errors: VerificationError."""
    versions = (
        ""
        if lock.version == second.version
        else f" (merged by alnico {lock.version}, again by {second.version})"
    )
    name = next((n for n, t in lock.tensors.items() if second.tensors[n] != t), None)
    if name is not None:
        raise VerificationError(
            f"{out}: {name} has the hash {lock.tensors[name].digest} in the lock and {second.tensors[name].digest} when it is merged again{versions}; "
            f"they must be the same. The second merge is at {target}: `alnico diff {out} {target}` says more."
        )
    names = [[n for n in listed_files(folder) if n not in TEXTS] for folder in (out, target)]
    listed = [n for n in names[1] if n not in names[0]] + [
        n for n in names[0] if n not in names[1] and n in (lock.files or {})
    ]
    if listed:
        place = f"only in {target}" if listed[0] in names[1] else f"not in {target}"
        raise VerificationError(
            f"{out}: {listed[0]} is {place}, where it was merged again{versions}; expected the same files. Merge again."
        )
    size = 0
    for name in names[1]:
        byte, compared = _first_difference(out / name, target / name)
        if byte is not None:
            raise VerificationError(
                f"{out / name}: differs from byte {byte} on from what is merged again{versions}, at {target / name}; expected the same "
                f"bytes. {_reason(name)}"
            )
        size += compared
    return len(names[1]), size


def _reason(name: str) -> str:
    if name.endswith(".safetensors"):
        return "The output was changed since it was merged: its lock has the hashes of the second. Get a new copy of the output."
    return "The output's was changed since, or that of the model which it was carried from. Compare the two."


def _first_difference(first: Path, second: Path) -> tuple[int | None, int]:
    """Return the first byte in which two files differ, if they do, and how many were compared."""
    done = 0
    with open_binary(first) as a, open_binary(second) as b:
        while True:
            left, right = a.read(COMPARE_BYTES), b.read(COMPARE_BYTES)
            if left != right:
                length = min(len(left), len(right))
                same = np.frombuffer(left[:length], np.uint8) == np.frombuffer(right[:length], np.uint8)
                return done + (length if same.all() else int(np.argmin(same))), done
            if not left:
                return None, done
            done += len(left)
