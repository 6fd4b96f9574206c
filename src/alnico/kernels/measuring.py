"""The texts of kernels that measure: sums, counts, values, histograms and brackets of one model; inner products of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from alnico.kernels.shape import GRAM_LANES, LANES, LEAF, TILE
from alnico.kernels.source import straighten
from alnico.kernels.text import DECORATOR, PREAMBLE, Kind, Real, argument_types


@dataclass(frozen=True)
class MeasureKernel:
    """Reduces ``of`` of one model's values over a block that begins at a leaf.

    ``run(raw, code, base, base_code, start, leaves, *arguments)`` fills ``leaves`` (float64 sums, or int64 counts) with
    one number a leaf; for ``values`` it fills it with the values themselves. For ``histogram``, ``run(raw, code, base, base_code, start, shift, prefix, bins, *arguments)``
    adds to bin ``(bits >> shift) & 0xFFFF`` each element whose bits above that equal ``prefix``. For ``bracket``,
    ``run(raw, code, base, base_code, start, low, high, counts, found, *arguments)`` adds to ``counts`` the elements above
    ``high`` and those in [``low``, ``high``], and puts the latter into ``found`` from its beginning while there is room, unless
    ``low`` is ``high``: then they are all the same.
    """

    reduction: Literal["sum", "count", "values", "histogram", "bracket"]
    of: Callable[..., float]
    of_deltas: bool
    kinds: tuple[Kind, ...]
    real: Real

    def text(self) -> str:
        names = [f"a{i}" for i in range(len(self.kinds))]
        noisy = [i for i, kind in enumerate(self.kinds) if kind in ("noise", "bernoulli")]
        arguments = ["v[j] - base[j]" if self.of_deltas else "v[j]"]
        for i, kind in enumerate(self.kinds):
            arguments.append({"noise": f"n{i}[j]", "bernoulli": f"select(n{i}[j] < a{i}, ONE, ZERO)"}.get(kind, f"a{i}"))
        value = f"of({', '.join(arguments)})"
        noise = [f"n{i}" for i in noisy]
        inline = DECORATOR.format(options='inline="always", ')
        plain = DECORATOR.format(options="")
        text = PREAMBLE.format(bits=self.real[-2:])
        text += "".join(f"\n\n{inline}\n{function}\n" for function in straighten(self.of, "of"))
        extra = {"histogram": ["shift", "prefix", "bins"], "bracket": ["low", "high", "counts", "found"]}.get(
            self.reduction, ["leaves"]
        )
        signature = ["raw", "code", "base", "base_code", "start", *extra]
        for i, name in enumerate(names):
            signature += [name, f"key{i}"] if i in noisy else [name]
        lines = [
            f"def run({', '.join(signature)}):",
            "    width = 8 if code == 0 else (4 if code == 1 else 2)",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            "    count = raw.size // width",
            f"    values = np.empty({TILE}, REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            *[f"    noise{i} = np.empty({TILE}, np.float32)" for i in noisy],
        ]
        fill = [
            "decode(raw[width * s:width * e], code, values[:e - s])",
            *(["decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"] if self.of_deltas else []),
            *[f"fill_noise(key{i}, start + s, noise{i}[:e - s])" for i in noisy],
        ]

        def tile(result: str, statement: str) -> str:
            heads = ", ".join(["v", "base", *noise, result, *names])
            return f"\n\n{plain}\ndef tile({heads}):\n    for j in range(v.size):\n        {statement}\n"

        def each_tile(result: str) -> list[str]:
            passed = ["values[:e - s]", "base_tile[:e - s]", *[f"noise{i}[:e - s]" for i in noisy], result, *names]
            return [
                f"    for s in range(0, count, {TILE}):",
                f"        e = min(s + {TILE}, count)",
                *[f"        {line}" for line in fill],
                f"        tile({', '.join(passed)})",
            ]

        if self.reduction == "histogram":
            bits = "uint32" if self.real == "float32" else "uint64"
            # -0.0 + 0.0 is 0.0: with its sign bit a zero would be the largest of all.
            text += tile("measured", f"measured[j] = {value} + ZERO")
            lines += [
                f"    measured = np.empty({TILE}, REAL)",
                f"    bits = measured.view(np.{bits})",
                *each_tile("measured[:e - s]"),
                "        for j in range(e - s):",
                "            b = np.uint64(bits[j])",
                "            if (b >> np.uint64(16)) >> shift == prefix:",
                "                bins[np.int64((b >> shift) & np.uint64(0xFFFF))] += 1",
            ]
        elif self.reduction == "bracket":
            text += tile("measured", f"measured[j] = {value}")
            text += f"\n\n{plain}\ndef above(measured, high):\n    total = np.int32(0)\n    for j in range(measured.size):\n"
            text += "        total += np.int32(measured[j] > high)\n    return total\n"
            text += (
                f"\n\n{plain}\ndef mark(measured, low, high, flags):\n    total = np.int32(0)\n    for j in range(measured.size):\n"
            )
            text += "        flag = (measured[j] >= low) & (measured[j] <= high)\n        flags[j] = np.uint8(flag)\n"
            text += "        total += np.int32(flag)\n    return total\n"
            # Eight flags are one word, and most words are 0.
            text += f"\n\n{plain}\ndef gather(measured, flags, found, place):\n    words = flags.view(np.uint64)\n"
            text += "    for w in range(words.size):\n        if words[w] != 0:\n"
            text += "            for j in range(8 * w, 8 * w + 8):\n                if flags[j] and place < found.size:\n"
            text += "                    found[place] = measured[j]\n                    place += 1\n    return place\n"
            lines += [
                f"    measured = np.empty({TILE}, REAL)",
                f"    flags = np.zeros({TILE}, np.uint8)",
                "    place = 0",
                *each_tile("measured[:e - s]"),
                "        counts[0] += above(measured[:e - s], high)",
                "        counts[1] += mark(measured[:e - s], low, high, flags)",
                "        if low != high:",
                "            flags[e - s:] = 0",
                "            place = gather(measured, flags, found, place)",
            ]
        elif self.reduction == "values":
            text += tile("measured", f"measured[j] = {value}")
            lines += each_tile("leaves[s:e]")
        else:
            one = f"np.float64({value})" if self.reduction == "sum" else f"np.int64({value} != ZERO)"
            zero, lane_type = ("0.0", "float64") if self.reduction == "sum" else ("0", "int64")
            text += tile("lanes", f"lanes[j] += {one}")
            passed = ["values[g:h]", "base_tile[g:h]", *[f"noise{i}[g:h]" for i in noisy], "lanes[:h - g]", *names]
            lines += [
                f"    lanes = np.empty({LANES}, np.{lane_type})",
                "    for leaf in range(leaves.size):",
                f"        lanes[:] = {zero}",
                f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
                f"            e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))",
                *[f"            {line}" for line in fill],
                f"            for g in range(0, e - s, {LANES}):",
                f"                h = min(g + {LANES}, e - s)",
                f"                tile({', '.join(passed)})",
                f"        total = {zero}",
                f"        for j in range({LANES}):",
                "            total += lanes[j]",
                "        leaves[leaf] = total",
            ]
        return text + "\n\n" + DECORATOR.format(options="cache=CACHE, ") + "\n" + "\n".join(lines) + "\n"

    def signature(self, types: Any) -> Any:
        raw, real = types.uint8[::1], getattr(types, self.real)
        result = {"sum": types.float64[::1], "count": types.int64[::1], "values": real[::1]}
        extra = {
            "histogram": [types.uint64, types.uint64, types.int64[::1]],
            "bracket": [real, real, types.int64[::1], real[::1]],
        }.get(self.reduction) or [result[self.reduction]]
        arguments = [raw, types.int64, raw, types.int64, types.int64, *extra]
        return tuple(arguments + argument_types(self.kinds, real, real, types.uint64))


@dataclass(frozen=True)
class GramKernel:
    """Inner products of all pairs of ``models`` inputs over a block that begins at a leaf.

    ``run(raws, codes, base, base_code, count, leaves)`` fills ``leaves`` (leaves, models, models) float64 above and on
    the diagonal. Products of float32 are exact in float64.
    """

    models: int
    of_deltas: bool
    real: Real

    def text(self) -> str:
        k = self.models
        fill: list[str] = []
        for i in range(k):
            fill += [f"w = 8 if codes[{i}] == 0 else (4 if codes[{i}] == 1 else 2)"]
            fill += [f"decode(raws[{i}][w * s:w * e], codes[{i}], values[{i}, :e - s])"]
        if self.of_deltas:
            fill += ["decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"]
            fill += [f"subtract(values[{i}, :e - s], base_tile[:e - s])" for i in range(k)]
        lines = [
            "def run(raws, codes, base, base_code, count, leaves):",
            "    base_width = 8 if base_code == 0 else (4 if base_code == 1 else 2)",
            f"    values = np.empty(({k}, {TILE}), REAL)",
            f"    base_tile = np.empty({TILE}, REAL)",
            f"    lanes = np.empty(({k}, {k}, {GRAM_LANES}), np.float64)",
            "    for leaf in range(leaves.shape[0]):",
            "        lanes[:] = 0.0",
            f"        for s in range(leaf * {LEAF}, min((leaf + 1) * {LEAF}, count), {TILE}):",
            f"            e = min(s + {TILE}, min((leaf + 1) * {LEAF}, count))",
            *[f"            {line}" for line in fill],
            f"            for i in range({k}):",
            f"                for j in range(i, {k}):",
            f"                    for g in range(0, e - s, {GRAM_LANES}):",
            f"                        h = min(g + {GRAM_LANES}, e - s)",
            "                        dot(values[i, g:h], values[j, g:h], lanes[i, j, :h - g])",
            f"        for i in range({k}):",
            f"            for j in range(i, {k}):",
            "                total = 0.0",
            f"                for l in range({GRAM_LANES}):",
            "                    total += lanes[i, j, l]",
            "                leaves[leaf, i, j] = total",
        ]
        plain = DECORATOR.format(options="")
        text = PREAMBLE.format(bits=self.real[-2:])
        text += f"\n\n{plain}\ndef dot(a, b, lanes):\n    for j in range(a.size):\n"
        text += "        lanes[j] += np.float64(a[j]) * np.float64(b[j])\n"
        text += f"\n\n{plain}\ndef subtract(a, b):\n    for j in range(a.size):\n        a[j] -= b[j]\n"
        return text + "\n\n" + DECORATOR.format(options="cache=CACHE, ") + "\n" + "\n".join(lines) + "\n"

    def signature(self, types: Any) -> Any:
        raw = types.uint8[::1]
        return (types.UniTuple(raw, self.models), types.int64[::1], raw, types.int64, types.int64, types.float64[:, :, ::1])
