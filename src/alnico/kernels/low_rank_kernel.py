"""Writes the kernel that adds the product of two factors to a matrix: ``W + s L R``.

It computes any run of elements. The product is summed in the order of the rank, in the dtype of the factors,
without contraction: which elements are computed together changes no bit, as it would with a BLAS product.
"""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.constants import TILE
from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

RANKS_AT_ONCE = 4
"""Ranks added between reading and writing a sum: fewer wait for the cache, more do not fit the registers."""

COLUMNS = 1024
"""Columns of the right factor that stay in the cache while the rows of a block go over them."""


@dataclass(frozen=True)
class FoldKernel:
    """``run(raw, code, left, right, scale, first, out)``: elements ``first`` on of ``W + scale * left @
    right``, row by row.

    ``raw`` are the bytes of these elements of W in the dtype ``code``; ``left`` is (rows, rank), ``right``
    (rank, columns). What overflows becomes an infinity.
    """

    real: Real

    def text(self) -> str:
        several = range(RANKS_AT_ONCE)
        rights = ", ".join(f"r{k}" for k in several)
        lefts = ", ".join(f"l{k}" for k in several)
        terms = "".join(f"        t = t + l{k} * r{k}[j]\n" for k in several)
        definitions = [
            f"def add_several(total, {rights}, {lefts}):\n    for j in range(total.size):\n        t = total[j]\n{terms}        total[j] = t",
            "def add_one(total, right, left):\n    for j in range(total.size):\n        total[j] = total[j] + left * right[j]",
            "def add_scaled(out, total, scale):\n    for j in range(out.size):\n        out[j] = out[j] + total[j] * scale",
        ]
        slices = ", ".join(f"right[k + {k}, c:d]" for k in several)
        numbers = ", ".join(f"left[row, k + {k}]" for k in several)
        lines = [
            f"def run({self.interface().signature()}):",
            "    width = width_of(code)",
            "    rank = right.shape[0]",
            "    columns = right.shape[1]",
            "    last = first + out.size",
            f"    whole = rank - rank % {RANKS_AT_ONCE}",
            f"    for column in range(0, columns, {COLUMNS}):",
            f"        stop = min(column + {COLUMNS}, columns)",
            "        for row in range(first // columns, (last + columns - 1) // columns):",
            "            c = max(column, first - row * columns)",
            "            d = min(stop, last - row * columns)",
            "            if c >= d:",
            "                continue",
            "            s = row * columns + c - first",
            "            e = s + d - c",
            "            total = tile[:d - c]",
            "            total[:] = ZERO",
            f"            for k in range(0, whole, {RANKS_AT_ONCE}):",
            f"                add_several(total, {slices}, {numbers})",
            "            for k in range(whole, rank):",
            "                add_one(total, right[k, c:d], left[row, k])",
            "            decode(raw[width * s:width * e], code, out[s:e])",
            "            add_scaled(out[s:e], total, scale)",
        ]
        apart = DECORATOR.format(options=APART)
        text = PREAMBLE.format(bits=self.real[-2:]) + "".join(
            f"\n\n{apart}\n{definition}\n" for definition in definitions
        )
        return f"{text}\n\n{PLAIN}\n" + "\n".join(lines) + "\n\n\n" + self.interface().entry()

    def interface(self) -> Interface:
        parameters = (
            ("raw", "uint8*1"),
            ("code", "int"),
            ("left", f"{self.real}*2"),
            ("right", f"{self.real}*2"),
            ("scale", "real"),
            ("first", "int"),
            ("out", f"{self.real}*1"),
        )
        return Interface(1, self.real, parameters, (("tile", (TILE,), "REAL"),))
