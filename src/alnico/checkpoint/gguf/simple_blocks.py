"""Decodes GGUF's blocks of 32 elements with one scale: ``d * code``, or ``d * code + m``.

Layouts, in bytes: Q4_0 ``d 2 | codes 16``; Q4_1 ``d 2 | m 2 | codes 16``; Q5_0 ``d 2 | fifth bits 4 | codes 16``;
Q5_1 ``d 2 | m 2 | fifth bits 4 | codes 16``; Q8_0 ``d 2 | codes 32``. d and m are float16. Of 16 bytes of codes the low
halves are elements 0 to 15, the high halves 16 to 31.
"""

from __future__ import annotations

import numpy as np

from alnico.checkpoint.gguf.block_types import NO_LEVELS, nibbles, scales_of
from alnico.kernels.block_kernel import BlockKernel, EncodeQ8Kernel
from alnico.kernels.choice import kernel_for


def decode_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (code - 8)``, codes of 4 bits."""
    scales = scales_of(blocks, 0)
    kernel_for(KERNELS["Q4_0"])(blocks, NO_LEVELS, scales, scales[:, :0].copy(), out)


def _q4_0_by_numpy(
    blocks: np.ndarray, _levels: np.ndarray, scales: np.ndarray, _minimums: np.ndarray, out: np.ndarray
) -> None:
    codes = nibbles(blocks[:, 2:], 16).view(np.int8)
    codes -= 8
    out[:] = codes
    out *= scales


def decode_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * code + m``, codes of 4 bits."""
    out[:] = nibbles(blocks[:, 4:], 16)
    out *= scales_of(blocks, 0)
    out += scales_of(blocks, 2)


def decode_q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (code - 16)``, codes of 5 bits."""
    codes = _five_bits(blocks[:, 6:], blocks[:, 2:6]).view(np.int8)
    codes -= 16
    out[:] = codes
    out *= scales_of(blocks, 0)


def decode_q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * code + m``, codes of 5 bits."""
    out[:] = _five_bits(blocks[:, 8:], blocks[:, 4:8])
    out *= scales_of(blocks, 0)
    out += scales_of(blocks, 2)


def decode_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * code``, codes of 8 bits with a sign."""
    scales = scales_of(blocks, 0)
    kernel_for(KERNELS["Q8_0"])(blocks, NO_LEVELS, scales, scales[:, :0].copy(), out)


def _q8_0_by_numpy(
    blocks: np.ndarray, _levels: np.ndarray, scales: np.ndarray, _minimums: np.ndarray, out: np.ndarray
) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= scales


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Join four bits with the fifth; bit i of the 32 is that of element i."""
    codes = nibbles(low, 16)
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    fifth <<= 4
    codes |= fifth
    return codes


def prepare_q8_0(elements: int) -> None:
    """Say how many elements are about to be encoded, so that a kernel is compiled where that is worth it."""
    kernel_for(ENCODER, elements)


def encode_q8_0(values: np.ndarray) -> np.ndarray:
    """Encode float32 (blocks, 32) as Q8_0, uint8 (blocks, 34): ``d = max |x| / 127``, ``code = round(x * (1 / d))``.

    Halves are rounded away from zero, and d itself to float16 after the codes were made of it, as llama.cpp does. Codes are 0 where
    1 / d is beyond float32: d is zero then as float16.

    >>> encode_q8_0(np.full((1, 32), 127, np.float32))[0, :4].view(np.int8)
    array([  0,  60, 127, 127], dtype=int8)
    """
    out = np.empty((len(values), 34), np.uint8)
    scales = np.empty(len(values), np.float32)
    kernel_for(ENCODER)(values, scales, out)
    with np.errstate(over="ignore"):
        out.view(np.float16)[:, 0] = scales
    return out


def _encode_by_numpy(values: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    for begin in range(0, len(values), ENCODED_BLOCKS):
        part = slice(begin, begin + ENCODED_BLOCKS)
        _encode_part(values[part], scales[part], out[part])


def _encode_part(values: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    # Bits are whole numbers in the order of the magnitudes, and faster.
    magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    np.divide(magnitudes.max(axis=1).view(np.float32), np.float32(127), out=scales)
    inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0
    scaled = values * inverse[:, None]
    # The largest float32 below a half, with the number's sign: then cutting off the fraction rounds halves away from zero, and
    # nothing else that is below a half.
    halves = np.bitwise_and(scaled.view(np.uint32), np.uint32(0x80000000), out=magnitudes)
    halves |= np.float32(0.49999997).view(np.uint32)
    scaled += halves.view(np.float32)
    np.copyto(out[:, 2:].view(np.int8), scaled, casting="unsafe")


ENCODED_BLOCKS = 2048
"""Blocks that numpy encodes at a time: they fit the second-level cache."""
ENCODER = EncodeQ8Kernel(_encode_by_numpy)
"""What encodes."""
KERNELS = {
    kernel.kind: kernel
    for kernel in (BlockKernel("Q4_0", _q4_0_by_numpy), BlockKernel("Q8_0", _q8_0_by_numpy))
}
"""What decodes types where there is much to do."""
