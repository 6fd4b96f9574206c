"""Defines the dtypes of safetensors, their sizes, and how their values become float32.

A tensor is merged only if its dtype is one of :data:`MERGEABLE`. Integers and booleans are copied.
Other float8 and narrower formats have a size here, so that files with them can be listed and copied.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = tuple[int, ...]
DtypeKind = Literal["float", "integer", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype: ``bits`` per element, and the numpy dtype that holds its bytes, if any."""

    name: str
    bits: int
    kind: DtypeKind
    storage: str | None

    @property
    def bytes(self) -> int:
        """Bytes per element; only for dtypes of at least 8 bits."""
        return self.bits // 8


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 64, "float", "<f8"),
        DType("F32", 32, "float", "<f4"),
        DType("F16", 16, "float", "<f2"),
        DType("BF16", 16, "float", "<u2"),
        DType("I64", 64, "integer", "<i8"),
        DType("U64", 64, "integer", "<u8"),
        DType("I32", 32, "integer", "<i4"),
        DType("U32", 32, "integer", "<u4"),
        DType("I16", 16, "integer", "<i2"),
        DType("U16", 16, "integer", "<u2"),
        DType("I8", 8, "integer", "i1"),
        DType("U8", 8, "integer", "u1"),
        DType("BOOL", 8, "bool", "u1"),
        DType("C64", 64, "complex", "<c8"),
        DType("F8_E5M2", 8, "float", "u1"),
        DType("F8_E4M3", 8, "float", "u1"),
        DType("F8_E5M2FNUZ", 8, "packed", "u1"),
        DType("F8_E4M3FNUZ", 8, "packed", "u1"),
        DType("F8_E8M0", 8, "packed", "u1"),
        DType("F6_E2M3", 6, "packed", None),
        DType("F6_E3M2", 6, "packed", None),
        DType("F4", 4, "packed", None),
    )
}

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes that are read and copied, never written as results: those are BF16, which holds every value of
both."""

MERGEABLE = ("F64", "F32", "F16", "BF16", *FLOAT8)
"""Dtypes whose values can be merged."""

COPYABLE_KINDS = ("integer", "bool")
"""Kinds of dtype that are copied when all models agree."""

TORCH_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
    "half": "F16",
    "float": "F32",
    "double": "F64",
}
"""Names a recipe may use for an output dtype (``torch.`` before them is allowed too)."""

Q8_0 = "Q8_0"
"""The blocks of GGUF files that a recipe may ask for as a dtype; what becomes blocks is computed as F32."""

CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The name of an output dtype in ``config.json``."""


def promote(names: list[str]) -> str:
    """Return the narrowest dtype of at least 16 bits that holds all values of ``names`` exactly.

    >>> promote(["BF16", "BF16"]), promote(["BF16", "F16"]), promote(["F32", "F64"])
    ('BF16', 'F32', 'F64')
    >>> promote(["F8_E4M3"]), promote(["F8_E5M2", "F16"])  # both 16-bit dtypes hold both
    ('BF16', 'F16')
    """
    distinct = set(names) - set(FLOAT8) or {"BF16"}
    if len(distinct) == 1:
        return distinct.pop()
    return "F64" if "F64" in distinct else "F32"


def decode(raw: np.ndarray, name: str) -> np.ndarray:
    """Decode raw bytes (uint8, contiguous) of a mergeable dtype to float32, or float64 for F64.

    Exact for every finite value.

    >>> decode(np.array([0x38, 0xC0], np.uint8), "F8_E4M3")
    array([ 1., -2.], dtype=float32)
    >>> decode(np.array([0x80, 0x3F], np.uint8), "BF16")
    array([1.], dtype=float32)
    """
    if name in FLOAT8:
        of_float8: np.ndarray = _float8_values(name)[raw]
        return of_float8
    values = raw.view(np.dtype(DTYPES[name].storage))
    if name == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if name == "F64" else values.astype(np.float32)


def decode_into(raw: np.ndarray, name: str, values: np.ndarray) -> None:
    """Decode raw bytes as :func:`decode` does, into float32 ``values``.

    >>> values = np.empty(1, np.float32)
    >>> decode_into(np.array([0x80, 0x3F], np.uint8), "BF16", values)
    >>> values
    array([1.], dtype=float32)
    """
    if name == "BF16":
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=values.view(np.uint32), dtype=np.uint32)
    else:
        values[:] = decode(raw, name)


def negate(raw: np.ndarray, name: str, *, is_negated: bool, is_conjugated: bool) -> None:
    """Turn raw bytes (uint8, contiguous) into those of the negative, the complex conjugate, or both, in
    place.

    Signs of floats are flipped, also of zeros and NaN; integers are negated modulo their size, as torch does
    it.

    >>> raw = np.array([1 + 2j], np.complex64).view(np.uint8)
    >>> negate(raw, "C64", is_negated=True, is_conjugated=True)
    >>> raw.view(np.complex64)
    array([-1.+2.j], dtype=complex64)
    """
    dtype = DTYPES[name]
    if dtype.kind == "complex":
        sign = raw.view(np.uint32)
        sign[0::2] ^= np.uint32(is_negated << 31)
        sign[1::2] ^= np.uint32((is_negated != is_conjugated) << 31)
    elif is_negated and dtype.kind == "float":
        sign = raw.view(f"<u{dtype.bytes}")
        sign ^= sign.dtype.type(1 << (dtype.bits - 1))
    elif is_negated:
        values = raw.view(np.dtype(dtype.storage))
        np.negative(values, out=values)


@functools.cache
def _float8_values(name: str) -> np.ndarray:
    """The value of each of the 256 codes: 4 bits of exponent and 3 of mantissa without infinities, or the
    upper byte of F16."""
    codes = np.arange(256)
    if name == "F8_E5M2":
        halves: np.ndarray = (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        return halves
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    magnitude[codes & 127 == 127] = np.nan
    values: np.ndarray = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return values
