"""Computes the root hash of a base's weight files, by which a search finds its task vectors."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from alnico.checkpoint.open_model import open_headers
from alnico.checkpoint.task_vectors.known_hashes import known_hashes
from alnico.store.file_hash import stored_file
from alnico.store.weight_hashes import root_of


def root_of_model(model: str | os.PathLike[str]) -> str:
    """Return the SHA-256 over the sorted lines ``SHA256  SIZE  NAME`` of a model's weight files, as manifests have it.

    All weights are read the first time; then the root is known until a file changes. Errors: ModelError.
    """
    with closing(open_headers(Path(os.path.expanduser(model)))) as opened:
        paths = {shard.name: shard.path for shard in opened.shards}

    def compute() -> str:
        return root_of({name: stored_file(path) for name, path in paths.items()}) or ""

    return known_hashes(paths.values()).get("sha256 root", compute)
