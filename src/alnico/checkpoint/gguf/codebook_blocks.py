"""Decodes GGUF's blocks of 256 elements made of vectors of a fixed codebook: the types IQ1, IQ2 and IQ3.

An index names a vector of 8 small numbers (4 for IQ3) in the type's codebook; signs are apart. Layouts, in bytes, d in float16:

- IQ2_XXS ``d 2 | 8 x (4 indices of 8 bits; 4 signs of 7 bits and a scale of 4 bits)``, 66
- IQ2_XS ``d 2 | 32 x (index of 9 bits, sign of 7 bits) 64 | 16 scales of 4 bits 8``
- IQ2_S ``d 2 | low 8 bits of 32 indices 32 | signs 32 | high 2 bits 8 | 16 scales of 4 bits 8``
- IQ3_XXS ``d 2 | 64 indices of 8 bits 64 | 8 x (4 signs of 7 bits, a scale of 4 bits) 32``
- IQ3_S ``d 2 | low 8 bits of 64 indices 64 | high bits 8 | signs 32 | 8 scales of 4 bits 4``
- IQ1_S ``d 2 | low 8 bits of 32 indices 32 | 8 x (4 times 3 high bits, a scale of 3 bits, the sign of the shift) 16``
- IQ1_M ``low 8 bits of 32 indices 32 | 32 x (3 high bits, the sign of the shift) 16 | 16 scales of 3 bits and d 8``

A sign of 7 bits has an eighth that makes the number of ones even.
"""

from __future__ import annotations

import functools

import numpy as np

from alnico.checkpoint.gguf.block_types import nibbles, scales_of
from alnico.checkpoint.gguf.codebooks import codebook

SHIFT = np.float32(0.125)
"""What is added to the numbers of the types IQ1, or subtracted."""


def decode_iq2_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (0.5 + scale) / 4 * vector``, parts of 32."""
    words = blocks[:, 2:].copy().view(np.uint32).reshape(len(blocks), 8, 2)
    indices = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)
    scales = scales_of(blocks, 0) * _half_up(words[:, :, 1] >> 28) * np.float32(0.25)
    _fill(out, codebook("IQ2_XXS"), indices, scales, _even_signs(_sevens(words[:, :, 1])))


def decode_iq2_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (0.5 + scale) / 4 * vector``, parts of 16."""
    words = blocks[:, 2:66].copy().view(np.uint16)
    scales = scales_of(blocks, 0) * _half_up(nibbles(blocks[:, 66:], 1)) * np.float32(0.25)
    _fill(out, codebook("IQ2_XS"), words & 511, scales, _even_signs(words >> 9))


def decode_iq2_s(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (0.5 + scale) / 4 * vector``, parts of 16."""
    high = (blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    indices = blocks[:, 2:34] | (high.reshape(len(blocks), 32).astype(np.uint16) << 8)
    scales = scales_of(blocks, 0) * _half_up(nibbles(blocks[:, 74:], 1)) * np.float32(0.25)
    _fill(out, codebook("IQ2_S"), indices, scales, _signs(blocks[:, 34:66]))


def decode_iq3_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (0.5 + scale) / 2 * vector``, parts of 32."""
    words = blocks[:, 66:].copy().view(np.uint32)
    scales = scales_of(blocks, 0) * _half_up(words >> 28) * np.float32(0.5)
    _fill(out, codebook("IQ3_XXS"), blocks[:, 2:66], scales, _even_signs(_sevens(words)))


def decode_iq3_s(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (1 + 2 * scale) * vector``, parts of 32."""
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    indices = blocks[:, 2:66] | (high.astype(np.uint16) << 8)
    scales = scales_of(blocks, 0) * (1 + 2 * nibbles(blocks[:, 106:], 1))
    _fill(out, codebook("IQ3_S"), indices, scales, _signs(blocks[:, 74:106]))


def decode_iq1_s(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (2 * scale + 1) * (vector ± 1/8)``, parts of 32."""
    words = blocks[:, 34:].copy().view(np.uint16)
    high = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    indices = blocks[:, 2:34] | (high.reshape(len(blocks), 32) << 8)
    scales = scales_of(blocks, 0) * (2 * ((words >> 12) & 7) + 1)
    shifts = np.where(words & 0x8000, -SHIFT, SHIFT)
    _fill_shifted(out, indices, scales, shifts)


def decode_iq1_m(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (2 * scale + 1) * (vector ± 1/8)``, parts of 16 with a scale, of 8 with a shift; d is in the top bits of the scales."""
    words = blocks[:, 48:].copy().view(np.uint16)
    tops = (words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    d = np.bitwise_or.reduce(tops, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    high = nibbles(blocks[:, 32:48], 1)
    indices = blocks[:, :32] | ((high & 7).astype(np.uint16) << 8)
    shifts = np.where(high & 8, -SHIFT, SHIFT)
    _fill_shifted(out, indices, d * (2 * scales.reshape(len(blocks), 16) + 1), shifts)


def _half_up(scales: np.ndarray) -> np.ndarray:
    """``0.5 + scale``, float32."""
    return np.float32(0.5) + scales.astype(np.float32)


def _sevens(words: np.ndarray) -> np.ndarray:
    """The four fields of 7 bits in the low bits of each 32-bit word."""
    fields = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    return fields.reshape(len(words), -1)


@functools.cache
def _sign_rows() -> np.ndarray:
    """The eight signs of each byte, float32 (256, 8); a one is a minus."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(ones, np.float32(-1), np.float32(1))


@functools.cache
def _even_sign_rows() -> np.ndarray:
    """The eight signs of each field of 7 bits, float32 (128, 8)."""
    codes = np.arange(128)
    parity = np.array([bin(code).count("1") & 1 for code in codes])
    rows: np.ndarray = _sign_rows()[codes | (parity << 7)]
    return rows


def _signs(codes: np.ndarray) -> np.ndarray:
    rows: np.ndarray = _sign_rows()[codes]
    return rows


def _even_signs(codes: np.ndarray) -> np.ndarray:
    rows: np.ndarray = _even_sign_rows()[codes]
    return rows


def _fill(
    out: np.ndarray, book: np.ndarray, indices: np.ndarray, scales: np.ndarray, signs: np.ndarray
) -> None:
    """Put the vectors of the codebook into ``out``, times the scale of their part and their signs."""
    np.take(book, indices, axis=0, out=out.reshape(len(out), -1, book.shape[1]), mode="clip")
    parts = out.reshape(len(out), scales.shape[1], -1)
    parts *= scales[:, :, None]
    out *= signs.reshape(len(out), -1)


def _fill_shifted(out: np.ndarray, indices: np.ndarray, scales: np.ndarray, shifts: np.ndarray) -> None:
    """Put vectors of IQ1's codebook into ``out``, shifted, times the scale of their part."""
    np.take(codebook("IQ1"), indices, axis=0, out=out.reshape(len(out), 32, 8), mode="clip")
    shifted = out.reshape(len(out), shifts.shape[1], -1)
    shifted += shifts[:, :, None]
    parts = out.reshape(len(out), scales.shape[1], -1)
    parts *= scales[:, :, None]
