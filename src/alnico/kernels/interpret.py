"""Runs kernels with numpy instead of compiling them: the same arguments, the same bits, for small work.

Each kernel's steps are those of its compiled text: the same tiles decoded, lanes, leaves and order of sums. Only
loops over independent elements become operations on arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from alnico.kernels.array_source import NoArrayForm, Type, on_arrays, select, types_of
from alnico.kernels.array_tiles import decode, encode, filled, is_bad, width_of
from alnico.kernels.constants import GRAM_LANES, LANES, LEAF
from alnico.kernels.difference_kernel import DifferenceKernel
from alnico.kernels.four_bit_kernel import GROUP_BYTES, FourBitKernel
from alnico.kernels.lookup_kernel import LookupKernel, split_codes
from alnico.kernels.low_rank_kernel import FoldKernel
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel, RankKernel
from alnico.kernels.mix_kernel import MixKernel
from alnico.kernels.selection_kernel import SelectionKernel
from alnico.kernels.template import PARTS, ArgumentKind

CHUNK = 16_384
"""Elements computed at a time: the arrays of one step stay in the second-level cache."""

NARROW = 256
"""Columns below which the rows of a matrix are added by an accumulation, which writes every sum on the way."""

MOST_LANES = 1 << 18
"""Most lanes that are filled at a time, where many short rows each have their own."""

Run = Callable[..., int | None]


def run_of(kernel: Any) -> tuple[Run, float]:
    """Return the function that runs a kernel, and the operations it takes for an element. Errors: NoArrayForm.

    Kernels that only decode or encode have their ``array_form`` next to their text, so that a merge without them does not import it.
    """
    if isinstance(kernel, MixKernel):
        return _mix(kernel)
    if isinstance(kernel, MeasureKernel):
        return _measure(kernel)
    if isinstance(kernel, GramKernel):
        pairs = kernel.models * (kernel.models + 1) // 2
        return functools.partial(_gram, kernel), 4.0 * kernel.models + 6.0 * pairs
    if isinstance(kernel, ColumnGramKernel):
        pairs = kernel.models * (kernel.models + 1) // 2
        return functools.partial(_column_gram, kernel), 4.0 * kernel.models + 8.0 * pairs
    if isinstance(kernel, RankKernel):
        return _rank, 150.0
    if isinstance(kernel, FoldKernel):
        return functools.partial(_fold, np.dtype(kernel.real)), 4.0
    if isinstance(kernel, DifferenceKernel):
        return functools.partial(_difference, np.dtype(kernel.real)), 20.0
    if isinstance(kernel, FourBitKernel):
        return _four_bit, 6.0
    if isinstance(kernel, LookupKernel):
        return functools.partial(_lookup, kernel), 33.0
    if isinstance(kernel, SelectionKernel):
        return _selection, 70.0
    if (array_form := getattr(kernel, "array_form", None)) is not None:
        form: tuple[Run, float] = array_form()
        return form
    raise NoArrayForm(f"{type(kernel).__name__} has no array form")


def chunks(count: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Cut ``count`` elements into spans."""
    return ((s, min(s + size, count)) for s in range(0, count, size))


class _Arguments:
    """The arguments of a scalar function, as one call of a kernel passes them."""

    def __init__(self, kinds: Sequence[ArgumentKind], real: np.dtype[Any], flat: Sequence[Any]) -> None:
        rest = iter(flat)
        self.kinds = kinds
        self.real = real
        self.parts: list[list[Any]] = [[next(rest) for _ in PARTS[kind]] for kind in kinds]

    def of_model(self, a: int, model: int, start: int, span: tuple[int, int]) -> Any:
        """An argument of one model, a number or one per element of a span; not of kind ``side``."""
        kind, parts = self.kinds[a], self.parts[a]
        if kind == "number":
            return self.real.type(parts[0])
        if kind == "numbers":
            return parts[0][model]
        values = filled(kind, parts, model, start, span)
        return values.astype(self.real) if kind == "bernoulli" else values


