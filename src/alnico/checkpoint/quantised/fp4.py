"""Finds weights in 4-bit floating point (E2M1): NVFP4, and MXFP4 of compressed-tensors and gpt-oss.

NVFP4 has a scale in F8_E4M3 for 16 columns and one in F32 for the tensor. compressed-tensors (``weight_packed``) divides by the
latter, ``weight_global_scale``; ModelOpt (``weight`` in U8) multiplies by it, ``weight_scale_2``. MXFP4 has a power of two for 32
columns. The first of the two codes of a byte is in its low half. gpt-oss stores experts as ``X_blocks`` (experts, outputs,
groups, 16) and ``X_scales`` (experts, outputs, groups), and means X as (experts, inputs, outputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alnico.checkpoint.quantised.coded_rows import (
    FP4_VALUES,
    CodedRows,
    ScaleGrid,
    rectangles,
)
from alnico.checkpoint.quantised.fp8 import COMFY
from alnico.checkpoint.quantised.stored_tensors import PANEL_BYTES, QuantisedTensor, StoredTensors
from alnico.kernels.choice import kernel_for
from alnico.kernels.template import KernelDescription
from alnico.kernels.transposed_kernel import TransposedBlocksKernel
from alnico.numerics.dtypes import Shape

NV_GROUP, MX_GROUP = 16, 32
PACKED, BLOCKS = ".weight_packed", "_blocks"


def find_fp4(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the tensors in NVFP4 and MXFP4. Errors: ModelError for parts that are missing or do not fit."""
    for name, tensor in stored.tensors.items():
        stem = name.removesuffix(PACKED)
        if stem != name and tensor.dtype == "U8":
            yield f"{stem}.weight", _packed(stored, stem)
        elif tensor.dtype == "U8" and name.endswith(".weight") and f"{name}_scale" in stored.tensors:
            yield name, _of_modelopt(stored, name)
        elif tensor.dtype == "U8" and name.endswith(BLOCKS) and len(tensor.shape) == 4:
            yield name.removesuffix(BLOCKS), _of_gpt_oss(stored, name)


def _packed(stored: StoredTensors, stem: str) -> CodedRows:
    """A tensor of compressed-tensors."""
    name, scale = f"{stem}{PACKED}", f"{stem}.weight_scale"
    if (found := stored.tensors.get(scale)) is not None and found.dtype in ("U8", "F8_E8M0"):
        return _rows(stored, name, "mxfp4", MX_GROUP, scale, "U8", "F8_E8M0")
    factor = f"{stem}.weight_global_scale"
    return _rows(stored, name, "nvfp4", NV_GROUP, scale, "F8_E4M3", factor=factor, divides=True)


def _of_modelopt(stored: StoredTensors, name: str) -> CodedRows:
    if f"{name.removesuffix('.weight')}{COMFY}" in stored.tensors:
        raise stored.refuse_form(f"the form of {name}", "4-bit codes of ComfyUI", "fp8 with one scale")
    return _rows(stored, name, "nvfp4", NV_GROUP, f"{name}_scale", "F8_E4M3", factor=f"{name}_scale_2")


def _rows(
    stored: StoredTensors,
    name: str,
    title: str,
    group: int,
    scale: str,
    *kinds: str,
    factor: str = "",
    divides: bool = False,
) -> CodedRows:
    shape = stored.tensors[name].shape
    columns = 2 * shape[-1] if shape else 2
    height = shape[-2] if len(shape) > 1 else 1
    groups = columns // group
    fits = [(*shape[:-1], groups)] if shape and groups * group == columns else []
    stored.part(scale, name, kinds, *fits)
    if factor:
        stored.part(factor, name, ("F32",), (), (1,))
    grid = ScaleGrid(scale, height, (height, groups), (1, group), kinds[-1], factor, divides)
    return CodedRows(
        f"{title} tensors",
        (*shape[:-1], columns),
        name,
        "low half first",
        FP4_VALUES,
        grid,
        None,
        columns,
        columns // 2,
        (scale, factor) if factor else (scale,),
    )


