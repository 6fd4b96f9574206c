"""What a model's files say of where it comes from: its licence, its base, and of a merge the models that it was made of.

Nothing of it is checked, and it is read from files that anyone may have written: of other types, too large or too deep, it counts as not
said.
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
from alnico.errors import ModelError

CARD = "README.md"
LOCK = "alnico.lock.json"
MAX_CARD_BYTES = 10_000_000
MAX_FRONT_CHARACTERS = 200_000
MAX_DEPTH = 16
"""Merges of merges that are followed."""

MAX_MODELS = 1_000
"""Models of one lock that are read, and bases of one card."""

WORD = re.compile(r"[\w.+-]{1,80}")
"""A licence's name, safe in a table."""

NAME = re.compile(r"[\w.+-]{1,96}(/[\w.+-]{1,96})?")
"""A model's name, safe in a card."""

LICENCE_FILE = re.compile(r"(licen[cs]e|copying|use_policy|notice)(\.(md|txt))?", re.IGNORECASE)


@dataclass(frozen=True)
class Lineage:
    """A model and what is said of it. ``licence`` has ``license`` (and ``license_name``, ``license_link``) as cards spell it; it is empty
    where none is stated. ``bases`` are ids of the hub. ``parents`` are the models that a merge, or a base with its adapter, is made of."""

    name: str
    licence: Mapping[str, str]
    bases: tuple[str, ...] = ()
    has_licence_file: bool = False
    parents: tuple[Lineage, ...] = ()
    is_merge: bool = False

    def data(self) -> dict[str, Any]:
        """What is said, as plain data for the lock; nothing where nothing is said."""
        return {
            **({"licence": dict(self.licence)} if self.licence else {}),
            **({"base_model": list(self.bases)} if self.bases else {}),
            **({"merge_of": [{"name": p.name, **p.data()} for p in self.parents]} if self.is_merge else {}),
        }

    def stated(self) -> Iterator[Lineage]:
        """All models whose licences go into this one: those that it is made of, and itself where it is made of nothing known, or
        states a licence that none of them has."""
        for parent in self.parents:
            yield from parent.stated()
        if not self.parents or (self.licence and all(p.licence != self.licence for p in self.parents)):
            yield self


def lineage_of(source: Source) -> Lineage:
    """Read what a model's card, its lock and the names of its files say."""
    source = unwrap(source)  # other names, or the rows of another vocabulary, change nothing of it
    made_from = getattr(source, "made_from", None)
    if made_from is not None:  # the output of a stage that is not made yet
        return Lineage(_name(source), {}, parents=tuple(lineage_of(s) for s in made_from), is_merge=True)
    if isinstance(source, AdaptedModel):
        return Lineage(_name(source), {}, parents=(lineage_of(source.base), lineage_of(source.adapter.files)))
    folder = source.directory
    if folder is None:
        return Lineage(_name(source), {})
    return replace(
        _of_folder(folder.absolute(), _stamp(folder / CARD), _stamp(folder / LOCK)), name=_name(source)
    )


@functools.lru_cache(128)
def _of_folder(folder: Path, *_: tuple[int, int]) -> Lineage:
    """What the files of a folder say. Kept as long as they are the same: a search plans the same models for every trial."""
    front, parents = _front(folder / CARD), _parents(folder / LOCK)
    return Lineage(
        "",
        _licence(front),
        _bases(front),
        _has_licence_file(folder),
        parents or (),
        is_merge=parents is not None,
    )


def _stamp(path: Path) -> tuple[int, int]:
    """Time and size of a file; zeros where there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def licence_name(licence: Mapping[str, str]) -> str | None:
    """The name of a licence as people say it: that of the card's own words where the id is ``other``.

    >>> licence_name({"license": "other", "license_name": "llama3"}), licence_name({"license": "mit"}), licence_name({})
    ('llama3', 'mit', None)
    """
    name = licence.get("license_name", "")
    return name if WORD.fullmatch(name) else licence.get("license")


def _name(source: Source) -> str:
    if isinstance(source, AdaptedModel):
        return f"{_name(source.base)}+{source.weighted(_name(source.adapter.files))}"
    if source.origin is not None:
        return source.origin.name
    return Path(source.label).name or Path(source.label).resolve().name


def _front(card: Path) -> Mapping[str, Any]:
    """The front matter of a card; nothing where there is none that can be read."""
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
    if not isinstance(licence, str) or not WORD.fullmatch(licence):
        return {}
    more = ("license_name", "license_link") if licence == "other" else ()
    return {"license": licence} | {k: front[k] for k in more if isinstance(front.get(k), str)}


def _bases(front: Mapping[str, Any]) -> tuple[str, ...]:
    given = front.get("base_model")
    listed = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(b for b in listed[:MAX_MODELS] if isinstance(b, str) and NAME.fullmatch(b)))


def _has_licence_file(folder: Path) -> bool:
    try:
        return any(LICENCE_FILE.fullmatch(path.name) for path in folder.iterdir())
    except OSError:
        return False


def _parents(lock: Path) -> tuple[Lineage, ...] | None:
    """The models that a merge was made of, as its lock says; None for what is no merge of alnico."""
    if not lock.is_file():
        return None
    try:
        return _locked(read_json(lock), 0)
    except ModelError:
        return None


def _locked(lock: Mapping[str, Any], depth: int) -> tuple[Lineage, ...]:
    given = lock.get("inputs")
    models = (
        [i for i in given[:MAX_MODELS] if isinstance(i, dict) and "model" in i]
        if isinstance(given, list)
        else []
    )
    found = []
    for entry in models if depth < MAX_DEPTH else ():
        label = str(entry.get("repository") or entry["model"])
        name = label if entry.get("repository") else "+".join(Path(part).name for part in label.split("+"))
        if isinstance(entry.get("lock"), dict):
            found.append(Lineage(name, {}, parents=_locked(entry["lock"], depth + 1), is_merge=True))
        else:
            found.append(_told({**entry, "name": name}, depth))
    return tuple(found)


def _told(entry: Mapping[str, Any], depth: int) -> Lineage:
    """What :meth:`Lineage.data` wrote."""
    licence, parents = entry.get("licence"), entry.get("merge_of")
    told = parents[:MAX_MODELS] if isinstance(parents, list) and depth < MAX_DEPTH else []
    return Lineage(
        str(entry.get("name"))[:200],
        _licence(licence) if isinstance(licence, dict) else {},
        _bases(entry),
        parents=tuple(_told(p, depth + 1) for p in told if isinstance(p, dict)),
        is_merge=isinstance(parents, list),
    )