def _mix(kernel: MixKernel) -> tuple[Run, float]:
    models, real = kernel.models, np.dtype(kernel.real)
    types: list[Type] = ["reals", *types_of(kernel.kinds, kernel.real, per_model=True)]
    mix = on_arrays(kernel.mix, types, models, kernel.real)
    sides = [a for a, kind in enumerate(kernel.kinds) if kind == "side"]

    def values_of(
        arguments: _Arguments,
        a: int,
        raws: Sequence[np.ndarray],
        codes: np.ndarray,
        start: int,
        span: tuple[int, int],
    ) -> Any:
        kind = kernel.kinds[a]
        if kind in ("number", "numbers"):
            return arguments.of_model(a, 0, start, span) if kind == "number" else arguments.parts[a][0]
        if kind == "side":
            first = models * (1 + sides.index(a))
            return tuple(_decoded(raws[first + i], codes[first + i], span, real) for i in range(models))
        return tuple(arguments.of_model(a, i, start, span) for i in range(models))

    def run(
        raws: Sequence[np.ndarray], codes: np.ndarray, base: np.ndarray, base_code: int,
        out: np.ndarray, out_code: int, start: int, keep_equal: int, *flat: Any,
    ) -> int:  # fmt: skip
        width = width_of(out_code)
        arguments = _Arguments(kernel.kinds, real, flat)
        for s, e in chunks(out.size // width):
            x = [_decoded(raws[i], codes[i], (s, e), real) for i in range(models)]
            bad = any(map(is_bad, x))
            given = [values_of(arguments, a, raws, codes, start, (s, e)) for a in range(len(kernel.kinds))]
            bad |= any(is_bad(side) for a in sides for side in given[a])
            if kernel.of_deltas:
                b = _decoded(base, base_code, (s, e), real)
                bad |= is_bad(b)
                x = [(b + value if kernel.differences else value) - b for value in x]
            mixed = np.broadcast_to(np.asarray(mix.call(tuple(x), *given), real), e - s)
            if kernel.of_deltas:
                mixed = select(mixed == 0, b, b + mixed)
            elif keep_equal:
                equal = np.ones(e - s, bool)
                for value in x[1:]:
                    equal &= value == x[0]
                mixed = select(equal, x[0], mixed)
            if encode(mixed, out_code, out[width * s : width * e]) or bad:
                return s
        return -1

    return run, mix.steps + 6.0 * models + 10.0 + models * _filling(kernel.kinds)


def _decoded(raw: np.ndarray, code: int, span: tuple[int, int], real: np.dtype[Any]) -> np.ndarray:
    width = width_of(code)
    return decode(raw[width * span[0] : width * span[1]], code, real)


def _measure(kernel: MeasureKernel) -> tuple[Run, float]:
    real = np.dtype(kernel.real)
    types = types_of(kernel.kinds, kernel.real, per_model=False)
    values: list[Type] = ["real", "reals"] if kernel.across else ["real"]
    of = on_arrays(kernel.of, [*values, *types], kernel.models, kernel.real)
    reduction = _REDUCTIONS[kernel.reduction]

    def run(
        raws: Sequence[np.ndarray], codes: np.ndarray, base: np.ndarray, base_code: int, start: int, chosen: np.ndarray, *rest: Any
    ) -> None:  # fmt: skip
        outputs, flat = rest[: reduction.outputs], rest[reduction.outputs :]
        arguments = _Arguments(kernel.kinds, real, flat)
        count = raws[0].size // width_of(codes[0])

        def value_of(model: int, span: tuple[int, int], subtrahend: np.ndarray | None) -> np.ndarray:
            value = _decoded(raws[model], codes[model], span, real)
            return value if subtrahend is None else value - subtrahend

        def measured(n: int, span: tuple[int, int]) -> np.ndarray:
            """``of`` for the elements of a span of the ``n``-th chosen model."""
            b = _decoded(base, base_code, span, real) if kernel.of_deltas else None
            model = int(chosen[n])
            given = [arguments.of_model(a, model, start, span) for a in range(len(kernel.kinds))]
            if kernel.across:
                every = tuple(value_of(i, span, b) for i in range(kernel.models))
                result = of.call(every[model], every, *given)
            else:
                result = of.call(value_of(model, span, b), *given)
            result = np.asarray(result)
            if result.dtype.kind == "b":
                result = result.astype(real)
            return np.broadcast_to(result, span[1] - span[0])

        for n in range(chosen.size):
            reduction.reduce(functools.partial(measured, n), n, start, count, *outputs)

    decoding = 4.0 * kernel.models if kernel.across else 4.0
    return run, kernel.models * (of.steps + decoding + 12.0 + _filling(kernel.kinds))


def _filling(kinds: Sequence[ArgumentKind]) -> float:
    """The operations that fill one element of each argument that has a number for each."""
    return sum({"number": 0.0, "numbers": 0.0, "side": 4.0}.get(kind, 25.0) for kind in kinds)


Measured = Callable[[tuple[int, int]], np.ndarray]


def _sums(measured: Measured, n: int, _start: int, count: int, leaves: np.ndarray) -> None:
    for leaf in range(leaves.shape[1]):
        lanes = np.zeros(LANES)
        for s, e in _of_leaf(leaf, count):
            add_to_lanes(measured((s, e)).astype(np.float64), lanes)
        # From 0.0 upwards, lane by lane, as an accumulation does it.
        leaves[n, leaf] = np.add.accumulate(lanes)[-1] + 0.0


def _counts(measured: Measured, n: int, _start: int, count: int, leaves: np.ndarray) -> None:
    for leaf in range(leaves.shape[1]):
        leaves[n, leaf] = sum(np.count_nonzero(measured(span) != 0) for span in _of_leaf(leaf, count))


def _of_leaf(leaf: int, count: int) -> Iterator[tuple[int, int]]:
    first = leaf * LEAF
    return ((first + s, first + e) for s, e in chunks(min(LEAF, count - first)))


def add_to_lanes(values: np.ndarray, lanes: np.ndarray) -> None:
    """Add values to lanes in turn, from the first lane on. One row after another: that order is part of the bits."""
    whole = values.size // lanes.size * lanes.size
    for row in values[:whole].reshape(-1, lanes.size):
        lanes += row
    lanes[: values.size - whole] += values[whole:]


def _values(measured: Measured, n: int, _start: int, count: int, gathered: np.ndarray) -> None:
    for s, e in chunks(count):
        gathered[n, s:e] = measured((s, e))


def _histogram(
    measured: Measured, n: int, _start: int, count: int, shift: int, prefix: np.ndarray, bins: np.ndarray
) -> None:
    for span in chunks(count):
        values = measured(span)
        values = values + values.dtype.type(0.0)  # -0.0 becomes 0.0
        word = np.dtype(f"u{values.dtype.itemsize}").type
        bits = values.view(word) >> word(shift)
        # In two steps: a shift by all bits of a word is undefined.
        inside = bits[(bits >> word(16)).astype(np.uint64) == prefix[n]]
        bins[n] += np.bincount((inside & word(0xFFFF)).astype(np.int64), minlength=65_536)


def _bracket(
    measured: Measured, n: int, _start: int, count: int,
    low: np.ndarray, high: np.ndarray, counts: np.ndarray, gathered: np.ndarray,
) -> None:  # fmt: skip
    place = 0
    for span in chunks(count):
        values = measured(span)
        over, reached = values > high[n], values >= low[n]
        above = np.count_nonzero(over)
        counts[n, 0] += above
        counts[n, 1] += np.count_nonzero(reached) - above
        if low[n] != high[n]:
            kept = values[reached & ~over][: max(gathered.shape[1] - place, 0)]
            gathered[n, place : place + kept.size] = kept
            place += kept.size


def _sums_of_rows(measured: Measured, n: int, start: int, count: int, row: int, parts: np.ndarray) -> None:
    _rows(measured, start, count, row, parts[n], np.add, 0.0)


def _largest_of_rows(measured: Measured, n: int, start: int, count: int, row: int, parts: np.ndarray) -> None:
    _rows(measured, start, count, row, parts[n], _larger, -np.inf)


def _larger(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    result: np.ndarray = select(second > first, second, first)
    return result


def _rows(
    measured: Measured, start: int, count: int, row: int, parts: np.ndarray, join: Callable[..., np.ndarray], nothing: float
) -> None:  # fmt: skip
    for s, e in chunks(count, LEAF):
        values = np.concatenate([measured((s + a, s + b)).astype(np.float64) for a, b in chunks(e - s)])
        numbers, totals = fold_rows(values, start + s, row, join, nothing)
        parts[numbers - (start // row + start // LEAF)] = totals


def fold_rows(
    values: np.ndarray, place: int, row: int, join: Callable[..., np.ndarray] = np.add, nothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce each part of a row in the float64 ``values`` of one leaf, which begin at element ``place`` of the tensor.

    Element i of the tensor goes to lane i modulo their number; then halves of the lanes are joined. Returns the
    number of each part (see GramKernel) and its total.
    """
    cuts = np.arange(-(-place // row) * row - place, values.size, row)
    starts = cuts if cuts.size and cuts[0] == 0 else np.concatenate([[0], cuts])
    stops = np.append(starts[1:], values.size)
    numbers = (place + starts) // row + (place + starts) // LEAF
    longest = int((stops - starts).max())
    height = 1 if longest <= GRAM_LANES else -(-(GRAM_LANES - 1 + longest) // GRAM_LANES)
    # In a short part no two values meet before the lanes are folded to as many: until then each is joined with nothing.
    width = min(GRAM_LANES, 1 << (longest - 1).bit_length())
    totals = np.empty(starts.size)
    for first, last in chunks(starts.size, max(MOST_LANES // (height * width), 1)):
        begin, end = int(starts[first]), int(stops[last - 1])
        lengths = (stops - starts)[first:last]
        owner = np.repeat(np.arange(last - first), lengths)
        at = np.arange(place + begin, place + end)
        level: Any = 0
        if height > 1:
            level = at // GRAM_LANES - np.repeat((place + starts[first:last]) // GRAM_LANES, lengths)
        table = np.full((last - first, height, width), nothing)
        table[owner, level, at % width] = values[begin:end]
        lanes = np.full((last - first, width), nothing)
        for h in range(height):
            lanes = join(lanes, table[:, h])
        totals[first:last] = fold(lanes, join)
    return numbers, totals


def fold(lanes: np.ndarray, join: Callable[..., np.ndarray] = np.add) -> np.ndarray:
    """Join the lanes of the last axis, the second half with the first, until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = join(lanes[..., :half], lanes[..., half:])
    return lanes[..., 0]


class _ReducingFunction:
    def __init__(self, reduce: Callable[..., None], outputs: int) -> None:
        self.reduce = reduce
        self.outputs = outputs


_REDUCTIONS = {
    "sum": _ReducingFunction(_sums, 1),
    "count": _ReducingFunction(_counts, 1),
    "sum of rows": _ReducingFunction(_sums_of_rows, 2),
    "largest of rows": _ReducingFunction(_largest_of_rows, 2),
    "values": _ReducingFunction(_values, 1),
    "histogram": _ReducingFunction(_histogram, 3),
    "bracket": _ReducingFunction(_bracket, 4),
}


def _inputs(
    kernel: GramKernel | ColumnGramKernel, raws: Sequence[np.ndarray], codes: np.ndarray, base: np.ndarray, base_code: int, span: tuple[int, int]
) -> list[np.ndarray]:  # fmt: skip
    """The values that products are taken of, in float64: rounded to the kernel's precision before."""
    real = np.dtype(kernel.real)
    x = [_decoded(raws[i], codes[i], span, real) for i in range(kernel.models)]
    if kernel.of_deltas:
        b = _decoded(base, base_code, span, real)
        x = [value - b for value in x]
    return [value.astype(np.float64) for value in x]


def _gram(
    kernel: GramKernel, raws: Sequence[np.ndarray], codes: np.ndarray, base: np.ndarray, base_code: int, start: int, row: int, sums: np.ndarray
) -> None:  # fmt: skip
    for span in chunks(raws[0].size // width_of(codes[0]), LEAF):
        x = _inputs(kernel, raws, codes, base, base_code, span)
        pairs = ((x[i], x[j]) for i in range(kernel.models) for j in range(i, kernel.models))
        for p, (a, b) in enumerate(pairs):
            numbers, totals = fold_rows(a * b, start + span[0], row)
            sums[numbers - (start // row + start // LEAF), p] = totals


def _column_gram(
    kernel: ColumnGramKernel, raws: Sequence[np.ndarray], codes: np.ndarray, base: np.ndarray, base_code: int, start: int, sums: np.ndarray
) -> None:  # fmt: skip
    columns = sums.shape[1]
    for s, e in chunks(raws[0].size // width_of(codes[0]), LEAF):
        x = _inputs(kernel, raws, codes, base, base_code, (s, e))
        pairs = ((x[i], x[j]) for i in range(kernel.models) for j in range(i, kernel.models))
        for p, (a, b) in enumerate(pairs):
            products, at = a * b, (start + s) % columns
            head = min(columns - at, products.size) if at else 0
            sums[p, at : at + head] += products[:head]
            whole = (products.size - head) // columns * columns
            rows = products[head : head + whole].reshape(-1, columns)
            if columns < NARROW:
                sums[p] = np.add.accumulate(np.concatenate([sums[p, None], rows]))[-1]
            else:
                for row in rows:
                    sums[p] += row
            rest = products[head + whole :]
            sums[p, : rest.size] += rest


def _rank(keys: np.ndarray, shares: np.ndarray, ranks: np.ndarray) -> None:
    size = keys.shape[1]
    if not keys.size:
        return
    numbers, index = keys >> np.uint64(32), np.arange(size)
    begins = np.ones(keys.shape, bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    ends = np.ones(keys.shape, bool)
    ends[:, :-1] = begins[:, 1:]
    last = np.minimum.accumulate(np.where(ends, index, size)[:, ::-1], axis=1)[:, ::-1]
    places = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    np.put_along_axis(ranks, places, shares[first + last], axis=1)


def _fold(
    real: np.dtype[Any], raw: np.ndarray, code: int, left: np.ndarray, right: np.ndarray, scale: float, first: int, out: np.ndarray
) -> int:  # fmt: skip
    rank, columns = right.shape
    rows = max(CHUNK // max(columns, 1), 1)
    stop = first + out.size
    for top in range(first // columns if out.size else 0, -(-stop // columns) if out.size else 0, rows):
        lefts = left[top : top + rows]
        total = np.zeros((len(lefts), columns), real)
        for k in range(rank):
            total += lefts[:, k, None] * right[k]
        begin, end = max(top * columns, first), min((top + len(lefts)) * columns, stop)
        part = total.reshape(-1)[begin - top * columns : end - top * columns]
        s, e = begin - first, end - first
        out[s:e] = _decoded(raw, code, (s, e), real) + part * real.type(scale)
    return 0 if is_bad(out) else -1


def _difference(
    real: np.dtype[Any], first: np.ndarray, first_code: int, second: np.ndarray, second_code: int, out: np.ndarray, sums: np.ndarray
) -> None:  # fmt: skip
    lanes = np.zeros((2, LANES))
    for span in chunks(first.size // width_of(first_code)):
        a, b = _decoded(first, first_code, span, real), _decoded(second, second_code, span, real)
        if out.size:
            out[slice(*span)] = a - b
        for values, lane in zip(
            (a.astype(np.float64) - b, b.astype(np.float64)), lanes[: sums.size], strict=False
        ):
            add_to_lanes(values * values, lane)
    sums[:] = fold(lanes)[: sums.size]


def _four_bit(codes: np.ndarray, scales: np.ndarray, minimums: np.ndarray, out: np.ndarray) -> None:
    values = np.zeros((len(scales), 2 * GROUP_BYTES), out.dtype)
    pairs = codes.astype("<u2")
    pairs |= pairs << 4  # little-endian: the first code is in the low half of its byte
    pairs &= 0x0F0F
    values.reshape(-1)[: 2 * codes.size] = pairs.view(np.uint8)
    values *= scales[:, None]
    values += minimums[:, None]
    out[: 2 * codes.size] = values.reshape(-1)[: 2 * codes.size]


def _lookup(
    kernel: LookupKernel, codes: np.ndarray, table: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int, offset: int, out: np.ndarray
) -> None:  # fmt: skip
    columns = out.shape[1]
    values = table[split_codes(codes, kernel.order, columns)]
    groups = (np.arange(columns) + offset) // group
    values -= zeros[:, groups]
    np.multiply(values, scales[:, groups], out=out)


def _selection(bits: np.ndarray, places: np.ndarray, _rest: np.ndarray, out: np.ndarray) -> None:
    sizes = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)  # without signs
    for r, place in enumerate(places.tolist()):
        out[r] = np.partition(sizes[r], place)[place]
