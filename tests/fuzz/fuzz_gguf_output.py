"""A model's config, tokenizer and tensors that become a GGUF file, which its own reader reads again."""

from __future__ import annotations

import json
from pathlib import Path

import alnico
from alnico.checkpoint.gguf.file_header import read_header
from fuzz.harness import Target, files_of, header_of, put, put_header
from made import llama_config, llama_shapes
from made_tokenizers import entry, letters

NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
HIDDEN, ROWS = 8, 16
HEADER = header_of(
    {name: ("F32", shape) for name, shape in llama_shapes(HIDDEN, 1, ROWS).items()}, {"F32": 4}
)
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def read(data: bytes, folder: Path) -> None:
    files = files_of(data)
    place = folder / "m"
    place.mkdir(exist_ok=True)
    put(place, files, NAMES)
    if "model.safetensors" not in files:
        put_header(place / "model.safetensors", HEADER)
    dtype = files.get("dtype")
    recipe = {"merge_method": "passthrough", "models": [str(place)]}
    plan = alnico.plan(recipe | ({"dtype": dtype} if dtype in DTYPES else {}), single_file="out.gguf")
    for source in plan.sources:
        source.close()
    (shard,) = plan.shards
    start = shard.start
    header = read_header(
        lambda offset, count: start[offset : offset + count].ljust(count, b"\0"), shard.byte_size, "out"
    )
    assert header.metadata["general.architecture"]
    assert max(tensor.end for tensor in header.tensors) == shard.byte_size


def seeds() -> list[bytes]:
    vocabulary, model = letters("hgfedcba ", ("ab", "ef"))
    added = [entry(token, i) for i, token in enumerate(("<unk>", "<s>", "</s>"))]
    kind = {"type": "BPE", "vocab": vocabulary, **model}
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    bytes_first = {"type": "ByteLevel", "add_prefix_space": False}
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
    }
    tokenizers = [
        {"model": kind, "added_tokens": added, "pre_tokenizer": bytes_first, "post_processor": post},
        {"model": kind, "added_tokens": added, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_first]}},
        {"model": {**kind, "byte_fallback": True}, "added_tokens": added, "normalizer": {"type": "Prepend", "prepend": "_"}, "pre_tokenizer": {"type": "Metaspace"}},
    ]  # fmt: skip
    config = llama_config(HIDDEN, 1, ROWS)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    configs = [
        config,
        {**config, "model_type": "mistral", "sliding_window": 64, "head_dim": 2},
        {**config, "rope_scaling": llama3},
        {**config, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        {
            **config,
            "model_type": "qwen3_moe",
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 4,
        },
    ]
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    inputs: list[dict[str, object]] = [
        {"config.json": c, "tokenizer.json": tokenizers[i % len(tokenizers)], "tokenizer_config.json": settings, "dtype": DTYPES[i % len(DTYPES)]}
        for i, c in enumerate(configs)
    ]  # fmt: skip
    inputs.append({"config.json": config, "tokenizer.json": tokenizers[0], "model.safetensors": HEADER})
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    *NAMES, *DTYPES, "dtype", "model_type", "llama", "mistral", "qwen2", "qwen3_moe", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rope_theta", "rope_scaling", "rope_parameters", "rope_type", "linear", "yarn", "llama3", "default", "factor", "sliding_window", "merges", "vocab", "BPE",
    "byte_fallback", "pre_tokenizer", "ByteLevel", "Split", "Digits", "Sequence", "pretokenizers", "I64", "F64", "BF16",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS)
