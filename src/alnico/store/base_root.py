"""Computes the root hash of a base's weight files, by which a search finds its task vectors."""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from pathlib import Path

from alnico.checkpoint.open_model import open_headers
from alnico.store.check_files import sha256_of


def root_of(model: str | os.PathLike[str]) -> str:
    """Return the SHA-256 over the sorted lines ``SHA256  SIZE  NAME`` of a model's weight files, as manifests have it.

    All weights are read. Errors: ModelError.
    """
    path = Path(os.path.expanduser(model))
    with closing(open_headers(path)) as opened:
        files = sorted({shard.path for shard in opened.shards})
    folder = path if path.is_dir() else path.parent
    lines = sorted(f"{sha256_of(f)}  {f.stat().st_size}  {f.relative_to(folder).as_posix()}\n" for f in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
