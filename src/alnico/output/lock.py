"""The lock of a finished merge as a value: what was read and made, with hashes, and the recipe that makes it again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.files import files_below
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import CARD, LOCK
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.source import Shard
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import ModelError, UncheckedError
from alnico.output.hashes import digest_of

HASH = "xxh3-128"
UNLOCKED = (LOCK, CARD, SIGNATURE)
"""Files of an output that the lock has no hash of: itself, the card, which people complete, and a signature, which comes after it."""

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_WORD = 200
"""Characters of a digest, a dtype or a version."""
MAX_STAGES = 64
"""Stages inside one another that are read."""


@dataclass(frozen=True)
class LockedInput:
    """A model or statistics that were read. ``tensors`` maps those that were read to their digests, ``commits`` repositories on the
    hub to commits; of the output of a stage, ``made`` is its lock."""

    label: str
    is_statistics: bool
    tensors: Mapping[str, str]
    commits: Mapping[str, str]
    made: Lock | None


@dataclass(frozen=True)
class LockedTensor:
    """A tensor of the output."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Lock:
    """What the lock at ``path`` says; that of an adapter, which no recipe makes, has no recipe. ``files`` maps files beside it to what is known of them (``size``, and ``digest`` or, of weights,
    the ``header``'s); None in locks of before 0.1.0, which do not tell."""

    path: Path
    version: str
    arithmetic: int
    recipe: Mapping[str, Any]
    inputs: tuple[LockedInput, ...]
    tensors: Mapping[str, LockedTensor]
    files: Mapping[str, Mapping[str, Any]] | None

    @property
    def models(self) -> tuple[LockedInput, ...]:
        """The inputs that are no statistics, in the order of the recipe's references."""
        return tuple(i for i in self.inputs if not i.is_statistics)


def files_of(
    folder: Path, shards: Iterable[Shard], unfinished: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Describe all files of an output for its lock: of weights, whose tensors the lock has, the header. ``unfinished`` are the names
    that the weights have until the end. Errors: OSError."""
    found = {s.name: {"size": s.size, "header": s.header_digest} for s in shards}
    for name in listed_files(folder):
        if name not in found and name not in UNLOCKED and name not in unfinished:
            path = folder / name
            found[name] = {"size": path.stat().st_size, "digest": digest_of(path)}
    return dict(sorted(found.items()))


def listed_files(folder: Path) -> list[str]:
    """The files of a model's folder, relative to it, but for hidden ones; a link to a folder, which is not entered, counts as one."""
    paths = [p.relative_to(folder) for p in files_below(folder)]
    return [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]


def read_lock(folder: Path) -> Lock:
    """Read the lock of a finished merge. Errors: ModelError for one that is damaged, UncheckedError for hashes of another kind."""
    return _lock(folder / LOCK, read_json(folder / LOCK, is_ours=True), 0)


def _lock(path: Path, data: Mapping[str, Any], depth: int) -> Lock:
    if data.get("hash", HASH) != HASH:
        raise UncheckedError(
            f"{path}: its hashes are {str(data['hash'])[:40]!r}, expected {HASH}. Use the version of alnico that wrote it."
        )
    try:
        if depth > MAX_STAGES:
            raise ValueError("stages inside one another")
        tensors = {
            n: LockedTensor(
                _word(t["dtype"]), tuple(_count(x) for x in _list(t["shape"])), _word(t["digest"])
            )
            for n, t in data["output"].items()
        }
        files = data.get("files")
        is_merge = "do" not in data
        if files is not None and not all(
            is_inside(name) and isinstance(told, dict) for name, told in files.items()
        ):
            raise ValueError("a file outside the model's directory")
        for told in (files or {}).values():
            _count(told["size"])
            _word(told.get("digest", told.get("header")))
        return Lock(
            path,
            _word(data["alnico"]),
            _count(data["arithmetic"]),
            {**data["recipe"], "seed": _whole(data["seed"])} if is_merge else {},
            tuple(_input(path, entry, depth) for entry in data["inputs"]) if is_merge else (),
            tensors,
            files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: is no lock of alnico ({str(error)[:80]}). Merge again.") from None


def _input(path: Path, entry: Mapping[str, Any], depth: int) -> LockedInput:
    places = [entry, *entry.get("repositories", ())]
    commits = {_text(p["repository"]): _text(p["commit"]) for p in places if "repository" in p}
    if not all(COMMIT.fullmatch(commit) for commit in commits.values()):
        raise ValueError("a commit")
    label = _text(entry["statistics"] if "statistics" in entry else entry["model"])
    if not commits.keys() <= {part.rpartition("*")[2].partition("@")[0] for part in label.split("+")}:
        raise ValueError("a repository that is no part of the input")
    return LockedInput(
        label,
        "statistics" in entry,
        {n: _word(d) for n, d in entry["tensors"].items()},
        commits,
        _lock(path, entry["lock"], depth + 1) if "lock" in entry else None,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} where a text is")
    return value


def _word(value: Any) -> str:
    if len(text := _text(value)) > MAX_WORD:
        raise ValueError(f"{text[:40]} where a short text is")
    return text


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]} where a list is")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise TypeError(f"{str(value)[:40]} where a whole number is")
    return value


def _count(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError(f"{value} where a count is")
    return int(value)
