"""Decodes, encodes and draws one element on a GPU: the same bits as ``tiles.py``, and the simulator's text

Importing this file imports numba-cuda. Under ``NUMBA_ENABLE_CUDASIM`` every function is plain Python on numpy's numbers;
otherwise numba-cuda compiles it into the kernels that call it. There is one text of the arithmetic, and the simulator
runs it. 32-bit numbers are cut back after every sum and shift: numba widens them to 64 bits.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.core import config

from alnico.kernels.constants import BF16, E5M2, F16, F32, F64
from alnico.numerics.noise import GAMMA, MIX_1, MIX_2

SIMULATED = bool(config.ENABLE_CUDASIM)

instructions: Any = importlib.import_module(
    f"alnico.kernels.cuda.{'simulated' if SIMULATED else 'instructions'}"
)

add_u32 = instructions.add_u32
add_u64 = instructions.add_u64
address_at = instructions.address_at
bits_of = instructions.bits_of
device = instructions.device
jit: Any = cuda.jit
double_of = instructions.double_of
float_of = instructions.float_of
load4_u16 = instructions.load4_u16
load4_u32 = instructions.load4_u32
load4_u64 = instructions.load4_u64
load4_u8 = instructions.load4_u8
load_f32 = instructions.load_f32
load_f64 = instructions.load_f64
load_i64 = instructions.load_i64
load_u16 = instructions.load_u16
load_u32 = instructions.load_u32
load_u64 = instructions.load_u64
load_u8 = instructions.load_u8
long_of = instructions.long_of
product = instructions.product
quotient = instructions.quotient
reload_f64 = instructions.reload_f64
root = instructions.root
select = instructions.select
store4_u16 = instructions.store4_u16
store4_u32 = instructions.store4_u32
store4_u64 = instructions.store4_u64
store_f32 = instructions.store_f32
store_f64 = instructions.store_f64
store_i64 = instructions.store_i64
store_u16 = instructions.store_u16
store_u32 = instructions.store_u32
store_u64 = instructions.store_u64
with_sign = instructions.with_sign

_GAMMA, _MIX_1, _MIX_2 = np.uint64(GAMMA), np.uint64(MIX_1), np.uint64(MIX_2)
_U1, _U30, _U27, _U31, _U40 = (np.uint64(n) for n in (1, 30, 27, 31, 40))


@device
def magnitude(value):
    """``abs(value)``."""
    return abs(value)


@device
def smaller(first, second):
    """``min`` as numba has it on the processor: of two equal numbers the first, of NaN and a number the first."""
    return select(second < first, second, first)


@device
def larger(first, second):
    """``max`` as numba has it on the processor."""
    return select(second > first, second, first)


@device
def decode_bf16(word):
    """A BF16 as float32."""
    return float_of(np.uint32(np.uint32(word) << np.uint32(16)))


@device
def decode_f16(word):
    """An F16 as float32: multiplying by 2**112 moves the exponent, exactly, also of subnormals."""
    word = np.uint32(word)
    value = product(
        float_of(np.uint32(np.uint32(word & np.uint32(0x7FFF)) << np.uint32(13))), np.float32(2.0**112)
    )
    sign = np.uint32(np.uint32(word & np.uint32(0x8000)) << np.uint32(16))
    top = select(
        np.uint32(word & np.uint32(0x7FFF)) >= np.uint32(0x7C00), np.uint32(0x7F800000), np.uint32(0)
    )
    return float_of(np.uint32(np.uint32(bits_of(value) | sign) | top))


@device
def decode_e5m2(word):
    """An F8_E5M2, the upper byte of an F16, as float32."""
    return decode_f16(np.uint32(np.uint32(word) << np.uint32(8)))


@device
def decode_e4m3(word):
    """An F8_E4M3 as float32; it has no infinities, and one NaN of each sign."""
    word = np.uint32(word)
    value = product(
        float_of(np.uint32(np.uint32(word & np.uint32(0x7F)) << np.uint32(20))), np.float32(2.0**120)
    )
    sign = np.uint32(np.uint32(word & np.uint32(0x80)) << np.uint32(24))
    top = select(np.uint32(word & np.uint32(0x7F)) >= np.uint32(0x7F), np.uint32(0x7F800000), np.uint32(0))
    return float_of(np.uint32(np.uint32(bits_of(value) | sign) | top))


@device
def encode_bf16(value):
    """A float32 as BF16, to nearest even."""
    bits = bits_of(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


@device
def encode_f16(value):
    """A float32 as F16, to nearest even. Below 2**-14 halves are multiples of 2**-24: adding 0.5 rounds to them."""
    bits = bits_of(value)
    small = np.uint32(bits_of(abs(value) + np.float32(0.5)) - np.uint32(126 << 23))
    top = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(top >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(
        np.uint32(np.uint32(np.uint32(top - np.uint32(112 << 23)) + np.uint32(0xFFF)) + odd) >> np.uint32(13)
    )
    half = select(top < np.uint32(113 << 23), small, normal)
    half = select(top >= np.uint32(0x477FF000), np.uint32(0x7C00), half)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint16(np.uint32(half | sign))


@device
def to_odd(exact):
    """A float64 as float32, to odd where it is inexact: then rounding that to 16 bits equals one rounding."""
    narrow = np.float32(exact)
    wide = np.float64(narrow)
    inexact = (wide != exact) & (abs(wide) < np.inf)
    bits = bits_of(narrow)
    bits = np.uint32(bits - select(inexact & (abs(wide) > abs(exact)), np.uint32(1), np.uint32(0)))
    return float_of(np.uint32(bits | select(inexact, np.uint32(1), np.uint32(0))))


@device
def uniform(key, place):
    """The uniform float32 in [0, 1) of an element (see numerics.noise)."""
    z = np.uint64(key + np.uint64(np.uint64(place) + _U1) * _GAMMA)
    z = np.uint64(np.uint64(z ^ (z >> _U30)) * _MIX_1)
    z = np.uint64(np.uint64(z ^ (z >> _U27)) * _MIX_2)
    z = np.uint64(z ^ (z >> _U31))
    return product(np.float32(np.int64(z >> _U40)), np.float32(2.0**-24))


@device
def decode_any(code, address, place):
    """An element of a dtype that is known when the kernel runs, in float32; not of F64."""
    if code == BF16:
        value = decode_bf16(load_u16(address, place))
    elif code == F32:
        value = float_of(load_u32(address, place))
    elif code == F16:
        value = decode_f16(load_u16(address, place))
    elif code == E5M2:
        value = decode_e5m2(load_u8(address, place))
    else:
        value = decode_e4m3(load_u8(address, place))
    return value


@device
def decode_any_wide(code, address, place):
    """An element of a dtype that is known when the kernel runs, in float64."""
    if code == F64:
        value = double_of(load_u64(address, place))
    else:
        value = np.float64(decode_any(code, address, place))
    return value
