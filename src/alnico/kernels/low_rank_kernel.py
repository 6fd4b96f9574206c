"""Writes the kernel that adds the product of two factors to a matrix: ``W + s L R``.

It computes any run of elements. The product is summed in the order of the rank, in the dtype of the factors,
without contraction: which elements are computed together changes no bit, as it would with a BLAS product.
"""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

RANKS_AT_ONCE = 4
"""Ranks added between reading and writing a sum: fewer wait for the cache, more do not fit the registers."""

ROWS_AT_ONCE = 2
"""Rows that share the reading of these ranks: 1.35 ns instead of 2.0 per element of rank 32."""

COLUMNS = 1024
"""Columns of the right factor that stay in the cache while the rows of a block go over them."""


@dataclass(frozen=True)
class FoldKernel:
    """``run(raw, code, left, right, scale, first, out)``: elements ``first`` on of ``W + scale * left @
    right``, row by row.

    ``raw`` are the bytes of these elements of W in the dtype ``code``; ``left`` is (rows, rank), ``right``
    (rank, columns). What overflows becomes an infinity. Returns -1 if all results are finite, else the start of a part with one that is not.
    """

    real: Real

    def text(self) -> str:
        ranks, rows = range(RANKS_AT_ONCE), range(ROWS_AT_ONCE)
        totals = ", ".join(f"t{i}" for i in rows)
        rights = ", ".join(f"r{k}" for k in ranks)
        lefts = ", ".join(f"l{i}{k}" for i in rows for k in ranks)
        several = f"def add_several({totals}, {rights}, {lefts}):\n    for j in range(t0.size):\n"
        several += "".join(f"        x{k} = r{k}[j]\n" for k in ranks)
        for i in rows:
            terms = "".join(f"        t = t + l{i}{k} * x{k}\n" for k in ranks)
            several += f"        t = t{i}[j]\n{terms}        t{i}[j] = t\n"
        definitions = [
            several,
            "def add_one(total, right, left):\n    for j in range(total.size):\n        total[j] = total[j] + left * right[j]",
            "def add_scaled(out, total, scale):\n    for j in range(out.size):\n        out[j] = out[j] + total[j] * scale",
        ]
        sums = ", ".join(f"tile[{i}, :stop - column]" for i in rows)
        slices = ", ".join(f"right[k + {k}, column:stop]" for k in ranks)
        numbers = ", ".join(f"left[row{i}, k + {k}]" for i in rows for k in ranks)
        lines = [
            f"def run({self.interface().signature()}):",
            "    width = width_of(code)",
            "    rank = right.shape[0]",
            "    columns = right.shape[1]",
            "    last = first + out.size",
            "    bottom = (last + columns - 1) // columns",
            f"    whole = rank - rank % {RANKS_AT_ONCE}",
            "    bad = -1",
            f"    for column in range(0, columns, {COLUMNS}):",
            f"        stop = min(column + {COLUMNS}, columns)",
            f"        for row in range(first // columns, bottom, {ROWS_AT_ONCE}):",
            *[f"            row{i} = min(row + {i}, bottom - 1)" for i in rows],
            *[f"            tile[{i}, :stop - column] = ZERO" for i in rows],
            f"            for k in range(0, whole, {RANKS_AT_ONCE}):",
            f"                add_several({sums}, {slices}, {numbers})",
            "            for k in range(whole, rank):",
            *[
                f"                add_one(tile[{i}, :stop - column], right[k, column:stop], left[row{i}, k])"
                for i in rows
            ],
            f"            for i in range({ROWS_AT_ONCE}):",
            "                begin = (row + i) * columns",
            "                c = max(column, first - begin)",
            "                d = min(stop, last - begin)",
            "                if c >= d:",
            "                    continue",
            "                s = begin + c - first",
            "                e = s + d - c",
            "                decode(raw[width * s:width * e], code, out[s:e])",
            "                add_scaled(out[s:e], tile[i, c - column:d - column], scale)",
            "                if has_bad(out[s:e]):",
            "                    bad = s",
            "    return bad",
        ]
        apart = DECORATOR.format(options=APART)
        text = (
            PREAMBLE.format(bits=self.real[-2:])
            + f"from alnico.kernels.tiles import has_bad{self.real[-2:]} as has_bad\n"
        )
        text += "".join(f"\n\n{apart}\n{definition}\n" for definition in definitions)
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
        return Interface(1, self.real, parameters, (("tile", (ROWS_AT_ONCE, COLUMNS), "REAL"),), returns=True)
