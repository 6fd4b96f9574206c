"""Reads a quantised model as numbers: each tensor is decoded by blocks to float32 while it is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.quantised.left_out import is_left_out
from alnico.checkpoint.quantised.stored_tensors import (
    QUANTISATION_KEYS,
    QuantisedTensor,
    StoredTensors,
    without_quantisation,
)
from alnico.checkpoint.source import Origin, Shard, Source, Tensor, TensorSpec, read_tensor, unwrap
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import ModelError


class DequantisedModel:
    """A model whose quantised weights are read as numbers; its config does not mention quantisation.

    Decoded tensors have the ``nominal`` dtype BF16, so the output does too unless the recipe says otherwise:
    codes times a scale have more digits than BF16, but float32 would take four to eight times the bytes of the
    input. Tensors that are not quantised are read as they are.
    """

    def __init__(
        self, model: FileModel, stored: StoredTensors, decoded: Mapping[str, QuantisedTensor]
    ) -> None:
        self.label = model.label
        self.location = model.location
        self.decoded = decoded
        self._model = model
        self.stored = stored
        parts = {part: name for name, tensor in decoded.items() for part in tensor.stored}
        tensors: dict[str, Tensor] = {}
        self.left_out: list[str] = []
        """Stored tensors that numbers do not need."""
        for name, tensor in model.tensors.items():
            if name in parts:
                tensors.setdefault(parts[name], TensorSpec("F32", decoded[parts[name]].shape, "BF16"))
            elif is_left_out(name):
                self.left_out.append(name)
            elif name in decoded:
                raise ModelError(
                    f"{self.label}: {name} is stored twice, as {tensor.dtype} and as {decoded[name].stored[0]}; expected one of "
                    "them. Remove the other."
                )
            else:
                tensors[name] = tensor
        self.tensors: Mapping[str, Tensor] = tensors
        self.notes = [*model.notes, self._describe(parts)]

    def _describe(self, parts: Iterable[str]) -> str:
        """Say what is decoded, how large it becomes, and what is left out."""
        counts = Counter(tensor.title for tensor in self.decoded.values())
        what = " and ".join(f"{count} {title}" for title, count in counts.items())
        elements = sum(math.prod(tensor.shape) for tensor in self.decoded.values())
        before = sum(self._model.tensors[part].byte_size for part in parts)
        left = f" {len(self.left_out)} scales of activations and marks are left out." if self.left_out else ""
        return (
            f"{self.label}: {what} are decoded; the output is bf16, {2 * elements / max(before, 1):.1f} times the bytes.{left} "
            "Quantising it again loses changes that are smaller than the steps of the codes, which most of a fine-tune's are."
        )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return without_quantisation(self._model.config)

    @property
    def stored_config(self) -> Mapping[str, Any]:
        """``config.json`` as it is."""
        return self._model.config

    @property
    def directory(self) -> Path | None:
        return self._model.directory

    @property
    def origin(self) -> Origin | None:
        return self._model.origin

    @property
    def shards(self) -> Sequence[Shard]:
        return self._model.shards

    @property
    def kinds(self) -> frozenset[str]:
        """What its quantised tensors are, as in notes."""
        return frozenset(tensor.title for tensor in self.decoded.values())

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        needed = [
            part
            for name in tensors
            for part in (self.decoded[name].stored if name in self.decoded else (name,))
        ]
        return self._model.absent(needed, side_files)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self._model.fetch(files, report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        tensor = self.decoded.get(name)
        if tensor is None:
            self._model.read_into(name, offset, buffer)
            return
        read_computed(
            offset,
            buffer,
            np.dtype(np.float32),
            lambda first, out: tensor.decode(self.stored, first, out),
        )

    def read_stored(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a tensor as it is stored, as :meth:`read_into` does."""
        self._model.read_into(name, offset, buffer)

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        return self._model.identity()

    def paths(self) -> list[Path]:
        return self._model.paths()

    @property
    def held_bytes(self) -> int:
        return self._model.held_bytes

    @property
    def reading_bytes(self) -> int:
        """Codes and values of a chunk; its scales, at most one number per element, for matrices of one column; and what is kept of
        a tensor that is stored transposed."""
        kept = max(tensor.kept_bytes for tensor in self.decoded.values())
        return self._model.reading_bytes + 24 * CHUNK + kept

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> DequantisedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors, {len(self.decoded)} of them decoded>"


MARKS = (
    "_scale_inv", "_scale", ".scale", ".scale_weight", ".qweight", ".qzeros", ".weight_packed", "_blocks", ".SCB", ".absmax", ".codebooks",
)  # fmt: skip
"""Ends of the names of tensors that may belong to codes."""


def may_be_quantised(model: Source) -> bool:
    """Could a model have codes in place of weights, by its config or the names of its tensors?"""
    keys = (
        key for part in (model.config, *model.config.values()) if isinstance(part, Mapping) for key in part
    )
    return any(key in QUANTISATION_KEYS for key in keys) or any(
        name.endswith(MARKS) for name in model.tensors
    )


def quantised_kinds(source: Source) -> frozenset[str]:
    """Return what the quantised tensors of a model are, or of the base of one with adapters; empty if it has none."""
    source = unwrap(source)
    while (inner := getattr(source, "base", None)) is not None:
        source = unwrap(inner)
    return source.kinds if isinstance(source, DequantisedModel) else frozenset()
