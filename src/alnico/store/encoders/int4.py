"""Encodes a difference with 4 bits per entry, in groups that share a scale and a minimum (TVQ)."""

from __future__ import annotations

import numpy as np

from alnico.checkpoint.task_vectors.manifest import GROUP
from alnico.store.encoders.encoded import EncodedTensor, Lost, PartWriter
from alnico.store.spool import Spool
from alnico.store.tensor_change import TensorChange

MOST = 15
"""The largest code."""


def encode_int4(change: TensorChange, spool: Spool) -> EncodedTensor:
    """Encode ``D ~ minimum + scale * code`` for groups of 128 entries, with codes from 0 to 15 over the range of the group.

    Source: Kim et al. 2025, Task vector quantization, https://arxiv.org/abs/2503.06921, section 4.1; its groups are whole tensors.
    """
    groups = -(-change.elements // GROUP)
    codes = PartWriter(spool, "U8", (-(-change.elements // 2),))
    scales, minimums = np.empty(groups, np.float32), np.empty(groups, np.float32)
    lost = Lost()
    for first, last in change.spans():
        values = change.difference(first, last)
        padded = np.concatenate([values, np.full(-len(values) % GROUP, values[-1])]).reshape(-1, GROUP)
        least = padded.min(1).astype(np.float32)
        step = ((padded.max(1) - least) / MOST).astype(np.float32)
        with np.errstate(all="ignore"):
            found = np.rint((padded - least[:, None]) / step[:, None])
        code = np.where(step[:, None] > 0, np.clip(found, 0, MOST), 0).astype(np.uint8)
        group = first // GROUP
        scales[group : group + len(step)], minimums[group : group + len(step)] = step, least
        decoded = least[:, None].astype(np.float64) + step[:, None].astype(np.float64) * code
        lost.add(values, decoded.reshape(-1)[: len(values)])
        flat = code.reshape(-1)[: len(values)]
        flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
        codes.write(flat[0::2] | flat[1::2] << 4)
    parts = {"codes": codes.done()}
    for name, numbers in (("scales", scales), ("minimums", minimums)):
        part = PartWriter(spool, "F32", (groups,))
        part.write(numbers)
        parts[name] = part.done()
    return EncodedTensor("int4", "int4", parts, lost=lost.norm)
