"""Malformed GGUF files, each with the check that refuses it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.open_model import open_model
from hostile.malformed import Malformed, Read, reading
from made_gguf import ARRAY, TEXT, Tensor, floats, gguf_bytes, small_keys, small_tensors, text


def made(
    keys: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None, **claims: Any
) -> Callable[[Path], Read]:
    """A small Llama with other keys or tensors (None leaves one out), whose config and tokenizer are asked for, too."""

    def make(folder: Path) -> Read:
        all_keys = {k: v for k, v in (small_keys() | (keys or {})).items() if v is not None}
        all_tensors = {k: v for k, v in (small_tensors() | (tensors or {})).items() if v is not None}
        (folder / "m.gguf").write_bytes(gguf_bytes(all_keys, all_tensors, **claims))
        read = reading(folder / "m.gguf")

        def whole() -> None:
            read()
            with open_model(folder / "m.gguf") as model:
                assert model.directory is not None

        return whole

    return make


def stacked(count: int) -> dict[str, Tensor | None]:
    dense = dict.fromkeys(f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down"))
    return {**dense, "blk.0.ffn_up_exps.weight": floats(count, 16, 8)}


def twice(folder: Path) -> Read:
    """Two tensors of one name, which a mapping cannot hold: one has another name until the file is made."""
    tensors = {n.replace("attn_k", "attn_z"): t for n, t in small_tensors().items()}
    data = gguf_bytes(small_keys(), tensors).replace(b"blk.0.attn_z.weight", b"blk.0.attn_q.weight")
    (folder / "m.gguf").write_bytes(data)
    return reading(folder / "m.gguf")


def key_twice(folder: Path) -> Read:
    data = gguf_bytes(small_keys() | {"general.namf": "x", "general.name": "y"}, small_tensors())
    (folder / "m.gguf").write_bytes(data.replace(b"general.namf", b"general.name"))
    return reading(folder / "m.gguf")


def several(folder: Path) -> Read:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(gguf_bytes(small_keys(), small_tensors()))
    return reading(folder)


def split(missing: bool, count: int = 2) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        names = list(small_tensors())
        for i, part in enumerate((names[:4], names[4:])):
            keys = (small_keys() if i == 0 else {}) | {"split.count": count}
            data = gguf_bytes(keys, {n: small_tensors()[n] for n in part})
            if i == 0 or not missing:
                (folder / f"m-0000{i + 1}-of-00002.gguf").write_bytes(data)
        return reading(folder / "m-00001-of-00002.gguf")

    return make


GGUF_FILES = (
    Malformed("is not UTF-8; expected text. The file is damaged", "is not UTF-8; expected text", made({"general.name": struct.pack("<I", TEXT) + text(b"\xff")})),
    Malformed("has a value of the type", "has a value of the type 13", made({"general.name": struct.pack("<I", 13)})),
    Malformed("is an array of the type", "is an array of the type 9", made({"general.name": struct.pack("<IIQ", ARRAY, ARRAY, 0)})),
    Malformed("are left; expected all of it", "are left; expected all of it", made({"general.name": struct.pack("<IQ", TEXT, 1 << 40)})),
    Malformed("which need more than the", "which need more than the", made(counts=(1 << 50, 15))),
    Malformed("the key {} is there twice", "the key 'general.name' is there twice", key_twice),
    Malformed("The file is not GGUF", "begins with b'NOPE'; expected b'GGUF'", made(magic=b"NOPE")),
    Malformed("is a big-endian GGUF file", "is a big-endian GGUF file", made(version=3 << 24)),
    Malformed("is GGUF of the version", "is GGUF of the version 1", made(version=1)),
    Malformed("expected a power of two up to", "general.alignment is 33", made({"general.alignment": 33})),
    Malformed("dimensions; expected at most {}. The file is damaged", "has 5 dimensions", made(tensors={"output.weight": (0, (1, 1, 1, 6, 8), floats(6, 8)[2])})),
    Malformed("has the type {}; known are", "has the type 4; known are", made(tensors={"output.weight": (4, (6, 8), bytes(192))})),
    Malformed("tensor {} is there twice", "tensor 'blk.0.attn_q.weight' is there twice", twice),
    Malformed("expected whole blocks of", "is Q8_0 with rows of 8 elements", made(tensors={"output.weight": (8, (8, 8), bytes(68))})),
    Malformed("neither overlap nor leave gaps", "neither overlap nor leave gaps", made(offsets={"blk.0.attn_norm.weight": 32})),
    Malformed("expected it whole. The file is truncated", "expected it whole", made(tensors={"output.weight": (0, (6, 8), bytes(8))})),
    Malformed("{} | {} | an integer from 0 to {}", "expected an integer from 0", made({"llama.block_count": None})),
    Malformed("{} | {} | a finite number", "expected a finite number", made({"llama.rope.freq_base": float("nan")})),
    Malformed("{} | {} | a text", "expected a text", made({"general.type": 7})),
    Malformed("{} | {} | true or false", "expected true or false", made({"tokenizer.ggml.add_bos_token": 1})),
    Malformed("{} | {} | an array of strings", "expected an array of strings", made({"tokenizer.ggml.tokens": "a"})),
    Malformed("{} | {} | an array of numbers", "expected an array of numbers", made({"tokenizer.ggml.scores": ["a"] * 6})),
    Malformed("of GGUF files the families", "is a model of the family 'falcon'", made({"general.architecture": "falcon"})),
    Malformed("both are {}; expected one", "both are model.layers.0.self_attn.q_proj.weight", made(tensors={"blk.00.attn_q.weight": floats(8, 8)})),
    Malformed("is unknown in the family", "tensor 'blk.0.attn_rel_b.weight' is unknown", made(tensors={"blk.0.attn_rel_b.weight": floats(8, 8)})),
    Malformed("expected layers below that", "is in layer 7, the model has 1", made(tensors={"blk.7.attn_q.weight": floats(8, 8)})),
    Malformed("experts; expected that many first", "the model has 2 experts", made({"llama.expert_count": 2, "llama.expert_used_count": 1}, stacked(3))),
    Malformed("rows, the model {} heads; expected an even number", "has 8 rows, the model 3 heads", made({"llama.attention.head_count": 3})),
    Malformed("tokens and {}; expected a row for each token", "an embedding of the shape (5, 8)", made(tensors={"token_embd.weight": floats(5, 8)})),
    Malformed("expected none, linear, yarn", "are scaled by 'unheard'", made({"llama.rope.scaling.type": "unheard"})),
    Malformed("expected factors that a config", "rope_freqs.weight has other factors", made(tensors={"rope_freqs.weight": floats(2)})),
    Malformed("tokens and {} values in {}", "has 6 tokens and 3 values", made({"tokenizer.ggml.scores": np.zeros(3, "<f4")})),
    Malformed("has a token of {} characters", "has a token of 2000 characters", made({"tokenizer.ggml.tokens": ["a" * 2000, "b", "c", "d", "e", "f"]})),
    Malformed("expected the id of one", "eos_token_id is 6, there are 6 tokens", made({"tokenizer.ggml.eos_token_id": 6})),
    Malformed("is not of two tokens that are a third", "the merge 'a z'", made({"tokenizer.ggml.merges": ["a z"]})),
    Malformed("expected a vector of F32", "is F16 (2,); expected a vector of F32", made(tensors={"rope_freqs.weight": (1, (2,), bytes(4))})),
    Malformed("is a GGUF file of the type", "is a GGUF file of the type 'adapter'", made({"general.type": "adapter"})),
    Malformed("holds no tensors; expected a model. It may be", "holds no tensors", made(tensors=dict.fromkeys(small_tensors()))),
    Malformed("GGUF models ({}); expected one", "has 2 GGUF models (a.gguf, b.gguf)", several),
    Malformed("files by its key split.count", "is of a model of 3 files", split(missing=False, count=3)),
    Malformed("of the others are missing, such as", "1 of the others are missing, such as m-00002-of-00002.gguf", split(missing=True)),
)  # fmt: skip
