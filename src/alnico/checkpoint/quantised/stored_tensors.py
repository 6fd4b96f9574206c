"""Reads and checks the stored tensors of a quantised model: codes, scales, zero points."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.source import Tensor
from alnico.errors import ModelError
from alnico.numerics import dtypes
from alnico.numerics.dtypes import Shape

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, or of a part of it, that say how weights are quantised."""
FLOATS = ("F32", "BF16", "F16")
PANEL_BYTES = 16 << 20
"""Most bytes of codes that a thread keeps of a tensor that is stored transposed."""
PIECE_BYTES = 1 << 20
MAX_NOTE_BYTES = 1 << 16
"""Most bytes of a small tensor that describes another: JSON, or a shape."""


class QuantisedTensor(Protocol):
    """A tensor that is decoded while it is read."""

    @property
    def title(self) -> str:
        """What such tensors are, for a note: ``fp8 tensors with one scale``."""
        ...

    @property
    def stored(self) -> tuple[str, ...]:
        """The stored tensors that it is read from; the codes come first."""
        ...

    @property
    def shape(self) -> Shape: ...

    @property
    def kept_bytes(self) -> int:
        """Memory that a thread keeps while it reads the tensor, besides codes and scales of the elements asked for."""
        ...

    def decode(self, stored: StoredTensors, first: int, out: np.ndarray) -> None:
        """Fill ``out``, float32, with the elements from ``first`` on. Errors: ModelError for scales that are no numbers."""
        ...


