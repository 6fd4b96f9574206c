"""A model of fp8 weights with scales of blocks, decoded while it is read: ``W = fp8 x scale of its block``, in float32.

The format is DeepSeek-V3's (arXiv 2412.19437, section 3.3), which transformers calls ``fp8``: beside ``X.weight`` in F8_E4M3 lies
``X.weight_scale_inv``, one number for each block of ``weight_block_size``, to be multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Origin, Shard, Tensor, TensorSpec, read_tensor
from alnico.checkpoint.virtual_read import CHUNK, read_computed
from alnico.errors import ModelError
from alnico.numerics import dtypes

SCALE = "_scale_inv"
UNUSED = (".activation_scale", ".input_scale")
"""Scales of activations: a model in full precision has no use for them."""


class DequantisedModel:
    """A model whose quantised weights are read as numbers; its config says nothing of quantisation.

    ``nominal`` of what is decoded is BF16, so that the output is, unless the recipe says otherwise: fp8 values times a scale
    have more digits than BF16, and float32 would be four times the bytes of the input.
    """

    def __init__(self, model: FileModel) -> None:
        self.label = model.label
        self._model = model
        self.location = model.location
        block = model.config["quantization_config"]["weight_block_size"]
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in block)
        ):
            raise ModelError(
                f"{model.label}: config.json says weight_block_size {str(block)[:60]}; expected two whole numbers above 0. Check the model."
            )
        self._block: tuple[int, int] = (block[0], block[1])
        tensors: dict[str, Tensor] = {}
        self._scales: dict[str, str] = {}
        for name, tensor in model.tensors.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in model.tensors:
                continue
            if name.endswith(UNUSED):
                continue
            if tensor.dtype == "F8_E4M3":
                self._check(name)
                self._scales[name] = name + SCALE
                tensors[name] = TensorSpec("F32", tensor.shape, "BF16")
            else:
                tensors[name] = tensor
        self.tensors: Mapping[str, Tensor] = tensors
        self.notes = [
            *model.notes,
            f"{model.label}: {len(self._scales)} tensors of fp8 with scales of {block[0]} x {block[1]} blocks are decoded; the output is bf16, "
            "twice the bytes. To quantise it again rounds every number to 4 significant bits, by up to 6 %: changes smaller than that, "
            "as most of a fine-tune's are, would be lost.",
        ]

    def _check(self, name: str) -> None:
        tensors = self._model.tensors
        shape = tensors[name].shape
        if name + SCALE not in tensors:
            raise ModelError(
                f"{self.label}: {name} is F8_E4M3 and has no {name + SCALE}; expected its scales. Complete the download."
            )
        scale = tensors[name + SCALE]
        rows, columns = self._block
        expected = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)) if len(shape) > 1 else ()
        if scale.shape != expected or scale.dtype not in ("F32", "BF16", "F16"):
            raise ModelError(
                f"{self.label}: {name} is {shape}, its scales are {scale.dtype} {scale.shape}; expected numbers, {expected}, one for each "
                f"block of {rows} x {columns}. Get the model from its source."
            )

    @property
    def config(self) -> Mapping[str, Any]:
        return {k: v for k, v in self._model.config.items() if k != "quantization_config"}

    @property
    def directory(self) -> Path | None:
        return self._model.directory

    @property
    def origin(self) -> Origin | None:
        return self._model.origin

    @property
    def shards(self) -> Sequence[Shard]:
        return self._model.shards

    def _stored(self, names: Iterable[str]) -> list[str]:
        """The tensors of the files that some tensors are read from."""
        return [
            stored
            for name in names
            for stored in (name, *([self._scales[name]] if name in self._scales else []))
        ]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self._model.absent(self._stored(tensors), side_files)

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self._model.fetch(files, report)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._scales:
            self._model.read_into(name, offset, buffer)
            return
        read_computed(offset, buffer, np.dtype(np.float32), lambda first, out: self._decode(name, first, out))

    def _decode(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with the numbers of elements ``first`` on."""
        columns = self.tensors[name].shape[-1]
        height = self.tensors[name].shape[-2]
        raw = np.empty(out.size, np.uint8)
        self._model.read_into(name, first, memoryview(raw))
        out[:] = dtypes.decode(raw, "F8_E4M3")
        scale = self._scale(name, first // columns, (first + out.size - 1) // columns, height)
        row, column, at = first // columns, first % columns, 0
        base = row
        while at < out.size:
            count = min(columns - column, out.size - at)
            of_row = np.repeat(scale[row - base], self._block[1])[column : column + count]
            out[at : at + count] *= of_row
            at, column, row = at + count, 0, row + 1

    def _scale(self, name: str, first: int, last: int, height: int) -> np.ndarray:
        """The scales of rows ``first`` to ``last``, a line each: (rows, blocks of columns)."""
        stored = self._scales[name]
        tensor = self._model.tensors[stored]
        blocks, lines = tensor.shape[-1], tensor.shape[-2]
        rows = np.arange(first, last + 1)
        line = rows // height * lines + rows % height // self._block[0]
        low, high = int(line[0]), int(line[-1]) + 1
        width = dtypes.DTYPES[tensor.dtype].bytes
        raw = np.empty((high - low) * blocks * width, np.uint8)
        self._model.read_into(stored, low * blocks * width, memoryview(raw))
        values = dtypes.decode(raw, tensor.dtype).astype(np.float32).reshape(high - low, blocks)
        of_rows: np.ndarray = values[line - low]
        return of_rows

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
        """Codes, values, and the scales of the rows of a chunk: at most one number an element, for matrices of one column."""
        return self._model.reading_bytes + 16 * CHUNK

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> DequantisedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<model {self.label}: {len(self.tensors)} tensors, {len(self._scales)} of them decoded from fp8>"
        )


def is_decodable(config: Mapping[str, Any]) -> bool:
    """Does a config say fp8 with scales of blocks, which are decoded while they are read?"""
    told = config.get("quantization_config")
    return (
        isinstance(told, dict)
        and told.get("quant_method") == "fp8"
        and told.get("weight_block_size") is not None
    )
