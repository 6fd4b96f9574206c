"""Presents tensors that were widened when they were loaded in the dtype of their file, where that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from alnico.checkpoint.source import Source, SourceWrapper, Tensor, TensorSpec
from alnico.checkpoint.virtual_read import read_computed
from alnico.errors import MismatchError
from alnico.numerics.dtypes import DTYPES


class NarrowedModel(SourceWrapper):
    """A model whose float32 tensors are read as BF16 or F16, exactly: transformers loads files of 16 bits so.

    ``dtypes`` maps tensors to the dtype of their file. A value that the dtype does not hold is an error where it is read,
    as the tensor is then not the file's.
    """

    def __init__(self, source: Source, dtypes: Mapping[str, str]) -> None:
        self.wrapped = source
        self._narrow = {
            name: dtype
            for name, dtype in dtypes.items()
            if dtype in ("BF16", "F16") and name in source.tensors and source.tensors[name].dtype == "F32"
        }
        self.tensors: Mapping[str, Tensor] = {
            name: TensorSpec(self._narrow[name], tensor.shape, tensor.nominal)
            if name in self._narrow
            else tensor
            for name, tensor in source.tensors.items()
        }

    @property
    def reading_bytes(self) -> int:
        return self.wrapped.reading_bytes + (1 << 22)

    def absent(self, tensors: object, side_files: bool) -> Mapping[str, int]:
        return {}

    def identity(self) -> list[dict[str, object]]:
        return self.wrapped.identity()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._narrow:
            self.wrapped.read_into(name, offset, buffer)
            return
        dtype = self._narrow[name]
        width = DTYPES["F32"].bytes

        def compute(first: int, out: np.ndarray) -> None:
            raw = np.empty(out.size * width, np.uint8)
            self.wrapped.read_into(name, first * width, memoryview(raw))
            wide = raw.view(np.float32)
            with np.errstate(all="ignore"):
                if dtype == "BF16":
                    bits = wide.view(np.uint32)
                    out[:] = (bits >> 16).astype(np.uint16)
                    is_held = not (bits & 0xFFFF).any()
                else:
                    half = wide.astype(np.float16)
                    out[:] = half.view(np.uint16)
                    is_held = bool((half.astype(np.float32).view(np.uint32) == wide.view(np.uint32)).all())
            if not is_held:
                raise MismatchError(
                    f"{name}: the module has values that {dtype} does not hold, and the task vector was made of a base in "
                    f"{dtype}; expected the values of that base. Load the base itself, without changes."
                )

        read_computed(offset, buffer, np.dtype(np.uint16), compute)
