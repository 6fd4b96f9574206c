"""Measures facts on a GPU with the bits of the processor's kernels: a launch for each model, or group of models"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alnico.kernels.array_tiles import width_of
from alnico.kernels.constants import LANES, LEAF, UNROLLED_MODELS
from alnico.kernels.cuda.compiled import MOST_TEXTS, compiled
from alnico.kernels.cuda.launching import FlatArguments, Room, Uploads, addresses, are_packed, storage
from alnico.kernels.cuda.measure_source import CHUNK, GROUP, clearing_text, gram_text, measure_text, pairs_of
from alnico.kernels.cuda.memory import THREADS, DeviceBytes, GpuMemory
from alnico.kernels.cuda.source import PACK
from alnico.kernels.measure_kernels import OUTPUTS, ColumnGramKernel, GramKernel, MeasureKernel

MAILBOX_BYTES = 16 << 20
"""Pinned memory that the values of a tensor pass through at a time."""

BINS = 65_536


class _MeasuringCall:
    """One call of a kernel that measures: what each of its launches takes."""

    def __init__(
        self, kernel: MeasureKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray,
        base: Any, base_code: int, start: int, chosen: np.ndarray, *flat: Any,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.start = kernel, memory, start
        self.raws, self.codes, self.base_code = raws, codes.tolist(), int(base_code)
        self.count = raws[0].size // width_of(self.codes[0])
        self.chosen: list[int] = chosen.tolist()
        self.is_many = kernel.across and kernel.models > UNROLLED_MODELS
        self.base = base
        self.of_base = memory.address(base, storage(base_code)) if kernel.of_deltas else 0
        arguments = FlatArguments(kernel.kinds, np.dtype(kernel.real), flat)
        self.numbers = [arguments.numbers([model]) for model in self.chosen]
        self.room = Room()
        self.extra = [arguments.arrays(self.room, [model], start, self.count) for model in self.chosen]
        self.codes_table = Uploads()
        self.table = slice(0, 0)
        if self.is_many:
            self.codes_table.add(np.array(self.codes, np.int64), self.room)
            self.table = self.room.take(8 * len(raws))

    def upload(self) -> DeviceBytes:
        """Upload all arrays. Returns the working memory, which has what was taken of ``room``."""
        scratch = self.memory.scratch(self.room.size)
        inputs = addresses(self.memory, self.raws, self.codes)
        self.given: list[list[Any]] = []
        every: list[Any] = inputs if self.kernel.across else []
        if self.is_many:
            every = [
                self.memory.table(inputs, scratch[self.table]),
                *self.codes_table.put(self.memory, scratch),
            ]
        for n, model in enumerate(self.chosen):
            given = [self.count, self.start, *self.numbers[n], inputs[model], self.of_base, *every]
            self.given.append([*given, *self.extra[n].put(self.memory, scratch)])
        return scratch

    def launch(self, n: int, outputs: Sequence[Any], **shape: int) -> None:
        model = self.chosen[n]
        codes = tuple(self.codes) if self.kernel.across and not self.is_many else ()
        tensors = [(self.raws[model], self.codes[model]), *zip(self.raws, codes, strict=False)]
        if self.kernel.of_deltas:
            tensors.append((self.base, self.base_code))
        function = _measuring_kernel(
            self.kernel, self.codes[model], codes, self.base_code, are_packed(*zip(*tensors, strict=True))
        )
        self.memory.launch(function, [*self.given[n], *outputs], **shape)


@functools.lru_cache(maxsize=MOST_TEXTS)
def _measuring_kernel(
    kernel: MeasureKernel, code: int, codes: tuple[int, ...], base_code: int, packed: bool
) -> Any:
    return compiled(measure_text(kernel, code, codes, base_code, packed=packed))


@functools.lru_cache(maxsize=MOST_TEXTS)
def _gram_kernel(
    kernel: GramKernel | ColumnGramKernel,
    codes: tuple[int, ...],
    base_code: int,
    pairs: tuple[tuple[int, int], ...],
) -> Any:
    return compiled(gram_text(kernel, codes, base_code, pairs))


def measure(
    kernel: MeasureKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray, base: Any, base_code: int,
    start: int, chosen: np.ndarray, *rest: Any,
) -> int:  # fmt: skip
    """Reduce the values of the chosen models into the outputs, arrays of the processor. Returns 0."""
    outputs = len(OUTPUTS[kernel.reduction])
    call = _MeasuringCall(kernel, memory, raws, codes, base, base_code, start, chosen, *rest[outputs:])
    if call.count and call.chosen:
        _REDUCTIONS[kernel.reduction](call, *rest[:outputs])
    elif kernel.reduction in ("sum", "count"):
        rest[0][:] = 0
    return 0


def _values(call: _MeasuringCall, gathered: np.ndarray) -> None:
    memory, models = call.memory, len(call.chosen)
    call.upload()
    size = max(MAILBOX_BYTES // (gathered.itemsize * models * PACK), 1) * PACK
    for first in range(0, call.count, size):
        stop = min(first + size, call.count)
        mailbox = memory.mailbox(gathered.itemsize * models * (stop - first)).view(gathered.dtype)
        found = mailbox.reshape(models, stop - first)
        for n in range(models):
            outputs = [first, stop, memory.address(found[n], gathered.dtype)]
            call.launch(n, outputs, work=stop - first)
        memory.finish()
        gathered[:, first:stop] = found


def _of_leaves(call: _MeasuringCall, leaves: np.ndarray) -> None:
    memory, models = call.memory, len(call.chosen)
    call.upload()
    used = -(-call.count // LEAF)
    found = memory.mailbox(8 * models * used).view(leaves.dtype).reshape(models, used)
    for n in range(models):
        call.launch(n, [memory.address(found[n], leaves.dtype)], blocks=used)
    memory.finish()
    leaves[:] = 0
    leaves[:, :used] = found


def _of_rows(call: _MeasuringCall, row: int, parts: np.ndarray) -> None:
    memory, models = call.memory, len(call.chosen)
    rows = _RowParts(call.start, call.count, row)
    place = call.room.take(rows.starts.nbytes)
    scratch = call.upload()
    memory.upload(rows.starts, scratch[place])
    of_rows = [memory.address(scratch[place], np.int64), rows.size, rows.width]
    found = memory.mailbox(8 * models * rows.size).view(np.float64).reshape(models, rows.size)
    for n in range(models):
        outputs = [*of_rows, memory.address(found[n], np.float64)]
        call.launch(n, outputs, blocks=rows.blocks)
    memory.finish()
    parts[:, rows.numbers] = found


def _histogram(call: _MeasuringCall, shift: int, prefix: np.ndarray, bins: np.ndarray) -> None:
    memory, models = call.memory, len(call.chosen)
    place = call.room.take(4 * BINS * models)
    counted = call.upload()[place]
    found = memory.mailbox(counted.size)
    _clear(memory, counted)
    for n in range(models):
        own = counted[4 * BINS * n : 4 * BINS * (n + 1)]
        outputs = [np.uint64(shift), np.uint64(prefix[n]), memory.address(own, np.uint32)]
        call.launch(n, outputs, work=call.count)
    memory.download(counted, found)
    memory.finish()
    bins += found.view(np.uint32).reshape(models, BINS)


def _bracket(
    call: _MeasuringCall, low: np.ndarray, high: np.ndarray, counts: np.ndarray, gathered: np.ndarray
) -> None:
    memory, models, room = call.memory, len(call.chosen), gathered.shape[1]
    places = call.room.take(32 * models)
    kept = [call.room.take(gathered.itemsize * room) for _ in range(models)]
    scratch = call.upload()
    _clear(memory, scratch[places])
    for n in range(models):
        own = scratch[places][32 * n : 32 * (n + 1)]
        outputs = [low[n], high[n], room, memory.address(own, np.uint64)]
        call.launch(
            n,
            [*outputs, memory.address(scratch[kept[n]], gathered.dtype)],
            work=-(-call.count // CHUNK) * THREADS,
        )
    found = memory.mailbox(32 * models)
    memory.download(scratch[places], found)
    memory.finish()
    above_inside_kept = found.view(np.int64).reshape(models, 4)
    counts += above_inside_kept[:, :2]
    for n, size in enumerate(np.minimum(above_inside_kept[:, 2], room).tolist()):
        memory.download(scratch[kept[n]][: gathered.itemsize * size], gathered[n, :size])
    memory.finish()


_REDUCTIONS: dict[str, Callable[..., None]] = {
    "values": _values,
    "sum": _of_leaves,
    "count": _of_leaves,
    "sum of rows": _of_rows,
    "largest of rows": _of_rows,
    "histogram": _histogram,
    "bracket": _bracket,
}


def _clear(memory: GpuMemory, part: DeviceBytes) -> None:
    if part.array is not None:  # the simulator would take a second
        part.array[:] = 0
        return
    given = [part.size // 8, memory.address(part, np.uint64)]
    memory.launch(compiled(clearing_text()), given, work=part.size // 8)


class _RowParts:
    """The parts of leaves within one row of ``row`` elements, of a block: where they start, and their numbers.

    A block of a GPU has ``LANES // width`` of them, each in as many lanes as its elements need.
    """

    def __init__(self, start: int, count: int, row: int) -> None:
        rows = np.arange(-(-start // row) * row, start + count, row, dtype=np.int64)
        leaves = np.arange(-(-start // LEAF) * LEAF, start + count, LEAF, dtype=np.int64)
        places = np.unique(np.concatenate([[start], rows, leaves]))
        self.numbers = places // row + places // LEAF - (start // row + start // LEAF)
        self.starts = np.append(places, start + count) - start
        self.size = places.size
        longest = int(np.diff(self.starts).max())
        self.width = min(LANES, 1 << (longest - 1).bit_length())
        self.blocks = -(-self.size // (LANES // self.width))


def gram(
    kernel: GramKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray, base: Any, base_code: int,
    start: int, row: int, sums: np.ndarray,
) -> int:  # fmt: skip
    """Fill ``sums`` with the products of the parts of rows. Returns 0."""
    count = raws[0].size // width_of(codes[0])
    if not count:
        return 0
    rows = _RowParts(start, count, row)
    scratch = memory.scratch(rows.starts.nbytes)
    memory.upload(rows.starts, scratch)
    of_rows = [memory.address(scratch, np.int64), rows.size, rows.width]
    for models, pairs, places in _groups(kernel.models):
        found = memory.mailbox(8 * rows.size * len(pairs)).view(np.float64)
        given = _inputs(kernel, memory, raws, codes, base, base_code, models)
        function = _gram_kernel(kernel, tuple(codes[models].tolist()), int(base_code), tuple(pairs))
        outputs = [*of_rows, memory.address(found, np.float64)]
        memory.launch(function, [count, start, *given, *outputs], blocks=rows.blocks)
        memory.finish()
        sums[rows.numbers[:, None], places] = found.reshape(rows.size, len(pairs))
    return 0


def column_gram(
    kernel: ColumnGramKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray, base: Any, base_code: int,
    start: int, sums: np.ndarray,
) -> int:  # fmt: skip
    """Add the products of the columns to ``sums``. Returns 0."""
    count, columns = raws[0].size // width_of(codes[0]), sums.shape[1]
    for models, pairs, places in _groups(kernel.models) if count else []:
        found = memory.mailbox(8 * columns * len(pairs)).view(np.float64)
        found[:] = sums[places].reshape(-1)
        given = _inputs(kernel, memory, raws, codes, base, base_code, models)
        function = _gram_kernel(kernel, tuple(codes[models].tolist()), int(base_code), tuple(pairs))
        outputs = [columns, memory.address(found, np.float64)]
        memory.launch(function, [count, start, *given, *outputs], work=columns)
        memory.finish()
        sums[places] = found.reshape(len(pairs), columns)
    return 0


def _inputs(
    kernel: GramKernel | ColumnGramKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray,
    base: Any, base_code: int, models: Sequence[int],
) -> list[Any]:  # fmt: skip
    of_base = memory.address(base, storage(base_code)) if kernel.of_deltas else 0
    return [of_base, *addresses(memory, [raws[i] for i in models], codes[list(models)].tolist())]


def _groups(models: int) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """For each launch: its models, the pairs of them by their place among these, and the places of the pairs in all."""
    of_pair = {pair: n for n, pair in enumerate((i, j) for i in range(models) for j in range(i, models))}
    firsts = range(0, models, GROUP)
    launches = []
    for a in firsts:
        for b in firsts[a // GROUP :]:
            first, second = (list(range(g, min(g + GROUP, models))) for g in (a, b))
            used = first if a == b else first + second
            pairs = pairs_of(first, second)
            launches.append(
                (used, [(used.index(i), used.index(j)) for i, j in pairs], [of_pair[pair] for pair in pairs])
            )
    return launches
