"""Models of any size whose files hold headers and holes: no disk is used for their tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}

Shapes = Mapping[str, Sequence[int]]


def llama_405b() -> dict[str, tuple[int, ...]]:
    """The tensors of Llama 3.1 405B, as its repository on the hub lists them: 126 layers, 16,384 wide, 8 heads for keys and values."""
    return _llama(126, 16_384, 53_248)


def llama_70b() -> dict[str, tuple[int, ...]]:
    """The tensors of Llama 3.1 70B: 80 layers, 8,192 wide, 8 heads for keys and values."""
    return _llama(80, 8_192, 28_672)


def _llama(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    keys, vocabulary = 1_024, 128_256
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (keys, hidden),
            at + "self_attn.v_proj.weight": (keys, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def deepseek_671b() -> dict[str, tuple[int, ...]]:
    """The tensors of DeepSeek-V3 without its layer that predicts further tokens: 61 layers, 7,168 wide, 256 routed experts in 58 of
    them, compressed keys and values."""
    hidden, inner, dense, vocabulary = 7_168, 2_048, 18_432, 129_280
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(61):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_a_proj.weight": (1_536, hidden),
            at + "self_attn.q_a_layernorm.weight": (1_536,),
            at + "self_attn.q_b_proj.weight": (24_576, 1_536),
            at + "self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            at + "self_attn.kv_a_layernorm.weight": (512,),
            at + "self_attn.kv_b_proj.weight": (32_768, 512),
            at + "self_attn.o_proj.weight": (hidden, 16_384),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
        mlps = [("mlp.", dense)] if i < 3 else [(f"mlp.experts.{n}.", inner) for n in range(256)]
        if i >= 3:
            shapes |= {at + "mlp.gate.weight": (256, hidden), at + "mlp.gate.e_score_correction_bias": (256,)}
            mlps.append(("mlp.shared_experts.", inner))
        for name, width in mlps:
            shapes |= {
                f"{at}{name}gate_proj.weight": (width, hidden),
                f"{at}{name}up_proj.weight": (width, hidden),
                f"{at}{name}down_proj.weight": (hidden, width),
            }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


CONFIG_671B = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7_168, "intermediate_size": 18_432,
    "moe_intermediate_size": 2_048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "vocab_size": 129_280, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip

CONFIG_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8_192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip

CONFIG_405B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128_256, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def save_sparse(path: Path, shapes: Shapes, dtype: str) -> None:
    """A safetensors file of holes, which read as zeros."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def fill(path: Path, name: str, values: np.ndarray, at: int = 0) -> None:
    """Write values over the holes of a tensor, from its element ``at`` on."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(begin + at * values.itemsize)
        file.write(values.tobytes())


def save_sparse_model(
    folder: Path,
    shapes: Shapes,
    dtype: str = "BF16",
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A model directory of such files, with an index; tensors are dealt out in order, equally many a shard."""
    names = list(shapes)
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_sparse(folder / file, {n: shapes[n] for n in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder
