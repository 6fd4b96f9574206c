"""Writes the parts that all kernel texts share: preamble, kinds of arguments, entry point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

ArgumentKind = Literal["number", "numbers", "noise", "bernoulli", "ranked", "rows", "columns", "side"]
"""What an argument is to a kernel: one number; one per model; uniform noise; draws of 1.0 or 0.0, with one
chance per model or one that depends on the rank; one number per model for each row, or for each column; the
numbers of further raw inputs, one per model, which follow the models' in order."""

Real = Literal["float32", "float64"]

Parameter = tuple[str, str]
"""A parameter of ``run`` and what it is: ``raws`` (address and size of the raw bytes of each input), ``int``,
``real``, or ``DTYPE*DIMENSIONS``."""

DECORATOR = "@compiled({options})"
APART = "apart=True"
"""For functions whose written arrays do not overlap: without it, loops over many arrays are not
vectorised."""
PREAMBLE = """\
import math

import numpy as np
from numba import carray, types
from alnico.kernels.tiles import decode{bits} as decode, encode{bits} as encode
from alnico.kernels.tiles import add, add_product, compiled, double_of, draw, draw_ranked, fill_columns, fill_noise, fill_rows, keep_between, part, pointer, select, subtract, width_of

REAL = np.float{bits}
ZERO = REAL(0.0)
ONE = REAL(1.0)
"""

PARTS = {
    "number": ("a",),
    "numbers": ("a",),
    "noise": ("a", "keys"),
    "bernoulli": ("a", "keys", "words", "known"),
    "ranked": ("a", "keys", "steps", "ranks", "words", "known"),
    "rows": ("a", "inner"),
    "columns": ("a", "inner"),
    "side": (),
}
"""The parameters of ``run`` that each kind of argument becomes; the number of the argument is appended."""

FILLS = {
    "noise": "fill_noise(keys{a}[{m}], start + s, {tile})",
    "bernoulli": "draw(keys{a}[{m}], start + s, a{a}[{m}], words{a}[{m}], known{a} != 0, {tile})",
    "ranked": "draw_ranked(keys{a}[{m}], start + s, a{a}[{m}], steps{a}[{m}], ranks{a}[{m}, s:e], words{a}[{m}], known{a} != 0, {tile})",
    "rows": "fill_rows(a{a}[{m}], start + s, inner{a}, {tile})",
    "columns": "fill_columns(a{a}[{m}], start + s, inner{a}, {tile})",
    "side": "bad |= decode(part(raws, {r}, width_of(codes[{r}]), s, e), codes[{r}], {tile})",
}
"""Kinds that have a number for each element: how a tile of them is filled, for argument ``a`` of model
``m``."""


def tiled_arguments(kinds: tuple[ArgumentKind, ...]) -> list[int]:
    """The positions of the arguments that have a number for each element."""
    return [a for a, kind in enumerate(kinds) if kind in FILLS]


def fill_statement(
    kinds: tuple[ArgumentKind, ...], argument: int, model: object, tile: str, raw: object = None
) -> str:
    """The statement that fills ``tile`` with an argument's numbers for elements ``s`` to ``e`` of the block.
    ``raw`` is the place of a side's raw bytes among those of all inputs."""
    return FILLS[kinds[argument]].format(a=argument, m=model, tile=tile, r=raw)


def tile_type(kind: ArgumentKind) -> str:
    """The dtype of a filled tile. What is drawn is 1, else 0."""
    return {"noise": "float32", "bernoulli": "uint8", "ranked": "uint8"}.get(kind, "REAL")


def value_of(kind: ArgumentKind, filled: str) -> str:
    """What a scalar function gets of an element of a filled tile."""
    ones = {"bernoulli": "ONE, ZERO", "ranked": "np.float32(1.0), np.float32(0.0)"}
    return f"select({filled} != 0, {ones[kind]})" if kind in ones else filled


