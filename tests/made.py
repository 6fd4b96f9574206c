"""Small models made for tests. Files are written by the safetensors package, never by the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

STORAGE = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}

Tensors = Mapping[str, tuple[str, np.ndarray]]
"""Name to (dtype, values); BF16 values are float32 and rounded here."""


def encoded(dtype: str, values: np.ndarray) -> bytes:
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values).astype(STORAGE[dtype]).tobytes()


def decoded(dtype: str, data: bytes) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, STORAGE[dtype])


def save_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffers = {
        name: np.frombuffer(encoded(dtype, values) or b"\0", np.uint8)
        for name, (dtype, values) in tensors.items()
    }
    specs = {
        name: TensorSpec(
            dtype=NAMES[dtype],
            shape=values.shape,
            data_ptr=buffers[name].ctypes.data,
            data_len=buffers[name].size if values.size else 0,
        )
        for name, (dtype, values) in tensors.items()
    }
    serialize_file(specs, str(path), metadata if metadata is not None else {"format": "pt"})
    return path


def save_model(
    directory: Path, tensors: Tensors, config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """Write a model directory; with ``shards`` > 1 the tensors are dealt out in order, with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(directory / file, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def llama_shapes(
    hidden: int = 16, layers: int = 2, vocabulary: int = 32, tied: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-shaped model with 4 heads, 2 of them for keys and values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (hidden // 2, hidden),
            at + "self_attn.v_proj.weight": (hidden // 2, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (3 * hidden, hidden),
            at + "mlp.up_proj.weight": (3 * hidden, hidden),
            at + "mlp.down_proj.weight": (hidden, 3 * hidden),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def llama_config(
    hidden: int = 16, layers: int = 2, vocabulary: int = 32, tied: bool = True, dtype: str = "bfloat16"
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def family(
    root: Path,
    count: int = 3,
    dtype: str = "BF16",
    shards: int = 1,
    seed: int = 0,
    size: float = 0.01,
    **shape: Any,
) -> tuple[Path, list[Path]]:
    """Write a Llama-shaped base and ``count`` fine-tunes of it; returns their directories."""
    random = np.random.default_rng(seed)
    shapes = llama_shapes(**shape)
    base = {
        n: (random.standard_normal(s) * 0.05 + (1.0 if "norm" in n else 0.0)).astype(np.float32)
        for n, s in shapes.items()
    }
    config = llama_config(**shape, dtype=NAMES[dtype])
    paths = []
    for i in range(count):
        tuned = {n: v + size * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
        paths.append(
            save_model(root / f"tuned-{i}", {n: (dtype, v) for n, v in tuned.items()}, config, shards)
        )
    return save_model(root / "base", {n: (dtype, v) for n, v in base.items()}, config, shards), paths


def read_file(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Read a safetensors file without alnico: name to (dtype, values), BF16 as float32."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = decoded(entry["dtype"], raw[8 + length + begin : 8 + length + end])
        found[name] = (entry["dtype"], values.reshape(entry["shape"]))
    return found


def read_model(directory: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a model directory (or file) without alnico."""
    files = [directory] if directory.is_file() else sorted(directory.glob("*.safetensors"))
    return {name: values for file in files for name, (_, values) in read_file(file).items()}


def model_bytes(directory: Path) -> dict[str, bytes]:
    """Every file of an output that bits must agree on: weights, index and lock."""
    return {
        p.name: p.read_bytes()
        for p in sorted(directory.iterdir())
        if p.suffix == ".safetensors" or p.name.endswith(".json")
    }
