"""Reads and writes the lock of a merge: hashes of everything read and written, and the recipe."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico._version import __version__
from alnico.checkpoint.files import files_below
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import CARD, LOCK, lineage_of
from alnico.checkpoint.lora_model import AdaptedModel, repositories
from alnico.checkpoint.reference import COMMIT
from alnico.checkpoint.sidecars import SIGNATURE
from alnico.checkpoint.source import Shard, Source, Tensor, unwrap
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import ModelError, UncheckedError
from alnico.kernels.constants import ARITHMETIC
from alnico.numerics.digest import HASH
from alnico.output.hashes import hash_path
from alnico.output.journal import Record
from alnico.plan.job import Plan

UNLOCKED = (LOCK, CARD, SIGNATURE)
"""Files of an output without a hash in the lock: the lock itself, the card, which people complete, and a
signature, which comes later."""

LINE_LENGTH = 200
"""Longest line of a lock that holds more than one entry."""

MAX_WORD = 200
"""Most characters of a digest, a dtype or a version."""
MAX_STAGES = 64
"""Most stages inside one another that are read."""


@dataclass(frozen=True)
class LockedInput:
    """A model or statistics that were read. ``tensors`` maps the tensors that were read to their digests,
    ``commits`` maps repositories on the hub to commits. ``stage_lock`` is the lock of an input that is the
    output of a stage."""

    label: str
    is_statistics: bool
    tensors: Mapping[str, str]
    commits: Mapping[str, str]
    stage_lock: Lock | None


@dataclass(frozen=True)
class LockedTensor:
    """A tensor of the output."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Lock:
    """The content of the lock at ``path``. The lock of an adapter has no recipe, as no recipe makes one.
    ``files`` maps the files next to it to their ``size``, and their ``digest`` or, for weights, the digest of
    their ``header``; None in locks from before 0.1.0. ``device`` is ``cpu`` or ``cuda``, and ``gpus`` are the models
    of the GPUs."""

    path: Path
    version: str
    arithmetic: int
    recipe: Mapping[str, Any]
    inputs: tuple[LockedInput, ...]
    tensors: Mapping[str, LockedTensor]
    files: Mapping[str, Mapping[str, Any]] | None
    device: str = "cpu"
    gpus: tuple[str, ...] = ()

    @property
    def device_text(self) -> str:
        """The device for people: ``cpu``, or ``cuda`` with the models of its GPUs."""
        return f"{self.device} ({', '.join(self.gpus)})" if self.gpus else self.device

    @property
    def models(self) -> tuple[LockedInput, ...]:
        """The inputs that are models, in the order of the recipe's references."""
        return tuple(i for i in self.inputs if not i.is_statistics)


