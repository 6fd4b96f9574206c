"""Finds the quantised tensors of a model, whatever program quantised it, and opens the model as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.quantised.awq import find_awq
from alnico.checkpoint.quantised.bitsandbytes import find_bitsandbytes
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.quantised.fp4 import find_fp4
from alnico.checkpoint.quantised.fp8 import find_fp8
from alnico.checkpoint.quantised.gptq import find_gptq
from alnico.checkpoint.quantised.integers import find_integers
from alnico.checkpoint.quantised.stored_tensors import QuantisedTensor, StoredTensors
from alnico.checkpoint.source import Source
from alnico.errors import ModelError

FORMATS: tuple[Callable[[StoredTensors], Iterator[tuple[str, QuantisedTensor]]], ...] = (
    find_bitsandbytes,
    find_gptq,
    find_awq,
    find_fp4,
    find_integers,
    find_fp8,
)
"""The ways in which weights are quantised. Each finds its tensors; a model may have several."""
UNREAD = (
    ".weight_scale_inv", ".weight_scale", ".qweight", ".absmax", ".weight_packed", ".SCB", ".scale_weight", ".codebooks", ".qzeros",
)  # fmt: skip
"""Ends of the names of tensors that stand for others, which is refused where none is decoded with them."""


def open_quantised(model: FileModel) -> FileModel | DequantisedModel:
    """Return a model whose quantised tensors are read as numbers; the model itself if it has none.

    Errors: ModelError for codes of a format that is not read, or whose scales are missing or do not fit.
    """
    stored = StoredTensors(model)
    found: dict[str, QuantisedTensor] = {}
    claimed: set[str] = set()
    for find in FORMATS:
        for name, tensor in find(stored):
            if claimed.isdisjoint(tensor.stored):
                found[name] = tensor
                claimed.update(tensor.stored)
    _refuse_others(stored, claimed)
    return DequantisedModel(model, stored, found) if found else model


def refuse_quantised(model: Source) -> None:
    """Refuse a model in a trainer's shards whose weights are quantised. Errors: ModelError."""
    codes = [name for name in model.tensors if name.endswith(UNREAD)]
    if codes or "quantization_config" in model.config:
        evidence = f"it has {codes[0]!r}" if codes else "config.json has a quantization_config"
        raise ModelError(
            f"{model.label}: its weights are quantised ({evidence}), in shards of a trainer; expected floating-point values. "
            "Save the model as safetensors with its trainer."
        )


def _refuse_others(stored: StoredTensors, claimed: set[str]) -> None:
    """Refuse a model with codes that no format claims, or whose config says that it is quantised where nothing is."""
    unread = [name for name in stored.tensors if name.endswith(UNREAD) and name not in claimed]
    if not unread and (claimed or not stored.is_declared):
        return
    evidence = f"it has {unread[0]!r}" if unread else "config.json has a quantization_config"
    if stored.method:
        evidence = f"config.json says {stored.method!r}"
    raise ModelError(
        f"{stored.label}: its weights are quantised ({evidence}) in a way that is not read; expected one of those in docs/formats.md. "
        "Use the full-precision model."
    )
