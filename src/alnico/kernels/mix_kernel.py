"""Writes the kernel that mixes: raw bytes of all inputs in, raw bytes of the output out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alnico.kernels.constants import FEW_MODELS, TILE, UNROLLED_MODELS
from alnico.kernels.scalar_source import straighten
from alnico.kernels.template import (
    APART,
    DECORATOR,
    PREAMBLE,
    ArgumentKind,
    Interface,
    Real,
    argument_parameters,
    fill_statement,
    tile_type,
    tiled_arguments,
    value_of,
)


@dataclass(frozen=True)
class MixKernel:
    """Computes output bytes from input bytes, for ``models`` inputs, of which ``differences`` says whether they are models or
    what is added to the base: then a model is ``base + difference``, rounded as it is where it is read.

    ``run(raws, codes, base, base_code, out, out_code, start, keep_equal, *arguments) -> int`` takes raw bytes
    (uint8) of the same elements of each input, the models' and then those of each side, and returns -1, or
    the first element of a tile that holds a NaN or an infinity.
    """

    mix: Callable[..., float]
    models: int
    of_deltas: bool
    kinds: tuple[ArgumentKind, ...]
    real: Real
    differences: bool = False

    def text(self) -> str:
        unrolled = self.models <= UNROLLED_MODELS
        models = range(self.models)
        names = [f"a{i}" for i, kind in enumerate(self.kinds) if kind in ("number", "numbers")]
        each = tiled_arguments(self.kinds)
        value = "v{i}[j] - b" if self.of_deltas else "v{i}[j]"
        value = value.replace("v{i}[j]", "(b + v{i}[j])") if self.differences else value
        body: list[str] = []
        loop: list[str] = []
        if unrolled:
            heads = (
                [f"v{i}" for i in models]
                + ["base"]
                + [f"n{a}_{i}" for a in each for i in models]
                + ["out", "keep_equal"]
            )
            for i, kind in enumerate(self.kinds):
                if kind == "numbers":
                    body.append(f"    t{i} = ({' '.join(f'a{i}[{m}],' for m in models)})")
            loop.append(f"        x = ({' '.join(value.format(i=i) + ',' for i in models)})")
            for a in each:
                numbers = (value_of(self.kinds[a], f"n{a}_{m}[j]") for m in models)
                loop.append(f"        t{a} = ({' '.join(number + ',' for number in numbers)})")
            equal = " & ".join(f"(x[{i}] == x[0])" for i in models if i) or "True"
        else:
            heads = ["values", "base"] + [f"n{a}" for a in each] + ["out", "keep_equal"]
            body += [f"    t{i} = a{i}" for i, kind in enumerate(self.kinds) if kind == "numbers"]
            heads += ["x", *[f"t{a}" for a in each]]
            loop += ["        equal = True", f"        for i in range({self.models}):"]
            model = "(b + values[i, j])" if self.differences else "values[i, j]"
            loop.append(f"            x[i] = {model}{' - b' if self.of_deltas else ''}")
            loop.append("            equal &= x[i] == x[0]")
            for a in each:
                loop.append(f"            t{a}[i] = {value_of(self.kinds[a], f'n{a}[i, j]')}")
            equal = "equal"
        arguments = ", ".join(f"a{i}" if kind == "number" else f"t{i}" for i, kind in enumerate(self.kinds))
        loop.append(f"        m = REAL(mix(x, {arguments}))")
        if self.of_deltas:
            loop.append("        out[j] = select(m == ZERO, b, b + m)")
        else:
            loop.append(f"        out[j] = select(keep_equal & {equal}, x[0], m)")
        tile = [f"def tile({', '.join([*heads, *names])}):", *body, "    for j in range(out.size):"]
        tile += (["        b = base[j]"] if self.of_deltas else []) + loop
        return (
            self._preamble()
            + DECORATOR.format(options=APART)
            + "\n"
            + "\n".join(tile)
            + "\n\n\n"
            + self._run(unrolled, names, each)
        )

    def _preamble(self) -> str:
        inline = DECORATOR.format(options='inline="always", ')
        return (
            PREAMBLE.format(bits=self.real[-2:])
            + "".join(
                f"\n\n{inline}\n{function}\n"
                for function in straighten(self.mix, "mix", self.models if self.models > FEW_MODELS else None)
            )
            + "\n\n"
        )

    def _run(self, unrolled: bool, names: list[str], each: list[int]) -> str:
        models = range(self.models)
        lines = [
            f"def run({self.interface().signature()}):",
            "    width = width_of(out_code)",
            "    base_width = width_of(base_code)",
            "    count = out.size // width",
        ]
        lines += [
            f"    for s in range(0, count, {TILE}):",
            f"        e = min(s + {TILE}, count)",
            "        bad = False",
        ]
        for i in models:
            lines.append(f"        w = width_of(codes[{i}])")
            lines.append(f"        bad |= decode(raws[{i}][w * s:w * e], codes[{i}], values[{i}, :e - s])")
        if self.of_deltas:
            lines.append(
                "        bad |= decode(base[base_width * s:base_width * e], base_code, base_tile[:e - s])"
            )
        sides = [a for a in each if self.kinds[a] == "side"]
        for a in each:
            first = self.models * (1 + sides.index(a)) if a in sides else None
            for i in models:
                raw = None if first is None else first + i
                lines.append(f"        {fill_statement(self.kinds, a, i, f'filled{a}[{i}, :e - s]', raw)}")
        passed = [f"values[{i}, :e - s]" for i in models] if unrolled else ["values"]
        passed.append("base_tile[:e - s]")
        passed += (
            [f"filled{a}[{i}, :e - s]" for a in each for i in models]
            if unrolled
            else [f"filled{a}" for a in each]
        )
        passed += [
            "out_tile[:e - s]",
            "keep_equal != 0",
            *([] if unrolled else ["x", *[f"t{a}" for a in each]]),
            *names,
        ]
        lines += [
            f"        tile({', '.join(passed)})",
            "        bad |= encode(out_tile[:e - s], out_code, out[width * s:width * e])",
            "        if bad:",
            "            return s",
            "    return -1",
        ]
        return DECORATOR.format(options="") + "\n" + "\n".join(lines) + "\n\n\n" + self.interface().entry()

    def interface(self) -> Interface:
        first = [
            ("raws", "raws"), ("codes", "int64*1"), ("base", "uint8*1"), ("base_code", "int"), ("out", "uint8*1"), ("out_code", "int"),
            ("start", "int"), ("keep_equal", "int"),
        ]  # fmt: skip
        each = tiled_arguments(self.kinds)
        scratch = [
            ("values", (self.models, TILE), "REAL"),
            ("base_tile", (TILE,), "REAL"),
            ("out_tile", (TILE,), "REAL"),
        ]
        scratch += [(f"filled{a}", (self.models, TILE), tile_type(self.kinds[a])) for a in each]
        if self.models > UNROLLED_MODELS:
            scratch += [("x", (self.models,), "REAL"), *[(f"t{a}", (self.models,), "REAL") for a in each]]
        raws = self.models * (1 + self.kinds.count("side"))
        return Interface(
            raws,
            self.real,
            (*first, *argument_parameters(self.kinds, self.real)),
            tuple(scratch),
            returns=True,
        )
