"""The texts of kernels that measure: sums, counts, values, histograms and brackets; inner products; ranks in rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from alnico.kernels.shape import GRAM_LANES, LANES, LEAF, TILE, UNROLLED_MODELS
from alnico.kernels.source import straighten
from alnico.kernels.text import DECORATOR, PREAMBLE, Kind, Real, argument_types, fill, filled, parameters, tile_type

Reduction = Literal["sum", "count", "values", "histogram", "bracket"]

OUTPUTS = {
    "sum": ("leaves",),
    "count": ("leaves",),
    "values": ("found",),
    "histogram": ("shift", "prefix", "bins"),
    "bracket": ("low", "high", "counts", "found"),
}
"""What ``run`` fills in and needs besides, each with one row a chosen model."""

PLAIN = DECORATOR.format(options="")
INLINE = DECORATOR.format(options='inline="always", ')
ENTRY = DECORATOR.format(options="cache=CACHE, ")


@dataclass(frozen=True)
class MeasureKernel:
    """Reduces ``of`` of one model's value, for each ``chosen`` model, over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, start, chosen, *outputs, *arguments)``, where ``outputs`` have a row for each chosen
    model. Of ``sum`` and ``count``: ``leaves``, filled with a number a leaf. Of ``values``: ``found``, filled with the
    values themselves. Of ``histogram``: ``shift, prefix, bins``; bin ``(bits >> shift) & 0xFFFF`` counts the elements whose
    bits above that equal ``prefix``. Of ``bracket``: ``low, high, counts, found``; ``counts`` gets the number of elements
    above ``high`` and of those in [``low``, ``high``], and the latter are put into ``found`` while there is room, unless
    ``low`` is ``high``: then they are all the same. With ``across``, ``of`` sees the values of all models, too.
    """

    reduction: Reduction
    of: Callable[..., float]
    models: int
    of_deltas: bool
    kinds: tuple[Kind, ...]
    real: Real
    across: bool = False

    def text(self) -> str:
        reduction = {"sum": self._sums, "count": self._sums, "values": self._values, "histogram": self._histogram}
        definitions, body = reduction.get(self.reduction, self._bracket)()
        # The text must say all that its types depend on: it is their key.
        text = PREAMBLE.format(bits=self.real[-2:]) + f"MODELS = {self.models}\n"
        text += "".join(f"\n\n{INLINE}\n{function}\n" for function in straighten(self.of, "of"))
        text += "".join(f"\n\n{PLAIN}\n{definition}\n" for definition in definitions)
        signature = ["raws", "codes", "base", "base_code", "start", "chosen", *OUTPUTS[self.reduction], *parameters(self.kinds)]
        head = [
            f"def run({', '.join(signature)}):",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            "    width = 8 if codes[0] == 0 else (4 if codes[0] == 1 else 2)",
            "    count = raws[0].size // width",
            f"    values = np.empty(({self.models if self.across else 1}, {TILE}), REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            *[f"    filled{a} = np.empty({TILE}, {tile_type(self.kinds[a])})" for a in filled(self.kinds)],
        ]
        return text + "\n\n" + ENTRY + "\n" + "\n".join(head + body) + "\n"

    def _tile(self, result: str, statement: str) -> str:
        """A loop over one tile; ``{value}`` in the statement is what ``of`` says of an element."""
        base = " - base[j]" if self.of_deltas else ""
        given = [f"v[j]{base}"]
        heads = ["v", "base", result]
        prepare: list[str] = []
        if self.across and self.models <= UNROLLED_MODELS:
            heads += [f"v{i}" for i in range(self.models)]
            given.append(f"({' '.join(f'v{i}[j]{base},' for i in range(self.models))})")
        elif self.across:
            heads.append("every")
            given.append("x")
            prepare = [f"        for i in range({self.models}):", f"            x[i] = every[i, j]{base}"]
        for a, kind in enumerate(self.kinds):
            heads += [f"f{a}"] if a in filled(self.kinds) else []
            heads += [f"a{a}"] if kind in ("number", "numbers", "bernoulli") else []
            given.append(
                {"bernoulli": f"select(f{a}[j] < a{a}, ONE, ZERO)"}.get(kind, f"f{a}[j]" if a in filled(self.kinds) else f"a{a}")
            )
        lines = [f"def tile({', '.join(heads)}):"]
        lines += [f"    x = np.empty({self.models}, REAL)"] if prepare else []
        value = f"of({', '.join(given)})"
        lines += ["    for j in range(v.size):", *prepare, f"        {statement.format(value=value)}"]
        return "\n".join(lines)

    def _each_model(self, span: str, work: list[str]) -> list[str]:
        """Statements for the tile ``s`` to ``e``: decode, then ``work`` for each model ``i``, the ``n``-th that is chosen."""
        lines = [f"        {span}"]
        if self.of_deltas:
            lines.append("        decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])")
        if self.across:
            lines.append(f"        for i in range({self.models}):")
            lines.append("            w = 8 if codes[i] == 0 else (4 if codes[i] == 1 else 2)")
            lines.append("            decode(raws[i][w * s:w * e], codes[i], values[i, :e - s])")
        lines += ["        for n in range(chosen.size):", "            i = chosen[n]"]
        if not self.across:
            lines.append("            w = 8 if codes[i] == 0 else (4 if codes[i] == 1 else 2)")
            lines.append("            decode(raws[i][w * s:w * e], codes[i], values[0, :e - s])")
        lines += [f"            {fill(self.kinds, a, 'i', f'filled{a}[:e - s]')}" for a in filled(self.kinds)]
        return lines + [f"            {line}" for line in work]

    def _call(self, result: str, begin: str, stop: str) -> str:
        own = "i" if self.across else "0"
        passed = [f"values[{own}, {begin}:{stop}]", f"base_tile[{begin}:{stop}]", result]
        if self.across and self.models <= UNROLLED_MODELS:
            passed += [f"values[{i}, {begin}:{stop}]" for i in range(self.models)]
        elif self.across:
            passed.append(f"values[:, {begin}:{stop}]")
        for a, kind in enumerate(self.kinds):
            passed += [f"filled{a}[{begin}:{stop}]"] if a in filled(self.kinds) else []
            passed += [{"number": f"a{a}"}.get(kind, f"a{a}[i]")] if kind in ("number", "numbers", "bernoulli") else []
        return f"tile({', '.join(passed)})"

    def _tiles(self, work: list[str]) -> list[str]:
        return [f"    for s in range(0, count, {TILE}):", *self._each_model(f"e = min(s + {TILE}, count)", work)]

    def _values(self) -> tuple[list[str], list[str]]:
        return [self._tile("out", "out[j] = {value}")], self._tiles([self._call("found[n, s:e]", "0", "e - s")])

    def _histogram(self) -> tuple[list[str], list[str]]:
        bits = "uint32" if self.real == "float32" else "uint64"
        work = [
            self._call("measured[:e - s]", "0", "e - s"),
            "for j in range(e - s):",
            "    b = np.uint64(bits[j])",
            "    if (b >> np.uint64(16)) >> shift == prefix[n]:",
            "        bins[n, np.int64((b >> shift) & np.uint64(0xFFFF))] += 1",
        ]
        made = [f"    measured = np.empty({TILE}, REAL)", f"    bits = measured.view(np.{bits})"]
        # -0.0 + 0.0 is 0.0: with its sign bit a zero would be the largest of all.
        return [self._tile("out", "out[j] = {value} + ZERO")], made + self._tiles(work)

    def _bracket(self) -> tuple[list[str], list[str]]:
        definitions = [
            self._tile("out", "out[j] = {value}"),
            "def above(measured, high):\n    total = np.int32(0)\n    for j in range(measured.size):\n"
            "        total += np.int32(measured[j] > high)\n    return total",
            "def mark(measured, low, high, flags):\n    total = np.int32(0)\n    for j in range(measured.size):\n"
            "        flag = (measured[j] >= low) & (measured[j] <= high)\n        flags[j] = np.uint8(flag)\n"
            "        total += np.int32(flag)\n    return total",
            # Eight flags are one word, and most words are 0.
            "def gather(measured, flags, found, place):\n    words = flags.view(np.uint64)\n"
            "    for w in range(words.size):\n        if words[w] != 0:\n"
            "            for j in range(8 * w, 8 * w + 8):\n                if flags[j] and place < found.size:\n"
            "                    found[place] = measured[j]\n                    place += 1\n    return place",
        ]
        work = [
            self._call("measured[:e - s]", "0", "e - s"),
            "counts[n, 0] += above(measured[:e - s], high[n])",
            "counts[n, 1] += mark(measured[:e - s], low[n], high[n], flags)",
            "if low[n] != high[n]:",
            "    flags[e - s:] = 0",
            "    places[n] = gather(measured, flags, found[n], places[n])",
        ]
        made = [
            f"    measured = np.empty({TILE}, REAL)",
            f"    flags = np.zeros({TILE}, np.uint8)",
            "    places = np.zeros(chosen.size, np.int64)",
        ]
        return definitions, made + self._tiles(work)

    def _sums(self) -> tuple[list[str], list[str]]:
        one = "np.float64({value})" if self.reduction == "sum" else "np.int64({value} != ZERO)"
        kind = "float64" if self.reduction == "sum" else "int64"
        work = [
            f"for g in range(0, e - s, {LANES}):",
            f"    h = min(g + {LANES}, e - s)",
            f"    {self._call('lanes[n, :h - g]', 'g', 'h')}",
        ]
        body = [
            f"    lanes = np.empty((chosen.size, {LANES}), np.{kind})",
            "    for leaf in range(leaves.shape[1]):",
            "        lanes[:] = 0",
            f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
            *[f"    {line}" for line in self._each_model(f"e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))", work)],
            "        for n in range(chosen.size):",
            f"            total = np.{kind}(0)",
            f"            for l in range({LANES}):",
            "                total += lanes[n, l]",
            "            leaves[n, leaf] = total",
        ]
        return [self._tile("lanes", f"lanes[j] += {one}")], body

    def signature(self, types: Any) -> Any:
        raw, real = types.uint8[::1], getattr(types, self.real)
        outputs = {
            "sum": (types.float64[:, ::1],),
            "count": (types.int64[:, ::1],),
            "values": (real[:, ::1],),
            "histogram": (types.uint64, types.uint64[::1], types.int64[:, ::1]),
            "bracket": (real[::1], real[::1], types.int64[:, ::1], real[:, ::1]),
        }[self.reduction]
        first = [types.UniTuple(raw, self.models), types.int64[::1], raw, types.int64, types.int64, types.int64[::1]]
        return (*first, *outputs, *argument_types(self.kinds, self.real, types))


@dataclass(frozen=True)
class GramKernel:
    """Inner products of all pairs of ``models`` inputs over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, start, row, sums)`` fills ``sums`` (segments, pairs) float64 with the products of the
    pairs (0, 0), (0, 1), ... (0, k-1), (1, 1), ...: a segment is the part of a leaf that lies in one row of ``row`` elements,
    numbered ``element // row + element // LEAF`` less that of the block's first. Products of float32 are exact in float64.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        pairs = self.models * (self.models + 1) // 2
        lines = [
            *_gram_head("start, row, sums", self.models),
            f"    lanes = np.zeros(({pairs}, {GRAM_LANES}), np.float64)",
            f"    first = start // row + start // {LEAF}",
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            *_gram_tile(self.models, self.of_deltas),
            "        a = s",
            "        while a < e:",
            "            place = start + a",
            f"            left = min(row - place % row, {LEAF} - place % {LEAF}, count - a)",
            "            z = min(e, a + left)",
            "            pair = 0",
            f"            for i in range({self.models}):",
            f"                for j in range(i, {self.models}):",
            f"                    dot(values[i, a - s:z - s], values[j, a - s:z - s], lanes[pair], place % {GRAM_LANES})",
            "                    pair += 1",
            "            if z - a == left:",
            f"                segment = place // row + place // {LEAF} - first",
            f"                for p in range({pairs}):",
            "                    total = 0.0",
            f"                    for l in range({GRAM_LANES}):",
            "                        total += lanes[p, l]",
            "                    sums[segment, p] = total",
            "                lanes[:] = 0.0",
            "            a = z",
        ]
        return _gram_text(DOT, self.real, lines)

    def signature(self, types: Any) -> Any:
        return (*_gram_signature(self.models, types), types.int64, types.int64, types.float64[:, ::1])


