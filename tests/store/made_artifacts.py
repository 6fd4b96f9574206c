"""Small finished task vectors for tests of stores, written by numpy and safetensors alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

from alnico.store.entry import Entry, entry_of


def digest(values: np.ndarray, dtype: str) -> str:
    """The hash of a tensor of at most 4 MiB, as docs/design.md says."""
    state = xxhash.xxh3_128(f"{dtype}|{','.join(map(str, values.shape))}|".encode())
    state.update(xxhash.xxh3_128_digest(values.tobytes()))
    return state.hexdigest()


def make_artifact(folder: Path, name: str = "sql", seed: int = 0, size: int = 4096, **more: Any) -> Path:
    """Write a folder with ``taskvector.json`` and one file of tensors: a sparse change of one tensor."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    base = random.standard_normal(size).astype(np.float32)
    indices = np.sort(random.choice(size, size // 8, replace=False)).astype(np.int32)
    finetuned = base.copy()
    finetuned[indices] += 1
    save_file({"w.indices": indices, "w.values": finetuned[indices]}, folder / "taskvector.safetensors")
    data = (folder / "taskvector.safetensors").read_bytes()
    entry = {
        "encoding": "sparse",
        "dtype": "F32",
        "shape": [size],
        "base": digest(base, "F32"),
        "finetuned": digest(finetuned, "F32"),
        "stored": {"indices": "w.indices", "values": "w.values"},
        "digests": {"indices": digest(indices, "I32"), "values": digest(finetuned[indices], "F32")},
        "error": 0.0,
        "norm": float(np.linalg.norm((finetuned - base).astype(np.float64))),
        "byte_size": indices.nbytes * 2,
    }
    manifest = {
        "format": "alnico task vector",
        "version": 1,
        "name": name,
        "base": {"id": "org/base", "revision": "a" * 40},
        "finetuned": {},
        "tensors": {"w": entry},
        "files": {"taskvector.safetensors": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        "kind": "difference",
        **more,
    }
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    return folder


def made_entry(folder: Path, version: int = 1) -> Entry:
    return entry_of(folder, version)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
