"""Decodes GGUF's ternary blocks of 256 elements: ``d * (digit - 1)``, digits 0 to 2.

Layouts, in bytes: TQ1_0 ``digits 48 | the last 16 digits 4 | d float16 2``; TQ2_0 ``codes of 2 bits 64 | d float16 2``.
A byte of TQ1_0 holds the fraction ``0.abcde`` in base 3, scaled to 256: the digits come out at the top when it is multiplied by
powers of 3 modulo 256.
"""

from __future__ import annotations

import numpy as np

from alnico.checkpoint.gguf.block_types import bits, scales_of


def decode_tq1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """Five digits a byte: 32 bytes of 160 elements, 16 of 80, and 4 of 16 with four digits each."""
    parts = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    digits = np.concatenate([_digits(packed, count) for packed, count in parts], axis=1).view(np.int8)
    digits -= 1
    out[:] = digits
    out *= scales_of(blocks, 52)


def decode_tq2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """Four digits a byte."""
    digits = bits(blocks[:, :64], 4, 2, 32).view(np.int8)
    digits -= 1
    out[:] = digits
    out *= scales_of(blocks, 64)


def _digits(packed: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` digits of each byte: all first ones, then all second ones."""
    powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)
    shifted = packed[:, None, :] * powers[:, None]
    digits = (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return digits.reshape(len(packed), -1)
