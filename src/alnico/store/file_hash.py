"""Hashes a whole file by SHA-256, as manifests state it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.task_vectors.manifest import StoredFile
from alnico.errors import ModelError

HASHED_BYTES = 4 << 20


def stored_file(path: Path) -> StoredFile:
    """Return the size and the hash of a file. Errors: ModelError."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_binary(path) as file:
            while data := file.read(HASHED_BYTES):
                digest.update(data)
                size += len(data)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions, and `alnico store verify`."
        ) from None
    return StoredFile(size, digest.hexdigest())
