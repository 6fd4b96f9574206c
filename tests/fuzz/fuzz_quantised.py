"""Quantised models: headers of codes and scales in every format, what the config says, and bitsandbytes' JSON inside of a tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alnico.checkpoint.open_model import open_model
from fuzz.harness import Target, as_bytes, files_of, header_of, put

MODEL, CONFIG, STATE = "model.safetensors", "config.json", "state"
AT = "a.weight.quant_state.bitsandbytes__nf4"
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def read(data: bytes, folder: Path) -> None:
    files = files_of(data)
    put(folder, files, (MODEL, CONFIG))
    _put_state(folder / MODEL, files)
    with open_model(folder) as model:
        for name, tensor in model.tensors.items():
            assert model.read(name).shape == tensor.shape
        model.absent(model.tensors, True)
        assert model.reading_bytes >= 0


def _put_state(path: Path, files: Any) -> None:
    """Write JSON into the bytes of the tensor that has it."""
    header = files.get(MODEL)
    place = header.get(AT) if isinstance(header, dict) else None
    offsets = place.get("data_offsets") if isinstance(place, dict) else None
    if STATE not in files or not isinstance(offsets, list) or not offsets or type(offsets[0]) is not int:
        return
    whole = path.read_bytes()
    text = as_bytes(files[STATE])
    begin = 8 + int.from_bytes(whole[:8], "little") + offsets[0]
    if 0 <= begin <= len(whole) - len(text):
        path.write_bytes(whole[:begin] + text + whole[begin + len(text) :])


def seeds() -> list[bytes]:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "shape": [4, 32],
        "nested_blocksize": 256,
        "nested_offset": 0.1,
    }
    of_state = len(as_bytes(state))
    models: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"quant_method": "fp8", "weight_block_size": [2, 4]}, {"a.weight": ("F8_E4M3", (4, 8)), "a.weight_scale_inv": ("F32", (2, 2))}),
        ({"quant_method": "compressed-tensors"}, {"a.weight": ("F8_E4M3", (4, 8)), "a.weight_scale": ("BF16", (4, 1)), "a.input_scale": ("F32", (1,))}),
        ({"quant_method": "modelopt"}, {"a.weight": ("U8", (4, 16)), "a.weight_scale": ("F8_E4M3", (4, 2)), "a.weight_scale_2": ("F32", ())}),
        ({"quant_method": "compressed-tensors"}, {"a.weight_packed": ("U8", (4, 16)), "a.weight_scale": ("F8_E4M3", (4, 2)), "a.weight_global_scale": ("F32", (1,))}),
        ({"quant_method": "mxfp4"}, {"a_blocks": ("U8", (2, 4, 2, 16)), "a_scales": ("U8", (2, 4, 2))}),
        ({"config_groups": {"g": {"weights": {"num_bits": 4}}}}, {"a.weight_packed": ("I32", (8, 8)), "a.weight_scale": ("BF16", (8, 2)), "a.weight_zero_point": ("I32", (1, 2)), "a.weight_g_idx": ("I32", (64,))}),
        ({}, {"a.weight_packed": ("I32", (8, 8)), "a.weight_scale": ("BF16", (8, 1)), "a.weight_shape": ("I64", (2,))}),
        ({}, {"a.weight": ("I8", (4, 8)), "a.weight_scale": ("F32", (4, 1)), "a.weight_zero_point": ("I8", (4, 1))}),
        ({}, {"a.weight": ("I8", (4, 8)), "a.SCB": ("F32", (4,)), "a.weight_format": ("U8", ())}),
        ({}, {"a.weight": ("U8", (64, 1)), "a.weight.absmax": ("U8", (2,)), "a.weight.nested_absmax": ("F32", (1,)), "a.weight.nested_quant_map": ("F32", (256,)), "a.weight.quant_map": ("F32", (16,)), AT: ("U8", (of_state,))}),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"a.qweight": ("I32", (8, 8)), "a.qzeros": ("I32", (2, 1)), "a.scales": ("F16", (2, 8)), "a.g_idx": ("I32", (64,))}),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, {"a.qweight": ("I32", (64, 1)), "a.qzeros": ("I32", (2, 1)), "a.scales": ("F16", (2, 8))}),
        ({}, {"a.weight": ("F8_E4M3", (4, 8)), "a.scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,)), "a.comfy_quant": ("U8", (4,))}),
    ]  # fmt: skip
    inputs = [
        {MODEL: header_of(tensors, WIDTHS), CONFIG: {"model_type": "x", "quantization_config": config}, STATE: state}
        for config, tensors in models
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    MODEL, CONFIG, STATE, "quantization_config", "quant_method", "weight_block_size", "bits", "group_size", "checkpoint_format", "gptq_v2",
    "version", "gemm", "config_groups", "weights", "num_bits", "blocksize", "nested_blocksize", "nested_offset", "shape", "dtype", "data_offsets",
    *WIDTHS, "a.weight", "a.weight_scale", "a.weight_scale_2", "a.weight_packed", "a.qweight", "a.scales", "a.qzeros", "a.g_idx", "a.weight_g_idx",
    "a_blocks", "a_scales", "a.SCB", "a.scale_weight", AT,
)  # fmt: skip
TARGET = Target(read, seeds, WORDS)
