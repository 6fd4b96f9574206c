"""Finds the checkpoints of a training run by the steps in the names of its folders and files.

    checkpoint-500, step_500, global_step500, iter_0000500, 500     folders of transformers, DeepSpeed, Megatron, torchtitan and others
    epoch=3-step=500.ckpt, checkpoint_3_500.pt, ema_0.9999_000500.pt    files of Lightning, fairseq and others

A run has one kind of names, which differ in their numbers alone. What else lies in the folder (optimizer states, the best or the last
checkpoint once more, logs) is left out by its name. Nothing is opened here.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.reference import PICKLES, is_hub_reference
from alnico.checkpoint.training.recognise import is_rank_file, training_folder
from alnico.checkpoint.weight_files import SHARD_NAME, gguf_files, holds_weights
from alnico.errors import ModelError

FILES = (".safetensors", ".nemo", ".gguf", *PICKLES)
"""Endings of files that can be a checkpoint."""
SUBFOLDERS = ("checkpoints", "checkpoint", "ckpts", "ckpt")
"""Folders in which trainers put the checkpoints of a run, next to logs and configs."""

WORDS = (
    ("update", r"checkpoint_\d+_"),
    ("step", r"(?<![A-Za-z])(?:global[_-]?)?steps?[=_. -]{0,2}"),
    ("iteration", r"(?<![A-Za-z])iter(?:ation)?s?[=_. -]{0,2}"),
    ("update", r"(?<![A-Za-z])updates?[=_. -]{0,2}"),
    ("batch", r"(?<![A-Za-z])(?:batch(?:es)?|ba)[=_. -]{0,2}"),
    ("checkpoint", r"(?<![A-Za-z])(?:checkpoint|ckpt)s?[=_. -]{0,2}"),
    ("epoch", r"(?<![A-Za-z])(?:epochs?|ep)[=_. -]{0,2}"),
    ("number", r"(?:^|[^\d.])(?=\d+$)"),
)
"""What stands before the number that orders a run's checkpoints, by what it counts; the first that a name has counts. The last
one is any name that ends in a number."""
STEPS = tuple(
    (counted, re.compile(rf"{before}(\d{{1,15}})(?!\d)", re.IGNORECASE)) for counted, before in WORDS
)
AFTER = re.compile(r"(?<![\d.])(\d{1,15})[_-]?(?:epochs?|steps?|iters?)(?![A-Za-z])", re.IGNORECASE)
"""A number before what it counts: ``3epoch.pth`` of ESPnet."""

AVERAGED = re.compile(r"(?<![A-Za-z])ema(?![a-z])|EMA")
"""What the name of averaged weights has in it."""
OTHERS = re.compile(
    r"(?<![A-Za-z])(optim(izer)?s?|sched(uler)?s?|scaler|rng|random_states?|trainer_state)(?![a-z])|^opt[_-]?\d+\.\w+$",
    re.IGNORECASE,
)
"""What the name of something else than a model has in it."""
UNFINISHED = re.compile(r"(^|[._-])(tmp|temp|partial|incomplete)($|[._-])", re.IGNORECASE)
"""What the name of a checkpoint has in it that its trainer has not finished."""

MAX_ENTRIES = 100_000
"""Most names of a folder, or matches of a glob, that are looked at."""
SHOWN = 3
EXPECTED = "checkpoint-500, step_500 or epoch=3-step=500.ckpt"


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run: its step, and the reference by which it is opened."""

    step: int
    reference: str


class FoundCheckpoints(NamedTuple):
    """The checkpoints of a run, the oldest first, and what was left out."""

    checkpoints: tuple[RunCheckpoint, ...]
    notes: tuple[str, ...]


class NamedStep(NamedTuple):
    """The step in a name, and the kind of the name: ``#`` stands for the step, ``N`` for other numbers."""

    step: int
    kind: str
    counted: str


class _RunEntry(NamedTuple):
    named: NamedStep
    reference: str
    path: Path


def step_in(name: str) -> NamedStep | None:
    """Return the step in the name of a file or folder; None if it has none.

    >>> [step_in(n)[:2] for n in ("checkpoint-500", "epoch=3-step=1000.ckpt", "iter_0000500", "ema_0.9999_050000.pt", "500")]
    [(500, 'checkpoint-#'), (1000, 'epoch=N-step=#.ckpt'), (500, 'iter_#'), (50000, 'ema_N_#.pt'), (500, '#')]
    >>> step_in("model.safetensors"), step_in("model-00001-of-00002.safetensors"), step_in("v1.5")
    (None, None, None)
    """
    if SHARD_NAME.fullmatch(name) or is_rank_file(name) or ".index." in name:
        return None
    stem = next((name[: -len(ending)] for ending in FILES if name.endswith(ending)), name)
    for counted, pattern in STEPS[:-1]:
        if found := list(pattern.finditer(stem)):
            return _named(name, found[-1], counted)
    after = AFTER.search(stem)
    match = after if after is not None else STEPS[-1][1].search(stem)
    return None if match is None else _named(name, match, STEPS[-1][0])


