"""Encodes a tensor exactly: absent where nothing changed, new values at indices, or all values."""

from __future__ import annotations

import numpy as np

from alnico.store.encoders.encoded import EncodedTensor, PartWriter, index_dtype
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange


def encode_exact(change: TensorChange, spool: Spool) -> EncodedTensor:
    """Encode with the fewest bytes that give the fine-tune's bits."""
    if change.is_comparable and change.facts.is_equal:
        return EncodedTensor("absent", "absent")
    if change.is_comparable and sparse_bytes(change) < change.finetuned.byte_size:
        return encode_sparse(change, spool)
    return encode_whole(change, spool)


def sparse_bytes(change: TensorChange) -> int:
    """The size of the sparse encoding."""
    index = 8 if index_dtype(change.elements) == "I64" else 4
    return change.facts.changed * (index + change.width)


def encode_sparse(change: TensorChange, spool: Spool) -> EncodedTensor:
    """Encode the new values of entries whose bits changed, with their indices."""
    count = change.facts.changed
    dtype = index_dtype(change.elements)
    indices = PartWriter(spool, dtype, (count,))
    values = PartWriter(spool, change.finetuned.dtype, (count,))
    for first, last in change.spans():
        at = change.changed_at(first, last)
        indices.write((at + first).astype(np.int64 if dtype == "I64" else np.int32))
        values.write(change.own_raw(first, last).reshape(-1, change.width)[at])
    return EncodedTensor("sparse", "sparse", {"indices": indices.done(), "values": values.done()})


def encode_whole(change: TensorChange, spool: Spool) -> EncodedTensor:
    """Encode all values of the fine-tune."""
    values = PartWriter(spool, change.finetuned.dtype, change.finetuned.shape)
    size = change.finetuned.byte_size
    for start in range(0, size, 1 << 20):
        values.write(change.own_bytes.read(start, min(1 << 20, size - start)))
    return EncodedTensor("whole", "whole", {"values": values.done()})
