"""Writes the kernel that decodes groups of 4-bit codes: ``minimum + scale * code``."""

from __future__ import annotations

from dataclasses import dataclass

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

GROUP_BYTES = 64
"""Bytes of a group of 128 codes; the first code of a byte is in its low half."""


@dataclass(frozen=True)
class FourBitKernel:
    """``run(codes, scales, minimums, out)``: two elements for each byte of ``codes``, in float32 or float64.

    Each group of 128 elements has a scale and a minimum. The product is rounded before the sum.
    """

    real: Real

    def text(self) -> str:
        group = [
            "def decode_group(codes, scale, minimum, out):",
            "    for j in range(codes.size):",
            "        out[2 * j] = REAL(np.uint8(codes[j] & 15)) * scale + minimum",
            "        out[2 * j + 1] = REAL(np.uint8(codes[j] >> 4)) * scale + minimum",
        ]
        lines = [
            f"def run({self.interface().signature()}):",
            "    for g in range(scales.size):",
            f"        s = g * {GROUP_BYTES}",
            f"        e = min(s + {GROUP_BYTES}, codes.size)",
            "        decode_group(codes[s:e], scales[g], minimums[g], out[2 * s:2 * e])",
        ]
        preamble = PREAMBLE.format(bits=self.real[-2:])
        apart = DECORATOR.format(options=APART)
        functions = "\n\n\n".join([f"{apart}\n" + "\n".join(group), f"{PLAIN}\n" + "\n".join(lines)])
        return f"{preamble}\n\n{functions}\n\n\n{self.interface().entry()}"

    def interface(self) -> Interface:
        real = f"{self.real}*1"
        parameters = (("codes", "uint8*1"), ("scales", real), ("minimums", real), ("out", real))
        return Interface(1, self.real, parameters)
