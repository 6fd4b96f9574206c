"""Quantised tensors made by the libraries of their formats are decoded to the numbers that these libraries decode them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import alnico

ROWS, COLUMNS = 96, 256
WEIGHT = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, COLUMNS))).float()


def decoded(folder: Path, stored: dict[str, torch.Tensor], config: Any = None) -> dict[str, torch.Tensor]:
    """What alnico reads of a model of some stored tensors."""
    save_file({name: part.contiguous() for name, part in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config or None}))
    with alnico.open_model(folder) as model:
        return {name: torch.from_numpy(model.read(name)) for name in model.tensors}


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_four_bits(tmp_path: Path, kind: str, nested: bool, blocksize: int) -> None:
    codes, state = bitsandbytes.functional.quantize_4bit(
        WEIGHT, quant_type=kind, blocksize=blocksize, compress_statistics=nested
    )
    parts = {f"a.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    found = decoded(tmp_path, {"a.weight": codes, **parts})["a.weight"]
    expected = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert expected.dtype == torch.float32
    assert torch.equal(found, expected)


def test_bitsandbytes_in_eight_bits(tmp_path: Path) -> None:
    codes, limits, _ = bitsandbytes.functional.int8_vectorwise_quant(WEIGHT.half())
    stored = {"a.weight": codes, "a.SCB": limits, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = decoded(tmp_path, stored)["a.weight"]
    expected = bitsandbytes.functional.int8_vectorwise_dequant(codes, limits)
    # The library rounds SCB / 127 and two products; here one product is rounded.
    assert (found - expected).abs().max() <= 2**-22 * expected.abs().max()


SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "pack-quantized, asymmetric": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "pack-quantized, by row": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
    "pack-quantized, 8 bits": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float-quantized, one scale": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float-quantized, blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    args = QuantizationArgs(**SCHEMES[name])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(name.partition(",")[0])
    compressed = compressor.compress(parameters(args), scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": args.num_bits}}},
    }
    found = decoded(tmp_path, {f"a.{part}": value for part, value in compressed.items()}, config)
    assert set(found) == {"a.weight"}
    if name.startswith("nvfp4"):  # decompress computes in bfloat16; its functions compute in float32, too
        assert (found["a.weight"] - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max()
        codes = unpack_fp4_from_uint8(compressed["weight_packed"], ROWS, COLUMNS, dtype=torch.float32)
        scale, factor = compressed["weight_scale"].float(), compressed["weight_global_scale"]
        expected = dequantize(codes, scale, args=args, global_scale=factor, dtype=torch.float32)
    assert torch.equal(found["a.weight"], expected.float())


def parameters(args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """The weight with scales, and zero points where they are asked for, in float32: absolute largest values of what shares a scale."""
    strategy = str(args.strategy)
    if strategy == "tensor":
        shape: tuple[int, ...] = (1,)
        largest = WEIGHT.abs().amax().reshape(1)
    elif strategy == "block":
        height, width = args.block_structure
        largest = WEIGHT.reshape(ROWS // height, height, COLUMNS // width, width).abs().amax((1, 3))
    else:
        largest = WEIGHT.reshape(ROWS, -1, args.group_size or COLUMNS).abs().amax(-1)
    shape = largest.shape
    of_float = {4: 6.0, 8: 448.0}[args.num_bits]
    scale = largest / (of_float if args.type == "float" else 2 ** (args.num_bits - 1) - 1)
    stored = {"weight": WEIGHT.clone(), "weight_scale": scale}
    if strategy == "tensor_group":
        factor = torch.tensor([448.0 * 6.0 / float(WEIGHT.abs().max())])
        stored |= {
            "weight_scale": (scale * factor).to(torch.float8_e4m3fn).float(),
            "weight_global_scale": factor,
        }
    if args.scale_dtype == torch.uint8:
        stored["weight_scale"] = torch.exp2(torch.ceil(torch.log2(scale)))
    if not args.symmetric:
        random = np.random.default_rng(1).integers(-8, 8, shape)
        stored["weight_zero_point"] = torch.from_numpy(random).to(torch.int8)
    return stored


def test_mxfp4_experts_of_gpt_oss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = torch.from_numpy(random.integers(0, 256, (3, 64, 5, 16)).astype(np.uint8))
    scales = torch.from_numpy(random.integers(100, 140, (3, 64, 5)).astype(np.uint8))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = decoded(tmp_path, {"e.up_blocks": blocks, "e.up_scales": scales}, {"quant_method": "mxfp4"})[
        "e.up"
    ]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [torch.float32, torch.float8_e8m0fnu])
def test_fp8_blocks_of_transformers(tmp_path: Path, scale: torch.dtype) -> None:
    codes = torch.cat([WEIGHT, WEIGHT, WEIGHT, WEIGHT]).to(torch.float8_e4m3fn)
    scales = (torch.rand(3, 2) + 0.5).to(scale)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = decoded(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, config)["a.weight"]
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))


def test_every_fp8_code_is_that_of_torch(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        finite = codes[torch.isfinite(codes.float())].reshape(2, -1)
        found = decoded(tmp_path, {"a.weight": finite, "a.weight_scale": torch.tensor(0.3)})["a.weight"]
        assert torch.equal(found, finite.float() * torch.tensor(0.3))
