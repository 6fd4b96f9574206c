"""Runs the two analysis kernels with numpy: the same sums, counts and histograms as compiled."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from alnico.kernels.analysis_kernels import MOMENTS, TABLES, DescribingKernel, OrderKernel
from alnico.kernels.array_tiles import decode, is_bad, width_of
from alnico.kernels.constants import LANES, LEAF
from alnico.kernels.interpret import add_to_lanes, chunks, fold
from alnico.kernels.interpret import run_of as run_of_merge

DESCRIBING_STEPS, ORDER_STEPS = 150.0, 50.0
"""Operations for an element of a model."""


def run_of(kernel: Any) -> tuple[Callable[..., int | None], float]:
    """Return the function that runs any kernel, and the operations it takes for an element. Errors: NoArrayForm."""
    if isinstance(kernel, DescribingKernel):
        return functools.partial(_describe, np.dtype(kernel.real)), DESCRIBING_STEPS
    if isinstance(kernel, OrderKernel):
        return functools.partial(_order, np.dtype(kernel.real)), ORDER_STEPS
    return run_of_merge(kernel)


def _deltas(
    addresses: np.ndarray, codes: np.ndarray, base: np.ndarray, base_code: int, span: tuple[int, int], real: np.dtype[Any]
) -> tuple[list[np.ndarray], np.ndarray, bool]:  # fmt: skip
    """The task-vector entries of all models in a span, the base's values there, and whether a value is not finite."""
    s, e = span
    width = width_of(base_code)
    b = decode(base[width * s : width * e], base_code, real)
    bad, deltas = is_bad(b), []
    for address, code in zip(addresses.tolist(), codes.tolist(), strict=True):
        width = width_of(code)
        size = width * (e - s)
        # The caller owns this memory for as long as the kernel runs.
        raw = np.frombuffer((ctypes.c_uint8 * size).from_address(address + width * s), np.uint8)
        value = decode(raw, code, real)
        bad |= is_bad(value)
        deltas.append(value - b)
    return deltas, b, bad


def _bits(values: np.ndarray) -> np.ndarray:
    """The bits of task-vector entries as float32: what is not 0 never becomes 0, and a zero has no sign."""
    narrow = values.astype(np.float32)
    if values.dtype == np.float64:
        lost = (values != 0) & (narrow == 0)
        narrow[lost] = np.copysign(np.float32(1e-45), narrow[lost])
    bits = narrow.view(np.uint32)
    bits[narrow == 0] = 0
    return bits


