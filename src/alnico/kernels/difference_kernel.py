"""Writes the kernel that subtracts a tensor from another, and sums the squares of what is left."""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.constants import LANES
from alnico.kernels.measure_kernels import FOLD, PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

SPAN = 2048
"""Elements of both tensors that are in the first-level cache at a time, also in float64."""


@dataclass(frozen=True)
class DifferenceKernel:
    """``run(first, first_code, second, second_code, out, sums)``: ``first - second``, of raw bytes in the dtypes of the codes.

    The differences, rounded to ``real``, go to ``out`` unless it is empty. ``sums`` gets the sum of their squares, and if it has two
    elements that of the squares of ``second``: in float64, element i in lane i modulo :data:`LANES`, then by halves of the lanes.
    """

    real: Real

    def text(self) -> str:
        definitions = [
            "def add_squares(a, b, lanes):\n    for j in range(a.size):\n        x = np.float64(a[j]) - np.float64(b[j])\n        lanes[j] += x * x",
            "def add_squares_of(b, lanes):\n    for j in range(b.size):\n        x = np.float64(b[j])\n        lanes[j] += x * x",
            "def difference(a, b, out):\n    for j in range(out.size):\n        out[j] = a[j] - b[j]",
        ]
        lines = [
            f"def run({self.interface().signature()}):",
            "    first_width = width_of(first_code)",
            "    second_width = width_of(second_code)",
            "    count = first.size // first_width",
            "    lanes[:] = 0.0",
            f"    for s in range(0, count, {SPAN}):",
            f"        e = min(s + {SPAN}, count)",
            "        decode(first[first_width * s:first_width * e], first_code, a[:e - s])",
            "        decode(second[second_width * s:second_width * e], second_code, b[:e - s])",
            "        if out.size:",
            "            difference(a, b, out[s:e])",
            f"        for g in range(0, e - s, {LANES}):",
            f"            h = min(g + {LANES}, e - s)",
            "            add_squares(a[g:h], b[g:h], lanes[0])",
            "            if sums.size > 1:",
            "                add_squares_of(b[g:h], lanes[1])",
            "    for i in range(sums.size):",
            "        sums[i] = fold(lanes[i])",
        ]
        apart = DECORATOR.format(options=APART)
        text = PREAMBLE.format(bits=self.real[-2:])
        text += "".join(f"\n\n{apart}\n{definition}\n" for definition in definitions)
        return (
            f"{text}\n\n{PLAIN}\n{FOLD}\n\n\n{PLAIN}\n"
            + "\n".join(lines)
            + "\n\n\n"
            + self.interface().entry()
        )

    def interface(self) -> Interface:
        parameters = (
            ("first", "uint8*1"),
            ("first_code", "int"),
            ("second", "uint8*1"),
            ("second_code", "int"),
            ("out", f"{self.real}*1"),
            ("sums", "float64*1"),
        )
        scratch = (("a", (SPAN,), "REAL"), ("b", (SPAN,), "REAL"), ("lanes", (2, LANES), "float64"))
        return Interface(1, self.real, parameters, scratch)
