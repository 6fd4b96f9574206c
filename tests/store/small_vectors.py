"""Writes small task vectors by hand, as the format's page says: without any code of the store."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from made_artifacts import digest as digest_of

BASE_HASH = "0" * 32


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of tensors: name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def write_vector(folder: Path, name: str = "sql", *, value: float = 1.0, **more: Any) -> Path:
    """Write a task vector of one tensor of two float32 numbers, all ``value``, which is stored whole."""
    folder.mkdir(parents=True)
    data = struct.pack("<2f", value, value)
    weights = safetensors_bytes({"w": ("F32", [2], data)})
    (folder / "taskvector.safetensors").write_bytes(weights)
    digest = digest_of(np.array([value, value], np.float32), "F32")
    manifest = {
        "format": "alnico task vector",
        "version": 1,
        "name": name,
        "base": {"id": "owner/base", "revision": "a" * 40, "root": "b" * 64, "licence": "apache-2.0"},
        "finetuned": {"id": f"owner/{name}"},
        "tensors": {
            "w": {
                "encoding": "whole",
                "dtype": "F32",
                "shape": [2],
                "base": BASE_HASH,
                "finetuned": digest,
                "stored": {"values": "w"},
                "digests": {"values": digest},
                "norm": 1.5,
                "byte_size": 8,
            }
        },
        "files": {
            "taskvector.safetensors": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        },
        **more,
    }
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    return folder
