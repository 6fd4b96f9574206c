"""Reads a model's stated origin from its files: licence, base model, and the parents of a merge.

The statements are not verified, and anyone may have written the files: a statement of the wrong type, too
large or too deep counts as absent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.errors import ModelError

CARD = "README.md"
LOCK = "alnico.lock.json"
MAX_CARD_BYTES = 10_000_000
MAX_FRONT_CHARACTERS = 200_000
MAX_DEPTH = 16
"""Most levels of merges of merges to follow."""

MAX_MODELS = 1_000
"""Most models to read from one lock, and bases from one card."""

LICENCE_NAME = re.compile(r"[\w.+-]{1,80}")
"""A licence's name, safe in a table."""

TASK = re.compile(r"[a-z0-9-]{1,60}")
"""What a model is for, as the hub calls it: ``text-generation``."""

MODEL_NAME = re.compile(r"[\w.+-]{1,96}(/[\w.+-]{1,96})?")
"""A model's name, safe in a card."""

LICENCE_FILE = re.compile(r"(licen[cs]e|copying|use_policy|notice)(\.(md|txt))?", re.IGNORECASE)


@dataclass(frozen=True)
class Lineage:
    """A model and its stated origin. ``licence`` has the keys ``license``, ``license_name`` and
    ``license_link``, as cards do; it is empty if none is stated. ``bases`` are hub ids. ``parents`` are the
    models of a merge, or a base and its adapter. ``task`` is the card's ``pipeline_tag``."""

    name: str
    licence: Mapping[str, str]
    bases: tuple[str, ...] = ()
    has_licence_file: bool = False
    parents: tuple[Lineage, ...] = ()
    is_merge: bool = False
    task: str | None = None

    def data(self) -> dict[str, Any]:
        """The statements as plain data for the lock; without those that are absent."""
        return {
            **({"licence": dict(self.licence)} if self.licence else {}),
            **({"base_model": list(self.bases)} if self.bases else {}),
            **({"merge_of": [{"name": p.name, **p.data()} for p in self.parents]} if self.is_merge else {}),
        }

    def stated(self) -> Iterator[Lineage]:
        """All models whose licences apply to this one: its parents, and itself if it has no known parents or
        states a licence that none of them has."""
        for parent in self.parents:
            yield from parent.stated()
        if not self.parents or (self.licence and all(p.licence != self.licence for p in self.parents)):
            yield self


def lineage_of(source: Source) -> Lineage:
    """Read a model's origin from its card, its lock and the names of its files."""
    source = unwrap(source)  # other names or vocabulary rows do not change its origin
    made_from = getattr(source, "made_from", None)
    if made_from is not None:  # the output of a stage that does not exist yet
        return Lineage(_name(source), {}, parents=tuple(lineage_of(s) for s in made_from), is_merge=True)
    if isinstance(source, AdaptedModel):
        return Lineage(_name(source), {}, parents=(lineage_of(source.base), lineage_of(source.adapter.files)))
    if isinstance(source, EquippedModel):
        return Lineage(_name(source), {}, parents=(_base_lineage(source), _vector_lineage(source)))
    folder = source.directory
    if folder is None:
        return Lineage(_name(source), {})
    return replace(
        _read_folder(folder.absolute(), _time_and_size(folder / CARD), _time_and_size(folder / LOCK)),
        name=_name(source),
    )


def _base_lineage(source: EquippedModel) -> Lineage:
    """The origin of the base of a task vector. Where the base at hand states no licence, the vector's author did."""
    lineage, stated = lineage_of(source.base), source.vector.manifest.base.licence
    if lineage.licence or lineage.parents or lineage.has_licence_file or not stated:
        return lineage
    return replace(lineage, licence=_licence({"license": stated}))


def _vector_lineage(source: EquippedModel) -> Lineage:
    """The origin that the manifest of a task vector states."""
    manifest = source.vector.manifest
    return Lineage(
        source.vector.files.origin.name if source.vector.files.origin else manifest.name,
        _licence({"license": manifest.licence}),
        _bases({"base_model": manifest.base.id}),
    )


@functools.lru_cache(128)
def _read_folder(folder: Path, *_: tuple[int, int]) -> Lineage:
    """Read the origin from the files of a folder. Cached while they are unchanged: a search plans the same
    models for every trial."""
    front, parents = _read_front_matter(folder / CARD), _read_lock(folder / LOCK)
    return Lineage(
        "",
        _licence(front),
        _bases(front),
        _has_licence_file(folder),
        parents or (),
        is_merge=parents is not None,
        task=_task(front),
    )


