"""Encodes the signs of a difference with a bit per entry, and a scale (BitDelta)."""

from __future__ import annotations

import numpy as np

from alnico.store.encoders.encoded import EncodedTensor, Lost, PartWriter
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange

LEAST_ROW = 256
"""A row of at least so many entries has a scale of its own: its 4 bytes are at most an eighth of the bits."""


def encode_sign(change: TensorChange, spool: Spool) -> EncodedTensor:
    """Encode ``D ~ s * (1 where D > 0, else -1)`` with ``s = mean |D|``, which loses least, of each row or of the tensor.

    Source: Liu et al. 2024, BitDelta, https://arxiv.org/abs/2402.10193, section 3.1; its scale is one per matrix, here one a row.
    """
    means = change.facts.means
    assert means is not None
    columns = change.row
    if len(change.finetuned.shape) < 2 or columns < LEAST_ROW:
        scales, columns = np.array([float((means * columns).sum()) / change.elements]), change.elements
    else:
        scales = means
    scales = scales.astype(np.float32)
    bits = PartWriter(spool, "U8", (-(-change.elements // 8),))
    lost = Lost()
    for first, last in change.spans():
        values = change.difference(first, last)
        is_positive = values > 0
        bits.write(np.packbits(is_positive, bitorder="little"))
        of_row = scales[np.arange(first, last) // columns] if len(scales) > 1 else scales
        lost.add(values, np.where(is_positive, of_row, -of_row).astype(np.float64))
    part = PartWriter(spool, "F32", scales.shape)
    part.write(scales)
    return EncodedTensor("sign", "sign", {"bits": bits.done(), "scales": part.done()}, lost=lost.norm)
