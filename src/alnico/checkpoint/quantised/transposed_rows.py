"""Decodes matrices whose codes have inputs as rows and are read with outputs as rows (GPTQ, AWQ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alnico.checkpoint.quantised.coded_rows import rectangles, refuse_lost_scales
from alnico.checkpoint.quantised.stored_tensors import PANEL_BYTES, StoredTensors
from alnico.kernels.choice import kernel_for
from alnico.kernels.template import KernelDescription
from alnico.kernels.transposed_kernel import Packing, TransposedKernel
from alnico.numerics import dtypes
from alnico.numerics.dtypes import Shape

ALIGNED = 32
"""A panel begins at a multiple of so many outputs, so that words of packed codes and zero points are whole."""
NO_INDEX = np.empty(0, np.uint32)


@dataclass(frozen=True, eq=False)
class CodePanel:
    """Some outputs of a matrix: ``words`` as they are stored, ``scales`` and ``zeros`` (outputs, groups).

    Input i belongs to group ``i // group``, or to ``groups[i]``, uint32, where that is another one.
    """

    words: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: int
    groups: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TransposedRows:
    """A matrix (outputs, inputs) of which a thread keeps a panel, which ``make(stored, begin, end)`` reads: some outputs.

    ``packing``, ``bits`` and ``shifts`` say how codes lie in words (:class:`TransposedKernel`).
    """

    title: str
    shape: Shape
    stored: tuple[str, ...]
    packing: Packing
    bits: Literal[4, 8]
    shifts: tuple[int, ...]
    scales: str
    make: Callable[[StoredTensors, int, int], CodePanel]

    @property
    def _row_bytes(self) -> int:
        return max(self.shape[1] * self.bits // 8, 1)

    @property
    def _outputs(self) -> int:
        """The outputs of a panel."""
        most = PANEL_BYTES // self._row_bytes // ALIGNED * ALIGNED
        return min(max(most, ALIGNED), self.shape[0])

    @property
    def kept_bytes(self) -> int:
        """A panel, what a part of it is read into, and its scales and zero points with what they are made from."""
        return self._outputs * (2 * self._row_bytes + 6 * 4 * self.shape[1] // 16)

    def decode(self, stored: StoredTensors, first: int, out: np.ndarray) -> None:
        if not first:  # so that a kernel is compiled where that is worth it
            kernel_for(self._kernel(self._panel(stored, 0)), math.prod(self.shape))
        for row, rows, column, width, at in rectangles(first, out.size, self.shape[1]):
            done = 0
            while done < rows:
                number, place = divmod(row + done, self._outputs)
                count = min(rows - done, self._outputs - place)
                begin = at + done * width
                part = out[begin : begin + count * width].reshape(count, width)
                self._decode(stored, self._panel(stored, number), place, column, part)
                done += count

    def _panel(self, stored: StoredTensors, number: int) -> CodePanel:
        begin = number * self._outputs
        end = min(begin + self._outputs, self.shape[0])
        panel: CodePanel = stored.kept((self.stored[0], number), lambda: self.make(stored, begin, end))
        return panel

    def _kernel(self, panel: CodePanel) -> KernelDescription:
        return TransposedKernel(self.packing, self.bits, panel.groups is not None)

    def _decode(
        self, stored: StoredTensors, panel: CodePanel, row: int, column: int, out: np.ndarray
    ) -> None:
        """Decode a rectangle of a panel. Errors: ModelError for a scale of 0 over a number that is not 0."""
        rows, width = out.shape
        if column % 2:  # begins in the middle of a byte, where bytes are of two inputs
            wider = np.empty((rows, width + 1), np.float32)
            self._decode(stored, panel, row, column - 1, wider)
            out[:] = wider[:, 1:]
            return
        index = NO_INDEX if panel.groups is None else panel.groups
        run = kernel_for(self._kernel(panel))
        shifts = np.array(self.shifts, np.uint32)

        def decode(scales: np.ndarray, into: np.ndarray) -> None:
            run(panel.words, shifts, panel.zeros, scales, index, panel.group, row, column, into)

        decode(panel.scales, out)
        if not panel.scales[row : row + rows].all():
            refuse_lost_scales(stored, self.scales, panel.scales, out, decode)


def scales_of_outputs(stored: StoredTensors, name: str, begin: int, end: int) -> np.ndarray:
    """Read the scales of some outputs, which are stored as (groups, outputs): (outputs, groups) float32.

    Errors: ModelError for one that is not finite.
    """
    tensor = stored.tensors[name]
    width = dtypes.DTYPES[tensor.dtype].bytes
    raw = stored.read_columns(name, tensor.shape[0], begin * width, end * width)
    scales = dtypes.decode(raw.reshape(-1), tensor.dtype).astype(np.float32).reshape(tensor.shape[0], -1)
    stored.check_finite(name, scales)
    return np.ascontiguousarray(scales.T)


def group_size(stored: StoredTensors, inputs: int, groups: int) -> int:
    """Return how many inputs share a scale, by the config or by the shapes; 0 if neither says it."""
    size = stored.config.get("group_size")
    if isinstance(size, int) and size > 0 and -(-inputs // size) == groups:
        return size
    return inputs // groups if groups and inputs % groups == 0 else 0


def unpack_halves(raw: np.ndarray) -> np.ndarray:
    """Unpack bytes (rows, bytes) that hold two codes each, the first in the low half: (rows, codes) uint8.

    >>> unpack_halves(np.array([[0x21, 0x43]], np.uint8))
    array([[1, 2, 3, 4]], dtype=uint8)
    """
    codes = np.empty((len(raw), 2 * raw.shape[1]), np.uint8)
    np.bitwise_and(raw, np.uint8(15), out=codes[:, ::2])
    np.right_shift(raw, np.uint8(4), out=codes[:, 1::2])
    return codes