def _time_and_size(path: Path) -> tuple[int, int]:
    """Time and size of a file; zeros if there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def licence_name(licence: Mapping[str, str]) -> str | None:
    """The common name of a licence: the card's ``license_name`` where the id is ``other``.

    >>> licence_name({"license": "other", "license_name": "llama3"}), licence_name({"license": "mit"}), licence_name({})
    ('llama3', 'mit', None)
    """
    name = licence.get("license_name", "")
    return name if LICENCE_NAME.fullmatch(name) else licence.get("license")


def _name(source: Source) -> str:
    if isinstance(source, AdaptedModel):
        return f"{_name(source.base)}+{source.weighted(_name(source.adapter.files))}"
    if isinstance(source, EquippedModel):
        return f"{_name(source.base)}+{source.weighted(_vector_lineage(source).name)}"
    if source.origin is not None:
        return source.origin.name
    return Path(source.label).name or Path(source.label).resolve().name


def _read_front_matter(card: Path) -> Mapping[str, Any]:
    """The front matter of a card; empty if it cannot be read."""
    try:
        with open_binary(card) as file:
            data = file.read(MAX_CARD_BYTES + 1)
        if len(data) > MAX_CARD_BYTES:
            return {}
        text = data.decode("utf-8", "replace")
    except OSError:
        return {}
    front, fence, _ = text[3:].partition("\n---")
    if not text.startswith("---") or not fence or len(front) > MAX_FRONT_CHARACTERS:
        return {}
    try:
        loaded = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _licence(front: Mapping[str, Any]) -> Mapping[str, str]:
    licence = front.get("license")
    if not isinstance(licence, str) or not LICENCE_NAME.fullmatch(licence):
        return {}
    more = ("license_name", "license_link") if licence == "other" else ()
    return {"license": licence} | {k: front[k] for k in more if isinstance(front.get(k), str)}


def _bases(front: Mapping[str, Any]) -> tuple[str, ...]:
    value = front.get("base_model")
    listed = value if isinstance(value, list) else [value]
    return tuple(
        dict.fromkeys(b for b in listed[:MAX_MODELS] if isinstance(b, str) and MODEL_NAME.fullmatch(b))
    )


def _task(front: Mapping[str, Any]) -> str | None:
    value = front.get("pipeline_tag")
    return value if isinstance(value, str) and TASK.fullmatch(value) else None


def _has_licence_file(folder: Path) -> bool:
    try:
        return any(LICENCE_FILE.fullmatch(path.name) for path in folder.iterdir())
    except OSError:
        return False


def _read_lock(lock: Path) -> tuple[Lineage, ...] | None:
    """The parents of a merge, from its lock; None if the folder is not a merge by alnico."""
    if not lock.is_file():
        return None
    try:
        return _parse_lock(read_json(lock), 0)
    except ModelError:
        return None


def _parse_lock(lock: Mapping[str, Any], depth: int) -> tuple[Lineage, ...]:
    inputs = lock.get("inputs")
    models = (
        [i for i in inputs[:MAX_MODELS] if isinstance(i, dict) and "model" in i]
        if isinstance(inputs, list)
        else []
    )
    parents = []
    for entry in models if depth < MAX_DEPTH else ():
        label = str(entry.get("repository") or entry["model"])
        name = label if entry.get("repository") else "+".join(Path(part).name for part in label.split("+"))
        if isinstance(entry.get("lock"), dict):
            parents.append(Lineage(name, {}, parents=_parse_lock(entry["lock"], depth + 1), is_merge=True))
        else:
            parents.append(_parse_lineage({**entry, "name": name}, depth))
    return tuple(parents)


def _parse_lineage(entry: Mapping[str, Any], depth: int) -> Lineage:
    """Read back what :meth:`Lineage.data` wrote."""
    licence, parents = entry.get("licence"), entry.get("merge_of")
    entries = parents[:MAX_MODELS] if isinstance(parents, list) and depth < MAX_DEPTH else []
    return Lineage(
        str(entry.get("name"))[:200],
        _licence(licence) if isinstance(licence, dict) else {},
        _bases(entry),
        parents=tuple(_parse_lineage(p, depth + 1) for p in entries if isinstance(p, dict)),
        is_merge=isinstance(parents, list),
    )
