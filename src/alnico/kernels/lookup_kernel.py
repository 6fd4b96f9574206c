"""Writes the kernel that decodes codes by a table and scales of groups: ``(table[code] - zero) * scale``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alnico.kernels.measure_kernels import PLAIN
from alnico.kernels.template import APART, DECORATOR, PREAMBLE, Interface, Real

CodeOrder = Literal["byte", "low half first", "high half first"]
"""How codes lie in bytes: one in each, or two, with the first of them in the low or in the high half."""

STEP = 16
"""Elements decoded at a time. LLVM knows how many, so that the loop over them becomes vectors in groups of any size."""


@dataclass(frozen=True)
class LookupKernel:
    """``run(codes, table, zeros, scales, group, offset, out)``: elements of rows, in float32.

    ``codes`` is (rows, bytes), ``out`` (rows, columns), ``table`` has a number for each code. ``zeros`` and ``scales`` are
    (rows, groups): one number for ``group`` columns each; the first group lacks its first ``offset`` columns. Where a byte
    holds two codes, ``group`` and ``offset`` are even. Difference and product are rounded one by one.
    """

    order: CodeOrder
    real: Real = "float32"

    def text(self) -> str:
        per_byte = 1 if self.order == "byte" else 2
        lines = [
            f"def run({self.interface().signature()}):",
            "    for r in range(out.shape[0]):",
            "        s = 0",
            "        g = 0",
            "        if offset != 0:",
            "            s = min(group - offset, out.shape[1])",
            f"            decode_rest({self._bytes('0', 's')}, table, zeros[r, 0], scales[r, 0], out[r, 0:s])",
            "            g = 1",
            f"        if group % {STEP} == 0:",
            "            whole = (out.shape[1] - s) // group",
            "            e = s + whole * group",
            f"            decode_groups({self._bytes('s', 'e')}, table, zeros[r, g:g + whole], scales[r, g:g + whole], group // {STEP}, out[r, s:e])",
            "            s = e",
            "            g += whole",
            "        while s < out.shape[1]:",
            "            e = min(s + group, out.shape[1])",
            f"            decode_rest({self._bytes('s', 'e')}, table, zeros[r, g], scales[r, g], out[r, s:e])",
            "            s = e",
            "            g += 1",
        ]
        groups = (
            "def decode_groups(codes, table, zeros, scales, steps, out):\n"
            "    for g in range(scales.size):\n"
            "        zero = zeros[g]\n"
            "        scale = scales[g]\n"
            "        for k in range(g * steps, (g + 1) * steps):\n"
            f"{self._loop(str(STEP // per_byte), f'{STEP // per_byte} * k + ', f'{STEP} * k + ', 12)}"
        )
        rest = (
            "def decode_rest(codes, table, zero, scale, out):\n"
            f"{self._loop('out.size' if per_byte == 1 else 'out.size >> 1', '', '', 4)}{self._last()}"
        )
        apart = DECORATOR.format(options=APART)
        functions = "\n\n\n".join([f"{apart}\n{groups}", f"{apart}\n{rest}", f"{PLAIN}\n" + "\n".join(lines)])
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n{functions}\n\n\n{self.interface().entry()}"

    def _bytes(self, begin: str, end: str) -> str:
        """The bytes of some elements of a row."""
        return (
            f"codes[r, {begin}:{end}]" if self.order == "byte" else f"codes[r, {begin} >> 1:({end} + 1) >> 1]"
        )

    def _loop(self, count: str, first_byte: str, first: str, indent: int) -> str:
        """The loop over so many bytes from a byte on, whose elements go to ``out`` from an element on."""
        space = " " * indent
        head = f"{space}for j in range({count}):\n"
        if self.order == "byte":
            return f"{head}{space}    out[{first}j] = (table[codes[{first_byte}j]] - zero) * scale\n"
        low, high = codes_in(f"{first_byte}j", self.order)
        return (
            f"{head}{space}    out[{first}2 * j] = (table[{low}] - zero) * scale\n"
            f"{space}    out[{first}2 * j + 1] = (table[{high}] - zero) * scale\n"
        )

    def _last(self) -> str:
        """What decodes an element whose byte has no second one."""
        if self.order == "byte":
            return ""
        return f"    if out.size & 1:\n        j = out.size >> 1\n        out[2 * j] = (table[{codes_in('j', self.order)[0]}] - zero) * scale\n"

    def interface(self) -> Interface:
        numbers = f"{self.real}*2"
        parameters = (
            ("codes", "uint8*2"),
            ("table", f"{self.real}*1"),
            ("zeros", numbers),
            ("scales", numbers),
            ("group", "int"),
            ("offset", "int"),
            ("out", numbers),
        )
        return Interface(1, self.real, parameters)


@dataclass(frozen=True)
class IndexedKernel:
    """``run(codes, table, zeros, scales, index, out)``: elements of rows whose columns name their groups, in float32.

    As for :class:`LookupKernel`; column c of the ``out`` is of group ``index[c]``.
    """

    order: CodeOrder
    real: Real = "float32"

    def text(self) -> str:
        per = 1 if self.order == "byte" else 2
        lines = [
            DECORATOR.format(options=APART),
            "def decode_row(codes, table, zeros, scales, index, out):",
            f"    for j in range(out.size // {per}):",
        ]
        for i, code in enumerate(codes_in("j", self.order)):
            lines += [
                f"        g = index[{per} * j + {i}]",
                f"        out[{per} * j + {i}] = (table[{code}] - zeros[g]) * scales[g]",
            ]
        if per == 2:
            lines += [
                "    if out.size & 1:",
                "        g = index[out.size - 1]",
                f"        out[out.size - 1] = (table[{codes_in('out.size >> 1', self.order)[0]}] - zeros[g]) * scales[g]",
            ]
        lines += [
            "",
            "",
            PLAIN,
            f"def run({self.interface().signature()}):",
            "    for r in range(out.shape[0]):",
            "        decode_row(codes[r], table, zeros[r], scales[r], index, out[r])",
        ]
        return f"{PREAMBLE.format(bits=self.real[-2:])}\n\n" + "\n".join(lines) + f"\n\n\n{self.interface().entry()}"  # fmt: skip

    def interface(self) -> Interface:
        numbers = f"{self.real}*2"
        parameters = (
            ("codes", "uint8*2"),
            ("table", f"{self.real}*1"),
            ("zeros", numbers),
            ("scales", numbers),
            ("index", "uint32*1"),
            ("out", numbers),
        )
        return Interface(1, self.real, parameters)

    def array_form(self) -> tuple[Callable[..., None], float]:
        """The function that runs the kernel with numpy, and the operations it takes for an element."""
        return functools.partial(_decode_indexed, self.order), 33.0


def codes_in(place: str, order: CodeOrder) -> tuple[str, ...]:
    """What reads the codes in a byte, in their order."""
    if order == "byte":
        return (f"codes[{place}]",)
    low, high = f"np.uint8(codes[{place}] & np.uint8(15))", f"np.uint8(codes[{place}] >> np.uint8(4))"
    return (low, high) if order == "low half first" else (high, low)


def split_codes(codes: np.ndarray, order: CodeOrder, columns: int) -> np.ndarray:
    """Return the codes of rows (rows, bytes), one in each byte: (rows, columns) uint8."""
    if order == "byte":
        return codes
    low, high = codes & np.uint8(15), codes >> np.uint8(4)
    halves = (low, high) if order == "low half first" else (high, low)
    return np.stack(halves, axis=-1).reshape(len(codes), -1)[:, :columns]


def _decode_indexed(
    order: CodeOrder, codes: np.ndarray, table: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray, out: np.ndarray
) -> None:  # fmt: skip
    np.take(table, split_codes(codes, order, out.shape[1]), out=out, mode="clip")
    out -= zeros[:, index]
    out *= scales[:, index]