class StoredTensors:
    """The tensors of a model as its files hold them."""

    def __init__(self, model: FileModel) -> None:
        self.label = model.label
        self.tensors: Mapping[str, Tensor] = model.tensors
        self.config = quantisation_of(model.config)
        self.is_declared = bool(self.config) or model.config.get("quantization_config") is not None
        self._model = model
        self._scratch = threading.local()

    @property
    def method(self) -> str:
        """The ``quant_method`` of the config; empty if it has none."""
        return str(self.config.get("quant_method") or "")

    def part(self, name: str, of: str, kinds: Sequence[str], *shapes: Shape) -> Tensor:
        """Return the header of a tensor that another one is decoded with. Errors: ModelError if it is missing or does not fit."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(
                f"{self.label}: {of} is {self.tensors[of].dtype} without {name}; expected its scales. "
                "Complete the download."
            )
        if tensor.dtype not in kinds or tensor.shape not in shapes:
            raise ModelError(
                f"{self.label}: {of} is {self.tensors[of].shape}, its {name.rpartition('.')[2]} is {tensor.dtype} "
                f"{tensor.shape}; expected {' or '.join(kinds)} {' or '.join(str(s) for s in shapes) or 'of another shape'}. Get the model from "
                "its source."
            )
        return tensor

    def refuse_form(self, what: str, found: object, expected: str) -> ModelError:
        """Return the error for a variant of a format that is not decoded."""
        return ModelError(
            f"{self.label}: {what} is {str(found)[:60]!r}; expected {expected}. Use the full-precision model, or one that was "
            "quantised in that way."
        )

    def read(self, name: str, offset: int, size: int) -> np.ndarray:
        """Read bytes of a tensor into this thread's buffer, which the next call overwrites: fresh pages are slow."""
        raw = getattr(self._scratch, "raw", None)
        if raw is None or raw.nbytes < size:
            raw = self._scratch.raw = np.empty(size, np.uint8)
        raw = raw[:size]
        self._model.read_into(name, offset, memoryview(raw))
        return raw

    def read_columns(self, name: str, rows: int, begin: int, end: int) -> np.ndarray:
        """Read bytes ``begin`` to ``end`` of each row of a tensor of ``rows`` rows: (rows, end - begin)."""
        width = self.tensors[name].byte_size // rows
        if end - begin == width:
            raw = np.empty(rows * width, np.uint8)
            self._model.read_into(name, 0, memoryview(raw))
            return raw.reshape(rows, width)
        result = np.empty((rows, end - begin), np.uint8)
        count = max(PIECE_BYTES // width, 1)
        for row in range(0, rows, count):
            held = min(count, rows - row)
            result[row : row + held] = self.read(name, row * width, held * width).reshape(held, width)[
                :, begin:end
            ]
        return result

    def integers(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Read integers of a tensor as they are stored."""
        tensor = self.tensors[name]
        width = dtypes.DTYPES[tensor.dtype].bytes
        raw = np.empty((tensor.elements if count is None else count) * width, np.uint8)
        self._model.read_into(name, first * width, memoryview(raw))
        return raw.view(np.dtype(dtypes.DTYPES[tensor.dtype].storage))

    def numbers(
        self, name: str, first: int = 0, count: int | None = None, kind: str | None = None
    ) -> np.ndarray:
        """Read numbers of a tensor as float32; ``kind`` is their dtype where the file's does not say it."""
        kind = kind or self.tensors[name].dtype
        values = self.integers(name, first, count)
        if kind == "F8_E8M0":
            powers: np.ndarray = POWERS[values]
            return powers
        if kind in dtypes.MERGEABLE:
            return dtypes.decode(values.view(np.uint8), kind).astype(np.float32, copy=False)
        return values.astype(np.float32)

    def scales(
        self, name: str, first: int = 0, count: int | None = None, kind: str | None = None
    ) -> np.ndarray:
        """Read scales as float32. Errors: ModelError for one that is not finite."""
        values = self.numbers(name, first, count, kind)
        self.check_finite(name, values)
        return values

    def check_finite(self, name: str, scales: np.ndarray) -> None:
        """Refuse scales of which one is not finite. Errors: ModelError."""
        if not np.isfinite(scales).all():
            wrong = scales[~np.isfinite(scales)][0]
            raise ModelError(
                f"{self.label}: {name}: a scale is {wrong}; expected finite numbers. Get the model from its source."
            )

    def refuse_zero(self, name: str) -> None:
        """Refuse a scale of 0 over codes that stand for other values."""
        raise ModelError(
            f"{self.label}: {name}: a scale is 0, and the values that it scales are not; expected positive numbers. Get the model "
            "from its source."
        )

    def is_here(self, name: str) -> bool:
        """Can a tensor be read now, without a download or a request?"""
        return not self._model.is_read_by_ranges and not self._model.absent([name], False)

    def read_note(self, name: str) -> bytes:
        """Read a small tensor that describes another one, while a model is opened. Downloads the file of a model on the hub."""
        tensor = self.tensors[name]
        self._model.fetch(self._model.absent([name], False))
        raw = np.empty(min(tensor.byte_size, MAX_NOTE_BYTES), np.uint8)
        self._model.read_into(name, 0, memoryview(raw))
        return raw.tobytes()

    def kept(self, key: tuple[str, int], make: Any) -> Any:
        """Return what this thread keeps of a tensor; the last one only, which ``make()`` returns."""
        if getattr(self._scratch, "key", None) != key:
            self._scratch.value = None  # before the next one is made, so that both are never held
            self._scratch.value = make()
            self._scratch.key = key
        return self._scratch.value


def _powers() -> np.ndarray:
    powers = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
    return np.append(powers, np.float32(np.nan))


POWERS = _powers()
"""The values of F8_E8M0, ``2 ** (code - 127)``; code 255 is NaN."""


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config says about quantisation: at its top, or in a part such as ``text_config``."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = (part.get(key) for part in parts for key in QUANTISATION_KEYS)
    return next((one for one in found if isinstance(one, Mapping) and one), {})


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that does not mention quantisation."""
    return {
        key: {k: v for k, v in value.items() if k not in QUANTISATION_KEYS}
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key not in QUANTISATION_KEYS
    }


def with_quantisation(config: Mapping[str, Any], of_base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says of quantisation what another one says."""
    result = dict(config)
    for key, value in of_base.items():
        if key in QUANTISATION_KEYS:
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(inner := config.get(key), Mapping):
            result[key] = {**inner, **{k: v for k, v in value.items() if k in QUANTISATION_KEYS}}
    return result
