"""Finds the task vectors that a call names, ``sql:0.7``: in a store, by path, or an adapter; with their weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.lora_adapter import CONFIG
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.reference import is_hub_reference, is_path
from alnico.checkpoint.remote.open_folder import is_url
from alnico.checkpoint.task_vectors.manifest import MANIFEST, Manifest, is_name, read_manifest
from alnico.checkpoint.task_vectors.store_folder import (
    PREFIX,
    default_store,
    store_on_this_machine,
    vector_folder,
    vector_names,
    versions_of,
)
from alnico.errors import ModelError, RecipeError, near_name
from alnico.numerics.numbers import finite_number


@dataclass(frozen=True)
class ChosenVector:
    """A task vector that is equipped.

    ``label`` names it for people, ``reference`` after ``BASE+`` in a recipe: ``store:sql@2``, or a path. ``weight`` is the
    coefficient, which ``is_suggested`` by the vector where the caller gave none. ``manifest`` is None for what has none: an
    adapter, or a file of ``TaskVector.save``. ``place`` is where it is, for all versions of a stored vector; equal places
    are one vector.
    """

    label: str
    reference: str
    weight: float
    is_suggested: bool
    place: str
    manifest: Manifest | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What its manifest says against the weight."""
        if self.manifest is None:
            return ()
        scale = self.manifest.scale
        least, most = scale.least, scale.most
        if (most is not None and self.weight > most) or (least is not None and self.weight < least):
            low = "-inf" if least is None else f"{least:g}"
            high = "inf" if most is None else f"{most:g}"
            return (
                f"{self.label}: the weight {self.weight:g} is outside of [{low}, {high}], the range in which it was tried; "
                f"its author suggests {scale.suggested:g}.",
            )
        return ()

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "vector": self.label,
            "reference": self.reference,
            "weight": self.weight,
            "is_suggested": self.is_suggested,
            "base": None if self.manifest is None else self.manifest.base.id,
            "error": None if self.manifest is None else self.manifest.error,
        }


def choose_vectors(
    vectors: str | os.PathLike[str] | Sequence[Any] | Mapping[Any, Any],
    store: str | os.PathLike[str] | None = None,
) -> tuple[ChosenVector, ...]:
    """Find the vectors of a call, in its order.

    ``vectors`` maps names to weights, or lists ``NAME`` and ``NAME:WEIGHT``. A name is that of a vector in the ``store``
    (default: the user's), which may end in ``@VERSION``; a path; or the hub id of an adapter. Without a weight, or with
    None, it is the one that the vector suggests, otherwise 1.

    Errors: RecipeError for a weight that is not a number, for a vector that is named twice, and for none; ModelError for
    one that is not found, with the nearest name.
    """
    place = default_store() if store is None else store_on_this_machine(store, "store")
    found = [_find(name, weight, place) for name, weight in _pairs(vectors)]
    if not found:
        raise RecipeError(
            "vectors: there are none; expected at least one. Name one, such as sql:0.7; `alnico store list` shows what "
            "there is."
        )
    first: dict[Any, ChosenVector] = {}
    for vector in found:
        same = [first.setdefault(key, vector) for key in _identities(vector)]
        other = next((one for one in same if one is not vector), None)
        if other is not None:
            if other.label != vector.label:
                raise RecipeError(
                    f"{vector.label}: is the same task vector as {other.label}; expected each once. Leave one of them out, and "
                    f"give the other the weight {other.weight + vector.weight:g} for both together."
                )
            both = f"{other.weight:g} and {vector.weight:g}"
            raise RecipeError(
                f"{vector.label}: is named twice, with the weights {both}; expected each task vector once. Give it one "
                f"weight, such as {vector.label}:{other.weight + vector.weight:g} for both together."
            )
    return tuple(found)


def _identities(vector: ChosenVector) -> list[Any]:
    """Return what only this vector has: its place, and the hashes of its files, which a copy and an update share with it."""
    files = vector.manifest.files if vector.manifest is not None else {}
    hashes = tuple(sorted((name, file.sha256) for name, file in files.items()))
    return [vector.place, hashes] if hashes else [vector.place]


