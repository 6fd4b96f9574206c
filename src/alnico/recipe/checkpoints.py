"""Reads ``checkpoints``: the models of a recipe as the checkpoints of a training run, the newest last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_hub_reference, is_path
from alnico.checkpoint.training.run_checkpoints import (
    EXPECTED,
    FoundCheckpoints,
    RunCheckpoint,
    find_checkpoints,
    has_wildcard,
    ordered,
    step_of_reference,
)
from alnico.errors import ModelError
from alnico.recipe import scalars
from alnico.recipe.keys import CHECKPOINTS
from alnico.recipe.models import MAX_MODELS
from alnico.recipe.reference import resolve_reference
from alnico.recipe.yaml_nodes import Node, ParseContext, shorten

KEY = "checkpoints"

MOST_UNFINISHED = 3
"""The most checkpoints at the end of a run that may be half-written: one that is being written, and those of earlier crashes."""


@dataclass(frozen=True)
class RunRequest:
    """What ``checkpoints`` asks for."""

    run: str | tuple[str, ...]
    last: int | None = None
    every: int = 1
    steps: tuple[int, ...] = ()
    ema: bool = False

    @property
    def label(self) -> str:
        """The run in messages."""
        return (
            self.run if isinstance(self.run, str) else ", ".join(self.run[:2]) + ", ..." * (len(self.run) > 2)
        )


def with_models(keys: Mapping[str, Node], folder: str, reading: ParseContext) -> dict[str, Node]:
    """Return the keys of a recipe with ``models`` in place of ``checkpoints``; report what is wrong with the latter.

    Without such models the keys have neither. What is left out of the run is noted.
    """
    others = {key: node for key, node in keys.items() if key != KEY}
    node = keys[KEY]
    before = len(reading.mistakes)
    request = _request(node, reading)
    if request is None or len(reading.mistakes) > before:
        return others
    try:
        references, notes = _checkpoints(request, folder)
    except ModelError as error:
        for line in error.args:
            reading.wrong(node.line, f"{KEY}: {line}")
        return others
    for note in notes:
        reading.note(node.line, f"{KEY}: {note}")
    models = Node([Node(reference, node.line) for reference in references], node.line)
    return {**others, "models": models}


def _request(node: Node, reading: ParseContext) -> RunRequest | None:
    """Read the key; report what is wrong with it."""
    before = len(reading.mistakes)
    keys: Mapping[str, Node] = {"run": node}
    where = KEY
    if isinstance(node.value, dict):
        keys = scalars.mapping(node, KEY, CHECKPOINTS, "run, last, every, steps and ema", reading)
        where = f"{KEY}.run"
    if "run" not in keys and len(reading.mistakes) > before:  # misspelt
        return None
    if "run" not in keys:
        reading.wrong(
            node.line,
            f"{where} is missing; expected the folder of a training run, a glob, or a list. Add run: PATH.",
        )
        return None
    named = keys["run"]
    run: str | tuple[str, ...] | None
    if isinstance(named.value, list) and named.value:
        listed = [scalars.text(item, f"{where}[{i}]", reading) for i, item in enumerate(named.value)]
        run = tuple(text for text in listed if text is not None)
    elif isinstance(named.value, str):
        run = scalars.text(named, where, reading)
    else:
        actual = "an empty list" if named.value == [] else named.kind
        reading.wrong(
            named.line,
            f"{where} is {actual}; expected the folder of a training run, a glob, or a list of checkpoints.",
        )
        run = None
    last = scalars.integer(keys.get("last"), f"{KEY}.last", 1, reading)
    every = scalars.integer(keys.get("every"), f"{KEY}.every", 1, reading)
    steps = _steps(keys.get("steps"), reading)
    ema = scalars.boolean(keys.get("ema"), f"{KEY}.ema", reading)
    return None if not run else RunRequest(run, last, every or 1, steps, ema)


def _steps(node: Node | None, reading: ParseContext) -> tuple[int, ...]:
    """Read the first and the last step, and how far they are apart."""
    if node is None:
        return ()
    values = [item.value for item in node.value] if isinstance(node.value, list) else []
    numbers = tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)
    is_valid = len(values) == len(numbers) in (2, 3) and numbers[0] <= numbers[1] and (*numbers, 1)[2] > 0
    if not is_valid:
        actual = shorten(f"[{', '.join(map(str, values))}]") if values else node.kind
        reading.wrong(
            node.line,
            f"{KEY}.steps is {actual}; expected [from, to] or [from, to, every], whole numbers with from <= to and every above 0.",
        )
        return ()
    return numbers


def _checkpoints(request: RunRequest, folder: str) -> tuple[list[str], list[str]]:
    """Return the references of the checkpoints, the oldest first, and notes. Errors: ModelError."""
    found = _found(request, folder)
    notes = list(found.notes)
    remaining = list(found.checkpoints)
    chosen = _select(request, remaining, [])
    left_out: list[str] = []
    first: ModelError | None = None
    while not isinstance(request.run, tuple) or any(map(has_wildcard, request.run)):
        newest = chosen[-1]
        if newest is not remaining[-1]:
            break  # nothing is being written to an older checkpoint
        if (error := _why_unreadable(newest.reference, folder)) is None:
            break
        first = first or error
        remaining.remove(newest)
        left_out.append(newest.reference)
        if len(left_out) == MOST_UNFINISHED or not remaining:
            raise first
        notes.append(f"left out, as it cannot be read and may be half-written: {' '.join(error.args)}")
        chosen = _select(request, remaining, left_out)
    if len(chosen) > MAX_MODELS:
        raise ModelError(
            f"{request.label}: has {len(chosen)} checkpoints; expected at most {MAX_MODELS}. Take fewer with last, every or steps."
        )
    return [checkpoint.reference for checkpoint in chosen], notes


def _why_unreadable(reference: str, folder: str) -> ModelError | None:
    """Return why the headers of a checkpoint on this machine cannot be read; None if they can, or it is not on this machine."""
    resolved = resolve_reference(reference, folder)
    if not is_path(resolved):
        return None
    try:
        open_model(resolved).close()
    except ModelError as error:
        return error
    return None


def _found(request: RunRequest, folder: str) -> FoundCheckpoints:
    """Return all checkpoints that the run has, before any is selected. Errors: ModelError."""
    run = request.run
    if isinstance(run, str) and is_hub_reference(run) and "*" in run.partition("@")[2] and not is_path(run):
        return _revisions(run, request.steps)
    if isinstance(run, str):
        return find_checkpoints(run, folder, ema=request.ema)
    checkpoints: list[RunCheckpoint] = []
    notes: list[str] = []
    for item in run:
        if has_wildcard(item):
            found = find_checkpoints(item, folder, ema=request.ema)
            checkpoints += found.checkpoints
            notes += found.notes
            continue
        step = step_of_reference(item)
        if step is None:
            raise ModelError(
                f"{item}: has no step in its name; expected checkpoints such as {EXPECTED}. List the models in their order, as in other merges."
            )
        checkpoints.append(RunCheckpoint(step, item + ("@ema" if request.ema else "")))
    return FoundCheckpoints(ordered(request.label, checkpoints), tuple(notes))


def _revisions(run: str, steps: Sequence[int]) -> FoundCheckpoints:
    """Return the revisions of a model of the hub that are named by steps. Errors: ModelError."""
    if len(steps) != 3:
        raise ModelError(
            f"{run}: is a model of the hub with a step in place of *; expected steps (from, to, every), since revisions are not listed. "
            "Give steps."
        )
    first, last, every = steps
    count = (last - first) // every + 1
    if count > MAX_MODELS:
        raise ModelError(f"{run}: steps has {count} steps; expected at most {MAX_MODELS}. Take fewer.")
    numbers = range(first, last + 1, every)
    return FoundCheckpoints(tuple(RunCheckpoint(n, run.replace("*", str(n))) for n in numbers), ())


def _select(
    request: RunRequest, checkpoints: Sequence[RunCheckpoint], left_out: Sequence[str]
) -> list[RunCheckpoint]:
    """Return the checkpoints that are asked for. Errors: ModelError for steps that are not there, and too few checkpoints."""
    chosen = list(checkpoints)
    besides = f", without {' and '.join(left_out)}, which may be half-written" if left_out else ""
    if request.steps:
        first, last = request.steps[:2]
        chosen = [c for c in chosen if first <= c.step <= last]
        if len(request.steps) == 3:
            wanted = range(first, last + 1, request.steps[2])
            chosen = [c for c in chosen if c.step in wanted]
            if len(chosen) < len(wanted):
                there = {c.step for c in chosen}
                missing = next(step for step in wanted if step not in there)
                raise ModelError(
                    f"{request.label}: has no checkpoint of step {missing}{besides}; expected {len(wanted)}, from {first} to {last}, every "
                    f"{request.steps[2]}. Change steps, or leave out its third number to take what is there."
                )
    chosen = chosen[::-1][:: request.every][::-1]
    if not chosen:
        shown = f"{checkpoints[0].step} to {checkpoints[-1].step}"
        raise ModelError(
            f"{request.label}: has no checkpoint in these steps{besides}; it has {shown}. Change steps."
        )
    if request.last is not None and len(chosen) < request.last:
        raise ModelError(
            f"{request.label}: has {len(chosen)} such {'checkpoint' if len(chosen) == 1 else 'checkpoints'}{besides}; expected the last "
            f"{request.last}. Ask for {len(chosen)}, or leave last out."
        )
    return chosen[-request.last :] if request.last is not None else chosen
