"""Verifies stored task vectors: their files by their manifests, their signatures, and the base that they need."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.signatures import check_signature
from alnico.checkpoint.task_vectors.manifest import Manifest, read_manifest
from alnico.checkpoint.task_vectors.store_folder import VECTORS, vector_names, versions_of
from alnico.errors import MismatchError, ModelError, VerificationError
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of, format_size
from alnico.output.hashes import hash_tensors
from alnico.run_options import RunOptions
from alnico.store.check_files import file_problems
from alnico.store.local_store import LocalStore
from alnico.threads import Crew


@dataclass(frozen=True)
class VerifiedVector:
    """A task vector whose files are what its manifest says. ``base`` is the model that was found to fit, ``signed_by`` the key of a
    valid signature; both are None if they were not asked for."""

    vector: str
    files: int
    byte_size: int
    base: str | None = None
    signed_by: str | None = None


@dataclass(frozen=True)
class StoreVerification:
    """The task vectors that passed all checks."""

    vectors: tuple[VerifiedVector, ...]

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for ``--json``."""
        return {"is_verified": True, "vectors": [asdict(v) for v in self.vectors]}

    def __repr__(self) -> str:
        size = format_size(sum(v.byte_size for v in self.vectors))
        return result_line(
            f"{count_of(len(self.vectors), 'task vector')} verified",
            size,
            names_text(v.vector for v in self.vectors),
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [[v.vector, v.files, format_size(v.byte_size), v.base, v.signed_by] for v in self.vectors]
        return result_html(
            "Verified", ResultTable(("task vector", "files", "size", "base", "signed by"), rows)
        )


def all_folders(store: LocalStore) -> list[Path]:
    """Return the folders of all versions of all task vectors. Errors: OutputError, ModelError."""
    store.check()
    return [
        store.folder / VECTORS / name / str(version)
        for name in vector_names(store.folder)
        for version in versions_of(store.folder, name)
    ]


def verify_folders(
    folders: Sequence[Path],
    *,
    base: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> StoreVerification:
    """Verify task vectors. Errors: VerificationError with a line for each problem of their files; as for ``Store.verify``."""
    passed: list[VerifiedVector] = []
    problems: list[str] = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            if manifest.name != folder.parent.name:
                raise ModelError(
                    f"{folder}: its manifest says that it is {manifest.name!r}; expected {folder.parent.name!r}. Remove it, or get it again."
                )
        except ModelError as error:
            problems += map(str, error.args)
            continue
        found = list(file_problems(folder, manifest))
        problems += found
        if not found:
            label = f"{folder.parent.name}@{folder.name}"
            signed_by = None if key is None else os.fspath(check_signature(folder, [Path(key)]))
            if base is not None:
                check_base(manifest, os.fspath(base), label, offline=offline)
            of = None if base is None else os.fspath(base)
            passed.append(VerifiedVector(label, len(manifest.files), manifest.byte_size, of, signed_by))
    if problems:
        raise VerificationError(*problems)
    return StoreVerification(tuple(passed))


def check_base(manifest: Manifest, base: str, label: str, *, offline: bool) -> None:
    """Check every tensor of a base that a task vector touches. Errors: MismatchError; ModelError, HubError for the base."""
    wanted = {name: t.base for name, t in manifest.tensors.items() if t.base is not None}
    run = RunOptions.of(offline=offline)
    opened = open_model(base, offline=offline)
    with closing(opened) as source, Crew(run.threads, run.watch) as crew:
        there = [name for name in wanted if name in source.tensors]
        found = hash_tensors(source, there, crew)
    if different := [name for name, hash_ in wanted.items() if found.get(name) != hash_]:
        raise MismatchError(
            f"{base}: {len(different)} of {count_of(len(wanted), 'tensor')} are not those of the base that {label} was made of, first "
            f"{different[0]}; expected {manifest.base.id or 'the same model'}. Give that model, at the same revision."
        )
