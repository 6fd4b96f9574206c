"""Writes the kernels that decode matrices stored transposed: small tiles are turned round in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

Packing = Literal["outputs", "inputs"]
"""What the codes of a word of 32 bits are of: consecutive outputs of one input, or consecutive inputs of one output."""

WORD_BITS = 32
SPAN = 512
"""Inputs of a tile, whose words are in the first-level cache."""
WORDS = 16
"""Words of outputs that are turned round at a time: a cache line of each input."""
OUTPUTS = 64
"""Outputs that are turned round at a time where words are of inputs, or of a block of them."""
BLOCK = 32
"""Inputs that share a scale in MXFP4."""


@dataclass(frozen=True)
class TransposedKernel:
    """``run(words, shifts, zeros, scales, index, group, row, column, out)``: ``(code - zero) * scale``, in float32.

    ``out`` is (outputs, inputs) from output ``row`` and input ``column`` on. ``words`` of outputs are (inputs, words), and code p of a
    word begins at bit ``shifts[p]``; words of inputs are (words, outputs), the first code in the lowest bits. ``zeros`` and ``scales``
    are (outputs, groups). Input i is of group ``index[i]`` if the kernel ``is_indexed``, else of ``i // group``. Where words are of
    inputs and codes have 4 bits, ``column`` and ``group`` are even. Difference and product are rounded one by one.
    """

    packing: Packing
    bits: Literal[4, 8]
    is_indexed: bool = False
    real: Real = "float32"

    def text(self) -> str:
        functions = [*([] if self.is_indexed else [self._part()]), self._row(), self._turn(), self._run()]
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n" + "\n\n\n".join(functions) + f"\n\n\n{self.interface().entry()}"  # fmt: skip

    def _is_halved(self) -> bool:
        """Does a byte hold two codes that follow one another in a row?"""
        return self.packing == "inputs" and self.bits == 4

    def _values(self, place: str) -> list[str]:
        """The numbers in what a place of ``codes`` holds."""
        if self._is_halved():
            return [f"REAL(np.uint8(codes[{place}] & np.uint8(15)))", f"REAL(np.uint8(codes[{place}] >> np.uint8(4)))"]  # fmt: skip
        if self.packing == "inputs":
            return [f"REAL(codes[{place}])"]
        return [f"REAL(np.uint8(np.uint32(codes[{place}] >> shift) & np.uint32({(1 << self.bits) - 1})))"]

    def _per_place(self) -> int:
        """The elements in a place of ``codes``."""
        return 2 if self._is_halved() else 1

    def _part(self) -> str:
        """The function that decodes elements of a row that have one scale."""
        per = self._per_place()
        lines = [
            DECORATOR.format(options=APART),
            "def decode_part(codes, shift, zero, scale, out):",
            f"    for j in range(out.size // {per}):",
        ]
        for i, value in enumerate(self._values("j")):
            lines.append(f"        out[{per} * j + {i}] = ({value} - zero) * scale")
        if per == 2:
            value = self._values("out.size >> 1")[0]
            lines += ["    if out.size & 1:", f"        out[out.size - 1] = ({value} - zero) * scale"]
        return "\n".join(lines)

    def _row(self) -> str:
        """The function that decodes a part of a row, from input ``first`` on."""
        per = self._per_place()
        head = "def decode_row(codes, shift, zeros, scales, index, group, first, out):"
        if not self.is_indexed:
            part = "codes[s >> 1:(e + 1) >> 1]" if per == 2 else "codes[s:e]"
            return "\n".join(
                [
                    PLAIN,
                    head,
                    "    g = first // group",
                    "    offset = first - g * group",
                    "    s = 0",
                    "    while s < out.size:",
                    "        e = min(s + group - offset, out.size)",
                    f"        decode_part({part}, shift, zeros[g], scales[g], out[s:e])",
                    "        offset = 0",
                    "        s = e",
                    "        g += 1",
                ]
            )
        lines = [DECORATOR.format(options=APART), head, f"    for j in range(out.size // {per}):"]
        for i, value in enumerate(self._values("j")):
            lines += [
                f"        g = index[{per} * j + {i}]",
                f"        out[{per} * j + {i}] = ({value} - zeros[g]) * scales[g]",
            ]
        if per == 2:
            value = self._values("out.size >> 1")[0]
            lines += [
                "    if out.size & 1:",
                "        g = index[out.size - 1]",
                f"        out[out.size - 1] = ({value} - zeros[g]) * scales[g]",
            ]
        return "\n".join(lines)

    def _turn(self) -> str:
        """The function that turns words round, from a row and a column of them on."""
        return (
            f"{DECORATOR.format(options=APART)}\ndef turn(words, row, rows, column, columns, turned):\n"
            "    for i in range(rows):\n"
            "        for j in range(columns):\n"
            "            turned[j, i] = words[row + i, column + j]"
        )

    def _run(self) -> str:
        index = "index[f:f + e - s]" if self.is_indexed else "index"
        head = [PLAIN, f"def run({self.interface().signature()}):", "    rows, width = out.shape"]
        if self.packing == "outputs":
            per = WORD_BITS // self.bits
            return "\n".join([
                *head,
                f"    last = (row + rows + {per - 1}) // {per}",
                f"    for w in range(row // {per}, last, {WORDS}):",
                f"        v = min(w + {WORDS}, last)",
                f"        for s in range(0, width, {SPAN}):",
                f"            e = min(s + {SPAN}, width)",
                "            f = column + s",
                "            turn(words, f, e - s, w, v - w, turned)",
                f"            for o in range(max({per} * w, row), min({per} * v, row + rows)):",
                f"                decode_row(turned[o // {per} - w, 0:e - s], shifts[o % {per}], zeros[o], scales[o], {index}, group, f, out[o - row, s:e])",
            ])  # fmt: skip
        per_byte, per_word = 8 // self.bits, WORD_BITS // self.bits
        return "\n".join([
            *head,
            "    as_bytes = turned.view(np.uint8)",
            "    shift = np.uint32(0)",
            f"    for q in range(0, rows, {OUTPUTS}):",
            f"        count = min({OUTPUTS}, rows - q)",
            "        s = 0",
            "        while s < width:",
            "            f = column + s",
            f"            e = min(s + {SPAN} - f % {SPAN}, width)",
            f"            w = f // {per_word}",
            f"            turn(words, w, (column + e + {per_word - 1}) // {per_word} - w, row + q, count, turned)",
            f"            b = f // {per_byte} - 4 * w",
            f"            c = b + (e - s + {per_byte - 1}) // {per_byte}",
            "            for o in range(count):",
            f"                decode_row(as_bytes[o, b:c], shift, zeros[row + q + o], scales[row + q + o], {index}, group, f, out[q + o, s:e])",
            "            s = e",
        ])  # fmt: skip

    def interface(self) -> Interface:
        numbers = f"{self.real}*2"
        parameters = (
            ("words", "uint32*2"),
            ("shifts", "uint32*1"),
            ("zeros", numbers),
            ("scales", numbers),
            ("index", "uint32*1"),
            ("group", "int"),
            ("row", "int"),
            ("column", "int"),
            ("out", numbers),
        )
        tile = (WORDS, SPAN) if self.packing == "outputs" else (OUTPUTS, SPAN * self.bits // WORD_BITS)
        return Interface(1, self.real, parameters, (("turned", tile, "uint32"),))

    def array_form(self) -> tuple[Callable[..., None], float]:
        """The function that runs the kernel with numpy, and the operations it takes for an element."""
        return functools.partial(_decode, self), 40.0


@dataclass(frozen=True)
class TransposedBlocksKernel:
    """``run(words, scales, row, column, out)``: MXFP4, ``E2M1(code) * scale``, in float32.

    ``out`` is (inputs, outputs) from input ``row`` and output ``column`` on. ``words`` are (outputs, words) of eight inputs each, the first
    in the lowest bits; ``scales`` (blocks, outputs) for :data:`BLOCK` inputs each.
    """

    real: Real = "float32"

    def text(self) -> str:
        apart = DECORATOR.format(options=APART)
        decode = (
            f"{apart}\ndef decode_codes(codes, shift, scales, out):\n"
            "    for j in range(out.size):\n"
            "        code = np.uint8(np.uint32(codes[j] >> shift) & np.uint32(15))\n"
            "        m = REAL(np.uint8(code & np.uint8(7)))\n"
            "        twice = select(m < REAL(4.0), m, select(m < REAL(6.0), m + m - REAL(4.0), REAL(4.0) * m - REAL(16.0)))\n"
            "        out[j] = twice * select(code < np.uint8(8), REAL(0.5), REAL(-0.5)) * scales[j]"
        )
        turn = (
            f"{apart}\ndef turn(words, row, rows, column, turned):\n"
            "    for i in range(rows):\n"
            "        for j in range(4):\n"
            "            turned[j, i] = words[row + i, column + j]"
        )
        lines = [
            PLAIN,
            f"def run({self.interface().signature()}):",
            "    rows, width = out.shape",
            f"    for s in range(0, width, {OUTPUTS}):",
            f"        e = min(s + {OUTPUTS}, width)",
            "        i = 0",
            "        while i < rows:",
            f"            g = (row + i) // {BLOCK}",
            f"            stop = min({BLOCK} * (g + 1) - row, rows)",
            "            turn(words, column + s, e - s, 4 * g, turned)",
            "            for k in range(i, stop):",
            f"                place = row + k - {BLOCK} * g",
            "                shift = np.uint32(np.uint32(4 * (place % 8)) & np.uint32(31))",
            "                decode_codes(turned[place // 8, 0:e - s], shift, scales[g, column + s:column + e], out[k, s:e])",
            "            i = stop",
        ]
        functions = "\n\n\n".join([decode, turn, "\n".join(lines)])
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n{functions}\n\n\n{self.interface().entry()}"

    def interface(self) -> Interface:
        numbers = f"{self.real}*2"
        parameters = (
            ("words", "uint32*2"),
            ("scales", numbers),
            ("row", "int"),
            ("column", "int"),
            ("out", numbers),
        )
        return Interface(1, self.real, parameters, (("turned", (4, OUTPUTS), "uint32"),))

    def array_form(self) -> tuple[Callable[..., None], float]:
        """The function that runs the kernel with numpy, and the operations it takes for an element."""
        return _decode_blocks, 40.0


def _decode(
    kernel: TransposedKernel, words: np.ndarray, shifts: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray, group: int,
    row: int, column: int, out: np.ndarray,
) -> None:  # fmt: skip
    rows, width = out.shape
    mask = np.uint32((1 << kernel.bits) - 1)
    per_word = WORD_BITS // kernel.bits
    if kernel.packing == "outputs":
        first = row // per_word
        taken = words[column : column + width, first : -(-(row + rows) // per_word)]
        codes = (taken[:, :, None] >> shifts & mask).reshape(width, -1)
        of_rows = codes[:, row - first * per_word :][:, :rows].T
    else:
        first = column // per_word
        taken = words[first : -(-(column + width) // per_word), row : row + rows]
        places = np.arange(per_word, dtype=np.uint32)[:, None] * np.uint32(kernel.bits)
        codes = (taken[:, None, :] >> places & mask).reshape(-1, rows)
        of_rows = codes[column - first * per_word :][:width].T
    inputs = slice(column, column + width)
    groups = index[inputs] if kernel.is_indexed else np.arange(inputs.start, inputs.stop) // group
    out[:] = of_rows
    out -= zeros[row : row + rows][:, groups]
    out *= scales[row : row + rows][:, groups]


def _decode_blocks(words: np.ndarray, scales: np.ndarray, row: int, column: int, out: np.ndarray) -> None:
    rows, width = out.shape
    inputs = np.arange(row, row + rows)
    of_inputs = words[column : column + width][:, inputs // 8]
    codes = (of_inputs >> (inputs % 8 * 4).astype(np.uint32) & np.uint32(15)).T
    m = (codes & np.uint32(7)).astype(np.float32)
    twice = np.maximum(np.maximum(m, 2 * m - 4), 4 * m - 16)
    np.multiply(twice, np.where(codes < 8, np.float32(0.5), np.float32(-0.5)), out=out)
    out *= scales[inputs // BLOCK, column : column + width]
