"""Finds weights that GPTQ quantised: integers of 4 or 8 bits with scales and zero points for groups of inputs.

``X.qweight`` (inputs x bits / 32, outputs) holds the codes of consecutive inputs in words of 32 bits, the first in the lowest
bits; ``X.qzeros`` (groups, outputs x bits / 32) the zero points of consecutive outputs; ``X.scales`` (groups, outputs);
``X.g_idx`` (inputs) the group of each input. ``W[o, i] = (q[i, o] - zero[g(i), o]) * scale[g(i), o]``. Files of version 1
(``checkpoint_format: gptq``, and all before there were two) store the zero point minus one, those of version 2 (``gptq_v2``) itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from alnico.checkpoint.quantised.coded_rows import group_index
from alnico.checkpoint.quantised.stored_tensors import FLOATS, QuantisedTensor, StoredTensors
from alnico.checkpoint.quantised.transposed_rows import (
    CodePanel,
    TransposedRows,
    group_size,
    scales_of_outputs,
    unpack_halves,
)

SUFFIX = ".qweight"
WORD_BITS = 32
INTEGERS = ("I32", "U32")
ADDED_TO_ZEROS = {"gptq": 1, "gptq_v2": 0}
"""What is added to stored zero points, by ``checkpoint_format``."""


def is_gptq(stored: StoredTensors, name: str) -> bool:
    """Is ``X.qweight`` of GPTQ? AWQ packs outputs, so that the scales have more columns."""
    scales = stored.tensors.get(f"{name.removesuffix(SUFFIX)}.scales")
    return stored.method != "awq" and (
        scales is None or scales.shape[-1:] == stored.tensors[name].shape[-1:] or stored.method != ""
    )


def find_gptq(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the matrices of GPTQ. Errors: ModelError for other widths and forms, parts that are missing or do not fit."""
    for name, tensor in stored.tensors.items():
        if name.endswith(SUFFIX) and tensor.dtype in INTEGERS and is_gptq(stored, name):
            yield f"{name.removesuffix(SUFFIX)}.weight", _matrix(stored, name)


def _matrix(stored: StoredTensors, name: str) -> TransposedRows:
    bits, form = stored.config.get("bits", 4), str(stored.config.get("checkpoint_format") or "gptq")
    if not isinstance(bits, int) or bits not in (4, 8) or form not in ADDED_TO_ZEROS:
        raise stored.refuse_form(
            f"the form of {name}", f"{bits} bits, {form}", "4 or 8 bits of gptq or gptq_v2"
        )
    stem = name.removesuffix(SUFFIX)
    codes = stored.tensors[name]
    words, outputs = codes.shape if len(codes.shape) == 2 else (0, 0)
    stored.part(name, name, INTEGERS, (words, outputs))
    inputs = words * WORD_BITS // bits
    scales = stored.part(f"{stem}.scales", name, FLOATS, *_of_outputs(stored, f"{stem}.scales", outputs))
    groups = scales.shape[0]
    group = group_size(stored, inputs, groups)
    per_word = WORD_BITS // bits
    packed = [(groups, outputs // per_word)] if outputs % per_word == 0 and group else []
    stored.part(f"{stem}.qzeros", name, INTEGERS, *packed)
    index = f"{stem}.g_idx" if f"{stem}.g_idx" in stored.tensors else ""
    if index:
        stored.part(index, name, ("I32", "I64"), (inputs,))
    make = partial(
        _read_panel, stem=stem, bits=bits, added=ADDED_TO_ZEROS[form], inputs=inputs, group=group, index=index
    )
    parts = (name, f"{stem}.scales", f"{stem}.qzeros", *([index] if index else []))
    return TransposedRows(
        f"int{bits} tensors of GPTQ",
        (outputs, inputs),
        parts,
        "inputs",
        4 if bits == 4 else 8,
        tuple(range(0, WORD_BITS, bits)),
        f"{stem}.scales",
        make,
    )


def _of_outputs(stored: StoredTensors, name: str, outputs: int) -> list[tuple[int, int]]:
    """The shape of numbers for groups of inputs and each output, with as many groups as are stored."""
    tensor = stored.tensors.get(name)
    return [(max(tensor.shape[0], 1), outputs)] if tensor is not None and tensor.shape else []


def _read_panel(
    stored: StoredTensors, begin: int, end: int, *, stem: str, bits: int, added: int, inputs: int, group: int, index: str
) -> CodePanel:  # fmt: skip
    words = stored.read_columns(f"{stem}{SUFFIX}", inputs * bits // WORD_BITS, 4 * begin, 4 * end).view("<u4")
    scales = scales_of_outputs(stored, f"{stem}.scales", begin, end)
    groups = scales.shape[1]
    of_inputs = group_index(stored, index, inputs, group, groups)
    if of_inputs is None and bits == 4 and group % 2:  # a byte is of two groups
        of_inputs = (np.arange(inputs) // group).astype(np.uint32)
    zeros = stored.read_columns(f"{stem}.qzeros", groups, begin * bits // 8, end * bits // 8)
    unpacked = (unpack_halves(zeros) if bits == 4 else zeros).T.astype(np.float32) + np.float32(added)
    return CodePanel(
        words,
        scales,
        np.ascontiguousarray(unpacked),
        group,
        of_inputs,
    )
