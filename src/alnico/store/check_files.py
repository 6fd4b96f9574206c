"""Checks the files of a stored task vector against its manifest, by size and SHA-256."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from alnico.checkpoint.durable import copy_file
from alnico.checkpoint.lineage import CARD, LICENCE_FILE
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.task_vectors.manifest import MANIFEST, Manifest
from alnico.errors import ModelError, ResourceError, RunError, VerificationError
from alnico.numerics.sizes import format_size
from alnico.store.file_hash import stored_file

UNLISTED = (MANIFEST, CARD, SIGNATURE)
"""Files of a task vector that its manifest does not list; a licence is another."""


def is_unlisted(name: str) -> bool:
    """May a file lie in the folder of a task vector without being in its manifest?"""
    return name in UNLISTED or LICENCE_FILE.fullmatch(name) is not None


def file_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the files of a task vector: missing, of another size or content, or unlisted."""
    advice = "Do not use it; get the task vector again."
    try:
        found = {name: os.lstat(folder / name) for name in os.listdir(folder)}
    except OSError as error:
        yield f"{folder}: cannot be read ({error.strerror}). Check its permissions."
        return
    for name in sorted(n for n in found if n not in manifest.files and not is_unlisted(n)):
        yield f"{folder / name}: is not in the manifest; expected only the files that it lists. {advice}"
    for name, file in manifest.files.items():
        if name not in found:
            yield f"{folder / name}: is missing; the manifest lists it. {advice}"
        elif found[name].st_size != file.size:
            yield f"{folder / name}: has {found[name].st_size} bytes; the manifest says {file.size}. {advice}"
        else:
            try:
                sha256 = stored_file(folder / name).sha256
            except ModelError as error:
                yield str(error)
                continue
            if sha256 != file.sha256:
                yield f"{folder / name}: has the SHA-256 {sha256}; the manifest says {file.sha256}. {advice}"


def copy_vector(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy a task vector into a new folder and check the copy against the manifest.

    The card, the signature and a licence are copied, too. Errors: VerificationError for files that are not what the manifest says; ResourceError, before anything is written, where the disk
    has no room; RunError.
    """
    names = os.listdir(source)
    if unlisted := sorted(n for n in names if n not in manifest.files and not is_unlisted(n)):
        raise VerificationError(
            f"{source / unlisted[0]}: is not in the manifest; expected only the files that it lists. Remove it, or get the task vector "
            "again."
        )
    try:
        sizes = {
            name: os.stat(source / name).st_size for name in manifest.files if os.path.exists(source / name)
        }
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise RunError(f"{source}: cannot be read ({error.strerror}). Check its permissions.") from None
    if wrong := [n for n, file in manifest.files.items() if sizes.get(n, file.size) != file.size]:
        raise VerificationError(
            f"{source / wrong[0]}: has {sizes[wrong[0]]} bytes; the manifest says {manifest.files[wrong[0]].size}. Do not use it; get "
            "the task vector again."
        )
    if (wanted := sum(sizes.values())) > free:
        raise ResourceError(
            f"{source}: has {format_size(wanted)}, and the disk of the store has {format_size(free)} left; expected room for a copy. Make "
            "room, or choose another store."
        )
    try:
        target.mkdir()
        for name in dict.fromkeys([*manifest.files, *filter(is_unlisted, names)]):
            copy_file(source / name, target / name)
    except OSError as error:
        raise RunError(
            f"{error.filename or target}: cannot be copied into the store ({error.strerror}); expected a readable file and space on the "
            "disk. Check both."
        ) from None
    problems = [p.replace(os.fspath(target), os.fspath(source)) for p in file_problems(target, manifest)]
    if problems:
        raise VerificationError(*problems)