def describe_files(
    folder: Path, shards: Iterable[Shard], unfinished: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Describe all files of an output for its lock; shards are described by their header, as the lock has the
    hashes of their tensors.

    ``unfinished`` are the names that shards have until the merge is complete. Errors: OSError.
    """
    entries = {s.name: {"size": s.size, "header": s.header_digest} for s in shards}
    for name in listed_files(folder):
        if name not in entries and name not in UNLOCKED and name not in unfinished:
            path = folder / name
            entries[name] = {"size": path.stat().st_size, "digest": hash_path(path)}
    return dict(sorted(entries.items()))


def listed_files(folder: Path) -> list[str]:
    """List the files in a model's folder, relative to it, without hidden ones. A link to a folder counts as a
    file and is not followed."""
    paths = [p.relative_to(folder) for p in files_below(folder)]
    return [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]


def format_lock(plan: Plan, records: Mapping[str, Record], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a lock. Equal merges give equal locks. ``files`` describe the files of the output
    (:func:`describe_files`).

    Files of inputs are identified by size and header hash; paths stay as the recipe writes them. An input
    from the hub has its commit, the output of a stage has its own lock.
    """
    read: dict[int, dict[str, str]] = {i: {} for i in range(len(plan.sources))}
    for record in records.values():
        for model, name, digest in record.inputs:
            read[model][name] = digest
    lock = {
        "alnico": __version__,
        "arithmetic": ARITHMETIC,
        "hash": HASH,
        "device": plan.device_kind,
        **({"gpus": sorted({gpu.model for gpu in plan.gpus})} if plan.gpus else {}),
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "inputs": [
            {
                "statistics" if source in plan.statistics else "model": source.label,
                **_hub_places(source),
                **_origin_of_input(plan, i),
                "files": [
                    {k: v for k, v in f.items() if k not in ("mtime_ns", "commit")} for f in source.identity()
                ],
                "tensors": dict(sorted(read[i].items())),
            }
            for i, source in enumerate(plan.sources)
        ],
        **(
            {"weights": [w.data(plan.sources) for w in plan.norm_weight_groups]}
            if plan.norm_weight_groups
            else {}
        ),
        "dropped": [
            {"model": plan.sources[d.model].label, "tensor": d.name, "why": d.why} for d in plan.dropped
        ],
        "output": {
            job.name: {
                "dtype": job.dtype,
                "shape": list(job.shape),
                "do": job.recorded_kind,
                "digest": records[job.name].digest,
            }
            for job in plan.jobs
        },
        "files": files,
    }
    return format_json(lock) + "\n"


_in_one_line = json.JSONEncoder(ensure_ascii=False).encode
"""``json.dumps`` makes an encoder for each call, which takes longer than the entry of a tensor."""


def format_json(value: Any, depth: int = 0) -> str:
    """Return JSON in which each entry that fits one line is on one: a tensor, for example.

    ``json.dumps`` with an indent is written in Python and takes 75 us per tensor, as long as merging a small
    one.
    """
    if not isinstance(value, (dict, list)):
        return _in_one_line(value)
    if 3 * len(value) <= LINE_LENGTH and len(text := _in_one_line(value)) <= LINE_LENGTH:
        return text
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{pad}{_in_one_line(k)}: {format_json(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(pad + format_json(v, depth + 1) for v in value) + "\n" + " " * depth + "]"


def _origin_of_input(plan: Plan, model: int) -> dict[str, Any]:
    """The lock of a stage's output; for other models, the licence and origin that their files state."""
    folder = plan.sources[model].directory
    if model >= len(plan.models):
        return {}
    if folder is None or plan.recipe.references[model] not in {p.recipe.stage for p in plan.stages}:
        return lineage_of(plan.sources[model]).data()
    return {"lock": read_json(folder / LOCK)}


def _hub_places(source: Source) -> dict[str, Any]:
    """The repository and commit of a model on the hub; a base with adapters may have several."""
    places = [{"repository": place.name, "commit": place.commit} for place in repositories(source)]
    if isinstance(unwrap(source), (AdaptedModel, EquippedModel)):
        return {"repositories": places} if places else {}
    return dict(*places)


def differing_tensors(lock: Lock, tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that the lock or the weights lack, or that have another dtype or shape in them, in
    order of their names."""
    names = sorted({**lock.tensors, **tensors})
    return [
        name
        for name in names
        if describe_tensor(lock.tensors.get(name)) != describe_tensor(tensors.get(name))
    ]


def describe_tensor(tensor: LockedTensor | Tensor | None) -> str:
    """Return dtype and shape, for messages."""
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def read_lock(folder: Path) -> Lock:
    """Read the lock of a finished merge. Errors: ModelError for one that is damaged, UncheckedError for
    hashes of another kind."""
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
            is_inside(name) and isinstance(entry, dict) for name, entry in files.items()
        ):
            raise ValueError("a file outside the model's directory")
        for entry in (files or {}).values():
            _count(entry["size"])
            _word(entry.get("digest", entry.get("header")))
        return Lock(
            path,
            _word(data["alnico"]),
            _count(data["arithmetic"]),
            {**data["recipe"], "seed": _whole(data["seed"])} if is_merge else {},
            tuple(_input(path, entry, depth) for entry in data["inputs"]) if is_merge else (),
            tensors,
            files,
            _device(data.get("device", "cpu")),
            tuple(_word(model) for model in _list(data.get("gpus", []))),
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


def _device(value: Any) -> str:
    if value not in ("cpu", "cuda"):
        raise ValueError(f"{str(value)[:40]} where a device is")
    return str(value)


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
