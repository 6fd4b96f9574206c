"""Writes the kernel that selects a kth largest value of each row, by counting digits of the values' bits."""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import PREAMBLE, Interface, Real

DIGIT = 11
"""Bits counted at a time: the counts of a digit fit the first-level cache."""


@dataclass(frozen=True)
class SelectionKernel:
    """``run(bits, places, rest, out)``: the value at ``places[r]`` of row ``r``, where the smallest has place 0.

    ``bits`` (rows, n) are those of values that are not negative, which order as the values do; ``rest`` has room for
    a row, and ``out`` gets the bits of one value for each row. Time does not depend on how many values are equal.
    Signs are left out, so that -0.0 is 0.0.
    """

    real: Real

    @property
    def dtype(self) -> str:
        """Of the bits."""
        return f"uint{self.real[-2:]}"

    def text(self) -> str:
        whole = int(self.real[-2:])
        steps = [*range(whole - DIGIT, 0, -DIGIT), 0]
        wide = f"np.{self.dtype}"
        mask = f"{wide}({(1 << DIGIT) - 1})"
        size = f"{wide}({(1 << (whole - 1)) - 1})"
        count = (
            "def count(values, shift, bins):\n"
            "    bins[:] = 0\n"
            "    half = values.size >> 1\n"
            "    for i in range(half):\n"  # two tables: equal neighbours do not wait for each other
            f"        bins[0, ((values[2 * i] & {size}) >> shift) & {mask}] += 1\n"
            f"        bins[1, ((values[2 * i + 1] & {size}) >> shift) & {mask}] += 1\n"
            "    if values.size & 1:\n"
            f"        bins[0, ((values[values.size - 1] & {size}) >> shift) & {mask}] += 1"
        )
        keep = (
            "def keep(values, shift, prefix, rest):\n"
            "    n = 0\n"
            "    for i in range(values.size):\n"
            f"        v = values[i] & {size}\n"
            "        rest[n] = v\n"
            "        n += np.int64((v >> shift) == prefix)\n"
            "    return n"
        )
        lines = [
            f"def run({self.interface().signature()}):",
            "    for r in range(out.size):",
            "        place = places[r]",
            "        n = bits.shape[1]",
            f"        prefix = {wide}(0)",
        ]
        for before, shift in zip([None, *steps], steps, strict=False):
            values = "bits[r]" if before is None else "rest[:n]"
            width = DIGIT if before is None else before - shift
            lines += [
                f"        count({values}, {wide}({shift}), bins)",
                "        d = 0",
                "        below = 0",
                "        while below + bins[0, d] + bins[1, d] <= place:",
                "            below += bins[0, d] + bins[1, d]",
                "            d += 1",
                "        place -= below",
                f"        prefix = {wide}((prefix << {wide}({width})) | {wide}(d))",
            ]
            if shift:
                lines.append(f"        n = keep({values}, {wide}({shift}), prefix, rest)")
        lines.append("        out[r] = prefix")
        functions = "\n\n\n".join(f"{PLAIN}\n{part}" for part in (count, keep, "\n".join(lines)))
        return f"{PREAMBLE.format(bits=whole)}\n\n{functions}\n\n\n{self.interface().entry()}"

    def interface(self) -> Interface:
        parameters = (
            ("bits", f"{self.dtype}*2"),
            ("places", "int64*1"),
            ("rest", f"{self.dtype}*1"),
            ("out", f"{self.dtype}*1"),
        )
        return Interface(1, self.real, parameters, (("bins", (2, 1 << DIGIT), "int64"),))
