"""What the texts of all kernels share: their first lines, the kinds of their arguments, how these are filled in, and their types."""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["number", "numbers", "noise", "bernoulli", "ranked", "rows", "columns"]
"""What an argument is to a kernel: one number; one a model; uniform noise; draws of 1.0 or 0.0, with one chance a model or
with one that depends on the rank; one number a model for each row, or for each column."""

Real = Literal["float32", "float64"]

DECORATOR = '@njit({options}nogil=True, error_model="numpy")'
PREAMBLE = """\
import math

import numpy as np
from numba import njit
from alnico.kernels.tiles import decode{bits} as decode, encode{bits} as encode
from alnico.kernels.tiles import fill_columns, fill_noise, fill_ranked, fill_rows, select, subtract

REAL = np.float{bits}
ZERO = REAL(0.0)
ONE = REAL(1.0)
"""

PARTS = {
    "number": ("a",),
    "numbers": ("a",),
    "noise": ("a", "keys"),
    "bernoulli": ("a", "keys"),
    "ranked": ("a", "keys", "steps", "ranks"),
    "rows": ("a", "inner"),
    "columns": ("a", "inner"),
}
"""The parameters of ``run`` that each kind of argument becomes; the number of the argument is appended."""

FILLS = {
    "noise": "fill_noise(keys{a}[{m}], start + s, {tile})",
    "bernoulli": "fill_noise(keys{a}[{m}], start + s, {tile})",
    "ranked": "fill_ranked(keys{a}[{m}], start + s, a{a}[{m}], steps{a}[{m}], ranks{a}[{m}, s:e], {tile})",
    "rows": "fill_rows(a{a}[{m}], start + s, inner{a}, {tile})",
    "columns": "fill_columns(a{a}[{m}], start + s, inner{a}, {tile})",
}
"""Kinds that have a number for each element: how a tile of them is filled, for argument ``a`` of model ``m``."""


def parameters(kinds: tuple[Kind, ...]) -> list[str]:
    """The names of the parameters of ``run`` that arguments of these kinds become, in order."""
    return [f"{part}{a}" for a, kind in enumerate(kinds) for part in PARTS[kind]]


def filled(kinds: tuple[Kind, ...]) -> list[int]:
    """The arguments that have a number for each element."""
    return [a for a, kind in enumerate(kinds) if kind in FILLS]


def fill(kinds: tuple[Kind, ...], argument: int, model: object, tile: str) -> str:
    """The statement that fills ``tile`` with an argument's numbers for elements ``s`` to ``e`` of the block."""
    return FILLS[kinds[argument]].format(a=argument, m=model, tile=tile)


def tile_type(kind: Kind) -> str:
    """What the numbers of a filled tile are."""
    return "REAL" if kind in ("rows", "columns") else "np.float32"


def argument_types(kinds: tuple[Kind, ...], real: Real, types: Any) -> list[Any]:
    """The numba types of ``parameters(kinds)``."""
    number = getattr(types, real)
    of_part = {
        "a": number[::1],
        "keys": types.uint64[::1],
        "steps": number[::1],
        "ranks": types.float32[:, ::1],
        "inner": types.int64,
    }
    flat: list[Any] = []
    for kind in kinds:
        flat += [of_part[part] for part in PARTS[kind]]
        if kind == "number":
            flat[-1] = number
        elif kind in ("rows", "columns"):
            flat[-2] = number[:, ::1]
    return flat
