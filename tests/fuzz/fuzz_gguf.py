"""A GGUF file: its header, and the names, config and tokenizer that follow from it."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from alnico.checkpoint.gguf.block_types import BLOCK_TYPES
from alnico.checkpoint.gguf.file_header import read_header
from alnico.checkpoint.gguf.metadata import Metadata
from alnico.checkpoint.gguf.open_gguf import open_gguf
from alnico.checkpoint.gguf.tokenizer_files import tokenizer_files
from fuzz.harness import Target
from made_gguf import floats, gguf_bytes, small_keys, small_tensors

FILE = "m.gguf"
MOST_READ = 1 << 16
"""Most bytes of a tensor that are read: decoded blocks are larger than their file."""


def read(data: bytes, folder: Path) -> None:
    (folder / FILE).write_bytes(data)
    header = read_header(lambda offset, count: data[offset : offset + count], len(data), FILE)
    assert all(0 <= t.begin <= t.end <= len(data) for t in header.tensors)
    with open_gguf(FILE, folder / FILE) as model:
        for name, tensor in model.tensors.items():
            part = bytearray(min(tensor.byte_size, MOST_READ))
            model.read_into(name, tensor.byte_size - len(part), memoryview(part))
        assert model.config["model_type"]
        tokenizer_files(Metadata(header.metadata, FILE))


def seeds() -> list[bytes]:
    byte_level = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>", "c"], "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "general.license": "mit"}
    experts = {"llama.expert_count": 2, "llama.expert_used_count": 1}
    wide = {f"blk.0.attn_{t.name.lower()}": t for t in BLOCK_TYPES.values() if t.elements == 256}
    blocks = {
        f"blk.0.ffn_up.{i}.weight": (t.code, (1, 256), bytes(range(t.byte_size % 256)) + bytes(t.byte_size - t.byte_size % 256))
        for i, t in enumerate(wide.values())
    }  # fmt: skip
    return [
        gguf_bytes(small_keys(), small_tensors()),
        gguf_bytes(small_keys() | byte_level, small_tensors(), version=2),
        gguf_bytes(small_keys() | scaled, small_tensors() | {"output.weight": floats(6, 8)}),
        gguf_bytes(
            small_keys() | experts,
            {n: t for n, t in small_tensors().items() if "ffn" not in n}
            | {"blk.0.ffn_gate_exps.weight": floats(2, 4, 8)}
            | blocks,
        ),
        gguf_bytes({"general.alignment": 64, **small_keys()}, small_tensors(), alignment=64),
    ]


def mutate(data: bytes, draw: random.Random, words: Sequence[str]) -> bytes | None:
    """Change numbers and words where they stand, so that the file keeps its form."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(max(len(changed) - 8, 1))
        kind = draw.randrange(4)
        if kind == 0:
            number = draw.choice(
                (0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
            )
            changed[at : at + 8] = struct.pack("<Q", number)
        elif kind == 1:
            changed[at : at + 4] = struct.pack("<I", draw.choice((0, 3, 8, 9, 12, 13, 30, 32, 1 << 31)))
        elif kind == 2:
            word = draw.choice(list(words)).encode()
            changed[at : at + len(word)] = word
        else:
            changed[at] = draw.randrange(256)
    return bytes(changed)


WORDS = (
    "llama", "qwen2", "qwen2moe", "gemma2", "phi3", "falcon", "general.type", "adapter", "yarn", "linear", "gpt2", "none",
    "blk.0.attn_k.weight", "blk.1.attn_q.weight", "blk.0.ffn_up_exps.weight", "rope_freqs.weight", "output.weight", "tokenizer.ggml.merges",
    "llama.attention.head_count", "llama.block_count", "general.alignment", "split.count",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, mutate=mutate)
