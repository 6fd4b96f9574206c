"""GGUF files made for tests: byte by byte from the format's description, and of transformers' models by the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INTEGER, FLOAT, FLAG, TEXT, ARRAY = 4, 6, 7, 8, 9
CODES = {np.dtype("<i4"): 5, np.dtype("<f4"): 6}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(given: Any) -> bytes:
    """A value with its type before it; bytes are taken as they are."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, bool):
        return struct.pack("<I?", FLAG, given)
    if isinstance(given, int):
        return struct.pack("<II", INTEGER, given)
    if isinstance(given, float):
        return struct.pack("<If", FLOAT, given)
    if isinstance(given, str):
        return struct.pack("<I", TEXT) + text(given)
    if isinstance(given, np.ndarray):
        return struct.pack("<IIQ", ARRAY, CODES[given.dtype], given.size) + given.tobytes()
    return struct.pack("<IIQ", ARRAY, TEXT, len(given)) + b"".join(text(v) for v in given)


Tensor = tuple[int, Sequence[int], bytes]
"""The code of a type, the shape with the last dimension last, and the bytes."""


def gguf_bytes(
    keys: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    version: int = 3,
    offsets: Mapping[str, int] | None = None,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A whole file. ``offsets`` and ``counts`` (of tensors and of keys) are claimed in place of the true ones."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    head += b"".join(text(key) + value(given) for key, given in keys.items())
    data = b""
    for name, (code, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        offset = (offsets or {}).get(name, len(data))
        sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", code, offset)
        data += content
    return head + bytes(-len(head) % alignment) + data


def floats(*shape: int, seed: int = 0) -> Tensor:
    """A tensor of F32."""
    values = np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    return 0, shape, values.tobytes()


def small_keys(**changes: Any) -> dict[str, Any]:
    """The keys of a Llama of one layer, hidden size 8, 2 heads and 6 tokens; a change to None leaves a key out."""
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"],
        "tokenizer.ggml.scores": np.array([0, 0, 0, -1, -2, -3], "<f4"),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1], "<i4"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    keys |= {key.replace("__", "."): given for key, given in changes.items()}
    return {key: given for key, given in keys.items() if given is not None}


def small_tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """The tensors of that Llama, tied; a change to None leaves one out."""
    at = "blk.0."
    tensors: dict[str, Tensor | None] = {
        "token_embd.weight": floats(6, 8, seed=1),
        f"{at}attn_norm.weight": floats(8, seed=2),
        f"{at}attn_q.weight": floats(8, 8, seed=3),
        f"{at}attn_k.weight": floats(4, 8, seed=4),
        f"{at}attn_v.weight": floats(4, 8, seed=5),
        f"{at}attn_output.weight": floats(8, 8, seed=6),
        f"{at}ffn_norm.weight": floats(8, seed=7),
        f"{at}ffn_gate.weight": floats(16, 8, seed=8),
        f"{at}ffn_up.weight": floats(16, 8, seed=9),
        f"{at}ffn_down.weight": floats(8, 16, seed=10),
        "output_norm.weight": floats(8, seed=11),
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def save_small(path: Path, **changes: Any) -> Path:
    """Write that Llama; keys of ``gguf_bytes`` may be among the changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(small_keys(), small_tensors(), **changes))
    return path


# Models of transformers, written by the gguf package.


def reordered(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp's converter writes them: within a head, the rows of the two halves in turns."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of a module of transformers as llama.cpp's converter names and changes them, float32.

    Names are those of the gguf package's own table.
    """
    import gguf

    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    tensors = {}
    for name, values in _experts_apart(state).items():
        stem, _, kind = name.rpartition(".")
        found = names.get_name(stem)
        assert found is not None, name
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = reordered(values, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if stem.endswith("shared_expert_gate"):
            values = values.reshape(-1)
        tensors[f"{found}.{kind}"] = values
    return tensors


def _experts_apart(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divide packed gate and up projections: the gate is the first half of the rows of each expert."""
    apart = {}
    for name, values in state.items():
        if name.endswith("experts.gate_up_proj"):
            half = values.shape[1] // 2
            stem = name.removesuffix("gate_up_proj")
            apart[f"{stem}gate_proj.weight"], apart[f"{stem}up_proj.weight"] = (
                values[:, :half],
                values[:, half:],
            )
        elif name.endswith("experts.down_proj"):
            apart[f"{name}.weight"] = values
        else:
            apart[name] = values
    return apart


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    keys: Mapping[str, Any],
    kind: str = "F32",
) -> Path:
    """Write tensors by the gguf package: matrices as ``kind``, vectors as F32."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, given in keys.items():
        if isinstance(given, bool):
            writer.add_bool(key, given)
        elif isinstance(given, int):
            writer.add_uint32(key, given)
        elif isinstance(given, float):
            writer.add_float32(key, given)
        elif isinstance(given, str):
            writer.add_string(key, given)
        else:
            writer.add_array(key, given)
    for name, values in tensors.items():
        code = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[code][0]:
            code = gguf.GGMLQuantizationType.F16
        data = np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values), code))
        writer.add_tensor(name, data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
