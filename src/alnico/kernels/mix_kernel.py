"""Writes the kernel that mixes: raw bytes of all inputs in, raw bytes of the output out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from alnico.kernels.array_source import NoArrayForm
from alnico.kernels.constants import FEW_MODELS, TILE
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
from alnico.kernels.tile_program import GROUP, LEAST_TILE, MOST_TILE, TileProgram, room_of


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
        if (program := self._program()) is not None:
            return self._text_of_many(program)
        unrolled = self.models <= FEW_MODELS
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
        inline = DECORATOR.format(options='inline="always"')
        return (
            PREAMBLE.format(bits=self.real[-2:])
            + "".join(f"\n\n{inline}\n{function}\n" for function in straighten(self.mix, "mix"))
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
            lines.append(
                f"        bad |= decode(part(raws, {i}, width_of(codes[{i}]), s, e), codes[{i}], values[{i}, :e - s])"
            )
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

    def _program(self) -> TileProgram | None:
        """The equation for any number of models; None for few, and for one whose variables have no known types."""
        return (
            None
            if self.models <= FEW_MODELS
            else _program_of(self.mix, self.kinds, self.real, self.of_deltas)
        )

    def _text_of_many(self, program: TileProgram) -> str:
        each = tiled_arguments(self.kinds)
        sides = [a for a in each if self.kinds[a] == "side"]
        value = program.row("x", "r_")
        fill = [f"v = {value}", "bad |= decode(part(raws, i, width_of(codes[i]), s, e), codes[i], v)"]
        fill += ["add(v, base_tile[:size])"] if self.differences else []
        fill += ["subtract(v, base_tile[:size])"] if self.of_deltas else []
        fill += (
            ["if i == 0:", "    for j in range(size):", "        first_tile[j] = v[j]"]
            if program.uses_first
            else []
        )
        for a in each:
            raw = f"models * {1 + sides.index(a)} + i" if a in sides else None
            fill.append(fill_statement(self.kinds, a, "i", program.row(f"t{a}", "r_"), raw))
        interface = self.interface()
        lines = [
            f"def run({interface.signature()}):",
            f"    models = raws.shape[0] // {1 + len(sides)}",
            f"    rows = {program.rows()}",
            "    width = width_of(out_code)",
            "    base_width = width_of(base_code)",
            "    count = out.size // width",
            f"    length = min({MOST_TILE}, room.size // (rows * {1 + len(each)}) // {LEAST_TILE} * {LEAST_TILE})",
            "    for s in range(0, count, length):",
            "        e = min(s + length, count)",
            "        size = e - s",
            "        bad = False",
        ]
        if self.of_deltas:
            lines.append(
                "        bad |= decode(base[base_width * s:base_width * e], base_code, base_tile[:size])"
            )
        lines += [f"        {line}" for line in program.statements(fill)]
        lines += [
            "        bad |= encode(out_tile[:size], out_code, out[width * s:width * e])",
            "        if bad:",
            "            return s",
            "    return -1",
        ]
        parts = [PREAMBLE.format(bits=self.real[-2:]), *program.functions]
        return (
            "\n\n".join([*parts, DECORATOR.format(options="") + "\n" + "\n".join(lines)])
            + "\n\n\n"
            + interface.entry()
        )

    def interface(self) -> Interface:
        first = [
            ("raws", "raws"), ("codes", "int64*1"), ("base", "uint8*1"), ("base_code", "int"), ("out", "uint8*1"), ("out_code", "int"),
            ("start", "int"), ("keep_equal", "int"),
        ]  # fmt: skip
        each = tiled_arguments(self.kinds)
        raws = self.models * (1 + self.kinds.count("side"))
        parameters = (*first, *argument_parameters(self.kinds, self.real))
        if (program := self._program()) is not None:
            tiles = [
                "base_tile",
                "out_tile",
                *(["first_tile"] if program.uses_first else []),
                *program.tiles(),
            ]
            rows = GROUP if program.is_single else self.models
            scratch: list[Scratch] = [
                *((t, (MOST_TILE,), "REAL") for t in tiles),
                ("room", (-LEAST_TILE,), "REAL"),
            ]
            room = room_of(rows * (1 + len(each)), self.real)
            return Interface(raws, self.real, parameters, tuple(scratch), returns=True, rows=room)
        scratch = [
            ("values", (self.models, TILE), "REAL"),
            ("base_tile", (TILE,), "REAL"),
            ("out_tile", (TILE,), "REAL"),
        ]
        scratch += [(f"filled{a}", (self.models, TILE), tile_type(self.kinds[a])) for a in each]
        if self.models > FEW_MODELS:
            scratch += [("x", (self.models,), "REAL"), *[(f"t{a}", (self.models,), "REAL") for a in each]]
        return Interface(raws, self.real, parameters, tuple(scratch), returns=True)


@functools.lru_cache(maxsize=256)
def _program_of(
    mix: Callable[..., float], kinds: tuple[ArgumentKind, ...], real: Real, of_deltas: bool
) -> TileProgram | None:
    def finish(result: str) -> str:
        chosen = (
            "select(m == REAL(0.0), b, b + m)"
            if of_deltas
            else "select(keep_equal & (all_equal > REAL(0.0)), x[0], m)"
        )
        return f"result = {result}\nm = REAL(result)\nout = {chosen}"

    try:
        return TileProgram(mix, kinds, real, finish, tracks_equal=not of_deltas)
    except NoArrayForm:
        return None
