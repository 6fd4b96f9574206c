"""Finds weights that AWQ quantised: integers of 4 bits with scales and zero points for groups of inputs.

``X.qweight`` (inputs, outputs / 8) holds the codes of eight consecutive outputs in a word of 32 bits, in the order 0, 2, 4, 6, 1,
3, 5, 7 from the lowest bits; ``X.qzeros`` (groups, outputs / 8) the zero points in the same way; ``X.scales`` (groups, outputs).
``W[o, i] = (q[i, o] - zero[g, o]) * scale[g, o]``. This is the version ``gemm``; others lay out codes for one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from alnico.checkpoint.quantised.gptq import INTEGERS, SUFFIX, is_gptq
from alnico.checkpoint.quantised.stored_tensors import FLOATS, QuantisedTensor, StoredTensors
from alnico.checkpoint.quantised.transposed_rows import (
    CodePanel,
    TransposedRows,
    group_size,
    scales_of_outputs,
    unpack_halves,
)

OUTPUTS_OF_A_WORD = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output each code of a word belongs to, from the lowest bits on."""
PLACES = tuple(OUTPUTS_OF_A_WORD.index(output) for output in range(8))


def find_awq(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the matrices of AWQ. Errors: ModelError for other widths and versions, parts that are missing or do not fit."""
    for name, tensor in stored.tensors.items():
        if name.endswith(SUFFIX) and tensor.dtype in INTEGERS and not is_gptq(stored, name):
            yield f"{name.removesuffix(SUFFIX)}.weight", _matrix(stored, name)


def _matrix(stored: StoredTensors, name: str) -> TransposedRows:
    bits = stored.config.get("bits", stored.config.get("w_bit", 4))
    version = str(stored.config.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise stored.refuse_form(
            f"the version of {name}", f"{bits} bits, {version}", "4 bits of AWQ's version gemm"
        )
    stem = name.removesuffix(SUFFIX)
    codes = stored.tensors[name]
    inputs, words = codes.shape if len(codes.shape) == 2 else (0, 0)
    stored.part(name, name, INTEGERS, (inputs, words))
    scales = stored.tensors.get(f"{stem}.scales")
    groups = scales.shape[0] if scales is not None and scales.shape else 1
    group = group_size(stored, inputs, groups)
    stored.part(f"{stem}.scales", name, FLOATS, *([(groups, 8 * words)] if group else []))
    stored.part(f"{stem}.qzeros", name, INTEGERS, (groups, words))
    return TransposedRows(
        "int4 tensors of AWQ",
        (8 * words, inputs),
        (name, f"{stem}.scales", f"{stem}.qzeros"),
        "outputs",
        4,
        tuple(4 * place for place in PLACES),
        f"{stem}.scales",
        partial(_read_panel, stem=stem, inputs=inputs, group=group),
    )


def _read_panel(
    stored: StoredTensors, begin: int, end: int, *, stem: str, inputs: int, group: int
) -> CodePanel:
    scales = scales_of_outputs(stored, f"{stem}.scales", begin, end)
    zeros = unpack_halves(stored.read_columns(f"{stem}.qzeros", scales.shape[1], begin // 2, end // 2))
    in_order = zeros.reshape(len(zeros), -1, 8)[:, :, PLACES].reshape(len(zeros), -1)
    words = stored.read_columns(f"{stem}{SUFFIX}", inputs, begin // 2, end // 2).view("<u4")
    return CodePanel(words, scales, np.ascontiguousarray(in_order.T.astype(np.float32)), group)
