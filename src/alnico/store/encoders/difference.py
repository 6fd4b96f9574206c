"""Encodes the difference of a tensor in a float dtype, with a scale for the narrow ones."""

from __future__ import annotations

from alnico.numerics.dtypes import DTYPES
from alnico.store.encoders.encoded import EncodedTensor, Lost, PartWriter, rounded, scale_of
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange


def encode_difference(change: TensorChange, spool: Spool, dtype: str = "F16") -> EncodedTensor:
    """Encode ``D / scale``, each number rounded once to ``dtype``: F64, F32, BF16 or F16."""
    scale = scale_of(change, dtype)
    part = PartWriter(spool, dtype, change.finetuned.shape)
    lost = Lost()
    for first, last in change.spans():
        values = change.difference(first, last)
        raw, decoded = rounded(values / scale, dtype, change.name)
        part.write(raw)
        lost.add(values, decoded * scale)
    return EncodedTensor(
        "difference", f"difference:{dtype.lower()}", {"values": part.done()}, scale, lost.norm
    )


def plain_dtype(change: TensorChange) -> str:
    """The dtype of a difference that nothing asks to shorten: F32, F64 where a side has it, or F16 where both have 16 bits or fewer."""
    assert change.base is not None
    if change.is_wide:
        return "F64"
    names = {change.finetuned.nominal, change.base.nominal}
    return "F32" if names & {"F32", "F64"} else "F16"


def plain_bytes(change: TensorChange) -> int:
    """The size of such a difference."""
    return change.elements * DTYPES[plain_dtype(change)].bytes
