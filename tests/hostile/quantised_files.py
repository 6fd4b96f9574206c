"""Quantised models whose codes, scales or configs do not fit, each with the check that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hostile.malformed import Malformed, Read, reading, save, save_json
from made_quantised import FORMATS, QuantisedMatrix, save_quantised


def stored_as(
    config: Mapping[str, Any] | None, **tensors: tuple[str, tuple[int, ...]]
) -> Callable[[Path], Read]:
    """A model of zeros, under names with ``_`` for a dot where two are together, and a ``quantization_config``."""

    def make(folder: Path) -> Read:
        save(folder / "model.safetensors", {name.replace("__", "."): one for name, one in tensors.items()})
        save_json(folder / "config.json", {"quantization_config": config})
        return reading(folder)

    return make


def changed(kind: str, **stored: torch.Tensor) -> Callable[[Path], Read]:
    """A good matrix of a format of which parts are replaced."""

    def make(folder: Path) -> Read:
        one = FORMATS[kind](np.random.default_rng(0), 64, 64)
        parts = {**one.stored, **{f".{end}": part for end, part in stored.items()}}
        save_quantised(folder, {"q": QuantisedMatrix(parts, one.values, one.config)}, {})
        return reading(folder)

    return make


FP8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
MATRIX = ("F8_E4M3", (4, 4))
STATE = torch.tensor(list(b'{"blocksize": 64, "shape": [64, 65]}'), dtype=torch.uint8)

QUANTISED_FILES = (
    Malformed("config.json has the weight_block_size", "weight_block_size [0, 2]", stored_as({**FP8, "weight_block_size": [0, 2]}, q__weight=MATRIX, q__weight_scale_inv=("F32", (2, 2)))),
    Malformed("{} without {}; expected its scales", "is F8_E4M3 without q.weight_scale_inv", stored_as(FP8, q__weight=MATRIX)),
    Malformed("{}: {} is {}, its {} is {} {}; expected", "its weight_scale_inv is F32 (2, 3); expected F32 or BF16 or F16 or F8_E8M0 (2, 2)", stored_as(FP8, q__weight=MATRIX, q__weight_scale_inv=("F32", (2, 3)))),
    Malformed("a scale is {}; expected finite numbers", "q.weight_scale: a scale is nan", changed("fp8 of FBGEMM", weight_scale=torch.full((64, 1), torch.nan))),
    Malformed("a scale is 0, and the values that it scales are not", "q.weight_scale: a scale is 0", changed("fp8 of FBGEMM", weight_scale=torch.zeros(64, 1))),
    Malformed("the scales of {} | {}", "the scales of q.weight is '(4, 2)'; expected one number", stored_as(None, q__weight=("F8_E4M3", (4, 64)), q__weight_scale=("F32", (4, 2)), q__comfy_quant=("U8", (4,)))),
    Malformed("the form of {} | 4-bit codes of ComfyUI", "the form of q.weight is '4-bit codes of ComfyUI'", changed("nvfp4 of ModelOpt", comfy_quant=torch.ones(4, dtype=torch.uint8))),
    Malformed("the form of {} | {} bits, {}", "the form of q.qweight is '3 bits, gptq'", stored_as({"quant_method": "gptq", "bits": 3}, q__qweight=("I32", (8, 8)))),
    Malformed("the version of {} | {} bits, {}", "the version of q.qweight is '4 bits, gemv'", stored_as({"quant_method": "awq", "version": "gemv"}, q__qweight=("I32", (8, 8)))),
    Malformed("the width of {} | {} bits", "the width of q.weight_packed is 'unknown bits'", stored_as({}, q__weight_packed=("I32", (8, 8)), q__weight_scale=("BF16", (8, 1)))),
    Malformed("{} | {} | {} rows in {} words", "q.weight_shape is '(64, 33)'", changed("int4 in groups", weight_shape=torch.tensor([64, 33]))),
    Malformed("{} | {} | 0, rows one after the other", "q.weight_format is '2'", changed("int8 of bitsandbytes", weight_format=torch.tensor(2, dtype=torch.uint8))),
    Malformed("{} | {} {} | nf4 or fp4, sizes of blocks", "expected nf4 or fp4, sizes of blocks, and the shape of the 4096 codes of q.weight", changed("nf4", **{"weight.quant_state.bitsandbytes__nf4": STATE})),
    Malformed("{} reaches from {} to {}; expected 0 to {}", "q.g_idx reaches from 9 to 9", changed("GPTQ", g_idx=torch.full((64,), 9, dtype=torch.int32))),
    Malformed("is stored twice, as {} and as {}", "q.weight is stored twice, as F32 and as q.qweight", changed("GPTQ", weight=torch.ones(3))),
    Malformed("its weights are quantised ({}) in a way that is not read", "its weights are quantised (config.json says 'aqlm')", stored_as({"quant_method": "aqlm"}, w=("F32", (2,)))),
)  # fmt: skip
