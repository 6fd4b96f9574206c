"""Reads a step of a training run as a model: an anchor, and the sparse deltas that follow on it (``RUN@STEP``).

    RUN/anchors/step_N.safetensors    a whole model
    RUN/deltas/step_N.safetensors     NAME.indices and NAME.values of what changed since the step before: new values
    RUN/config.json                   and other side files

TRL writes such files for weight sync. A whole tensor in a delta replaces that of the step before.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.reference import ANCHORS
from alnico.checkpoint.source import Origin, Shard, Tensor, read_tensor
from alnico.checkpoint.task_vectors.decoders import CHUNK, INDICES, WIDE_INDICES, storage
from alnico.checkpoint.task_vectors.index_places import READ_BYTES, IndexPlaces, find_places
from alnico.checkpoint.virtual_read import read_computed
from alnico.errors import ModelError

DELTAS = "deltas"
STEP_FILE = re.compile(r"step_(\d{1,15})\.safetensors")
VERSION = "model_version"
"""Key of the metadata of anchors and deltas: it grows by one from step to step."""

PLACES, VALUES = ".indices", ".values"
MAX_DELTAS = 10_000


class DeltaChain:
    """The model of one step. Made by :func:`open_chain`.

    The files are checked by their headers when they are opened, and the indices of a delta when a tensor is first read.
    """

    origin: Origin | None = None
    held_bytes = 0

    def __init__(self, label: str, anchor: FileModel, deltas: FileModel, steps: Sequence[int]) -> None:
        self.label = label
        self.tensors: Mapping[str, Tensor] = anchor.tensors
        self.config: Mapping[str, Any] = anchor.config
        self.directory: Path | None = anchor.directory
        self.notes = [*anchor.notes, *deltas.notes]
        self._anchor = anchor
        self._deltas = deltas
        self._changes = {name: self._changes_of(name, steps) for name in anchor.tensors}
        self._check_names(steps)
        self._places: dict[str, IndexPlaces] = {}
        self._busy = {name: threading.Lock() for name, changes in self._changes.items() if changes}
        self._scratch = threading.local()

    def _changes_of(self, name: str, steps: Sequence[int]) -> list[str]:
        """Return the names in the deltas of what changes a tensor: those of indices, or of whole tensors. The first may be a
        whole tensor. Errors: ModelError for what does not fit the tensor."""
        found: list[str] = []
        tensor = self.tensors[name]
        for step in steps:
            stem = f"{step}/{name}"
            whole, places, values = (self._deltas.tensors.get(stem + end) for end in ("", PLACES, VALUES))
            if whole is not None:
                if (whole.dtype, whole.shape) != (tensor.dtype, tensor.shape) or places or values:
                    raise self._wrong(step, name, f"is {whole.dtype} {list(whole.shape)}", tensor)
                found = [stem]
            elif places is not None and values is not None:
                allowed = INDICES if tensor.elements < WIDE_INDICES else INDICES[1:]
                fits = (
                    places.dtype in allowed
                    and values.dtype == tensor.dtype
                    and places.shape == values.shape == (places.elements,)
                    and places.elements <= tensor.elements
                )
                if not fits:
                    what = f"has indices {places.dtype} {list(places.shape)} and values {values.dtype} {list(values.shape)}"
                    raise self._wrong(step, name, what, tensor)
                found.append(stem + PLACES)
            elif places is not None or values is not None:
                raise self._wrong(step, name, f"has {'indices' if places else 'values'} alone", tensor)
        return found

    def _wrong(self, step: int, name: str, found: str, tensor: Tensor) -> ModelError:
        return ModelError(
            f"{self.label}: {DELTAS}/step_{step}.safetensors: {name} {found}; expected as many indices ({' or '.join(INDICES)}) as "
            f"values of {tensor.dtype}, or the whole tensor, {tensor.dtype} {list(tensor.shape)}. The step belongs to another "
            "run, or is damaged."
        )

    def _check_names(self, steps: Sequence[int]) -> None:
        """Refuse tensors of a delta that the anchor does not have: without them the step is another model. Errors: ModelError."""
        known = {
            f"{step}/{name}{end}" for name in self.tensors for end in ("", PLACES, VALUES) for step in steps
        }
        if (unknown := next((n for n in self._deltas.tensors if n not in known), None)) is not None:
            step, _, name = unknown.partition("/")
            raise ModelError(
                f"{self.label}: {DELTAS}/step_{step}.safetensors: changes {name!r}, which the anchor does not have; expected the "
                "tensors of the anchor. The step belongs to another run, or the anchor is incomplete."
            )

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        changes = self._changes[name]
        if not changes:
            self._anchor.read_into(name, offset, buffer)
            return
        self._check(name)
        dtype = storage(self.tensors[name].dtype)
        read_computed(offset, buffer, dtype, lambda first, out: self._by_chunks(name, first, out))

    def _check(self, name: str) -> None:
        """Check the indices of all changes of a tensor, where that was not done yet. Errors: ModelError."""
        missing = [c for c in self._changes[name] if c.partition("/")[2] != name and c not in self._places]
        if missing:
            with self._busy[name]:
                for change in missing:
                    if change not in self._places:
                        step = change.partition("/")[0]
                        where = f"{self.label}: {DELTAS}/step_{step}.safetensors"
                        buffer = self._buffer("hash", READ_BYTES)
                        elements = self.tensors[name].elements
                        self._places[change], _ = find_places(self._deltas, change, elements, buffer, where)

    def _by_chunks(self, name: str, first: int, out: np.ndarray) -> None:
        at = 0
        while at < out.size:
            count = min(CHUNK - (first + at) % CHUNK, out.size - at)
            self._compute(name, first + at, out[at : at + count])
            at += count

    def _compute(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out``, the tensor's elements from ``first`` on, with the anchor's, and put the values of each delta in."""
        changes = self._changes[name]
        is_replaced = changes[0].partition("/")[2] == name
        source, stored = (self._deltas, changes[0]) if is_replaced else (self._anchor, name)
        source.read_into(stored, first * out.itemsize, memoryview(out.view(np.uint8)))
        for change in changes[is_replaced:]:
            begin, end = self._places[change].within(
                first, first + out.size, partial(self._read, "indices", change)
            )
            if begin < end:
                places = self._read("indices", change, begin, end - begin)
                values = self._read("values", change.removesuffix(PLACES) + VALUES, begin, end - begin)
                out[places - first] = values

    def _read(self, slot: str, stored: str, first: int, count: int) -> np.ndarray:
        """Read elements of a stored tensor into this thread's buffer of a name."""
        dtype = storage(self._deltas.tensors[stored].dtype)
        raw = self._buffer(slot, count * dtype.itemsize)
        self._deltas.read_into(stored, first * dtype.itemsize, raw)
        return np.frombuffer(raw, dtype)

    def _buffer(self, name: str, size: int) -> memoryview:
        buffers: dict[str, memoryview] = self._scratch.__dict__
        if name not in buffers or len(buffers[name]) < size:
            buffers[name] = memoryview(bytearray(size))
        return buffers[name][:size]

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    @property
    def reading_bytes(self) -> int:
        return READ_BYTES + 3 * 8 * CHUNK

    @property
    def shards(self) -> Sequence[Shard]:
        return [*self._anchor.shards, *self._deltas.shards]

    def identity(self) -> list[dict[str, Any]]:
        return [*self._anchor.identity(), *self._deltas.identity()]

    def paths(self) -> list[Path]:
        return [*self._anchor.paths(), *self._deltas.paths()]

    def close(self) -> None:
        self._anchor.close()
        self._deltas.close()

    def __enter__(self) -> DeltaChain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors, an anchor and {len(self._deltas.shards)} deltas>"