def _of_gpt_oss(stored: StoredTensors, name: str) -> TransposedBlocks:
    experts, outputs, groups, _ = shape = stored.tensors[name].shape
    scale = f"{name.removesuffix(BLOCKS)}_scales"
    fits = [shape[:-1]] if shape[-1] == MX_GROUP // 2 else []
    stored.part(scale, name, ("U8",), *fits)
    return TransposedBlocks((experts, groups * MX_GROUP, outputs), name, scale)


@dataclass(frozen=True)
class _Panel:
    """The inputs of some groups, of one expert: ``words`` (outputs, words of eight inputs), ``scales`` (groups, outputs)."""

    words: np.ndarray
    scales: np.ndarray


@dataclass(frozen=True)
class TransposedBlocks:
    """MXFP4 experts that are stored with outputs as rows and read with inputs as rows.

    A thread keeps the codes of some groups of inputs, of all outputs of an expert.
    """

    shape: Shape
    codes: str
    scales: str
    title = "mxfp4 tensors of experts"

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.codes, self.scales)

    @property
    def _groups(self) -> int:
        """The groups of inputs of a panel."""
        _, inputs, outputs = self.shape
        return min(max(PANEL_BYTES // max(outputs * MX_GROUP // 2, 1), 1), inputs // MX_GROUP)

    @property
    def kept_bytes(self) -> int:
        """A panel and what it is made from, and its scales as numbers."""
        outputs = self.shape[2]
        codes = outputs * self._groups * MX_GROUP // 2
        return 2 * codes + 2 * 4 * outputs * self._groups + outputs * (self.shape[1] // MX_GROUP)

    def decode(self, stored: StoredTensors, first: int, out: np.ndarray) -> None:
        _, inputs, outputs = self.shape
        if not first:  # so that a kernel is compiled where that is worth it
            kernel_for(_kernel(), math.prod(self.shape))
        per_panel = self._groups * MX_GROUP
        for row, rows, column, width, at in rectangles(first, out.size, outputs):
            done = 0
            while done < rows:
                expert, of_input = divmod(row + done, inputs)
                number, place = divmod(of_input, per_panel)
                count = min(rows - done, per_panel - place, inputs - of_input)
                panel = self._panel(stored, expert, number)
                begin = at + done * width
                part = out[begin : begin + count * width].reshape(count, width)
                kernel_for(_kernel())(panel.words, panel.scales, place, column, part)
                done += count

    def _panel(self, stored: StoredTensors, expert: int, number: int) -> _Panel:
        _, inputs, outputs = self.shape
        groups = inputs // MX_GROUP
        begin, end = number * self._groups, min((number + 1) * self._groups, groups)

        def scales() -> np.ndarray:
            of_expert = stored.scales(self.scales, expert * outputs * groups, outputs * groups, "F8_E8M0")
            return np.ascontiguousarray(of_expert.reshape(outputs, groups)[:, begin:end].T)

        def make() -> _Panel:
            width = MX_GROUP // 2
            if end - begin == groups:
                size = outputs * groups * width
                codes = stored.integers(self.codes, expert * size, size).reshape(outputs, -1)
                return _Panel(codes.view("<u4"), scales())
            codes = np.empty((outputs, (end - begin) * width), np.uint8)
            step = max(PANEL_BYTES // 16 // (groups * width), 1)
            for row in range(0, outputs, step):
                held = min(step, outputs - row)
                raw = stored.read(
                    self.codes, (expert * outputs + row) * groups * width, held * groups * width
                )
                codes[row : row + held] = raw.reshape(held, -1)[:, begin * width : end * width]
            return _Panel(codes.view("<u4"), scales())

        panel: _Panel = stored.kept((f"{self.codes} {expert}", number), make)
        return panel


def _kernel() -> KernelDescription:
    return TransposedBlocksKernel()
