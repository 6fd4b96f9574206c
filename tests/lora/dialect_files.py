"""Made LoRA files without a config, and what they add, in float64 from the formulas of LyCORIS and kohya."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import made

Factors = dict[str, np.ndarray]


def random_factors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Factors:
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}


def lora(
    shape: tuple[int, ...], rank: int, seed: int, alpha: float | None = None, words: str = "kohya"
) -> Factors:
    """Factors of a plain LoRA for a weight of a shape, by the endings of their names."""
    up, down = {
        "kohya": (".lora_up.weight", ".lora_down.weight"),
        "peft": (".lora_B.weight", ".lora_A.weight"),
        "plain": (".lora.up.weight", ".lora.down.weight"),
        "processor": ("_lora.up.weight", "_lora.down.weight"),
        "linear": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    }[words]
    ones = (1,) * (len(shape) - 2)
    made_here = random_factors({down: (rank, *shape[1:]), up: (shape[0], rank, *ones)}, seed)
    return made_here | ({} if alpha is None else {".alpha": np.float32(alpha)})


def added(factors: Factors) -> np.ndarray:
    """What factors add, in float64 and flattened to (outputs, inputs times kernel)."""
    f = {name: values.astype(np.float64) for name, values in factors.items()}
    alpha = f.get(".alpha")
    if ".diff" in f:
        return f[".diff"].reshape(len(f[".diff"]), -1)
    if ".hada_w1_a" in f:
        rank = f[".hada_w1_b"].shape[0]
        halves = [
            tucker(f[f".hada_t{i}"], f[f".hada_w{i}_a"].T, f[f".hada_w{i}_b"])
            if f".hada_t{i}" in f
            else f[f".hada_w{i}_a"] @ f[f".hada_w{i}_b"]
            for i in (1, 2)
        ]
        return (halves[0] * halves[1]) * (1 if alpha is None else alpha / rank)
    if any(name.startswith(".lokr") for name in f):
        rank = next((f[n].shape[0] for n in (".lokr_w2_b", ".lokr_w1_b") if n in f), None)
        w1 = f[".lokr_w1"] if ".lokr_w1" in f else f[".lokr_w1_a"] @ f[".lokr_w1_b"]
        if ".lokr_w2" in f:
            w2 = f[".lokr_w2"].reshape(len(f[".lokr_w2"]), -1)
        elif ".lokr_t2" in f:
            w2 = tucker(f[".lokr_t2"], f[".lokr_w2_a"].T, f[".lokr_w2_b"])
        else:
            w2 = f[".lokr_w2_a"] @ f[".lokr_w2_b"]
        return np.kron(w1, w2) * (1 if alpha is None or rank is None else alpha / rank)
    up = next(
        v
        for n, v in f.items()
        if n.endswith((".lora_up.weight", "lora_B.weight", "lora.up.weight", "layer.up.weight"))
    )
    down = next(
        v
        for n, v in f.items()
        if n.endswith((".lora_down.weight", "lora_A.weight", "lora.down.weight", "layer.down.weight"))
    )
    scale = 1 if alpha is None else alpha / down.shape[0]
    if ".lora_mid.weight" in f:
        return tucker(f[".lora_mid.weight"], up.reshape(len(up), -1), down.reshape(len(down), -1)) * scale
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1) * scale


def tucker(core: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``sum over p and q of left[o, p] core[p, q, kernel] right[q, i]``, flattened."""
    product = np.einsum("op,pqhw,qi->oihw", left, core, right)
    return product.reshape(len(product), -1)


def with_dora(weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """``m (W + D) / |W + D|``, with norms of each output, or of each input where the magnitude is a row."""
    whole = weight.astype(np.float64) + change.reshape(weight.shape)
    axes = tuple(range(1, whole.ndim)) if magnitude.shape[0] > 1 else (0, *range(2, whole.ndim))
    norms = np.sqrt((whole**2).sum(axes, keepdims=True))
    return whole * (magnitude.astype(np.float64).reshape(norms.shape) / norms)


def file_of(path: Path, modules: Mapping[str, Factors], dtype: str = "F32", **metadata: str) -> Path:
    """Save a file of modules, each with its factors by the endings of their names."""
    tensors: dict[str, Any] = {
        module + ending: (dtype if np.ndim(values) else "F32", np.asarray(values))
        for module, factors in modules.items()
        for ending, values in factors.items()
    }
    return made.save_file(path, tensors, {"format": "pt", **metadata})


UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (8,),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (48, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight": (8,),
    "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
    "mid_block.attentions.0.proj_in.weight": (8, 8, 1, 1),
    "up_blocks.1.attentions.2.proj_out.weight": (8, 8, 1, 1),
    "up_blocks.1.upsamplers.0.conv.weight": (8, 8, 3, 3),
}
"""Some tensors of a small U-Net, as diffusers names them."""


def unet(folder: Path, seed: int = 1) -> dict[str, np.ndarray]:
    """Save the tensors of a small U-Net in a folder, and return them."""
    random = np.random.default_rng(seed)
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in UNET.items()}
    made.save_file(folder / "diffusion_pytorch_model.safetensors", {n: ("F32", v) for n, v in values.items()})
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    return values


def near(found: np.ndarray, expected: np.ndarray, share: float = 1e-6) -> bool:
    """Equal to a share of the largest entry?"""
    largest = float(np.abs(expected).max())
    return math.isfinite(largest) and float(np.abs(found - expected).max()) <= share * largest