def open_chain(label: str, run: str, step: int) -> DeltaChain:
    """Open one step of a training run; reads headers only.

    The newest anchor up to the step counts, and every delta after it. Errors: ModelError for a step that is neither, a chain
    with a gap, and deltas that do not fit the anchor.
    """
    folder = Path(os.path.expanduser(run))
    anchors, deltas = _steps(folder / ANCHORS), _steps(folder / DELTAS)
    start = max((s for s in anchors if s <= step), default=None)
    if start is None or (step != start and step not in deltas):
        known = sorted({*anchors, *deltas})
        near = ", ".join(map(str, sorted(sorted(known, key=lambda s: abs(s - step))[:5])))
        found = "has no anchor up to it" if start is None and step in deltas else "is not there"
        raise ModelError(
            f"{label}: step {step} {found}; expected an anchor, or a delta with an anchor before it"
            f"{f'; the nearest steps are {near}' if near else ''}. Choose another step, or complete {run}."
        )
    links = [s for s in deltas if start < s <= step]
    if len(links) > MAX_DELTAS:
        raise ModelError(
            f"{label}: has {len(links)} deltas after the anchor {start}; expected at most {MAX_DELTAS}. Keep anchors in between."
        )
    anchor = FileModel(label, folder, [_open(folder, ANCHORS, start)])
    chain = FileModel(label, folder, [_open(folder, DELTAS, s, f"{s}/") for s in links])
    try:
        _check_gaps(label, run, [start, *links], [anchor.shards[0], *chain.shards])
        return DeltaChain(label, anchor, chain, links)
    except BaseException:
        anchor.close()
        chain.close()
        raise


def _steps(folder: Path) -> list[int]:
    """Return the steps of the files of a folder, sorted. Errors: ModelError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror}). Check its permissions.") from None
    return sorted(int(match[1]) for name in names if (match := STEP_FILE.fullmatch(name)) is not None)


def _open(folder: Path, kind: str, step: int, prefix: str = "") -> Shard:
    path = folder / kind / f"step_{step}.safetensors"
    check_inside(path, folder)
    return open_shard(path, prefix)


def _check_gaps(label: str, run: str, steps: Sequence[int], shards: Sequence[Shard]) -> None:
    """Refuse a chain that lacks a link: versions grow by one, and where there are none, steps are evenly spaced.

    Errors: ModelError.
    """
    versions = [shard.header.metadata.get(VERSION, "") for shard in shards]
    numbered = all(re.fullmatch(r"\d{1,15}", version) for version in versions)
    places = [int(version) for version in versions] if numbered else list(steps)
    distances = [b - a for a, b in itertools.pairwise(places)]
    usual = 1 if numbered else min(distances, default=1)
    for i, distance in enumerate(distances):
        if distance != usual:
            what = (
                f"versions {places[i]} and {places[i + 1]}"
                if numbered
                else f"steps with a distance of {distance}"
            )
            raise ModelError(
                f"{label}: a delta is missing between the steps {steps[i]} and {steps[i + 1]}: they are {what}; expected a distance "
                f"of {usual}. Complete {run}, or choose a step from {steps[i]} down or after the next anchor."
            )
