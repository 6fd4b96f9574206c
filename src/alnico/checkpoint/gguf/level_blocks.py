"""Decodes GGUF's blocks of 4-bit codes that stand for 16 fixed levels: ``d * LEVELS[code]``.

Layouts, in bytes: IQ4_NL ``d float16 2 | codes 16``, blocks of 32; IQ4_XS ``d float16 2 | high bits of 8 scales 2 | low bits 4 |
codes 128``, blocks of 256; MXFP4 (the Open Compute Project's format, as gpt-oss has it) ``exponent 1 | codes 16``, blocks of 32; NVFP4
``4 scales of 16 elements in FP8 E4M3 without a sign 4 | codes 32``, blocks of 64.
"""

from __future__ import annotations

import functools

import numpy as np

from alnico.checkpoint.gguf.block_types import bits, nibbles, scales_of
from alnico.kernels.block_kernel import BlockKernel
from alnico.kernels.choice import kernel_for

NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""The levels of the types IQ4: denser around zero, as weights are."""
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of FP4 E2M1, a sign bit before 2 bits of exponent and 1 of mantissa."""


def decode_iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * level``."""
    scales = scales_of(blocks, 0)
    kernel_for(KERNELS["IQ4_NL"])(blocks, NONLINEAR, scales, scales[:, :0].copy(), out)


def _iq4_nl_by_numpy(
    blocks: np.ndarray, levels: np.ndarray, scales: np.ndarray, _: np.ndarray, out: np.ndarray
) -> None:
    np.take(levels, nibbles(blocks[:, 2:], 16), out=out, mode="clip")
    out *= scales


def decode_iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    """``d * (scale - 32) * level``, scales of 6 bits, parts of 32."""
    low = nibbles(blocks[:, 4:8], 1)
    high = bits(blocks[:, 2:4], 4, 2, 1)
    scales = (low | (high << 4)).view(np.int8) - np.int8(32)
    np.take(NONLINEAR, nibbles(blocks[:, 8:], 16), out=out, mode="clip")
    parts = out.reshape(len(out), 8, 32)
    parts *= (scales_of(blocks, 0) * scales)[:, :, None]


def decode_mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    """``2^(exponent - 128) * level``: the levels are twice FP4's values, so the scale is half of ``2^(exponent - 127)``."""
    exponents = blocks[:, :1].astype(np.uint32)
    # The two smallest are below the normal numbers of float32.
    scales = np.where(exponents < 2, 0x200000 << exponents, (exponents - 1) << 23).astype(np.uint32)
    np.take(FP4, nibbles(blocks[:, 1:], 16), out=out, mode="clip")
    out *= scales.view(np.float32)


def decode_nvfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    """``scale / 2 * level``: the levels are twice FP4's values. Parts of 16."""
    np.take(FP4, nibbles(blocks[:, 4:], 8), out=out, mode="clip")
    parts = out.reshape(len(out), 4, 16)
    parts *= _half_scales()[blocks[:, :4]][:, :, None]


@functools.cache
def _half_scales() -> np.ndarray:
    """Half of the value of each code of E4M3, float32 (256): 4 bits of exponent and 3 of mantissa, the top bit is not used; the highest
    of the others, NaN elsewhere, is zero."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    values[127] = 0
    halves: np.ndarray = (values / 2).astype(np.float32)
    return halves


KERNELS = {"IQ4_NL": BlockKernel("IQ4_NL", _iq4_nl_by_numpy)}
"""What decodes types where there is much to do."""
