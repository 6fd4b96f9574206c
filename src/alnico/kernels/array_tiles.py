"""Decodes, encodes and fills arrays with numpy, bit for bit as ``tiles.py`` does compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from alnico.kernels.constants import BF16, CODES, F16, F32, F64, WIDE_BF16, WIDE_CODES, WIDE_F16, WORD
from alnico.kernels.template import ArgumentKind
from alnico.numerics.dtypes import decode as decode_values
from alnico.numerics.dtypes import decode_into
from alnico.numerics.noise import uniform

NAMES = {code: name for name, code in CODES.items()}
WIDE_NAMES = {code: name for name, code in WIDE_CODES.items()}
WIDTHS = {F64: 8, F32: 4, F16: 2, BF16: 2, WIDE_F16: 4, WIDE_BF16: 4}
"""Bytes per element of each dtype; all others have one."""


def width_of(code: int) -> int:
    """Bytes per element of a dtype."""
    return WIDTHS.get(int(code), 1)


def decode(raw: np.ndarray, code: int, real: np.dtype[Any]) -> np.ndarray:
    """Decode raw bytes to ``real``. The result may be a view of the bytes: it is not to be written into."""
    return _aligned(raw, NAMES[int(code)]).astype(real, copy=False)


def _aligned(raw: np.ndarray, name: str) -> np.ndarray:
    if name == "F32":  # decode_values copies
        return raw.view(np.float32)
    return decode_values(raw, name)


def is_bad(values: np.ndarray) -> bool:
    """Whether a value is NaN or infinite."""
    return not np.isfinite(values).all()


def encode(values: np.ndarray, code: int, out: np.ndarray) -> bool:
    """Round float32 or float64 values once, to nearest even, into raw bytes. Returns whether a result is NaN or infinite."""
    if code == F64:
        out.view(np.float64)[:] = values
        return is_bad(values)
    if code == F32:
        narrow = out.view(np.float32)
        narrow[:] = values
        return is_bad(narrow)
    if code in WIDE_NAMES:
        name = WIDE_NAMES[int(code)]
        rounded_bytes = np.empty(out.size // 2, np.uint8)
        bad = encode(values, CODES[name], rounded_bytes)
        decode_into(rounded_bytes, name, out.view(np.float32))
        return bad
    rounded = _to_odd(values) if values.dtype == np.float64 else values
    if code == F16:
        halves = out.view(np.float16)
        halves[:] = rounded
        return is_bad(halves)
    bits = rounded.view(np.uint32)
    upper = bits >> np.uint32(16)
    odd = upper & np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    out.view(np.uint16)[:] = odd
    return bool((bits & np.uint32(0x7FFFFFFF)).max(initial=0) >= 0x7F7F8000)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32, to odd where it is inexact: then rounding that to 16 bits equals one rounding."""
    narrow = values.astype(np.float32)
    wide = narrow.astype(np.float64)
    inexact = (wide != values) & ~np.isinf(wide)
    bits = narrow.view(np.uint32)
    bits -= (inexact & (np.abs(wide) > np.abs(values))).astype(np.uint32)
    bits |= inexact.astype(np.uint32)
    return narrow


def filled(kind: ArgumentKind, parts: list[Any], model: int, start: int, span: tuple[int, int]) -> np.ndarray:
    """The numbers of an argument for elements ``span`` of a block that begins at element ``start``; ``parts`` are what the
    argument is to a kernel (``template.PARTS``)."""
    s, e = span
    first, count = start + s, e - s
    if kind == "noise":
        return uniform(int(parts[1][model]), first, count)
    if kind in ("bernoulli", "ranked"):
        return _drawn(kind, parts, model, first, span)
    numbers, inner = parts[0][model], int(parts[1])
    places = np.arange(first, first + count)
    chosen: np.ndarray = numbers[places // inner if kind == "rows" else places % inner]
    return chosen


def _drawn(kind: ArgumentKind, parts: list[Any], model: int, first: int, span: tuple[int, int]) -> np.ndarray:
    """1.0 where an element is drawn, else 0.0, for the elements from ``first`` on."""
    count = span[1] - span[0]
    *_, words, is_known = parts
    kept = words[model, first // WORD : -(-(first + count) // WORD)]
    is_kept = WORD * kept.size >= count
    if is_kept and is_known:
        known: np.ndarray = np.unpackbits(kept.view(np.uint8), count=count, bitorder="little").astype(
            np.float32
        )
        return known
    chance = parts[0][model]
    if kind == "ranked":
        chance = chance + parts[2][model] * parts[3][model, span[0] : span[1]]
    drawn = uniform(int(parts[1][model]), first, count) < chance
    if is_kept:
        bits = np.packbits(drawn, bitorder="little")
        kept.view(np.uint8)[: bits.size] = bits
        kept.view(np.uint8)[bits.size :] = 0
    draws: np.ndarray = drawn.astype(np.float32)
    return draws
