"""Changes what a stored task vector says of itself: a new version with a new manifest and the same files."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.durable import copy_file, write_file
from alnico.checkpoint.task_vectors.manifest import (
    MANIFEST,
    Manifest,
    SafeScale,
    format_manifest,
    read_manifest,
)
from alnico.errors import AlnicoError, ModelError, RunError

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS)
"""Errors of file systems that cannot let a file have a second name."""


@dataclass(frozen=True)
class Changes:
    """What is to be said of a task vector; None leaves what it says now."""

    description: str | None = None
    tasks: Sequence[str] | None = None
    languages: Sequence[str] | None = None
    licence: str | None = None
    training: str | None = None
    scale: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def are_none(self) -> bool:
        return all(value is None for value in vars(self).values())


def write_changed(folder: Path, target: Path, changes: Changes) -> Manifest:
    """Write a task vector with another manifest into a new folder; the files are those of the old one, by hard links or copies.

    The signature and the card of the old one are not taken along: they are about the old manifest.
    Errors: AlnicoError for a value that a manifest cannot hold, ModelError, RunError.
    """
    manifest = changed(read_manifest(folder), changes)
    try:
        target.mkdir()
        for name in manifest.files:
            _link(folder / name, target / name)
    except OSError as error:
        raise RunError(
            f"{error.filename or target}: cannot be linked or copied into the store ({error.strerror}); expected a readable file and "
            "space on the disk. Check both."
        ) from None
    write_file(target / MANIFEST, format_manifest(manifest))
    return manifest


def changed(manifest: Manifest, changes: Changes) -> Manifest:
    """Return a manifest with changes. Errors: AlnicoError for a value that a manifest cannot hold."""
    given: dict[str, Any] = {
        "description": changes.description,
        "tasks": None if changes.tasks is None else _words(changes.tasks),
        "languages": None if changes.languages is None else _words(changes.languages),
        "licence": changes.licence,
        "training": changes.training,
    }
    old = manifest.scale
    scale = SafeScale(
        old.suggested if changes.scale is None else changes.scale,
        old.least if changes.least is None else changes.least,
        old.most if changes.most is None else changes.most,
    )
    new = replace(manifest, scale=scale, **{key: value for key, value in given.items() if value is not None})
    try:
        format_manifest(new)  # which checks it
    except ModelError as error:
        (problem, *_) = error.args
        said = problem.partition(" The task vector is damaged")[0].removeprefix(f"{MANIFEST}: ")
        raise AlnicoError(f"{manifest.name}: {said} Change it.") from None
    except (TypeError, ValueError) as error:
        raise AlnicoError(
            f"{manifest.name}: a value cannot be written ({error}); expected texts and finite numbers. Change it."
        ) from None
    return new


def _words(words: Sequence[str]) -> tuple[str, ...]:
    """Return a list of words; a text is one, and the empty text none."""
    return tuple(w for w in ((words,) if isinstance(words, str) else words) if w)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        copy_file(source, target)
