"""Decodes fp8 weights with block scales on reading: ``W = fp8 x block scale``, in float32.

The format is DeepSeek-V3's (arXiv 2412.19437, section 3.3), which transformers calls ``fp8``: ``X.weight`` in
F8_E4M3 comes with ``X.weight_scale_inv``, one factor per block of ``weight_block_size``.
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

SCALE_SUFFIX = "_scale_inv"
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
"""Ends of the names of activation scales, which a full-precision model does not use."""


class DequantisedModel:
    """A model whose quantised weights are read as numbers; its config does not mention quantisation.

    Decoded tensors have the ``nominal`` dtype BF16, so the output does too unless the recipe says otherwise:
    fp8 values times a scale have more digits than BF16, but float32 would take four times the bytes of the
    input.
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
                f"{model.label}: config.json has the weight_block_size {str(block)[:60]}; expected two "
                "positive whole numbers. Check the model."
            )
        self._block: tuple[int, int] = (block[0], block[1])
        tensors: dict[str, Tensor] = {}
        self._scales: dict[str, str] = {}
        for name, tensor in model.tensors.items():
            if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in model.tensors:
                continue
            if name.endswith(ACTIVATION_SCALES):
                continue
            if tensor.dtype == "F8_E4M3":
                self._check(name)
                self._scales[name] = name + SCALE_SUFFIX
                tensors[name] = TensorSpec("F32", tensor.shape, "BF16")
            else:
                tensors[name] = tensor
        self.tensors: Mapping[str, Tensor] = tensors
        self.notes = [
            *model.notes,
            f"{model.label}: {len(self._scales)} fp8 tensors with scales per {block[0]} x {block[1]} block "
            "are decoded; the output is bf16, twice the bytes. Quantising it again would round every number "
            "to 4 significant bits, by up to 6 %, and lose smaller changes, which most of a fine-tune's "
            "are.",
        ]

    def _check(self, name: str) -> None:
        tensors = self._model.tensors
        shape = tensors[name].shape
        if name + SCALE_SUFFIX not in tensors:
            raise ModelError(
                f"{self.label}: {name} is F8_E4M3 without {name + SCALE_SUFFIX}; expected its scales. "
                "Complete the download."
            )
        scale = tensors[name + SCALE_SUFFIX]
        rows, columns = self._block
        expected = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)) if len(shape) > 1 else ()
        if scale.shape != expected or scale.dtype not in ("F32", "BF16", "F16"):
            raise ModelError(
                f"{self.label}: {name} is {shape}, its scales are {scale.dtype} {scale.shape}; expected "
                f"floating-point {expected}, one per block of {rows} x {columns}. Get the model from its "
                "source."
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
        """The stored tensors that the named tensors are read from."""
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
        """Fill ``out`` with the decoded elements from ``first`` on."""
        columns = self.tensors[name].shape[-1]
        height = self.tensors[name].shape[-2]
        raw = np.empty(out.size, np.uint8)
        self._model.read_into(name, first, memoryview(raw))
        out[:] = dtypes.decode(raw, "F8_E4M3")
        scale = self._read_scales(name, first // columns, (first + out.size - 1) // columns, height)
        row, column, done = first // columns, first % columns, 0
        first_row = row
        while done < out.size:
            count = min(columns - column, out.size - done)
            row_scales = np.repeat(scale[row - first_row], self._block[1])[column : column + count]
            out[done : done + count] *= row_scales
            done, column, row = done + count, 0, row + 1

    def _read_scales(self, name: str, first: int, last: int, height: int) -> np.ndarray:
        """The scales of rows ``first`` to ``last``: (rows, blocks of columns)."""
        stored = self._scales[name]
        tensor = self._model.tensors[stored]
        blocks, scale_rows = tensor.shape[-1], tensor.shape[-2]
        rows = np.arange(first, last + 1)
        scale_row = rows // height * scale_rows + rows % height // self._block[0]
        low, high = int(scale_row[0]), int(scale_row[-1]) + 1
        width = dtypes.DTYPES[tensor.dtype].bytes
        raw = np.empty((high - low) * blocks * width, np.uint8)
        self._model.read_into(stored, low * blocks * width, memoryview(raw))
        values = dtypes.decode(raw, tensor.dtype).astype(np.float32).reshape(high - low, blocks)
        result: np.ndarray = values[scale_row - low]
        return result

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
        """Codes, values, and the scales of a chunk's rows: at most one number per element, for matrices of
        one column."""
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
    """Does a config declare fp8 with block scales, which is decoded while it is read?"""
    quantisation = config.get("quantization_config")
    return (
        isinstance(quantisation, dict)
        and quantisation.get("quant_method") == "fp8"
        and quantisation.get("weight_block_size") is not None
    )
