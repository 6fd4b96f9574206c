"""Writes the texts of kernels that measure on a GPU: sums, counts, histograms, brackets, inner products

Facts have the bits of the processor's, because every sum has its lanes, its leaves and its order: a thread adds the
elements of a lane one after another, and the lanes are joined as there. Threads of a block that have fewer than all lanes
take several, so that the result does not depend on their number. Counts are integers, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alnico.kernels.constants import GRAM_LANES, LANES, LEAF, UNROLLED_MODELS
from alnico.kernels.cuda.source import (
    PACK,
    WORDS,
    Slots,
    argument_of,
    decoded,
    extra_names,
    functions,
    loaded,
    module,
    place_lines,
)
from alnico.kernels.measure_kernels import ColumnGramKernel, GramKernel, MeasureKernel
from alnico.kernels.template import Real

CHUNK = 2048
"""Elements of which a block keeps those in a bracket before it asks for room for them."""

GROUP = 3
"""Models of a group: a launch makes the products of two groups, so that the lanes of all of them fit into a block."""


@dataclass(frozen=True)
class _MeasuredValue:
    """How a kernel gets ``of`` of an element: its arguments, and the tensors whose elements it takes, with their dtypes."""

    real: Real
    given: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...]
    packed: bool

    def at(self, place: str) -> str:
        """An expression for the value of the element at a place."""
        words = [f"load_{WORDS[code]}({address}, {place})" for address, code in self.tensors]
        return f"value({', '.join([place, *words, *self.given])})"

    def each(
        self, first: str, stop: str, thread: str, threads: str, use: Callable[[str, str], list[str]]
    ) -> list[str]:
        """Statements that use every value from ``first`` on, a multiple of a pack, in any order: ``use(value, place)``."""
        lines = []
        if self.packed:
            lines += [f"q = {first} // {PACK} + {thread}", f"while {PACK} * q + {PACK - 1} < {stop}:"]
            for n, (address, code) in enumerate(self.tensors):
                lines.append(f"    w{n} = load4_{WORDS[code]}({address}, q)")
            for m in range(PACK):
                words = [f"w{n}[{m}]" for n in range(len(self.tensors))]
                lines.append(f"    m{m} = value({', '.join([f'{PACK} * q + {m}', *words, *self.given])})")
            for m in range(PACK):
                lines += [f"    {line}" for line in use(f"m{m}", f"{PACK} * q + {m}")]
            lines += [f"    q += {threads}", f"j = {stop} // {PACK} * {PACK} + {thread}"]
        else:
            lines.append(f"j = {first} + {thread}")
        lines += [f"while j < {stop}:", f"    m0 = {self.at('j')}"]
        lines += [f"    {line}" for line in use("m0", "j")]
        return [*lines, f"    j += {threads}"]


def measure_text(
    kernel: MeasureKernel, code: int, codes: tuple[int, ...], base_code: int, *, packed: bool
) -> str:
    """The text of a reduction of one model's values: ``run(count, start, numbers, keys, own, base, *raws, *extra, *outputs)``.

    ``code`` is the model's dtype, ``codes`` those of all models, if ``of`` sees them: then ``raws`` are their addresses,
    or, if there are many, a table of them and one of their dtypes. ``packed``: all addresses allow loads of four elements.
    """
    real, kinds = kernel.real, kernel.kinds
    is_many = kernel.across and kernel.models > UNROLLED_MODELS
    raws = ["raws", "codes"] if is_many else [f"r{i}" for i in range(len(codes))]
    given = ["count", "start", "numbers", "keys", "own", "base", *raws, *extra_names(kinds)]
    tensors = [("own", code), *([("base", base_code)] if kernel.of_deltas else [])]
    tensors += [] if is_many else list(zip(raws, codes, strict=True))
    slots = Slots(kinds, [0])
    minus = " - b" if kernel.of_deltas else ""
    body = ["place = start + j", *place_lines(kinds)]
    if kernel.of_deltas:
        body.append(f"b = {decoded('of_base', base_code, real)}")
    body.append(f"v = {decoded('of_own', code, real)}{minus}")
    if is_many:
        any_of = "decode_any" if real == "float32" else "decode_any_wide"
        body.append(f"for i in range({kernel.models}):")
        body.append(f"    x[i] = {any_of}(load_i64(codes, i), address_at(raws, i), j){minus}")
    elif kernel.across:
        values = [f"{decoded(f'of_{r}', c, real)}{minus}" for r, c in zip(raws, codes, strict=True)]
        body.append(f"x = ({' '.join(value + ',' for value in values)})")
    passed = ["v", *(["x"] if kernel.across else [])]
    passed += [argument_of(kind, a, slots, 0, real) for a, kind in enumerate(kinds)]
    body.append(f"return of({', '.join(passed)})")
    scratch = ["x"] if is_many else []
    words = [f"of_{address}" for address, _ in tensors]
    texts = functions(kernel.of, "of", kernel.models)
    head = f"@device\ndef value({', '.join(['j', *words, *scratch, *given])}):\n"
    texts.append(head + "".join(f"    {line}\n" for line in body))
    value = _MeasuredValue(real, (*scratch, *given), tuple(tensors), packed)
    outputs, run = {
        "values": _values,
        "sum": _sum,
        "count": _count,
        "histogram": _histogram,
        "bracket": _bracket,
        "sum of rows": _sum_of_rows,
        "largest of rows": _largest_of_rows,
    }[kernel.reduction](value)
    if is_many:
        run = [f"x = cuda.local.array({kernel.models}, REAL)", *run]
    return module(real, texts, [*given, *outputs], run)


def _store(real: Real) -> str:
    return f"store_f{real[-2:]}"


def _values(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    def use(measured: str, place: str) -> list[str]:
        return [f"{_store(value.real)}(out, {place} - first, REAL({measured}))"]

    return ["first", "stop", "out"], value.each("first", "stop", "cuda.grid(1)", "cuda.gridsize(1)", use)


_OF_LEAF = [
    "leaf = cuda.blockIdx.x",
    f"begin = leaf * {LEAF}",
    f"stop = min(begin + {LEAF}, count)",
    "t = cuda.threadIdx.x",
]


def _sum(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    run = [
        f"lanes = cuda.shared.array({LANES}, np.float64)",
        *_OF_LEAF,
        "lane = t",
        f"while lane < {LANES}:",
        "    total = np.float64(0.0)",
        "    j = begin + lane",
        "    while j < stop:",
        f"        total += np.float64({value.at('j')})",
        f"        j += {LANES}",
        "    lanes[lane] = total",
        "    lane += cuda.blockDim.x",
        "cuda.syncthreads()",
        "if t == 0:",
        "    total = np.float64(0.0)",
        f"    for lane in range({LANES}):",
        "        total += lanes[lane]",
        "    store_f64(out, leaf, total)",
    ]
    return ["out"], run


def _count(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    def use(measured: str, _place: str) -> list[str]:
        return [f"found += np.int64({measured} != ZERO)"]

    run = [
        "total = cuda.shared.array(1, np.int64)",
        *_OF_LEAF,
        "if t == 0:",
        "    total[0] = 0",
        "cuda.syncthreads()",
        "found = np.int64(0)",
        *value.each("begin", "stop", "t", "cuda.blockDim.x", use),
        "cuda.atomic.add(total, 0, found)",
        "cuda.syncthreads()",
        "if t == 0:",
        "    store_i64(out, leaf, total[0])",
    ]
    return ["out"], run


def _histogram(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    bits = "bits_of" if value.real == "float32" else "long_of"

    def use(measured: str, _place: str) -> list[str]:
        return [
            # -0.0 + 0.0 is 0.0: with its sign bit a zero would be the largest of all.
            f"word = np.uint64({bits}(REAL({measured}) + ZERO))",
            "if np.uint64(np.uint64(word >> np.uint64(16)) >> shift) == prefix:",
            "    bin = np.int64(np.uint64(word >> shift) & np.uint64(0xFFFF))",
            "    if bin != last:",
            "        if length > 0:",
            "            add_u32(bins, last, length)",
            "        last = bin",
            "        length = np.int64(0)",
            "    length += 1",
        ]

    # A run of equal bins is added at once: most entries of a sparse task vector are zeros.
    run = [
        "last = np.int64(-1)",
        "length = np.int64(0)",
        *value.each("0", "count", "cuda.grid(1)", "cuda.gridsize(1)", use),
        "if length > 0:",
        "    add_u32(bins, last, length)",
    ]
    return ["shift", "prefix", "bins"], run


def _bracket(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    def use(measured: str, _place: str) -> list[str]:
        return [
            f"measured = REAL({measured})",
            "if measured > high:",
            "    above += 1",
            "elif measured >= low:",
            "    inside += 1",
            "    if low != high:",
            "        kept[cuda.atomic.add(marks, 2, np.int64(1))] = measured",
        ]

    # A block asks for room once per chunk: a counter that every kept element would raise is too slow.
    run = [
        f"kept = cuda.shared.array({CHUNK}, REAL)",
        "marks = cuda.shared.array(4, np.int64)",
        "t = cuda.threadIdx.x",
        "if t == 0:",
        "    marks[0] = 0",
        "    marks[1] = 0",
        "cuda.syncthreads()",
        "above = np.int64(0)",
        "inside = np.int64(0)",
        f"first = cuda.blockIdx.x * {CHUNK}",
        "while first < count:",
        "    if t == 0:",
        "        marks[2] = 0",
        "    cuda.syncthreads()",
        f"    stop = min(first + {CHUNK}, count)",
        *[f"    {line}" for line in value.each("first", "stop", "t", "cuda.blockDim.x", use)],
        "    cuda.syncthreads()",
        "    if t == 0:",
        "        marks[3] = add_u64(counts, 2, marks[2])",
        "    cuda.syncthreads()",
        "    j = t",
        "    while j < marks[2]:",
        "        if marks[3] + j < room:",
        f"            {_store(value.real)}(gathered, marks[3] + j, kept[j])",
        "        j += cuda.blockDim.x",
        "    cuda.syncthreads()",
        f"    first += cuda.gridDim.x * {CHUNK}",
        "cuda.atomic.add(marks, 0, above)",
        "cuda.atomic.add(marks, 1, inside)",
        "cuda.syncthreads()",
        "if t == 0:",
        "    add_u64(counts, 0, marks[0])",
        "    add_u64(counts, 1, marks[1])",
    ]
    return ["low", "high", "room", "counts", "gathered"], run


def _sum_of_rows(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    return _rows(value, "0.0", "{} + {}")


def _largest_of_rows(value: _MeasuredValue) -> tuple[list[str], list[str]]:
    return _rows(value, "-np.inf", "larger({}, {})")


def _rows(value: _MeasuredValue, nothing: str, join: str) -> tuple[list[str], list[str]]:
    term = f"np.float64(REAL({value.at('j')}))"
    run = [
        f"lanes = cuda.shared.array({LANES}, np.float64)",
        *_each_slot(
            [f"total = np.float64({nothing})"],
            [f"total = {join.format('total', term)}"],
            ["lanes[slot] = total"],
        ),
        *_folded([f"lanes[slot] = {join.format('lanes[slot]', 'lanes[slot + half]')}"]),
        *_each_part(["store_f64(out, begin + slot, lanes[slot * width])"]),
    ]
    return ["starts", "parts", "width", "out"], run


def _each_slot(before: Sequence[str], each: Sequence[str], after: Sequence[str]) -> list[str]:
    """Statements of a block that has ``{LANES} // width`` parts of rows, each in ``width`` lanes: in a part that is
    shorter than its lanes no two elements meet before the lanes are joined to as many."""
    return [
        "t = cuda.threadIdx.x",
        f"begin = cuda.blockIdx.x * ({LANES} // width)",
        "slot = t",
        f"while slot < {LANES}:",
        "    part = begin + slot // width",
        *[f"    {line}" for line in before],
        "    if part < parts:",
        "        j = load_i64(starts, part)",
        "        j += (slot - (start + j)) & (width - 1)",
        "        while j < load_i64(starts, part + 1):",
        *[f"            {line}" for line in each],
        "            j += width",
        *[f"    {line}" for line in after],
        "    slot += cuda.blockDim.x",
        "cuda.syncthreads()",
    ]


def _folded(each: Sequence[str]) -> list[str]:
    """Statements that join the second half of the lanes of each part with the first, until one is left."""
    return [
        "half = width // 2",
        "while half > 0:",
        "    slot = t",
        f"    while slot < {LANES}:",
        "        if (slot & (width - 1)) < half:",
        *[f"            {line}" for line in each],
        "        slot += cuda.blockDim.x",
        "    cuda.syncthreads()",
        "    half = half // 2",
    ]


def _each_part(each: Sequence[str]) -> list[str]:
    return [
        "slot = t",
        f"while slot < {LANES} // width:",
        "    if begin + slot < parts:",
        *[f"        {line}" for line in each],
        "    slot += cuda.blockDim.x",
    ]


def pairs_of(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of models whose products one launch makes, of two groups."""
    return [(i, j) for i in first for j in second if i <= j]


