"""Stored task vectors: the manifest and the headers of the files, on a base of zeros; and the schema beside the reader."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.task_vectors import equipped_model, stored_vector
from alnico.checkpoint.task_vectors.known_hashes import KnownHashes
from alnico.checkpoint.task_vectors.manifest import PARTS, format_manifest, parse_manifest
from alnico.errors import AlnicoError
from fuzz.harness import Target, files_of, header_of, put, put_header
from made_vectors import tensor_hash

MANIFEST, TENSORS, FACTORS, CONFIG = "taskvector.json", "taskvector.safetensors", "adapter_model.safetensors", "adapter_config.json"  # fmt: skip
NAMES = (MANIFEST, TENSORS, FACTORS, CONFIG, "taskvector.safetensors.index.json", "README.md")
WIDTHS = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}
SHAPE = (4, 6)
BASE = dict.fromkeys(PARTS, ("BF16", SHAPE))
STORED = {
    "sparse": {"indices": ("I32", (1,)), "values": ("BF16", (1,))},
    "whole": {"values": ("BF16", SHAPE)},
    "difference": {"values": ("F32", SHAPE)},
    "low_rank": {"left": ("F32", (4, 2)), "right": ("F32", (2, 6))},
    "top_k": {"indices": ("I64", (1,)), "values": ("F32", (1,))},
    "sign": {"bits": ("U8", (3,)), "scales": ("F32", (4,))},
    "int4": {"codes": ("U8", (12,)), "scales": ("F32", (1,)), "minimums": ("F32", (1,))},
}


def zeros_hash(dtype: str, shape: tuple[int, ...]) -> str:
    size = WIDTHS[dtype]
    for n in shape:
        size *= n
    return tensor_hash(dtype, shape, bytes(size))


def prepare(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "vector").mkdir()
    put_header(folder / "base" / "model.safetensors", header_of(BASE, WIDTHS))
    (folder / "base" / "config.json").write_text('{"model_type": "llama", "vocab_size": 4}')


def read(data: bytes, folder: Path) -> None:
    with ExitStack() as patches:
        for reader in (equipped_model, stored_vector):  # alnico's cache of hashes is not what is fuzzed
            patches.enter_context(mock.patch.object(reader, "known_hashes", return_value=KnownHashes()))
        read_vector(data, folder)


def read_vector(data: bytes, folder: Path) -> None:
    files = files_of(data)
    vector = folder / "vector"
    put(vector, {n: v for n, v in files.items() if n != MANIFEST}, NAMES)
    manifest = files.get(MANIFEST)
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        for name, entry in manifest["files"].items():  # sizes that are right lead deeper
            if (
                isinstance(entry, dict)
                and entry.get("size") == 0
                and name in NAMES
                and (vector / name).is_file()
            ):
                entry["size"] = (vector / name).stat().st_size
    if manifest is not None:
        (vector / MANIFEST).write_text(
            manifest if isinstance(manifest, str) else json.dumps(manifest), "utf-8", "replace"
        )
    if isinstance(manifest, dict):
        try:
            parsed = parse_manifest(manifest, "here")
            assert parse_manifest(json.loads(format_manifest(parsed)), "here") == parsed
        except AlnicoError:
            pass
    for weight in ("", "0.5*"):
        with open_model(f"{folder / 'base'}+{weight}{vector}") as model:
            for name in model.tensors:
                try:
                    model.read(name)
                except AlnicoError:
                    continue
            assert isinstance(dict(model.config), dict)
            lineage_of(model)
            model.identity()


def seeds() -> list[bytes]:
    tensors = {f"{e}.{p}": kind for e, parts in STORED.items() for p, kind in parts.items()}
    entries = {
        e: {
            "encoding": e, "dtype": "BF16", "shape": list(SHAPE), "base": zeros_hash("BF16", SHAPE),
            "stored": {p: f"{e}.{p}" for p in parts}, "digests": {p: zeros_hash(*kind) for p, kind in parts.items()},
        }
        for e, parts in {"absent": {}, **STORED}.items()
    }  # fmt: skip
    whole = {
        "format": "alnico task vector", "version": 1, "name": "x", "base": {"id": "a/b", "licence": "mit"}, "finetuned": {}, "tensors": entries,
        "files": {TENSORS: {"size": 0, "sha256": "0" * 64}}, "scale": {"suggested": 0.5}, "added_tokens": {"<x>": 4}, "left_out": {"r": "why"}, "tasks": ["sql"],
        "evaluations": [{"task": "t", "metric": "m", "value": 1.0}], "licence": "mit",
    }  # fmt: skip
    one = {e: {**whole, "tensors": {e: entries[e]}} for e in STORED}
    headers = {
        e: header_of({n: k for n, k in tensors.items() if n.startswith(f"{e}.")}, WIDTHS) for e in STORED
    }
    adapter = {
        "base_model.model.adapter.lora_A.weight": ("F32", (2, 6)),
        "base_model.model.adapter.lora_B.weight": ("F32", (4, 2)),
    }
    of_adapter = {
        **whole, "kind": "adapter", "files": {FACTORS: {"size": 0, "sha256": "0" * 64}, CONFIG: {"size": 0, "sha256": "0" * 64}},
        "tensors": {"adapter": {"encoding": "adapter", "dtype": "BF16", "shape": list(SHAPE)}},
    }  # fmt: skip
    inputs = [
        {MANIFEST: whole, TENSORS: header_of(tensors, WIDTHS)},
        *({MANIFEST: one[e], TENSORS: headers[e]} for e in STORED),
        {MANIFEST: of_adapter, FACTORS: header_of(adapter, WIDTHS), CONFIG: {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["adapter"]}},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    *NAMES, *PARTS, "format", "version", "tensors", "files", "size", "sha256", "encoding", "dtype", "shape", "base", "finetuned", "stored", "digests", "indices",
    "values", "left", "right", "bits", "scales", "codes", "minimums", "scale", "error", "norm", "sketch", "kind", "..", "a/../b", "BF16", "I64", "data_offsets",
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
