"""Estimates what each encoding would cost and lose, from a sample of each tensor that changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.source import TensorSpec
from alnico.methods.shared.singular_vectors import rank_of_each
from alnico.numerics.dtypes import DTYPES
from alnico.store.encoders.difference import encode_difference, plain_bytes
from alnico.store.encoders.encoded import EncodedTensor
from alnico.store.encoders.exact import sparse_bytes
from alnico.store.encoders.int4 import encode_int4
from alnico.store.encoders.low_rank import Decomposition, factor_bytes
from alnico.store.encoders.sign import encode_sign
from alnico.store.encoders.top_k import encode_top_k
from alnico.store.spool import NoSpool
from alnico.store.tensor_change import KeptBytes, TensorChange

SAMPLE = 1 << 16
"""Most entries of a tensor that are encoded for an estimate; a tensor of at most so many is encoded whole."""

LARGEST_SIDE = 1024
"""Matrices up to this smaller side are decomposed for an estimate of low rank, at most this many of them."""
MATRICES = 8

RANK_SHARES = (1 / 4, 1 / 8, 1 / 32)

Encode = Callable[[TensorChange, Any], EncodedTensor]

WAYS: dict[str, Encode] = {
    "difference:f32": lambda change, spool: encode_difference(change, spool, "F32"),
    "difference:bf16": lambda change, spool: encode_difference(change, spool, "BF16"),
    "difference:f16": lambda change, spool: encode_difference(change, spool, "F16"),
    "int4": encode_int4,
    "sign": encode_sign,
    "top_k:0.1": lambda change, spool: encode_top_k(change, spool, 0.1),
    "top_k:0.01": lambda change, spool: encode_top_k(change, spool, 0.01),
}
"""The encodings that are estimated, besides exact and low-rank ones. Tensors of one dimension stay whole in the last four."""

OF_MATRICES = ("int4", "sign", "top_k:0.1", "top_k:0.01")


@dataclass(frozen=True)
class EncodingCost:
    """What one encoding of all matrices would cost and lose: the bytes of the stored tensors, and ``|D' - D| / |D|`` over all of them.

    ``is_estimate``: the error is that of a sample.
    """

    encoding: str
    byte_size: int
    error: float
    is_estimate: bool

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return vars(self)


@dataclass(frozen=True)
class TensorCosts:
    """The costs of one tensor: bytes and squared loss by encoding; exact ones lose nothing."""

    exact: int
    ways: dict[str, tuple[float, float]]
    is_estimate: bool


def costs_of(change: TensorChange, found: Decomposition | None) -> TensorCosts:
    """Estimate the costs of a measured change. ``found`` are singular vectors, where the matrix was decomposed."""
    exact = 0 if change.is_comparable and change.facts.is_equal else change.finetuned.byte_size
    if change.is_comparable:
        exact = min(exact, sparse_bytes(change))
    if not change.has_difference or not change.facts.norm:
        return TensorCosts(exact, {}, False)
    sample = _sampled(change)
    is_estimate = sample is not change
    squares, ratio = change.facts.norm**2, change.elements / sample.elements
    of_sample = sample.facts.norm**2
    ways: dict[str, tuple[float, float]] = {}
    spool = NoSpool()
    is_vector = len(change.finetuned.shape) < 2
    for name, encode in WAYS.items():
        if is_vector and name in OF_MATRICES:
            ways[name] = (float(plain_bytes(change)), 0.0)
            continue
        one = encode(sample, spool)
        lost = one.lost**2 / of_sample * squares if of_sample else 0.0
        ways[name] = (one.byte_size * ratio, lost)
    for share in RANK_SHARES:
        name = f"low_rank:{share:g}"
        if change.stack is None:
            ways[name] = (float(plain_bytes(change)), 0.0)
            continue
        rank = rank_of_each(share, *change.stack[1:], 1)
        size = float(min(factor_bytes(change, rank), plain_bytes(change)))
        ways[name] = (size, found.lost_at(rank) ** 2 if found is not None else math.nan)
    return TensorCosts(exact, ways, is_estimate)


def table_of(costs: Sequence[TensorCosts], squares: Sequence[float]) -> tuple[EncodingCost, ...]:
    """Add up the costs of all tensors. ``squares`` are ``|D|^2`` of each. Matrices that were not decomposed count as those that were."""
    total = math.fsum(squares)
    rows = [EncodingCost("exact", sum(one.exact for one in costs), 0.0, False)]
    names = dict.fromkeys(name for one in costs for name in one.ways)
    for name in names:
        size = sum(one.ways[name][0] if name in one.ways else one.exact for one in costs)
        known = [
            (one.ways[name][1], s)
            for one, s in zip(costs, squares, strict=True)
            if name in one.ways and not math.isnan(one.ways[name][1])
        ]
        unknown = math.fsum(
            s
            for one, s in zip(costs, squares, strict=True)
            if name in one.ways and math.isnan(one.ways[name][1])
        )
        lost, of_known = math.fsum(x for x, _ in known), math.fsum(s for _, s in known)
        if unknown and not any(x for x, _ in known):
            continue  # no matrix was small enough
        lost += unknown * lost / of_known if of_known else 0.0
        is_estimate = bool(unknown) or any(one.is_estimate for one in costs if name in one.ways)
        rows.append(EncodingCost(name, round(size), math.sqrt(lost / total) if total else 0.0, is_estimate))
    return tuple(rows)


def to_decompose(stacks: dict[str, tuple[int, int, int] | None]) -> frozenset[str]:
    """Choose the matrices whose singular values are estimated: a few small ones, spread over the model."""
    small = [n for n, s in stacks.items() if s is not None and s[0] == 1 and min(s[1:]) <= LARGEST_SIDE]
    step = max(len(small) / MATRICES, 1.0)
    return frozenset(small[int(i * step)] for i in range(min(MATRICES, len(small))))


def _sampled(change: TensorChange) -> TensorChange:
    """Return a change of some rows of a tensor, spread over it and measured; the change itself if it is small."""
    if change.elements <= SAMPLE:
        return change
    assert change.base is not None
    columns = change.row
    rows = change.elements // columns
    if columns > SAMPLE:
        rows, columns = 1, min(columns, SAMPLE)
    count = max(min(SAMPLE // columns, rows), 1)
    own, base = (KeptBytes(count * columns * width, None) for width in _widths(change))
    for at, row in enumerate(_spread(rows, count)):
        first = row * change.row
        for kept, source, width in zip(
            (own, base), (change.own_bytes, change.base_bytes), _widths(change), strict=True
        ):
            assert source is not None
            kept.write(at * columns * width, source.read(first * width, columns * width))
    shape = (count, columns)
    sample = TensorChange(
        change.name,
        TensorSpec(change.finetuned.dtype, shape, change.finetuned.nominal),
        TensorSpec(change.base.dtype, shape, change.base.nominal),
        kept=(own, base),
        has_bits=change.has_bits,
    )
    sample.measure()
    return sample if sample.facts.norm else change  # a sample without any change says nothing


def _widths(change: TensorChange) -> tuple[int, int]:
    assert change.base is not None
    return change.width, DTYPES[change.base.dtype].bytes


def _spread(total: int, count: int) -> Iterator[int]:
    """Return ``count`` of ``total`` places, evenly spread."""
    return (int(i) for i in np.arange(count) * total // count)