def argument_parameters(kinds: tuple[ArgumentKind, ...], real: Real) -> list[Parameter]:
    """The parameters of ``run`` that arguments of these kinds become, in order."""
    of_part = {
        "a": f"{real}*1",
        "keys": "uint64*1",
        "steps": f"{real}*1",
        "ranks": "float32*2",
        "words": "uint64*2",
        "known": "int",
        "inner": "int",
    }
    of_kind = {"number": "real", "rows": f"{real}*2", "columns": f"{real}*2"}
    return [
        (f"{part}{a}", of_kind.get(kind, of_part[part]) if part == "a" else of_part[part])
        for a, kind in enumerate(kinds)
        for part in PARTS[kind]
    ]


Scratch = tuple[str, tuple[int, ...], str]
"""An array that a kernel works in: its name, shape and dtype."""


@dataclass(frozen=True)
class Interface:
    """How a kernel is called: its parameters in order, and the arrays it works in, which it does not
    allocate.

    Both follow the parameters of ``run``. ``returns``: whether ``run`` returns a number. The first size of a scratch array may
    be negative: then it is as many for each of ``rows``, which is not part of the text; such arrays come last.
    """

    models: int
    real: Real
    parameters: tuple[Parameter, ...]
    scratch: tuple[Scratch, ...] = ()
    returns: bool = False
    rows: int = 0

    @property
    def scratch_bytes(self) -> int:
        """The bytes of the scratch arrays, each at a multiple of 64 bytes."""
        fixed, each_row = self._places()[-1]
        return fixed + each_row * self.rows

    def _places(self) -> list[tuple[int, int]]:
        """Where each scratch array begins, and where the last one ends: bytes, and bytes for each row."""
        places = [(0, 0)]
        for _, shape, dtype in self.scratch:
            size = math.prod(shape) * np.dtype(self._dtype(dtype)).itemsize
            fixed, each_row = places[-1]
            places.append((fixed, each_row - size) if size < 0 else (fixed + -(-size // 64) * 64, each_row))
        return places

    def _dtype(self, name: str) -> str:
        return self.real if name == "REAL" else name

    def signature(self) -> str:
        """The parameters of ``run``."""
        return ", ".join([name for name, _ in self.parameters] + [name for name, _, _ in self.scratch])

    def entry(self) -> str:
        """The text of ``entry(t)``: turns a table of addresses, sizes and numbers into arrays and numbers,
        and calls ``run``."""
        place = 2
        lines = []
        for name, kind in self.parameters:
            if kind == "int":
                lines.append(f"{name} = t[{place}]")
                place += 1
            elif kind == "real":
                lines.append(f"{name} = REAL(double_of(t[{place}]))")
                place += 1
            else:
                dtype, _, dimensions = ("int64*2" if kind == "raws" else kind).partition("*")
                sizes = "".join(f"t[{place + 1 + d}], " for d in range(int(dimensions)))
                lines.append(f"{name} = carray(pointer(t[{place}]), ({sizes}), np.{dtype})")
                place += 1 + int(dimensions)
        for (name, shape, dtype), (fixed, each_row) in zip(self.scratch, self._places(), strict=False):
            of_shape = [f"{-shape[0]} * t[1]" if shape[0] < 0 else str(shape[0]), *map(str, shape[1:])]
            at = f"t[0] + {fixed}" + (f" + {each_row} * t[1]" if each_row else "")
            kind = "REAL" if dtype == "REAL" else f"np.{dtype}"
            lines.append(f"{name} = carray(pointer({at}), ({', '.join(of_shape)},), {kind})")
        call = f"run({self.signature()})"
        lines += [f"return {call}"] if self.returns else [call, "return 0"]
        decorator = DECORATOR.format(options="types.int64(types.CPointer(types.int64))")
        return decorator + "\ndef entry(t):\n" + "".join(f"    {line}\n" for line in lines)


class KernelDescription(Protocol):
    """What defines a kernel: a value, equal to that of the same kernel, which the choice between compiling and numpy asks for these."""

    @property
    def real(self) -> Real: ...

    def text(self) -> str: ...

    def interface(self) -> Interface: ...

    def __hash__(self) -> int: ...
