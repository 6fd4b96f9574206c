"""Hashes a whole file by SHA-256, as manifests state it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.task_vectors.manifest import StoredFile
from alnico.errors import ModelError


def stored_file(path: Path) -> StoredFile:
    """Return the size and the hash of a file. Errors: ModelError."""
    try:
        with open_binary(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions, and `alnico store verify`."
        ) from None
    return StoredFile(size, sha256)
