"""Decodes GGUF's K types: blocks of 256 elements whose parts have scales of their own.

Layouts, in bytes, with d and dmin in float16 (Q8_K: d in float32):

- Q2_K ``scales and minimums of 16 parts, 4 bits each, 16 | codes 64 | d 2 | dmin 2``
- Q3_K ``third bits 32 | codes 64 | scales of 16 parts, 6 bits each, 12 | d 2``
- Q4_K ``d 2 | dmin 2 | scales and minimums of 8 parts, 6 bits each, 12 | codes 128``
- Q5_K ``d 2 | dmin 2 | scales and minimums as Q4_K 12 | fifth bits 32 | codes 128``
- Q6_K ``low 4 bits 128 | high 2 bits 64 | scales of 16 parts, int8, 16 | d 2``
- Q8_K ``d 4 | codes 256 | sums of 16 parts, int16, 32``, which only computations use
"""

from __future__ import annotations

import numpy as np

from alnico.checkpoint.gguf.block_types import NO_LEVELS, bits, nibbles, scales_of
from alnico.kernels.block_kernel import BlockKernel
from alnico.kernels.choice import kernel_for


def decode_q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * scale * code - dmin * minimum``, codes of 2 bits, parts of 16."""
    scale = scales_of(blocks, 80) * (blocks[:, :16] & 15)
    minimum = scales_of(blocks, 82) * (blocks[:, :16] >> 4)
    out[:] = bits(blocks[:, 16:80], 4, 2, 32)
    _scale_parts(out, scale, minimum)


def decode_q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (scale - 32) * (code - 4)``, codes of 3 bits, parts of 16."""
    low, high = nibbles(blocks[:, 96:104], 8), bits(blocks[:, 104:108], 4, 2, 4)
    scales = (low | (high << 4)).view(np.int8) - np.int8(32)
    codes = bits(blocks[:, 32:96], 4, 2, 32)
    codes |= bits(blocks[:, :32], 8, 1, 32) << 2
    signed = codes.view(np.int8)
    signed -= 4
    out[:] = signed
    _scale_parts(out, scales_of(blocks, 108) * scales)


def decode_q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * scale * code - dmin * minimum``, codes of 4 bits, parts of 32."""
    scales, minimums = _six_bits(blocks[:, 4:16])
    run = kernel_for(KERNELS["Q4_K"])
    run(blocks, NO_LEVELS, scales_of(blocks, 0) * scales, scales_of(blocks, 2) * minimums, out)


def _q4_k_by_numpy(
    blocks: np.ndarray, _: np.ndarray, scales: np.ndarray, minimums: np.ndarray, out: np.ndarray
) -> None:
    out[:] = nibbles(blocks[:, 16:], 32)
    _scale_parts(out, scales, minimums)


def decode_q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * scale * code - dmin * minimum``, codes of 5 bits, parts of 32."""
    scales, minimums = _six_bits(blocks[:, 4:16])
    run = kernel_for(KERNELS["Q5_K"])
    run(blocks, NO_LEVELS, scales_of(blocks, 0) * scales, scales_of(blocks, 2) * minimums, out)


def _q5_k_by_numpy(
    blocks: np.ndarray, _: np.ndarray, scales: np.ndarray, minimums: np.ndarray, out: np.ndarray
) -> None:
    codes = nibbles(blocks[:, 48:], 32)
    codes |= bits(blocks[:, 16:48], 8, 1, 32) << 4
    out[:] = codes
    _scale_parts(out, scales, minimums)


def decode_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * scale * (code - 32)``, codes of 6 bits, parts of 16."""
    scales = scales_of(blocks, 208) * blocks[:, 192:208].view(np.int8)
    kernel_for(KERNELS["Q6_K"])(blocks, NO_LEVELS, np.ascontiguousarray(scales), scales[:, :0].copy(), out)


def _q6_k_by_numpy(
    blocks: np.ndarray, _levels: np.ndarray, scales: np.ndarray, _minimums: np.ndarray, out: np.ndarray
) -> None:
    codes = nibbles(blocks[:, :128], 64)
    codes |= bits(blocks[:, 128:192], 4, 2, 32) << 4
    signed = codes.view(np.int8)
    signed -= 32
    out[:] = signed
    _scale_parts(out, scales)


def decode_q8_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * code``, codes of 8 bits with a sign."""
    out[:] = blocks[:, 4:260].view(np.int8)
    out *= blocks[:, :4].copy().view(np.float32)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8 scales and the 8 minimums in 12 bytes. Of the first four, bytes 0 to 3 and 4 to 7 have the low 6 bits; of the last
    four, bytes 8 to 11 have the low 4 bits (scales in the low halves), and the top 2 bits of bytes 0 to 7 their high ones."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales, minimums


def _scale_parts(out: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None = None) -> None:
    """Multiply each part of codes by its scale, in place, and subtract its minimum."""
    parts = out.reshape(len(out), scales.shape[1], -1)
    parts *= scales[:, :, None]
    if minimums is not None:
        parts -= minimums[:, :, None]


KERNELS = {
    kernel.kind: kernel
    for kernel in (
        BlockKernel("Q4_K", _q4_k_by_numpy),
        BlockKernel("Q5_K", _q5_k_by_numpy),
        BlockKernel("Q6_K", _q6_k_by_numpy),
    )
}
"""What decodes types where there is much to do."""
