"""Task vectors made for tests: written with numpy, safetensors, json and hashlib, never by the code under test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from made import STORAGE, Tensors, decoded, encoded, save_file

PIECE = 4 << 20
GROUP = 128


def tensor_hash(dtype: str, shape: tuple[int, ...], raw: bytes) -> str:
    """xxh3-128 of a tensor: dtype, shape, and the hashes of pieces of 4 MiB."""
    state = xxhash.xxh3_128(f"{dtype}|{','.join(map(str, shape))}|".encode())
    for at in range(0, len(raw), PIECE):
        state.update(xxhash.xxh3_128(raw[at : at + PIECE]).digest())
    return state.hexdigest()


def hash_of(dtype: str, values: np.ndarray) -> str:
    return tensor_hash(dtype, values.shape, encoded(dtype, values))


def exact_values(dtype: str, values: np.ndarray) -> np.ndarray:
    """The values after rounding to the dtype, in float64 (integers as they are)."""
    stored = decoded(dtype, encoded(dtype, values)).reshape(values.shape)
    return stored.astype(np.float64) if np.issubdtype(stored.dtype, np.floating) else stored


Encoded = tuple[dict[str, tuple[str, str, np.ndarray]], dict[str, Any]]
"""Part -> (name in the file, dtype, values); and more keys of the entry."""


def encode(name: str, encoding: str, dtype: str, old: np.ndarray | None, new: np.ndarray) -> Encoded:
    """Encode a tensor as docs/task-vector-format.md says, in the simplest way."""
    if encoding == "absent":
        return {}, {}
    if encoding == "whole":
        return {"values": (name, dtype, new)}, {}
    assert old is not None
    if encoding == "sparse":
        before, after = (
            np.frombuffer(encoded(dtype, x), f"V{len(encoded(dtype, x)) // max(x.size, 1)}")
            for x in (old, new)
        )
        changed = np.flatnonzero(before != after)
        return {
            "indices": (f"{name}.indices", "I32", changed.astype(np.int32)),
            "values": (f"{name}.values", dtype, new.reshape(-1)[changed]),
        }, {}
    difference = exact_values(dtype, new) - exact_values(dtype, old)
    flat = difference.reshape(-1)
    if encoding.startswith("difference"):
        kind = encoding.partition(" ")[2] or "F32"
        scale = 0.5 if kind == "F16" else 1.0
        return {
            "values": (
                f"{name}.difference",
                kind,
                (difference / scale).astype(np.float32 if kind != "F64" else np.float64),
            )
        }, {"scale": scale}
    if encoding in ("low_rank", "low_rank stack"):
        rank = 2
        if encoding == "low_rank":
            u, s, v = np.linalg.svd(difference, full_matrices=False)
            module = name.removesuffix(".weight")
            left = (u[:, :rank] * s[:rank]).astype(np.float32)
            return {
                "left": (f"base_model.model.{module}.lora_B.weight", "F32", left),
                "right": (f"base_model.model.{module}.lora_A.weight", "F32", v[:rank].astype(np.float32)),
            }, {}
        stack = difference.reshape(difference.shape[0], difference.shape[1], -1)
        u, s, v = np.linalg.svd(stack, full_matrices=False)
        return {
            "left": (f"{name}.left", "F32", (u[..., :rank] * s[:, None, :rank]).astype(np.float32)),
            "right": (f"{name}.right", "F32", v[:, :rank].astype(np.float32)),
        }, {}
    if encoding == "top_k":
        kept = np.sort(np.argsort(-np.abs(flat))[: max(flat.size // 4, 1)])
        return {
            "indices": (f"{name}.top_k.indices", "I32", kept.astype(np.int32)),
            "values": (f"{name}.top_k.differences", "F16", flat[kept] / 0.25),
        }, {"scale": 0.25}
    if encoding in ("sign", "sign rows"):
        bits = np.packbits(flat >= 0, bitorder="little")
        mean = (
            np.abs(difference).mean()
            if encoding == "sign"
            else np.abs(difference).reshape(len(difference), -1).mean(1)
        )
        return {
            "bits": (f"{name}.signs", "U8", bits),
            "scales": (f"{name}.sign_scales", "F32", np.atleast_1d(mean)),
        }, {}
    assert encoding == "int4", encoding
    groups = [flat[i : i + GROUP] for i in range(0, flat.size, GROUP)]
    minimums = np.array([g.min() for g in groups], np.float32)
    scales = np.array([(g.max() - g.min()) / 15 or 1 for g in groups], np.float32)
    codes = np.concatenate(
        [np.clip(np.rint((g - m) / s), 0, 15) for g, m, s in zip(groups, minimums, scales, strict=True)]
    ).astype(np.uint8)
    codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return {
        "codes": (f"{name}.codes", "U8", codes[0::2] | codes[1::2] << 4),
        "scales": (f"{name}.scales", "F32", scales),
        "minimums": (f"{name}.minimums", "F32", minimums),
    }, {}


def decode(encoding: str, parts: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> np.ndarray:
    """The difference in float64, element by element, from the stored values of the parts (float64, or integers)."""
    shape, scale = tuple(entry["shape"]), entry.get("scale", 1.0)
    size = int(np.prod(shape))
    if encoding.startswith("difference"):
        return np.asarray(scale * parts["values"])
    if encoding.startswith("low_rank"):
        left, right = parts["left"], parts["right"]
        return np.asarray(scale * (left @ right)).reshape(shape)
    flat = np.zeros(size)
    if encoding == "top_k":
        for i, value in zip(parts["indices"], parts["values"], strict=True):
            flat[i] = scale * value
    elif encoding.startswith("sign"):
        scales = parts["scales"]
        for i in range(size):
            bit = int(parts["bits"][i // 8]) >> (i % 8) & 1
            row = i // (size // shape[0]) if len(scales) > 1 else 0
            flat[i] = (1 if bit else -1) * scales[row]
    else:
        assert encoding == "int4"
        for i in range(size):
            code = int(parts["codes"][i // 2]) >> 4 * (i % 2) & 15
            flat[i] = parts["minimums"][i // GROUP] + parts["scales"][i // GROUP] * code
    return flat.reshape(shape)


def write_vector(
    folder: Path,
    before: Tensors,
    after: Tensors,
    encodings: Mapping[str, str],
    *,
    name: str = "made",
    shards: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """Write a task vector of ``after`` on ``before``, each tensor in the given encoding; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    entries: dict[str, Any] = {}
    for number, (tensor, (dtype, new)) in enumerate(after.items()):
        encoding = encodings.get(tensor, "absent")
        old = before[tensor][1] if tensor in before else None
        parts, keys = encode(tensor, encoding, dtype, old, new)
        in_peft = encoding == "low_rank"
        shard = (
            f"taskvector-{number % shards + 1:05}-of-{shards:05}.safetensors"
            if shards > 1
            else "taskvector.safetensors"
        )
        if parts:
            held = files.setdefault("adapter_model.safetensors" if in_peft else shard, {})
            held |= {stored: (kind, values) for stored, kind, values in parts.values()}
        entries[tensor] = {
            "encoding": encoding.split()[0],
            "dtype": dtype,
            "shape": list(new.shape),
            **({"base": hash_of(before[tensor][0], before[tensor][1])} if tensor in before else {}),
            "finetuned": hash_of(dtype, new),
            "stored": {part: stored for part, (stored, _, _) in parts.items()},
            "digests": {part: hash_of(kind, values) for part, (_, kind, values) in parts.items()},
            **keys,
        }
    for file, tensors in files.items():
        save_file(folder / file, tensors)
    if "adapter_model.safetensors" in files:
        write_adapter_config(folder, files["adapter_model.safetensors"])
    if shards > 1:
        listed = {t: f for f, ts in files.items() if f.startswith("taskvector") for t in ts}
        (folder / "taskvector.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": listed})
        )
    return write_manifest(
        folder,
        {
            "format": "alnico task vector",
            "version": 1,
            "name": name,
            "base": {"id": "made/base"},
            "finetuned": {"id": "made/finetuned"},
            "tensors": entries,
            "kind": "difference",
            **more,
        },
    )


def write_adapter_config(folder: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    ranks = {
        n.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): v.shape[0]
        for n, (_, v) in tensors.items()
        if n.endswith(".lora_A.weight")
    }
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: r for n, r in ranks.items() if r != rank},
        "target_modules": sorted({n.rpartition(".")[2] for n in ranks}),
        "bias": "none",
        "base_model_name_or_path": "made/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write ``taskvector.json`` with the sizes and hashes of the other files."""
    paths = [
        p for p in sorted(folder.iterdir()) if p.name not in ("taskvector.json", "README.md", "model.sig")
    ]
    manifest["files"] = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in paths
    }
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    return manifest


def random_pair(
    rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", changed: float = 1.0
) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, tuple[str, np.ndarray]]]:
    """A base and a fine-tune; a share ``changed`` of the entries differs."""
    kind = STORAGE.get(dtype, np.float32)
    base = {n: (dtype, rng.standard_normal(s).astype(kind)) for n, s in shapes.items()}
    tuned = {}
    for name, (_, values) in base.items():
        moved = values + 0.1 * rng.standard_normal(values.shape)
        tuned[name] = (dtype, np.where(rng.random(values.shape) < changed, moved, values).astype(kind))
    return base, tuned
