"""Writes the kernels that measure: sums, counts, histograms, brackets, inner products, row ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from alnico.kernels.array_source import NoArrayForm
from alnico.kernels.constants import FEW_MODELS, GRAM_LANES, LANES, LEAF, TILE, WORD
from alnico.kernels.scalar_source import straighten
from alnico.kernels.template import (
    APART,
    DECORATOR,
    PREAMBLE,
    ArgumentKind,
    Interface,
    Real,
    Scratch,
    argument_parameters,
    fill_statement,
    tile_type,
    tiled_arguments,
    value_of,
)
from alnico.kernels.tile_program import MOST_TILE, TileProgram

Reduction = Literal["sum", "count", "sum of rows", "largest of rows", "values", "histogram", "bracket"]

MOST_SEARCHED = 4
"""Most values of one model that are searched in one call."""

OUTPUTS = {
    "sum": ("leaves",),
    "count": ("leaves",),
    "sum of rows": ("row", "parts"),
    "largest of rows": ("row", "parts"),
    "values": ("gathered",),
    "histogram": ("shift", "prefix", "bins"),
    "bracket": ("low", "high", "counts", "gathered"),
}
"""The output parameters of ``run`` and those that go with them, each with one row per chosen model."""

PLAIN = DECORATOR.format(options="")
INLINE = DECORATOR.format(options='inline="always"')
COMMON = (("raws", "raws"), ("codes", "int64*1"), ("base", "uint8*1"), ("base_code", "int"))
"""The first parameters of all kernels in this file."""


@dataclass(frozen=True)
class MeasureKernel:
    """Reduces ``of`` of one model's value, for each ``chosen`` model, over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, start, chosen, *outputs, *arguments)``, where ``outputs`` have a row
    for each chosen model. Of ``sum`` and ``count``: ``leaves``, filled with one number per leaf. Of the
    reductions of rows: ``row, parts``, filled with a number for each part of a leaf within one row of ``row``
    elements (see GramKernel). Of ``values``: ``gathered``, filled with the values themselves. Of
    ``histogram``: ``shift, prefix, bins``; bin ``(bits >> shift) & 0xFFFF`` counts the elements whose bits
    above that equal ``prefix``. Of ``bracket``: ``low, high, counts, gathered``; ``counts`` gets the number
    of elements above ``high`` and of those in [``low``, ``high``], and the latter are put into ``gathered``
    while there is room for a word of them, unless ``low`` is ``high``: then they are all the same. A model that is
    chosen several times in a row, at most :data:`MOST_SEARCHED`, is measured once. With ``across``, ``of``
    sees the values of all models, too.
    """

    reduction: Reduction
    of: Callable[..., float]
    models: int
    of_deltas: bool
    kinds: tuple[ArgumentKind, ...]
    real: Real
    across: bool = False

    def text(self) -> str:
        reduction = {
            "sum": self._sums,
            "count": self._sums,
            "values": self._values,
            "histogram": self._histogram,
        }
        reduction |= {"sum of rows": self._rows, "largest of rows": self._rows}
        definitions, body = reduction.get(self.reduction, self._bracket)()
        program = self._program()
        functions = [f"{INLINE}\n{function}\n" for function in straighten(self.of, "of")]
        text = PREAMBLE.format(bits=self.real[-2:])
        text += "".join(f"\n\n{f}" for f in (functions if program is None else program.functions))
        text += "".join(f"\n\n{PLAIN}\n{definition}\n" for definition in definitions)
        head = [
            f"def run({self.interface().signature()}):",
            "    base_width = width_of(base_code)",
            "    count = raws[0, 1] // width_of(codes[0])",
            *(["    models = rows = raws.shape[0]", f"    length = {MOST_TILE}"] if program else []),
        ]
        return text + "\n\n" + PLAIN + "\n" + "\n".join(head + body) + "\n\n\n" + self.interface().entry()

    def interface(self) -> Interface:
        outputs = {
            "sum": ("float64*2",),
            "count": ("int64*2",),
            "sum of rows": ("int", "float64*2"),
            "largest of rows": ("int", "float64*2"),
            "values": (f"{self.real}*2",),
            "histogram": ("int", "uint64*1", "int64*2"),
            "bracket": (f"{self.real}*1", f"{self.real}*1", "int64*2", f"{self.real}*2"),
        }[self.reduction]
        program = self._program()
        scratch: list[Scratch] = [("base_tile", (TILE,), "REAL")]
        scratch += [(name, (MOST_TILE,), "REAL") for name in program.tiles()] if program else []
        if program is None:
            scratch.append(("values", (self.models if self.across else 1, TILE), "REAL"))
        scratch += [(f"filled{a}", (TILE,), tile_type(self.kinds[a])) for a in tiled_arguments(self.kinds)]
        if self.across and program is None and self.models > FEW_MODELS:
            scratch.append(("x", (self.models,), "REAL"))
        if program is not None or self.reduction not in ("sum", "count", "values"):
            scratch.append(("measured", (TILE + WORD,), "REAL"))
        if self.reduction == "bracket":
            scratch.append(("places", (-MOST_SEARCHED,), "int64"))
        if self.reduction not in ("values", "histogram", "bracket"):
            scratch.append(("lanes", (-1, LANES), "int64" if self.reduction == "count" else "float64"))
        if program is not None:
            scratch.append(("room", (-MOST_TILE,), "REAL"))
        first = [
            *COMMON,
            ("start", "int"),
            ("chosen", "int64*1"),
            *zip(OUTPUTS[self.reduction], outputs, strict=True),
        ]
        parameters = (*first, *argument_parameters(self.kinds, self.real))
        return Interface(self.models, self.real, parameters, tuple(scratch), rows=self.models)

    def _program(self) -> TileProgram | None:
        """The equation for any number of models; None if it sees one or few, or has variables without known types."""
        is_many = self.across and self.models > FEW_MODELS
        return _program_of(self.of, self.kinds, self.real) if is_many else None

    def _tile(self, result: str, statement: str) -> str:
        """A loop over one tile; ``{value}`` in the statement is the result of ``of`` for an element."""
        if self._program() is not None:  # has been computed
            return f"def tile(v, {result}):\n    for j in range(v.size):\n        {statement.format(value='v[j]')}"
        prepare: list[str] = []
        if self.across and self.models > FEW_MODELS:
            base = " - base[j]" if self.of_deltas else ""
            prepare = [f"        for i in range({self.models}):", f"            x[i] = every[i, j]{base}"]
        lines = [
            f"def tile({self._heads(result)}):",
            "    for j in range(v.size):",
            *prepare,
            f"        {statement.format(value=self._value('j'))}",
        ]
        return "\n".join(lines)

    def _whole_tile(self, term: str) -> str:
        """A loop over the lanes of a whole tile, which loads and stores each once; ``{value}`` in the term is the result of ``of``.

        No index may be negative, or loops are not vectorised.
        """
        lines = [
            f"def whole_tile({self._heads('lanes')}):",
            f"    for lane in range({LANES}):",
            "        j = np.uint64(lane)",
            "        total = lanes[j]",
        ]
        for _ in range(0, TILE, LANES):
            lines += [
                f"        total += {term.format(value=self._value('j'))}",
                f"        j += np.uint64({LANES})",
            ]
        return "\n".join([*lines, "        lanes[lane] = total"])

    def _heads(self, result: str) -> str:
        """The parameters of a loop over a tile."""
        heads = ["v", "base", result]
        if self.across:
            few = self.models <= FEW_MODELS
            heads += [f"v{i}" for i in range(self.models)] if few else ["every", "x"]
        for a, kind in enumerate(self.kinds):
            heads += [f"f{a}"] if a in tiled_arguments(self.kinds) else []
            heads += [f"a{a}"] if kind in ("number", "numbers") else []
        return ", ".join(heads)

    def _value(self, j: str) -> str:
        """The result of ``of`` for element ``j`` of a tile."""
        base = f" - base[{j}]" if self.of_deltas else ""
        passed = [f"v[{j}]{base}"]
        if self.across:
            every = f"({' '.join(f'v{i}[{j}]{base},' for i in range(self.models))})"
            passed.append(every if self.models <= FEW_MODELS else "x")
        for a, kind in enumerate(self.kinds):
            passed.append(value_of(kind, f"f{a}[{j}]") if a in tiled_arguments(self.kinds) else f"a{a}")
        return f"of({', '.join(passed)})"

    def _each_model(self, span: str, work: list[str], again: list[str] | None = None) -> list[str]:
        """Statements for the tile ``s`` to ``e``: decode, then ``work`` for each model ``i``, the ``n``-th
        chosen one; of one that is chosen several times in a row, only ``again`` is repeated."""
        lines = [f"        {span}"]
        fills = [
            fill_statement(self.kinds, a, "i", f"filled{a}[:e - s]") for a in tiled_arguments(self.kinds)
        ]
        if self.of_deltas:
            lines.append("        decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])")
        if (program := self._program()) is not None:
            value = program.row("x", "r_")
            fill = [f"v = {value}", "decode(part(raws, i, width_of(codes[i]), s, e), codes[i], v)"]
            fill += ["subtract(v, base_tile[:size])"] if self.of_deltas else []
            lines.append("        size = e - s")
            return lines + [
                f"        {line}" for line in program.statements(fill, fills, [*work, *(again or [])])
            ]
        if self.across:
            lines.append(f"        for i in range({self.models}):")
            lines.append("            w = width_of(codes[i])")
            lines.append("            decode(part(raws, i, w, s, e), codes[i], values[i, :e - s])")
        lines += ["        for n in range(chosen.size):", "            i = chosen[n]"]
        indent = " " * 12
        if again is not None:
            lines.append(f"{indent}if n == 0 or chosen[n - 1] != i:")
            indent += "    "
        if not self.across:
            lines.append(f"{indent}w = width_of(codes[i])")
            lines.append(f"{indent}decode(part(raws, i, w, s, e), codes[i], values[0, :e - s])")
        lines += [f"{indent}{line}" for line in (*fills, *work)]
        return lines + [f"            {line}" for line in again or []]

    def _call(self, result: str, begin: str, stop: str) -> str:
        if self._program() is not None:
            return f"tile(measured[{begin}:{stop}], {result})"
        own = "i" if self.across else "0"
        passed = [f"values[{own}, {begin}:{stop}]", f"base_tile[{begin}:{stop}]", result]
        if self.across and self.models <= FEW_MODELS:
            passed += [f"values[{i}, {begin}:{stop}]" for i in range(self.models)]
        elif self.across:
            passed += [f"values[:, {begin}:{stop}]", "x"]
        for a, kind in enumerate(self.kinds):
            passed += [f"filled{a}[{begin}:{stop}]"] if a in tiled_arguments(self.kinds) else []
            if kind in ("number", "numbers"):
                passed.append(f"a{a}" if kind == "number" else f"a{a}[i]")
        return f"tile({', '.join(passed)})"

    def _size(self) -> int:
        """The elements of a tile."""
        return TILE if self._program() is None else MOST_TILE

    def _tiles(self, work: list[str], again: list[str] | None = None) -> list[str]:
        return [
            f"    for s in range(0, count, {self._size()}):",
            *self._each_model(f"e = min(s + {self._size()}, count)", work, again),
        ]

    def _values(self) -> tuple[list[str], list[str]]:
        return [self._tile("out", "out[j] = {value}")], self._tiles(
            [self._call("gathered[n, s:e]", "0", "e - s")]
        )

    def _histogram(self) -> tuple[list[str], list[str]]:
        bits = "uint32" if self.real == "float32" else "uint64"
        work = [
            self._call("measured[:e - s]", "0", "e - s"),
            "for j in range(e - s):",
            "    b = np.uint64(bits[j])",
            "    if (b >> np.uint64(16)) >> shift == prefix[n]:",
            "        bins[n, np.int64((b >> shift) & np.uint64(0xFFFF))] += 1",
        ]
        first = [f"    bits = measured[:{TILE}].view(np.{bits})"]
        # -0.0 + 0.0 is 0.0: with its sign bit a zero would be the largest of all.
        return [self._tile("out", "out[j] = {value} + ZERO")], first + self._tiles(work)

    def _bracket(self) -> tuple[list[str], list[str]]:
        search = (
            "places[n] = keep_between(measured, e - s, low[n], high[n], gathered[n], places[n], counts[n])"
        )
        work = [self._call("measured[:e - s]", "0", "e - s")]
        return [self._tile("out", "out[j] = {value}")], ["    places[:] = 0", *self._tiles(work, [search])]

    def _rows(self) -> tuple[list[str], list[str]]:
        """As in GramKernel, element i of the tensor goes to lane i modulo their number."""
        largest = self.reduction == "largest of rows"
        nothing = "-np.inf" if largest else "0.0"
        join = "max({0}, {1})" if largest else "{0} + {1}"
        definitions = [
            self._tile("out", "out[j] = {value}"),
            f"def collect(values, lane, lanes):\n    j = 0\n    while j < values.size:\n        h = min(values.size - j, {LANES} - lane)\n"
            "        part, sums = values[j:j + h], lanes[lane:lane + h]\n        for i in range(h):\n"
            f"            sums[i] = {join.format('sums[i]', 'np.float64(part[i])')}\n        j += h\n        lane = 0",
            f"def fold(lanes):\n    n = {LANES}\n    while n > 1:\n        n //= 2\n        for j in range(n):\n"
            f"            lanes[j] = {join.format('lanes[j]', 'lanes[j + n]')}\n    total = lanes[0]\n    lanes[:] = {nothing}\n"
            "    return total",
        ]
        work = [
            self._call("measured[:e - s]", "0", "e - s"),
            "a = s",
            "while a < e:",
            "    place = start + a",
            f"    left = min(row - place % row, {LEAF} - place % {LEAF}, count - a)",
            "    z = min(e, a + left)",
            f"    collect(measured[a - s:z - s], place % {LANES}, lanes[n])",
            "    if z - a == left:",
            f"        parts[n, place // row + place // {LEAF} - first] = fold(lanes[n])",
            "    a = z",
        ]
        return definitions, [
            f"    first = start // row + start // {LEAF}",
            f"    lanes[:] = {nothing}",
            *self._tiles(work),
        ]

    def _sums(self) -> tuple[list[str], list[str]]:
        term = "np.float64({value})" if self.reduction == "sum" else "np.int64({value} != ZERO)"
        kind = "float64" if self.reduction == "sum" else "int64"
        work = [
            f"for g in range(0, e - s, {LANES}):",
            f"    h = min(g + {LANES}, e - s)",
            f"    {self._call('lanes[n, :h - g]', 'g', 'h')}",
        ]
        definitions = [self._tile("lanes", f"lanes[j] += {term}")]
        if not self.across:
            definitions.append(self._whole_tile(term))
            whole = self._call("lanes[n]", "0", str(TILE)).replace("tile(", "whole_tile(", 1)
            work = [f"if e - s == {TILE}:", f"    {whole}", "else:", *[f"    {line}" for line in work]]
        body = [
            "    for leaf in range(leaves.shape[1]):",
            "        lanes[:] = 0",
            f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {self._size()}):",
            *[
                f"    {line}"
                for line in self._each_model(
                    f"e = min(s + {self._size()}, min((leaf + 1) * {LEAF}, count))", work
                )
            ],
            "        for n in range(chosen.size):",
            f"            total = np.{kind}(0)",
            f"            for l in range({LANES}):",
            "                total += lanes[n, l]",
            "            leaves[n, leaf] = total",
        ]
        return definitions, body


@functools.lru_cache(maxsize=256)
def _program_of(of: Callable[..., float], kinds: tuple[ArgumentKind, ...], real: Real) -> TileProgram | None:
    try:
        return TileProgram(of, kinds, real, lambda result: f"result = {result}\nout = REAL(result)", own=True)
    except NoArrayForm:
        return None


GRAM_GROUP = 8
"""Models of a group whose inner products with those of another are made at a time."""


@dataclass(frozen=True)
class GramKernel:
    """Inner products of all pairs of ``models`` inputs over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, start, row, sums)`` fills ``sums`` (segments, pairs) float64 with the
    products of the pairs (0, 0), (0, 1), ... (0, k-1), (1, 1), ...: a segment is the part of a leaf within
    one row of ``row`` elements, numbered ``element // row + element // LEAF`` less that of the block's first.
    Products of float32 are exact in float64.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        return self._text_of_few() if self.models <= FEW_MODELS else self._text_of_many()

    def _text_of_few(self) -> str:
        pairs = self.models * (self.models + 1) // 2
        lines = [
            *_gram_head(self.interface()),
            "    lanes[:] = 0.0",
            f"    first = start // row + start // {LEAF}",
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            *_gram_tile(self.of_deltas, "0, models", "i", 8),
            "        a = s",
            "        while a < e:",
            "            place = start + a",
            f"            left = min(row - place % row, {LEAF} - place % {LEAF}, count - a)",
            "            z = min(e, a + left)",
            "            g = a",
            *_whole_products(self.models),
            "            while g < z:",
            f"                lane = (start + g) % {GRAM_LANES}",
            f"                h = min(z, g + {GRAM_LANES} - lane)",
            *[
                f"                {line}"
                for line in _products_of_few(self.models, "g - s:h - s", "lane:lane + h - g")
            ],
            "                g = h",
            "            if z - a == left:",
            f"                segment = place // row + place // {LEAF} - first",
            f"                for p in range({pairs}):",
            "                    sums[segment, p] = fold(lanes[p])",
            "            a = z",
        ]
        apart = [_whole_product(len(a), len(b), a == b, self.real) for a, b in _groups(self.models)]
        return _gram_text([*PRODUCTS, FOLD], self.interface(), lines, apart)

    def _text_of_many(self) -> str:
        # The products of two groups of models at a time: their lanes stay in the second-level cache.
        lines = [
            *_gram_head(self.interface()),
            f"    first = start // row + start // {LEAF}",
            f"    for i0 in range(0, models, {GRAM_GROUP}):",
            f"        i1 = min(i0 + {GRAM_GROUP}, models)",
            f"        for j0 in range(i0, models, {GRAM_GROUP}):",
            f"            j1 = min(j0 + {GRAM_GROUP}, models)",
            f"            shift = 0 if i0 == j0 else {GRAM_GROUP}",
            "            lanes[:] = 0.0",
            f"            for s in range(0, count, {TILE}):",
            f"                e = min(s + {TILE}, count)",
            *_gram_tile(self.of_deltas, "i0, i1", "i - i0", 16),
            "                if shift:",
            *_gram_tile(self.of_deltas, "j0, j1", "shift + i - j0", 20)[self.of_deltas :],
            "                a = s",
            "                while a < e:",
            "                    place = start + a",
            f"                    left = min(row - place % row, {LEAF} - place % {LEAF}, count - a)",
            "                    z = min(e, a + left)",
            "                    g = a",
            f"                    if z - a == {TILE} and i1 - i0 == j1 - j0 == {GRAM_GROUP}:",
            *_whole_products_of_groups(24),
            "                    while g < z:",
            f"                        lane = (start + g) % {GRAM_LANES}",
            f"                        h = min(z, g + {GRAM_LANES} - lane)",
            "                        for i in range(i0, i1):",
            *_products("i - i0", f"(i - i0) * {GRAM_GROUP} - j0", "g - s:h - s", "lane:lane + h - g", 28),
            "                        g = h",
            "                    if z - a == left:",
            f"                        segment = place // row + place // {LEAF} - first",
            "                        for i in range(i0, i1):",
            "                            for j in range(max(i, j0), j1):",
            "                                pair = i * models - i * (i + 1) // 2 + j",
            f"                                sums[segment, pair] = fold(lanes[(i - i0) * {GRAM_GROUP} + j - j0])",
            "                    a = z",
        ]
        apart = [_whole_product(GROUP, GROUP, is_same, self.real) for is_same in (True, False)]
        return _gram_text([*PRODUCTS, FOLD], self.interface(), lines, apart)

    def interface(self) -> Interface:
        parameters = (*COMMON, ("start", "int"), ("row", "int"), ("sums", "float64*2"))
        few = self.models <= FEW_MODELS
        rows, pairs = (
            (self.models, self.models * (self.models + 1) // 2) if few else (2 * GRAM_GROUP, GRAM_GROUP**2)
        )
        scratch: list[Scratch] = [("values", (rows, TILE), "REAL"), ("base_tile", (TILE,), "REAL")]
        scratch.append(("lanes", (pairs, GRAM_LANES), "float64"))
        return Interface(self.models, self.real, parameters, tuple(scratch))


@dataclass(frozen=True)
class ColumnGramKernel:
    """Inner products of all pairs of ``models`` inputs over the ``columns`` of a block.

    ``run(raws, codes, base, base_code, start, sums)`` adds to ``sums`` (pairs, columns) float64, in the order
    of the elements: blocks must come in order.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        lines = [
            *_gram_head(self.interface()),
            "    lanes, columns, shift, j0, j1 = sums, sums.shape[1], 0, 0, models",
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            *_gram_tile(self.of_deltas, "0, models", "i", 8),
            "        a = s",
            "        while a < e:",
            "            column = (start + a) % columns",
            "            z = min(e, a + columns - column)",
            "            for i in range(models):",
            *_products("i", "i * models - i * (i + 1) // 2", "a - s:z - s", "column:column + z - a", 16),
            "            a = z",
        ]
        return _gram_text(PRODUCTS, self.interface(), lines)

    def interface(self) -> Interface:
        return Interface(
            self.models,
            self.real,
            (*COMMON, ("start", "int"), ("sums", "float64*2")),
            (("base_tile", (TILE,), "REAL"), ("values", (-1, TILE), "REAL")),
            rows=self.models,
        )


@dataclass(frozen=True)
class RankKernel:
    """``run(keys, shares, ranks)``: see ``tiles.rank_rows``."""

    real: Real

    def text(self) -> str:
        text = PREAMBLE.format(bits=self.real[-2:]) + "from alnico.kernels.tiles import rank_rows\n\n\n"
        return (
            f"{text}{PLAIN}\ndef run(keys, shares, ranks):\n    rank_rows(keys, shares, ranks)\n\n\n"
            + self.interface().entry()
        )

    def interface(self) -> Interface:
        return Interface(
            1, self.real, (("keys", "uint64*2"), ("shares", "float32*1"), ("ranks", "float32*2"))
        )


def _product(others: int) -> str:
    """Add the products of one vector with one to four others to their lanes, in one loop, which loads that
    vector once."""
    heads = ["a", *[f"b{n}" for n in range(others)], *[f"l{n}" for n in range(others)]]
    lines = [
        f"def product{others}({', '.join(heads)}):",
        "    for j in range(a.size):",
        "        x = np.float64(a[j])",
    ]
    return "\n".join(lines + [f"        l{n}[j] += x * np.float64(b{n}[j])" for n in range(others)])


MOST_OTHERS = 4
PRODUCTS = [_product(others) for others in range(1, MOST_OTHERS + 1)]

# Adds halves to halves: the same order everywhere, and vector instructions down to the last step.
FOLD = (
    "def fold(lanes):\n    n = lanes.size\n    while n > 1:\n        n //= 2\n        for j in range(n):\n"
    "            lanes[j] += lanes[j + n]\n    total = lanes[0]\n    lanes[:] = 0.0\n    return total"
)


def _products_of_few(models: int, elements: str, lanes: str) -> list[str]:
    """Statements that add the products of all pairs (0, 0), (0, 1), ... of a part of a tile to their
    lanes."""
    pairs = [(i, j) for i in range(models) for j in range(i, models)]
    lines = []
    for i in range(models):
        for first in range(i, models, MOST_OTHERS):
            others = range(first, min(first + MOST_OTHERS, models))
            passed = [f"values[{j}, {elements}]" for j in (i, *others)]
            passed += [f"lanes[{pairs.index((i, j))}, {lanes}]" for j in others]
            lines.append(f"product{len(others)}({', '.join(passed)})")
    return lines


def _products(own: str, pair: str, elements: str, lanes: str, indent: int) -> list[str]:
    """Statements that add the products of model ``i``, in row ``own`` of the values, and of those from ``i`` and ``j0`` on to
    ``j1``, in the rows from ``shift`` on, for a part of a tile. ``pair + j`` is the row of their lanes."""
    lines = ["j = max(i, j0)", f"while j + {MOST_OTHERS - 1} < j1:"]
    lines += [f"    {_product_call(MOST_OTHERS, own, pair, elements, lanes)}", f"    j += {MOST_OTHERS}"]
    for others in range(1, MOST_OTHERS):
        lines += [f"if j1 - j == {others}:", f"    {_product_call(others, own, pair, elements, lanes)}"]
    return [" " * indent + line for line in lines]


GROUP = 4
"""Models of a group: the products of two groups have an accumulator each that stays in a register."""


def _groups(models: int) -> list[tuple[range, range]]:
    """Groups of models whose products with each other make all pairs."""
    groups = [range(g, min(g + GROUP, models)) for g in range(0, models, GROUP)]
    return [(a, b) for n, a in enumerate(groups) for b in groups[n:]]


def _whole_product(first: int, second: int, is_same: bool, real: Real) -> str:
    """A loop over the lanes of a whole tile: adds the products of two groups of vectors, or of all pairs of one.

    A product of two float32 is exact in float64, so adding it may be one instruction with it.
    """
    names = [f"a{i}" for i in range(first)] + ([] if is_same else [f"b{j}" for j in range(second)])
    others = names if is_same else names[first:]
    pairs = [
        (a, b) for i, a in enumerate(names[:first]) for j, b in enumerate(others) if not is_same or i <= j
    ]
    added = "add_product(x{0}, x{1}, s{2})" if real == "float32" else "s{2} + x{0} * x{1}"
    lines = [
        f"def whole{first}_{second}{'_same' if is_same else ''}({', '.join([*names, *[f'l{p}' for p in range(len(pairs))]])}):",
        f"    for lane in range({GRAM_LANES}):",
        "        j = np.uint64(lane)",
        *[f"        s{p} = l{p}[j]" for p in range(len(pairs))],
    ]
    for _ in range(0, TILE, GRAM_LANES):
        lines += [f"        x{name} = np.float64({name}[j])" for name in names]
        lines += [f"        s{p} = {added.format(a, b, p)}" for p, (a, b) in enumerate(pairs)]
        lines.append(f"        j += np.uint64({GRAM_LANES})")
    return "\n".join([*lines, *[f"        l{p}[lane] = s{p}" for p in range(len(pairs))]])


def _whole_products(models: int) -> list[str]:
    """Statements that add the products of all pairs to their lanes, if a part is a whole tile."""
    pairs = [(i, j) for i in range(models) for j in range(i, models)]
    lines = []
    for first, second in _groups(models):
        own = [(i, j) for i in first for j in second if i <= j]
        passed = [f"values[{i}]" for i in (first if first == second else [*first, *second])]
        passed += [f"lanes[{pairs.index(pair)}]" for pair in own]
        name = f"whole{len(first)}_{len(second)}{'_same' if first == second else ''}"
        lines.append(f"                {name}({', '.join(passed)})")
    return [f"            if z - a == {TILE}:", *lines, "                g = z"] if lines else []


def _product_call(others: int, own: str, pair: str, elements: str, lanes: str) -> str:
    passed = [f"values[{own}, {elements}]"]
    passed += [f"values[shift + j - j0 + {n}, {elements}]" for n in range(others)]
    passed += [f"lanes[{pair} + j + {n}, {lanes}]" for n in range(others)]
    return f"product{others}({', '.join(passed)})"


def _whole_products_of_groups(indent: int) -> list[str]:
    """Statements that add the products of two groups of models, or of all pairs of one, if a part is a whole tile."""
    halves = range(0, GRAM_GROUP, GROUP)
    lines = []
    for is_same in (True, False):
        lines.append("if not shift:" if is_same else "else:")
        for a in halves:
            for b in halves:
                own = is_same and a == b
                if is_same and a > b:
                    continue
                places = [
                    (i, j) for i in range(a, a + GROUP) for j in range(b, b + GROUP) if not own or i <= j
                ]
                others = [] if own else [b + n + (0 if is_same else GRAM_GROUP) for n in range(GROUP)]
                passed = [f"values[{i}]" for i in (*range(a, a + GROUP), *others)]
                passed += [f"lanes[{i * GRAM_GROUP + j}]" for i, j in places]
                lines.append(f"    whole{GROUP}_{GROUP}{'_same' if own else ''}({', '.join(passed)})")
    return [" " * indent + line for line in (*lines, "g = z")]


def _gram_head(interface: Interface) -> list[str]:
    return [
        f"def run({interface.signature()}):",
        "    models = raws.shape[0]",
        "    base_width = width_of(base_code)",
        "    count = raws[0, 1] // width_of(codes[0])",
    ]


def _gram_tile(of_deltas: bool, models: str, row: str, indent: int) -> list[str]:
    """Statements that decode the base, and some models into rows of the values."""
    lines = ["decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"] if of_deltas else []
    lines += [
        f"for i in range({models}):",
        f"    decode(part(raws, i, width_of(codes[i]), s, e), codes[i], values[{row}, :e - s])",
    ]
    lines += [f"    subtract(values[{row}, :e - s], base_tile[:e - s])"] if of_deltas else []
    return [" " * indent + line for line in lines]


def _gram_text(
    definitions: list[str], interface: Interface, lines: list[str], apart: Sequence[str] = ()
) -> str:
    """``apart`` are functions whose arrays do not overlap."""
    text = PREAMBLE.format(bits=interface.real[-2:]) + "".join(
        f"\n\n{PLAIN}\n{definition}\n" for definition in definitions
    )
    decorator = DECORATOR.format(options=APART)
    text += "".join(f"\n\n{decorator}\n{definition}\n" for definition in dict.fromkeys(apart))
    return f"{text}\n\n{PLAIN}\n" + "\n".join(lines) + "\n\n\n" + interface.entry()