def gram_text(
    kernel: GramKernel | ColumnGramKernel,
    codes: Sequence[int],
    base_code: int,
    pairs: Sequence[tuple[int, int]],
) -> str:
    """The text of the products of ``pairs`` of the models with these dtypes, numbered from 0.

    Of rows: ``run(count, start, base, *raws, starts, parts, width, out)``. Of columns: ``run(count, start, base, *raws,
    columns, sums)``, which adds to ``sums``.
    """
    real = kernel.real
    raws = [f"r{i}" for i in range(len(codes))]
    minus = " - b" if kernel.of_deltas else ""
    each = [f"b = {loaded('base', 'j', base_code, real)}"] if kernel.of_deltas else []
    each += [
        f"x{i} = np.float64({loaded(r, 'j', code, real)}{minus})"
        for i, (r, code) in enumerate(zip(raws, codes, strict=True))
    ]
    each += [f"s{p} = s{p} + product(x{i}, x{j})" for p, (i, j) in enumerate(pairs)]
    numbers = range(len(pairs))
    given = ["count", "start", "base", *raws]
    if isinstance(kernel, ColumnGramKernel):
        run = [
            "column = cuda.grid(1)",
            "while column < columns:",
            *[f"    s{p} = reload_f64(sums, {p} * columns + column)" for p in numbers],
            "    j = (column - start) % columns",
            "    while j < count:",
            *[f"        {line}" for line in each],
            "        j += columns",
            *[f"    store_f64(sums, {p} * columns + column, s{p})" for p in numbers],
            "    column += cuda.gridsize(1)",
        ]
        return module(real, [], [*given, "columns", "sums"], run)
    assert GRAM_LANES == LANES
    run = [
        f"lanes = cuda.shared.array(({len(pairs)}, {LANES}), np.float64)",
        *_each_slot(
            [f"s{p} = np.float64(0.0)" for p in numbers], each, [f"lanes[{p}, slot] = s{p}" for p in numbers]
        ),
        *_folded([f"lanes[{p}, slot] += lanes[{p}, slot + half]" for p in numbers]),
        *_each_part(
            [
                f"store_f64(out, (begin + slot) * {len(pairs)} + {p}, lanes[{p}, slot * width])"
                for p in numbers
            ]
        ),
    ]
    return module(real, [], [*given, "starts", "parts", "width", "out"], run)


def clearing_text() -> str:
    """The text of ``run(count, out)``: stores zeros of 8 bytes."""
    run = [
        "j = cuda.grid(1)",
        "while j < count:",
        "    store_u64(out, j, np.uint64(0))",
        "    j += cuda.gridsize(1)",
    ]
    return module("float32", [], ["count", "out"], run)