def _pairs(vectors: Any) -> list[tuple[str, float | None]]:
    """Return names with the weights that were given. Errors: RecipeError."""
    if isinstance(vectors, Mapping):
        return [
            (_name_of(name), None if weight is None else _number(weight, _name_of(name)))
            for name, weight in vectors.items()
        ]
    if isinstance(vectors, (str, os.PathLike)) or hasattr(vectors, "manifest"):
        vectors = [vectors]
    if not isinstance(vectors, Iterable) or isinstance(vectors, bytes):
        raise RecipeError(
            f"vectors is of type {type(vectors).__name__}; expected names with weights, as ['sql:0.7'] or {{'sql': 0.7}}. "
            "Give those."
        )
    return [_split(_name_of(word)) for word in vectors]


def _name_of(value: Any) -> str:
    """Return the name or path of a vector, also of a stored one in Python. Errors: RecipeError."""
    if hasattr(value, "manifest") and hasattr(value, "folder"):
        return str(value.folder)
    if not isinstance(value, (str, os.PathLike)):
        raise RecipeError(
            f"vectors has a value of type {type(value).__name__}; expected the name of a task vector, as 'sql' or 'sql:0.7'. "
            "Give names."
        )
    return os.fspath(value)


def _split(word: str) -> tuple[str, float | None]:
    """Split ``NAME:WEIGHT``. Errors: RecipeError.

    >>> _split("sql:0.7"), _split("sql@2"), _split("store:sql:-1"), _split("store:sql")
    (('sql', 0.7), ('sql@2', None), ('store:sql', -1.0), ('store:sql', None))
    """
    name, colon, weight = word.rpartition(":")
    if not colon or is_path(word) or is_url(word) or (name == PREFIX.rstrip(":") and not _is_number(weight)):
        return word, None
    return name, _number(weight, name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(weight: Any, name: str) -> float:
    if isinstance(weight, str):
        if not _is_number(weight):
            raise RecipeError(
                f"{name}: the weight is {weight!r}; expected a number. Write it as {name or 'sql'}:0.7."
            )
        weight = float(weight)
    return finite_number(weight, f"the weight of {name}", error=RecipeError)


def _find(name: str, weight: float | None, store: Path) -> ChosenVector:
    """Find one vector. Errors: ModelError, with the nearest name; RecipeError for an empty name."""
    if not name:
        raise RecipeError(
            "vectors: a name is empty; expected the name of a task vector, or its path. Write it as sql:0.7."
        )
    plain = name.removeprefix(PREFIX)
    bare, _, _ = plain.partition("@")
    is_stored = name.startswith(PREFIX) or (is_name(bare) and bool(versions_of(store, bare)))
    there = Path(os.path.expanduser(name))
    if is_stored:
        folder = vector_folder(plain, store)
        label = f"{bare}@{folder.name}"
        is_default = os.path.realpath(store) == os.path.realpath(default_store())
        reference = f"{PREFIX}{label}" if is_default else os.fspath(folder)
        return _with_manifest(label, reference, weight, folder, folder.parent)
    if (there / MANIFEST).is_file():
        return _with_manifest(name, name, weight, there, there)
    if is_path(name):
        if there.is_dir() and not (there / CONFIG).is_file() and not _has_weights(there):
            raise ModelError(
                f"{name}: has no {MANIFEST} and no {CONFIG}; expected a task vector or an adapter. Make one with "
                "`alnico store create`."
            )
        return ChosenVector(
            name, name, 1.0 if weight is None else weight, weight is None, os.path.realpath(there)
        )
    if is_hub_reference(name):
        return ChosenVector(
            name, name, 1.0 if weight is None else weight, weight is None, name.partition("@")[0]
        )
    near = near_name(bare, vector_names(store)) if is_name(bare) else None
    advice = (
        f"Did you mean {near}?"
        if near
        else suggestion(name, "`alnico store list` shows what the store has, `alnico store pull` gets more.")
    )
    raise ModelError(
        f"task vector {name!r}: is not in the store {store}, and no path; expected the name of a stored vector, a path, or "
        f"the hub id of an adapter as owner/name. {advice}"
    )


def _has_weights(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" for path in folder.iterdir())


def _with_manifest(
    label: str, reference: str, weight: float | None, folder: Path, place: Path
) -> ChosenVector:
    manifest = read_manifest(folder)
    return ChosenVector(
        label,
        reference,
        manifest.scale.suggested if weight is None else weight,
        weight is None,
        os.path.realpath(place),
        manifest,
    )
