"""Writes the kernels that decode blocks of GGUF files, and the one that encodes Q8_0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

BlockKind = Literal["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
"""A type of GGUF, by its name there."""

LINES: dict[BlockKind, tuple[str, ...]] = {
    "Q4_0": (
        "scale = scales[0]",
        "for j in range(16):",
        "    code = block[2 + j]",
        "    out[j] = (REAL(np.uint8(code & 15)) - REAL(8.0)) * scale",
        "    out[16 + j] = (REAL(np.uint8(code >> 4)) - REAL(8.0)) * scale",
    ),
    "Q8_0": (
        "scale = scales[0]",
        "for j in range(32):",
        "    out[j] = REAL(np.int8(block[2 + j])) * scale",
    ),
    "Q4_K": (
        "for p in range(4):",
        "    low, least = scales[2 * p], minimums[2 * p]",
        "    high, least_high = scales[2 * p + 1], minimums[2 * p + 1]",
        "    for j in range(32):",
        "        code = block[16 + 32 * p + j]",
        "        out[64 * p + j] = REAL(np.uint8(code & 15)) * low - least",
        "        out[64 * p + 32 + j] = REAL(np.uint8(code >> 4)) * high - least_high",
    ),
    "Q6_K": (
        "for p in range(4):",
        "    h, s = p >> 1, p & 1",
        "    one, two, three, four = scales[8 * h + s], scales[8 * h + 2 + s], scales[8 * h + 4 + s], scales[8 * h + 6 + s]",
        "    for j in range(16):",
        "        k = 16 * s + j",
        "        first, second, top = block[64 * h + k], block[64 * h + 32 + k], block[128 + 32 * h + k]",
        "        a = np.uint8(np.uint8(first & 15) | np.uint8(np.uint8(top & 3) << 4))",
        "        b = np.uint8(np.uint8(second & 15) | np.uint8(np.uint8(top & 12) << 2))",
        "        c = np.uint8(np.uint8(first >> 4) | np.uint8(top & 48))",
        "        d = np.uint8(np.uint8(second >> 4) | np.uint8(np.uint8(top & 192) >> 2))",
        "        out[128 * h + k] = (REAL(a) - REAL(32.0)) * one",
        "        out[128 * h + 32 + k] = (REAL(b) - REAL(32.0)) * two",
        "        out[128 * h + 64 + k] = (REAL(c) - REAL(32.0)) * three",
        "        out[128 * h + 96 + k] = (REAL(d) - REAL(32.0)) * four",
    ),
    "Q5_K": (
        "for p in range(4):",
        "    low, least = scales[2 * p], minimums[2 * p]",
        "    high, least_high = scales[2 * p + 1], minimums[2 * p + 1]",
        "    for j in range(32):",
        "        code = block[48 + 32 * p + j]",
        "        fifth = np.uint8(block[16 + j] >> np.uint8(2 * p))",
        "        out[64 * p + j] = REAL(np.uint8(np.uint8(code & 15) | np.uint8(np.uint8(fifth & 1) << 4))) * low - least",
        "        out[64 * p + 32 + j] = REAL(np.uint8(np.uint8(code >> 4) | np.uint8(np.uint8(fifth & 2) << 3))) * high - least_high",
    ),
    "IQ4_NL": (
        "scale = scales[0]",
        "for j in range(16):",
        "    code = block[2 + j]",
        "    out[j] = levels[np.uint8(code & 15)] * scale",
        "    out[16 + j] = levels[np.uint8(code >> 4)] * scale",
    ),
}
"""What decodes one block: ``out`` from ``block``, its bytes, with its ``scales``, its ``minimums`` and the ``levels`` of codes."""

SLAB = 128
"""Blocks of Q8_0 that are encoded at a time: they fit the first-level cache."""
Q8_0_ELEMENTS, Q8_0_BYTES = 32, 34


@dataclass(frozen=True)
class BlockKernel:
    """``run(blocks, levels, scales, minimums, out)``: float32 (blocks, elements) from the bytes of blocks (blocks, bytes).

    ``scales`` and ``minimums`` are (blocks, parts), those that a type has not are empty. Each operation is rounded.
    ``by_numpy`` does the same.
    """

    kind: BlockKind
    by_numpy: Callable[..., None] = field(compare=False)
    real: Real = "float32"

    def text(self) -> str:
        parameters = "block, levels, scales, minimums, out"
        lines = [
            DECORATOR.format(options=APART),
            f"def decode_block({parameters}):",
            *(f"    {line}" for line in LINES[self.kind]),
            "",
            "",
            PLAIN,
            f"def run({self.interface().signature()}):",
            "    for r in range(out.shape[0]):",
            "        decode_block(blocks[r], levels, scales[r], minimums[r], out[r])",
        ]
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n" + "\n".join(lines) + f"\n\n\n{self.interface().entry()}"  # fmt: skip

    def interface(self) -> Interface:
        numbers = f"{self.real}*2"
        parameters = (
            ("blocks", "uint8*2"),
            ("levels", f"{self.real}*1"),
            ("scales", numbers),
            ("minimums", numbers),
            ("out", numbers),
        )
        return Interface(1, self.real, parameters)

    def array_form(self) -> tuple[Callable[..., None], float]:
        """The function that runs the kernel with numpy, and the operations it takes for an element."""
        return self.by_numpy, 8.0


@dataclass(frozen=True)
class EncodeQ8Kernel:
    """``run(values, scales, out)``: the codes of Q8_0 from the third byte of each block on, ``scales`` (blocks) in float32.

    ``values`` are (blocks, 32), ``out`` (blocks, 34). See ``checkpoint/gguf/simple_blocks.py``, whose ``by_numpy`` does the same.
    """

    by_numpy: Callable[..., None] = field(compare=False)
    real: Real = "float32"

    def text(self) -> str:
        apart = DECORATOR.format(options=APART)
        # The largest magnitude by its bits, so that a NaN is the largest of all.
        peaks = (
            f"{apart}\ndef find_peaks(bits, peaks):\n"
            "    for r in range(bits.shape[0]):\n"
            "        peak = np.uint32(0)\n"
            f"        for j in range({Q8_0_ELEMENTS}):\n"
            "            peak = np.uint32(max(peak, np.uint32(bits[r, j] & np.uint32(0x7FFFFFFF))))\n"
            "        peaks[r] = peak"
        )
        scale = (
            f"{apart}\ndef find_scales(peaks, scales, inverses):\n"
            "    for r in range(scales.size):\n"
            "        scale = peaks[r] / REAL(127.0)\n"
            "        inverse = ONE / scale\n"
            "        scales[r] = scale\n"
            "        inverses[r] = select(inverse < REAL(np.inf), inverse, ZERO)"
        )
        encode = (
            f"{apart}\ndef encode_blocks(values, inverses, out):\n"
            "    for r in range(inverses.size):\n"
            f"        for j in range({Q8_0_ELEMENTS}):\n"
            "            scaled = values[r, j] * inverses[r]\n"
            "            rounded = scaled + select(scaled < ZERO, REAL(-0.49999997), REAL(0.49999997))\n"
            "            out[r, 2 + j] = np.uint8(np.int32(rounded))"
        )
        run = (
            f"{PLAIN}\ndef run({self.interface().signature()}):\n"
            "    bits = values.view(np.uint32)\n"
            "    magnitudes = peaks.view(np.float32)\n"
            f"    for s in range(0, scales.size, {SLAB}):\n"
            f"        e = min(s + {SLAB}, scales.size)\n"
            "        find_peaks(bits[s:e], peaks)\n"
            "        find_scales(magnitudes, scales[s:e], inverses)\n"
            "        encode_blocks(values[s:e], inverses[:e - s], out[s:e])"
        )
        functions = "\n\n\n".join([peaks, scale, encode, run])
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n{functions}\n\n\n{self.interface().entry()}"

    def interface(self) -> Interface:
        parameters = (
            ("values", f"{self.real}*2"),
            ("scales", f"{self.real}*1"),
            ("out", "uint8*2"),
        )
        scratch = (("peaks", (SLAB,), "uint32"), ("inverses", (SLAB,), "REAL"))
        return Interface(1, self.real, parameters, scratch)

    def array_form(self) -> tuple[Callable[..., None], float]:
        """The function that runs the kernel with numpy, and the operations it takes for an element."""
        return self.by_numpy, 10.0