def _named(name: str, match: re.Match[str], counted: str) -> NamedStep:
    before, after = (
        re.sub(r"\d+(\.\d+)?", "N", part) for part in (name[: match.start(1)], name[match.end(1) :])
    )
    return NamedStep(int(match[1]), f"{before}#{after}", counted)


def step_of_reference(reference: str) -> int | None:
    """Return the step of a checkpoint from its last name that has one: of its path, or of its revision on the hub.

    >>> step_of_reference("runs/global_step_500/actor"), step_of_reference("owner/name@step1000"), step_of_reference("best")
    (500, 1000, None)
    """
    for part in reversed(re.split(r"[/@]", reference)):
        if (named := step_in(part)) is not None:
            return named.step
    return None


def has_wildcard(text: str) -> bool:
    """Is a text a glob, and not the path of something?"""
    return glob.has_magic(text) and not os.path.lexists(os.path.expanduser(text))


def find_checkpoints(run: str, folder: str = ".", *, ema: bool = False) -> FoundCheckpoints:
    """Return the checkpoints in the folder of a run, or those that a glob matches. Reads names alone.

    A path that is not in the working directory is searched in ``folder``. With ``ema`` they are the averaged weights that the trainer
    kept: files with such a name, or else those inside each checkpoint. Errors: ModelError for no such folder, names without steps, of
    several kinds, or with one step twice.
    """
    candidates, others = _matches(run, folder) if has_wildcard(run) else _entries(run, folder)
    notes = []
    unfinished = [c for c in candidates if UNFINISHED.search(PurePath(c.reference).name)]
    if unfinished:
        notes.append(
            f"{run}: left out, as its trainer has not finished it: {_some(c.reference for c in unfinished)}."
        )
    candidates = [c for c in candidates if c not in unfinished]
    averaged = [c for c in candidates if AVERAGED.search(PurePath(c.reference).name)]
    plain = [c for c in candidates if c not in averaged]
    suffix = ""
    if ema and not averaged:
        suffix = "@ema"
    elif ema or not plain:
        plain, averaged = averaged, []
    elif averaged:
        notes.append(
            f"{run}: averaged weights (EMA) are left out: {_some(c.reference for c in averaged)}. To take those, set ema."
        )
    if not plain:
        raise ModelError(
            f"{run}: has no finished checkpoint, only {_some(c.reference for c in unfinished)}; expected checkpoints such as {EXPECTED}. "
            "Wait until one is written."
        )
    chosen = _of_one_kind(run, plain, others)
    if suffix and (without := next((c for c in chosen if not _may_hold_average(c.path)), None)) is not None:
        raise ModelError(
            f"{run}: no checkpoint is named as averaged weights (EMA), and {without.reference} cannot have them inside; expected names with "
            "ema, or checkpoints in .ckpt files or shards. Leave out ema."
        )
    if others:
        notes.append(
            f"{run}: left out, as their names have no step or are not those of a model: {_some(others)}."
        )
    return FoundCheckpoints(
        ordered(run, [RunCheckpoint(c.named.step, c.reference + suffix) for c in chosen]), tuple(notes)
    )


def ordered(run: str, checkpoints: Iterable[RunCheckpoint]) -> tuple[RunCheckpoint, ...]:
    """Return checkpoints by their steps, the oldest first. Errors: ModelError for two of one step."""
    sorted_by_step = sorted(checkpoints)
    for a, b in itertools.pairwise(sorted_by_step):
        if a.step == b.step:
            raise ModelError(
                f"{run}: {a.reference} and {b.reference} are both of step {a.step}; expected one checkpoint of each step. Choose by a "
                "glob that matches one of them, or list the models in their order, as in other merges."
            )
    return tuple(sorted_by_step)


def _entries(run: str, folder: str) -> tuple[list[_RunEntry], list[str]]:
    """Return what is in the folder of a run: what may be its checkpoints, and other models. Errors: ModelError."""
    for root in (Path(os.path.expanduser(run)), Path(folder, run)):
        if not root.exists():
            continue
        if not root.is_dir():
            raise ModelError(
                f"{run}: is a file; expected the folder of a training run, with checkpoints such as {EXPECTED}. Give the folder."
            )
        for inside in ("", *SUBFOLDERS):
            references = [os.path.join(run, inside, name) for name in _names(root / inside)]
            found, others = _sorted_out(references, root / inside)
            if found:
                return found, others
        is_model = _holds_model(root)
        raise ModelError(
            f"{run}: {'is a model, and no part of it' if is_model else 'nothing in it'} has a step in its name; expected the folder of a "
            f"training run, with checkpoints such as {EXPECTED}. Give that folder, or list the models in their order, as in other merges."
        )
    hub = (
        f" For a model of the hub, write {run}@step* and give steps: from, to, every."
        if is_hub_reference(run)
        else ""
    )
    otherwise = f"Check the path.{hub}"
    raise ModelError(
        f"{run}: no such folder; expected that of a training run, with checkpoints such as {EXPECTED}. "
        f"{suggestion(run, otherwise, accepts=Path.is_dir)}"
    )


