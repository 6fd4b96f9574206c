"""Finds fp8 weights with scales: one for a tensor, one for each row, or one for each block.

``W = fp8 x scale``. ``X.weight`` in F8_E4M3 or F8_E5M2 comes with ``X.weight_scale_inv`` (DeepSeek-V3, arXiv 2412.19437, section
3.3; transformers' ``fp8``), ``X.weight_scale`` (compressed-tensors, FBGEMM, ModelOpt, newer ComfyUI) or ``X.scale_weight`` (older
ComfyUI); experts that are stored together with ``X_scale``. Scales are floating-point numbers, or powers of two (F8_E8M0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from alnico.checkpoint.quantised.coded_rows import FLOAT8_VALUES, CodedRows, ScaleGrid
from alnico.checkpoint.quantised.stored_tensors import FLOATS, QuantisedTensor, StoredTensors
from alnico.errors import ModelError
from alnico.numerics import dtypes
from alnico.numerics.dtypes import Shape

USUAL_BLOCK = (128, 128)
"""Rows and columns of a block, where the config does not say them."""
MX_GROUP = 32
"""Columns that share a power of two in MXFP8."""
ALWAYS_SCALED = ("fp8", "fbgemm_fp8", "modelopt")
"""Values of ``quant_method`` whose fp8 tensors are never without scales."""
COMFY = ".comfy_quant"
"""End of the name of ComfyUI's description of a tensor."""


def find_fp8(stored: StoredTensors) -> Iterator[tuple[str, QuantisedTensor]]:
    """Yield the fp8 tensors that have scales. Errors: ModelError for scales that are missing or do not fit."""
    block = _configured_block(stored)
    for name, tensor in stored.tensors.items():
        if tensor.dtype not in dtypes.FLOAT8 or not tensor.elements:
            continue
        stem = name.removesuffix(".weight")
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{stem}.scale_weight", f"{stem}.scale"] if stem != name else []
        scale = next((one for one in names if one in stored.tensors), None)
        if scale is not None:
            yield name, _scaled(stored, name, scale, block)
        elif stored.method in ALWAYS_SCALED and not name.endswith("_scale"):
            stored.part(names[0] if stored.method == "fp8" else names[1], name, FLOATS)


def _configured_block(stored: StoredTensors) -> tuple[int, int] | None:
    """Return the size of blocks by the config of transformers' ``fp8``; None if it says none."""
    block = stored.config.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in block)
    ):
        raise ModelError(
            f"{stored.label}: config.json has the weight_block_size {str(block)[:60]}; expected two "
            "positive whole numbers. Check the model."
        )
    return block[0], block[1]


def _scaled(stored: StoredTensors, name: str, scale: str, block: tuple[int, int] | None) -> CodedRows:
    tensor, of_scale = stored.tensors[name], stored.tensors[scale]
    shape = tensor.shape
    kinds: tuple[str, ...] = (*FLOATS, "F8_E8M0")
    fitted = fit_grid(shape, of_scale.shape, block)
    kind = None
    if of_scale.dtype == "U8" and fitted is not None and fitted[2] == (1, MX_GROUP):
        kinds, kind = ("U8",), "F8_E8M0"
    if f"{name.removesuffix('.weight')}{COMFY}" in stored.tensors and (fitted is None or fitted[1][1] > 1):
        raise stored.refuse_form(
            f"the scales of {name}", of_scale.shape, "one number, or one for each row (ComfyUI)"
        )
    if fitted is None:
        stored.part(scale, name, kinds, *_accepted(shape, block))
    stored.part(scale, name, kinds, of_scale.shape)
    assert fitted is not None
    height, grid, of_block, columns = fitted
    return CodedRows(
        f"fp8 tensors {_describe(grid, of_block, columns) if block is None else _describe_blocks(block)}",
        shape,
        name,
        "byte",
        FLOAT8_VALUES[tensor.dtype],
        ScaleGrid(scale, height, grid, of_block, kind),
        None,
        columns,
        columns,
        (scale,),
    )


Fitted = tuple[int, tuple[int, int], tuple[int, int], int]


def fit_grid(shape: Shape, of_scales: Shape, block: tuple[int, int] | None = None) -> Fitted | None:
    """Say how scales lie on a tensor: rows of a matrix, numbers for a matrix, rows and columns of a block, columns of a row.

    None if they do not fit. ``block`` is the size of blocks where the config says it.

    >>> fit_grid((300, 200), (3, 2)), fit_grid((300, 200), (300, 1)), fit_grid((300, 200), ())
    ((300, (3, 2), (128, 128), 200), (300, (300, 1), (1, 200), 200), (300, (1, 1), (300, 200), 200))
    >>> fit_grid((4, 6, 8), (4, 1, 8))
    (6, (1, 8), (6, 1), 8)
    """
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if block is None and math.prod(of_scales) == 1:
        return rows, (1, 1), (rows, columns), columns
    if block is None and len(shape) > 1 and of_scales in ((shape[0],), (shape[0], *(1,) * (len(shape) - 1))):
        columns = math.prod(shape[1:])
        return shape[0], (shape[0], 1), (1, columns), columns
    if len(shape) < 2 or len(of_scales) != len(shape) or of_scales[:-2] != shape[:-2]:
        return None
    height, grid = shape[-2], of_scales[-2:]
    if not all(grid):
        return None
    exact = (-(-height // grid[0]), -(-columns // grid[1]))
    likely = [(height, columns), (1, columns), (height, 1), USUAL_BLOCK]
    if height % exact[0] == 0 and columns % exact[1] == 0:
        likely.append(exact)
    for one in likely if block is None else [block]:
        if (-(-height // one[0]), -(-columns // one[1])) == grid:
            return height, grid, one, columns
    return None


def _accepted(shape: Shape, block: tuple[int, int] | None) -> list[Shape]:
    """List the usual shapes of the scales of a tensor, for a message."""
    if len(shape) < 2:
        return [()] if block is None else []
    leading, (height, columns) = shape[:-2], shape[-2:]
    rows, width = block or USUAL_BLOCK
    blocks = (*leading, -(-height // rows), -(-columns // width))
    return [blocks] if block is not None else [(), (*leading, height, 1), blocks]


def _describe(grid: tuple[int, int], block: tuple[int, int], columns: int) -> str:
    if grid == (1, 1):
        return "with one scale"
    if block[1] == columns:
        return "with a scale per row"
    return "with a scale per column" if block[1] == 1 else _describe_blocks(block)


def _describe_blocks(block: tuple[int, int]) -> str:
    return f"with scales per {block[0]} x {block[1]} block"
