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
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.task_vectors.manifest import read_manifest
from alnico.checkpoint.task_vectors.store_folder import PREFIX, VECTORS, vector_names, versions_of
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.errors import MismatchError, ModelError, UncheckedError, VerificationError
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of, format_size
from alnico.run_options import Access
from alnico.store.check_files import file_problems
from alnico.store.local_store import LocalStore


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
    vectors: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> StoreVerification:
    """Verify task vectors; those in the folder ``vectors`` are a store's. Errors: VerificationError with a line for each problem of their files; as for ``Store.verify``."""
    passed: list[VerifiedVector] = []
    problems: list[str] = []
    mismatches: list[str] = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            if folder.parent.parent == vectors and manifest.name != folder.parent.name:
                raise ModelError(
                    f"{folder}: its manifest says that it is {manifest.name!r}; expected {folder.parent.name!r}. Remove it, or get it again."
                )
        except ModelError as error:
            problems += map(str, error.args)
            continue
        label = (
            f"{folder.parent.name}@{folder.name}" if folder.parent.parent == vectors else os.fspath(folder)
        )
        found = list(file_problems(folder, manifest))
        if not found:
            signed_by = None if key is None else os.fspath(check_signature(folder, [Path(key)]))
            try:
                check_contents(folder, label, None if base is None else os.fspath(base), offline=offline)
            except ModelError as error:
                found += map(str, error.args)
            except MismatchError as error:
                mismatches += map(str, error.args)
            else:
                of = None if base is None else os.fspath(base)
                passed.append(VerifiedVector(label, len(manifest.files), manifest.byte_size, of, signed_by))
        problems += found
    if problems:
        raise VerificationError(*problems, *mismatches)
    if mismatches:
        raise MismatchError(*mismatches)
    return StoreVerification(tuple(passed))


def check_contents(folder: Path, label: str, base: str | None, *, offline: bool) -> None:
    """Check the stored tensors against their entries, and those of a base against the recorded hashes.

    Errors: ModelError for a manifest that its files contradict; MismatchError; ModelError, HubError for the base.
    """
    with open_vector(folder) as vector:
        for name in vector.manifest.tensors:
            vector.check(name)
    if base is not None:
        where = label if os.sep in label else f"{PREFIX}{label}"
        source = open_model(base, access=Access(offline))
        try:
            equipped = EquippedModel(f"{base}+{where}", source, open_vector(folder))
        except BaseException:
            source.close()
            raise
        with closing(equipped):
            if all(t.base is None for t in equipped.vector.manifest.tensors.values()):
                raise UncheckedError(
                    f"{label}: {base} could not be checked: the manifest has no hashes of a base, as for an adapter that was taken in "
                    "without it; expected hashes. `alnico store create ADAPTER --base BASE` records them."
                )
            equipped.check_base()