def _matches(pattern: str, folder: str) -> tuple[list[_RunEntry], list[str]]:
    """Return what a glob matches: what may be checkpoints, and others. Errors: ModelError for a glob without matches or steps."""
    for root in ("", folder):
        written = os.path.expanduser(pattern)
        matches = sorted(itertools.islice(glob.iglob(written, root_dir=root or None), MAX_ENTRIES))
        if not matches:
            continue
        found, others = _sorted_out(matches, Path(root), is_named=True)
        if not found:
            raise ModelError(
                f"{pattern}: matches {_some(matches)}, without a step in the name; expected checkpoints such as {EXPECTED}. List "
                "the models in their order, as in other merges."
            )
        return found, others
    raise ModelError(f"{pattern}: matches nothing; expected checkpoints such as {EXPECTED}. Check the glob.")


def _sorted_out(
    references: Sequence[str], root: Path, *, is_named: bool = False
) -> tuple[list[_RunEntry], list[str]]:
    """Return which entries may be checkpoints, and which others look like models.

    ``is_named``: a glob named them, and a step may be in the name of a folder above.
    """
    found: list[_RunEntry] = []
    others: list[str] = []
    for reference in references:
        name = PurePath(reference).name
        path = root / (reference if is_named else name)
        is_folder = path.is_dir()
        if name.startswith(".") or not (is_folder or name.endswith(FILES)):
            continue
        named = step_in(name)
        if named is None and is_named:
            above = next((s for p in PurePath(reference).parents if (s := step_in(p.name)) is not None), None)
            named = above and above._replace(kind=f"{above.kind}/{name}")
        if OTHERS.search(name) or named is None:
            if not is_folder or _holds_model(path):
                others.append(reference)
            continue
        found.append(_RunEntry(named, reference, path))
    return found, others


def _of_one_kind(run: str, candidates: Sequence[_RunEntry], others: list[str]) -> Sequence[_RunEntry]:
    """Return the candidates whose names are of the kind that models have; names of ``others`` are added to them. Errors: ModelError."""
    kinds: dict[str, list[_RunEntry]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.named.kind, []).append(candidate)
    with_models = {
        kind: members
        for kind, members in kinds.items()
        if any(not m.path.is_dir() or _holds_model(m.path) for m in sorted(members, reverse=True))
    }
    if not with_models:
        newest = max(candidates)
        inside = [name for name in _names(newest.path) if _holds_model(newest.path / name)]
        where = f"; models are in its {_some(inside)}" if inside else ""
        hint = (
            f"Write a glob: {_as_glob(run, newest)}/{inside[0]}."
            if inside
            else "Give the folder of the run, or a glob that leads to the folders with the weights."
        )
        raise ModelError(
            f"{run}: {newest.reference} has no weights that can be read{where}; expected checkpoints with weights. {hint}"
        )
    if len(with_models) > 1:
        listed = [f"{kind} ({len(members)})" for kind, members in with_models.items()]
        first = max(next(iter(with_models.values())))
        raise ModelError(
            f"{run}: its checkpoints have names of several kinds: {_some(listed)}; expected one kind. Choose by a glob, such as "
            f"{_as_glob(run, first)}."
        )
    others += [m.reference for kind, members in kinds.items() if kind not in with_models for m in members]
    return next(iter(with_models.values()))


def _as_glob(run: str, candidate: _RunEntry) -> str:
    """A glob for all checkpoints whose names are like that of a candidate."""
    last = re.sub(r"[#N]", "*", candidate.named.kind)
    return last if has_wildcard(run) else os.path.join(os.path.dirname(candidate.reference), last)


def _may_hold_average(path: Path) -> bool:
    """Can a checkpoint have averaged weights inside: is it a pickle, or a folder of shards?"""
    return training_folder(path) is not None if path.is_dir() else path.suffix in PICKLES


def _holds_model(folder: Path) -> bool:
    """Does a folder hold weights, by the names in it?"""
    if not folder.is_dir():
        return False
    names = _names(folder)
    return holds_weights(names) or bool(gguf_files(names)) or training_folder(folder) is not None


def _names(folder: Path) -> list[str]:
    """The names in a folder; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, MAX_ENTRIES))
    except OSError:
        return []


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
