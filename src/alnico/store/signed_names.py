"""Finds files that travel with a task vector beside those of its manifest: a signature, and what it covers."""

from __future__ import annotations

import base64
import json
from collections.abc import Container, Sequence
from pathlib import Path

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.task_vectors.manifest import is_file_name
from alnico.errors import ModelError

MAX_BESIDE_BYTES = 10_000_000
"""Size of the largest of these files that is pushed or pulled."""
MOST_BESIDE = 100


def files_beside(folder: Path, listed: Container[str]) -> list[str]:
    """Return the names of a folder's signature and of what it covers besides the ``listed`` files of the manifest."""
    return [
        name
        for name in dict.fromkeys([SIGNATURE, *signed_names(folder)])
        if is_beside(name, listed)
        and (folder / name).is_file()
        and (folder / name).stat().st_size <= MAX_BESIDE_BYTES
    ]


def is_beside(name: str, listed: Container[str]) -> bool:
    """Is it the plain name of a file that is neither the manifest nor ``listed`` in it?"""
    return is_file_name(name) and name not in listed


def signed_names(folder: Path) -> Sequence[str]:
    """Return the names of the files that a folder's signature covers; none without one that can be read."""
    try:
        if not (folder / SIGNATURE).is_file():
            return ()
        payload = json.loads(base64.b64decode(read_json(folder / SIGNATURE)["dsseEnvelope"]["payload"]))
        return [str(one["name"]) for one in payload["predicate"]["resources"]][:MOST_BESIDE]
    except (ModelError, KeyError, TypeError, ValueError, RecursionError, AttributeError):
        return ()