def _keys(bits: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats."""
    sign = (-(bits >> np.uint32(31)).astype(np.int32)).view(np.uint32)
    keys: np.ndarray = bits ^ (sign | np.uint32(0x80000000))
    return keys


def _opposite(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> int:
    return int(np.count_nonzero(both & ((a ^ b) >> np.uint32(31)).astype(bool)))


def _describe(
    real: np.dtype[Any], addresses: np.ndarray, count: int, codes: np.ndarray, base: np.ndarray, base_code: int,
    moments: np.ndarray, of_base: np.ndarray, of_pairs: np.ndarray, of_sum: np.ndarray, unchanged: np.ndarray,
    pairs: np.ndarray, together: np.ndarray, ends: np.ndarray, tables: np.ndarray, *_work: np.ndarray,
) -> int:  # fmt: skip
    k = codes.size
    is_any_bad = False
    for leaf in range(of_base.shape[0]):
        lanes = np.zeros((k * MOMENTS + 3 + k * (k - 1), LANES))
        first = leaf * LEAF
        for s, e in chunks(min(LEAF, count - first)):
            deltas, b, bad = _deltas(addresses, codes, base, base_code, (first + s, first + e), real)
            is_any_bad |= bad
            wide = [delta.astype(np.float64) for delta in deltas]
            _add(lanes[k * MOMENTS :], b.astype(np.float64))
            bits = [_bits(delta) for delta in deltas]
            for i, d in enumerate(wide):
                if not s:
                    moments[leaf, i * (MOMENTS + 1) + MOMENTS] = d[0]
                _add_moments(lanes[i * MOMENTS :], d, moments[leaf, i * (MOMENTS + 1) + MOMENTS])
                _count(_keys(bits[i]), ends[i], tables[TABLES * i :])
                unchanged[i] += np.count_nonzero(bits[i] == 0)
            if k > 1:
                _of_several(wide, bits, together, lanes[k * MOMENTS + 2])
                _of_pairs(wide, bits, pairs, lanes[k * MOMENTS + 3 :])
        totals = fold(lanes)
        for i in range(k):
            moments[leaf, i * (MOMENTS + 1) : i * (MOMENTS + 1) + MOMENTS] = totals[
                i * MOMENTS : (i + 1) * MOMENTS
            ]
        of_base[leaf] = totals[k * MOMENTS : k * MOMENTS + 2]
        of_sum[leaf, 0] = totals[k * MOMENTS + 2]
        of_pairs[leaf] = totals[k * MOMENTS + 3 :]
    if is_any_bad:
        return 1
    return 2 if ((ends[:, 1] >= 0xFF800000) | (ends[:, 0] <= 0x007FFFFF)).any() else 0


def _add(lanes: np.ndarray, d: np.ndarray) -> None:
    add_to_lanes(np.abs(d), lanes[0])
    add_to_lanes(d * d, lanes[1])


def _add_moments(lanes: np.ndarray, d: np.ndarray, shift: np.ndarray) -> None:
    y = d - shift
    q = y * y
    for n, terms in enumerate((y, q, q * y, q * q)):
        add_to_lanes(terms, lanes[n])
    _add(lanes[4:], d)


def _count(keys: np.ndarray, ends: np.ndarray, tables: np.ndarray) -> None:
    ends[0] = min(ends[0], keys.min())
    ends[1] = max(ends[1], keys.max())
    for n in range(TABLES):
        upper = keys[n::TABLES] >> np.uint32(16)
        if upper.size * 8 < tables.shape[1]:
            np.add.at(tables[n], upper, np.uint32(1))
        else:
            tables[n] += np.bincount(upper, minlength=tables.shape[1]).astype(np.uint32)


def _of_several(
    wide: list[np.ndarray], bits: list[np.ndarray], together: np.ndarray, lanes: np.ndarray
) -> None:
    total = np.zeros(wide[0].size)
    holders = np.zeros(wide[0].size, np.uint32)
    signs = np.zeros(wide[0].size, np.uint32)
    for d, b in zip(wide, bits, strict=True):
        total += d
        changed = (b != 0).astype(np.uint32)
        holders += changed
        signs |= changed << (b >> np.uint32(31))
    together[0] += np.count_nonzero(holders > 1)
    together[1] += np.count_nonzero(signs == 3)
    add_to_lanes(np.abs(total), lanes)


def _of_pairs(wide: list[np.ndarray], bits: list[np.ndarray], pairs: np.ndarray, lanes: np.ndarray) -> None:
    p = 0
    for i in range(len(wide)):
        for j in range(i + 1, len(wide)):
            both = (bits[i] != 0) & (bits[j] != 0)
            pairs[p, 0] += np.count_nonzero(both)
            pairs[p, 1] += _opposite(bits[i], bits[j], both)
            products = wide[i] * wide[j]
            add_to_lanes(products, lanes[2 * p])
            add_to_lanes(np.abs(products), lanes[2 * p + 1])
            p += 1


def _order(
    real: np.dtype[Any], addresses: np.ndarray, count: int, codes: np.ndarray, base: np.ndarray, base_code: int,
    slots: np.ndarray, fine: np.ndarray, least: np.ndarray, tops: np.ndarray, pairs: np.ndarray, *_work: np.ndarray,
) -> int:  # fmt: skip
    k = codes.size
    each = fine.shape[0] // k
    for span in chunks(count):
        deltas, _, _ = _deltas(addresses, codes, base, base_code, span, real)
        bits = [_bits(delta) for delta in deltas]
        flags = [(b & np.uint32(0x7FFFFFFF)) >= bound for b, bound in zip(bits, least, strict=True)]
        for i in range(k):
            tops[i] += np.count_nonzero(flags[i])
            if each > 0:
                keys = _keys(bits[i])
                slot = slots[i][keys >> np.uint32(16)]
                chosen = slot > 0
                places = (i * each + slot[chosen].astype(np.int64) - 1, keys[chosen] & np.uint32(0xFFFF))
                np.add.at(fine, places, np.uint32(1))
        p = 0
        for i in range(k):
            for j in range(i + 1, k):
                both = flags[i] & flags[j]
                pairs[p, 0] += np.count_nonzero(both)
                pairs[p, 1] += _opposite(bits[i], bits[j], both)
                p += 1
    return 0