@dataclass(frozen=True)
class ColumnGramKernel:
    """Inner products of all pairs of ``models`` inputs over the ``columns`` of a block.

    ``run(raws, codes, base, base_code, start, sums)`` adds to ``sums`` (pairs, columns) float64, in the order of the
    elements: blocks must come in order.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        lines = [
            *_gram_head("start, sums", self.models),
            "    columns = sums.shape[1]",
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            *_gram_tile(self.models, self.of_deltas),
            "        a = s",
            "        while a < e:",
            "            column = (start + a) % columns",
            "            z = min(e, a + columns - column)",
            "            pair = 0",
            f"            for i in range({self.models}):",
            f"                for j in range(i, {self.models}):",
            "                    add(values[i, a - s:z - s], values[j, a - s:z - s], sums[pair, column:column + z - a])",
            "                    pair += 1",
            "            a = z",
        ]
        return _gram_text(ADD, self.real, lines)

    def signature(self, types: Any) -> Any:
        return (*_gram_signature(self.models, types), types.int64, types.float64[:, ::1])


@dataclass(frozen=True)
class RankKernel:
    """``run(ordered, places, ranks)``: see ``tiles.rank_rows``."""

    real: Real

    def text(self) -> str:
        return (
            f"from numba import njit\nfrom alnico.kernels.tiles import rank_rows\n\nREAL = '{self.real}'\n\n\n"
            f"{ENTRY}\ndef run(ordered, places, ranks):\n    rank_rows(ordered, places, ranks)\n"
        )

    def signature(self, types: Any) -> Any:
        return (getattr(types, self.real)[:, ::1], types.int64[:, ::1], types.float32[:, ::1])


ADD = "def add(a, b, lanes):\n    for j in range(a.size):\n        lanes[j] += np.float64(a[j]) * np.float64(b[j])"
# An element has the same lane wherever tiles begin.
DOT = (
    f"{ADD}\n\n\n{PLAIN}\n"
    f"def dot(a, b, lanes, phase):\n    h = min({GRAM_LANES} - phase, a.size)\n    add(a[:h], b[:h], lanes[phase:phase + h])\n"
    f"    for g in range(h, a.size, {GRAM_LANES}):\n        h = min(g + {GRAM_LANES}, a.size)\n"
    "        add(a[g:h], b[g:h], lanes[:h - g])"
)


def _gram_head(parameters: str, models: int) -> list[str]:
    return [
        f"def run(raws, codes, base, base_code, {parameters}):",
        "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
        "    width = 8 if codes[0] == 0 else (4 if codes[0] == 1 else 2)",
        "    count = raws[0].size // width",
        f"    values = np.empty(({models}, {TILE}), REAL)",
        f"    base_tile = np.empty({TILE}, REAL)",
    ]


def _gram_tile(models: int, of_deltas: bool) -> list[str]:
    lines = ["        decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"] if of_deltas else []
    lines += [
        f"        for i in range({models}):",
        "            w = 8 if codes[i] == 0 else (4 if codes[i] == 1 else 2)",
        "            decode(raws[i][w * s:w * e], codes[i], values[i, :e - s])",
    ]
    return lines + (["            subtract(values[i, :e - s], base_tile[:e - s])"] if of_deltas else [])


def _gram_text(definition: str, real: Real, lines: list[str]) -> str:
    return f"{PREAMBLE.format(bits=real[-2:])}\n\n{PLAIN}\n{definition}\n\n\n{ENTRY}\n" + "\n".join(lines) + "\n"


def _gram_signature(models: int, types: Any) -> tuple[Any, ...]:
    raw = types.uint8[::1]
    return (types.UniTuple(raw, models), types.int64[::1], raw, types.int64)
