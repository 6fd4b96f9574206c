"""Quantised matrices made for tests: codes and scales as each format stores them, and in float64 what they mean.

Each is written from the description of its format, number by number. Nothing here is of the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
BNB_FP4 = [0.0, 0.005208333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class QuantisedMatrix:
    """What is stored of a matrix, by the end of the names, and what it means: (rows, columns), or (experts, inputs, outputs)."""

    stored: Mapping[str, torch.Tensor]
    values: np.ndarray
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = ".weight"


def e2m1(codes: np.ndarray) -> np.ndarray:
    return np.array([(-1.0 if c & 8 else 1.0) * E2M1[c & 7] for c in codes.reshape(-1).tolist()]).reshape(
        codes.shape
    )


def pairs(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Two codes of 4 bits in a byte, along the last dimension."""
    first, second = codes[..., ::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return first << 4 | second if high_first else second << 4 | first


def words(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Codes in words of 32 bits along an axis, the first in the lowest bits."""
    per_word = 32 // bits
    turned = np.moveaxis(codes, axis, -1).astype(np.uint64)
    padded = np.zeros((*turned.shape[:-1], -(-turned.shape[-1] // per_word) * per_word), np.uint64)
    padded[..., : turned.shape[-1]] = turned
    groups = padded.reshape(*padded.shape[:-1], -1, per_word)
    packed = sum(
        (groups[..., i] << np.uint64(bits * i) for i in range(per_word)),
        np.zeros(groups.shape[:-1], np.uint64),
    )
    return torch.from_numpy(
        np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis))
    )


def spread(values: np.ndarray, rows: int, columns: int, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat each number for a block of rows and columns."""
    return np.repeat(np.repeat(values, rows, -2), columns, -1)[..., : shape[-2], : shape[-1]]


def fp8(dtype: torch.dtype, name: str, grid: Callable[[int, int], tuple[int, ...]], block: Callable[[int, int], tuple[int, int]], scale: torch.dtype = torch.float32, config: Mapping[str, Any] | None = None, **others: torch.Tensor):  # fmt: skip
    def make(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
        weight = torch.from_numpy(random.standard_normal((rows, columns))).to(dtype)
        scales = torch.from_numpy(random.uniform(0.01, 0.1, grid(rows, columns))).to(scale)
        as_grid = scales.double().numpy().reshape(-1 if scales.dim() else 1, *(scales.shape[1:] or (1,)))
        values = weight.double().numpy() * spread(as_grid, *block(rows, columns), (rows, columns))
        stored = {".weight": weight, name: scales, **{f".{k}": v for k, v in others.items()}}
        return QuantisedMatrix(stored, values, config or {})

    return make


def nvfp4(is_modelopt: bool):
    def make(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
        codes = random.integers(0, 16, (rows, columns))
        scales = torch.from_numpy(random.uniform(0.5, 400, (rows, columns // 16))).to(torch.float8_e4m3fn)
        factor = np.float32(random.uniform(1e-4, 1e-3) if is_modelopt else random.uniform(1000, 9000))
        by = (
            scales.double().numpy() * float(factor)
            if is_modelopt
            else scales.double().numpy() / float(factor)
        )
        packed = torch.from_numpy(pairs(codes))
        names = (".weight", ".weight_scale_2") if is_modelopt else (".weight_packed", ".weight_global_scale")
        stored = {
            names[0]: packed,
            ".weight_scale": scales,
            names[1]: torch.tensor(factor) if is_modelopt else torch.tensor([factor]),
            ".input_scale": torch.ones(1),
        }
        config = (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"}
            if is_modelopt
            else {"quant_method": "compressed-tensors"}
        )
        return QuantisedMatrix(stored, e2m1(codes) * spread(by, 1, 16, codes.shape), config)

    return make


def mxfp4_packed(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
    codes, powers = random.integers(0, 16, (rows, columns)), random.integers(110, 125, (rows, columns // 32))
    stored = {
        ".weight_packed": torch.from_numpy(pairs(codes)),
        ".weight_scale": torch.from_numpy(powers.astype(np.uint8)),
    }
    values = e2m1(codes) * spread(2.0 ** (powers - 127.0), 1, 32, codes.shape)
    return QuantisedMatrix(stored, values, {"quant_method": "compressed-tensors"})


def mxfp4_experts(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
    """Experts of gpt-oss: stored by outputs, meant as (experts, inputs, outputs)."""
    codes = random.integers(0, 16, (2, rows, columns // 32, 32))
    powers = random.integers(110, 125, (2, rows, columns // 32))
    stored = {
        "_blocks": torch.from_numpy(pairs(codes)),
        "_scales": torch.from_numpy(powers.astype(np.uint8)),
    }
    values = (e2m1(codes) * 2.0 ** (powers[..., None] - 127.0)).reshape(2, rows, columns)
    return QuantisedMatrix(stored, values.transpose(0, 2, 1), {"quant_method": "mxfp4"}, "")


def integers(bits: int, group: int, *, is_packed: bool = True, has_zeros: bool = False, has_order: bool = False, scale: torch.dtype = torch.bfloat16):  # fmt: skip
    """compressed-tensors' integers; ``group`` 0 means one scale a row."""

    def make(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
        size = group or columns
        half = 1 << bits - 1
        codes = random.integers(-half, half, (rows, columns))
        scales = torch.from_numpy(random.uniform(0.01, 0.1, (rows, columns // size))).to(scale)
        zeros = random.integers(-half, half, scales.shape) if has_zeros else np.zeros(scales.shape, np.int64)
        of_column = np.arange(columns) // size
        if has_order:
            of_column = random.permutation(of_column)
        values = (codes - zeros[:, of_column]) * scales.double().numpy()[:, of_column]
        stored: dict[str, torch.Tensor] = {".weight_scale": scales}
        if is_packed:
            stored[".weight_packed"] = words(codes + half, bits, 1)
            stored[".weight_shape"] = torch.tensor([rows, columns])
        else:
            stored[".weight"] = torch.from_numpy(codes.astype(np.int8))
        if has_zeros:
            stored[".weight_zero_point"] = (
                words(zeros + half, bits, 0) if is_packed else torch.from_numpy(zeros.astype(np.int8))
            )
        if has_order:
            stored[".weight_g_idx"] = torch.from_numpy(of_column.astype(np.int32))
        weights = {"num_bits": bits, "type": "int", "group_size": group or None}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        return QuantisedMatrix(stored, values, config)

    return make


def bitsandbytes(kind: str, *, is_nested: bool, block: int = 64):
    def make(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
        count = rows * columns
        codes = random.integers(0, 16, count + count % 2)
        table = np.array(NF4 if kind == "nf4" else [*BNB_FP4, *(-x for x in BNB_FP4)], np.float32)
        blocks = -(-count // block)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": [rows, columns],
        }
        stored = {
            ".weight": torch.from_numpy(pairs(codes, high_first=True).reshape(-1, 1)),
            ".weight.quant_map": torch.from_numpy(table),
        }
        if is_nested:
            map_of_codes = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            factors = random.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
            of_blocks = random.integers(0, 256, blocks)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
            absmax = (
                map_of_codes.astype(float)[of_blocks] * factors.astype(float)[np.arange(blocks) // 256] + 0.05
            )
            stored |= {
                ".weight.absmax": torch.from_numpy(of_blocks.astype(np.uint8)),
                ".weight.nested_absmax": torch.from_numpy(factors),
                ".weight.nested_quant_map": torch.from_numpy(map_of_codes),
            }
        else:
            absmax = random.uniform(0.01, 0.1, blocks).astype(np.float32).astype(float)
            stored[".weight.absmax"] = torch.from_numpy(absmax.astype(np.float32))
        text = json.dumps(state).encode()
        stored[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        values = table.astype(float)[codes[:count]] * np.repeat(absmax, block)[:count]
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        return QuantisedMatrix(stored, values.reshape(rows, columns), config)

    return make


def bitsandbytes_int8(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
    codes, limits = (
        random.integers(-127, 128, (rows, columns)),
        random.uniform(0.1, 3, rows).astype(np.float32),
    )
    stored = {
        ".weight": torch.from_numpy(codes.astype(np.int8)),
        ".SCB": torch.from_numpy(limits),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return QuantisedMatrix(stored, codes * limits.astype(float)[:, None] / 127, config)


def gptq(bits: int = 4, *, version: int = 1, has_order: bool = False, group: int = 32):
    def make(random: np.random.Generator, rows: int, columns: int) -> QuantisedMatrix:
        codes = random.integers(0, 1 << bits, (columns, rows))
        groups = -(-columns // group)
        scales = torch.from_numpy(random.uniform(0.01, 0.1, (groups, rows))).to(torch.float16)
        zeros = random.integers(1, 1 << bits, (groups, rows))
        of_input = np.arange(columns) // group
        if has_order:
            of_input = random.permutation(of_input)
        values = (codes - zeros[of_input]) * scales.double().numpy()[of_input]
        stored = {
            ".qweight": words(codes, bits, 0),
            ".qzeros": words(zeros - (1 if version == 1 else 0), bits, 1),
            ".scales": scales,
            ".g_idx": torch.from_numpy(of_input.astype(np.int32)),
        }
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": has_order}
        if version == 2:
            config["checkpoint_format"] = "gptq_v2"
        return QuantisedMatrix(stored, values.T, config)

    return make


def awq(random: np.random.Generator, rows: int, columns: int, group: int = 32) -> QuantisedMatrix:
    codes = random.integers(0, 16, (columns, rows))
    groups = columns // group
    scales = torch.from_numpy(random.uniform(0.01, 0.1, (groups, rows))).to(torch.float16)
    zeros = random.integers(0, 16, (groups, rows))

    def in_order(numbers: np.ndarray) -> np.ndarray:
        return numbers.reshape(len(numbers), -1, 8)[:, :, AWQ_ORDER].reshape(len(numbers), -1)

    of_input = np.arange(columns) // group
    values = (codes - zeros[of_input]) * scales.double().numpy()[of_input]
    stored = {
        ".qweight": words(in_order(codes), 4, 1),
        ".qzeros": words(in_order(zeros), 4, 1),
        ".scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return QuantisedMatrix(stored, values.T, config)


def one(*_: int) -> tuple[int, ...]:
    return ()


def whole(rows: int, columns: int) -> tuple[int, int]:
    return rows, columns


def by_row(rows: int, _: int) -> tuple[int, ...]:
    return rows, 1


def one_row(_: int, columns: int) -> tuple[int, int]:
    return 1, columns


def in_blocks(rows: int, columns: int) -> tuple[int, ...]:
    return -(-rows // 128), -(-columns // 128)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MARK = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

FORMATS: dict[str, Callable[[np.random.Generator, int, int], QuantisedMatrix]] = {
    "fp8 in blocks": fp8(E4M3, ".weight_scale_inv", in_blocks, lambda *_: (128, 128), config=BLOCKS),
    "fp8 in blocks, bf16 scales": fp8(E4M3, ".weight_scale_inv", in_blocks, lambda *_: (128, 128), torch.bfloat16, BLOCKS),
    "fp8 in blocks, powers of two": fp8(E4M3, ".weight_scale_inv", in_blocks, lambda *_: (128, 128), torch.float8_e8m0fnu, BLOCKS),
    "fp8 of transformers, one scale": fp8(E4M3, ".weight_scale_inv", one, whole, config={"quant_method": "fp8", "weight_block_size": None}, activation_scale=torch.tensor(1.0)),
    "fp8 of compressed-tensors, by row": fp8(E4M3, ".weight_scale", by_row, one_row, torch.bfloat16, COMPRESSED, input_scale=torch.ones(1)),
    "fp8 of compressed-tensors, one scale": fp8(E4M3, ".weight_scale", lambda *_: (1,), whole, torch.bfloat16, COMPRESSED),
    "fp8 of FBGEMM": fp8(E4M3, ".weight_scale", by_row, one_row, config={"quant_method": "fbgemm_fp8"}, input_scale_ub=torch.ones(1)),
    "fp8 of ModelOpt": fp8(E4M3, ".weight_scale", one, whole, config={"quant_method": "modelopt", "quant_algo": "FP8"}, input_scale=torch.tensor(1.0), k_scale=torch.tensor(1.0)),
    "fp8 of ComfyUI": fp8(E4M3, ".weight_scale", one, whole, input_scale=torch.tensor(1.0), comfy_quant=MARK),
    "fp8 of ComfyUI before": fp8(E5M2, ".scale_weight", one, whole, scale_input=torch.tensor(1.0)),
    "mxfp8": fp8(E4M3, ".weight_scale", lambda r, c: (r, c // 32), lambda *_: (1, 32), torch.float8_e8m0fnu),
    "nvfp4 of compressed-tensors": nvfp4(False),
    "nvfp4 of ModelOpt": nvfp4(True),
    "mxfp4 of compressed-tensors": mxfp4_packed,
    "mxfp4 of gpt-oss": mxfp4_experts,
    "int8 by row": integers(8, 0, is_packed=False),
    "int8 by row, with zero points": integers(8, 0, is_packed=False, has_zeros=True),
    "int8 packed": integers(8, 64),
    "int4 in groups": integers(4, 32),
    "int4 by row": integers(4, 0, scale=torch.float32),
    "int4 with zero points": integers(4, 32, has_zeros=True),
    "int4 with an order": integers(4, 32, has_order=True, has_zeros=True),
    "nf4": bitsandbytes("nf4", is_nested=False),
    "nf4 with double quantisation": bitsandbytes("nf4", is_nested=True),
    "fp4 of bitsandbytes": bitsandbytes("fp4", is_nested=False, block=128),
    "int8 of bitsandbytes": bitsandbytes_int8,
    "GPTQ": gptq(),
    "GPTQ version 2": gptq(version=2),
    "GPTQ with an order": gptq(has_order=True),
    "GPTQ in 8 bits": gptq(8),
    "AWQ": awq,
}  # fmt: skip
"""By a name for people: makes a random matrix of rows and columns, multiples of 32 and 64."""


def save_quantised(
    folder: Path, made: Mapping[str, QuantisedMatrix], others: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> Path:  # fmt: skip
    """Write a model of quantised matrices, by their names without ``.weight``, and of other tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"{stem}{end}": part for stem, one in made.items() for end, part in one.stored.items()}
    stored = {
        name: part.clone() for name, part in stored.items()
    }  # safetensors refuses tensors that share memory
    save_file({**stored, **others}, folder / "model.safetensors", {"format": "pt"})
    quantisation = next((dict(one.config) for one in made.values() if one.config), None)
    text = {
        "model_type": "net",
        **(config or {}),
        **({"quantization_config": quantisation} if quantisation else {}),
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def save_decoded(
    folder: Path, made: Mapping[str, QuantisedMatrix], others: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32, config: Mapping[str, Any] | None = None
) -> Path:  # fmt: skip
    """Write the same model with numbers in place of codes."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        f"{stem}{one.name}": torch.from_numpy(np.ascontiguousarray(one.values)).to(dtype)
        for stem, one in made.items()
    }
    save_file({**values, **others}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "net", **(config or {})}))
    return folder
