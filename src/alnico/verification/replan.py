"""Plans a finished merge again: the recipe in its lock, and the inputs where they lie now."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_hub_reference, is_path, split_adapter
from alnico.checkpoint.source import Source
from alnico.errors import AlnicoError, HubError, MismatchError, ModelError, UncheckedError
from alnico.kernels.constants import ARITHMETIC
from alnico.output.lock import Lock, LockedInput
from alnico.output.recipe_file import RECIPE
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.recipe.load import load_recipe, load_recipes
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_RUN, RunOptions


@dataclass(frozen=True)
class ReplanOptions:
    """How a merge is planned again. ``places`` maps inputs, as the lock names them, to where they lie now; the others are looked for
    from the working directory, then beside the output, and those of the hub at their commits."""

    places: Mapping[str, str] = field(default_factory=dict)
    run: RunOptions = DEFAULT_RUN

    @classmethod
    def of(cls, inputs: Mapping[str, str | os.PathLike[str]] | None, run: RunOptions) -> ReplanOptions:
        """Return the options of a call, whose ``inputs`` may be paths."""
        return cls({name: os.fspath(place) for name, place in (inputs or {}).items()}, run)


def stage_locks(lock: Lock) -> dict[str, Lock]:
    """The locks of the stages that lead to a merge by their names, each before the one that takes its output, and last, as '', its own."""
    found: dict[str, Lock] = {}

    def visit(one: Lock) -> None:
        for given in one.models:
            if given.stage_lock is not None and given.label not in found:
                visit(given.stage_lock)
                found[given.label] = given.stage_lock

    visit(lock)
    return {**found, "": lock}


def recipe_in(lock: Lock, again: ReplanOptions) -> Recipe:
    """The recipe in a lock; what it names is looked for beside the output, too. Statistics and analyses are named anew where they lie
    elsewhere. Errors: UncheckedError for a recipe that this version does not read."""
    models = {name for given in lock.models for name in (given.label, *given.label.split("+"))}
    moved = {old: new for old, new in again.places.items() if old not in models}
    try:
        recipe = load_recipe(_renamed(lock.recipe, moved))
    except AlnicoError as error:
        raise UncheckedError(
            f"{lock.path}: its recipe is not read by this version of alnico ({' '.join(error.args)}). Use alnico {lock.version}."
        ) from None
    if len(recipe.references) != len(lock.models):
        raise UncheckedError(
            f"{lock.path}: its recipe names {len(recipe.references)} models, and it lists {len(lock.models)}; it was changed. Merge again."
        )
    written = recipe if moved else _as_written(lock, recipe)
    return dataclasses.replace(written, folder=str(lock.path.parent.absolute().parent))


def _as_written(lock: Lock, recipe: Recipe) -> Recipe:
    """The recipe beside the lock, if it says the same, so that what is made again carries it as it was written."""
    commits = {
        r: "+".join(_pinned(p, g.commits) for p in r.split("+"))
        for r, g in zip(recipe.references, lock.models, strict=True)
    }
    try:
        written = load_recipes(lock.path.parent / RECIPE)
    except AlnicoError:
        return recipe
    same = (recipe.canonical(), _renamed(recipe.canonical(), commits))
    return next((one for one in written if one.canonical() in same), recipe)


def _renamed(value: Any, moved: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(inner, moved) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, moved) for inner in value]
    return moved.get(value, value) if isinstance(value, str) else value


def check_places(lock: Lock, again: ReplanOptions) -> None:
    """Refuse places for what is no input, and inputs that are not found; all of them together. Errors: ModelError, UncheckedError."""
    locks = stage_locks(lock).values()
    inputs = {given.label: given for one in locks for given in one.inputs if given.stage_lock is None}
    names = {*inputs, *(part for label in inputs for part in label.split("+"))}
    names |= {r for one in locks for r in recipe_in(one, again).references}
    text = str([one.recipe for one in locks])
    unknown = [old for old in again.places if old not in names and repr(old) not in text]
    if unknown:
        raise ModelError(
            f"input {unknown[0]!r}: is none of {lock.path}; it lists {', '.join(inputs)}. Check the name before the =."
        )
    folder = str(lock.path.parent.absolute().parent)
    absent = [
        label
        for label, given in inputs.items()
        if not given.is_statistics
        and not _first_existing(_places(given, label, again, folder), bool(given.commits))
    ]
    if absent:
        raise UncheckedError(
            f"{lock.path.parent}: could not check against its inputs: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} neither here nor "
            f"beside it; expected what was merged. Say where with --input {absent[0]}=PATH."
        )


def input_places(lock: Lock, again: ReplanOptions) -> list[Path]:
    """Where the inputs of a merge may lie on this machine."""
    folder = str(lock.path.parent.absolute().parent)
    inputs = [given for one in stage_locks(lock).values() for given in one.inputs if given.stage_lock is None]
    return [
        Path(part)
        for given in inputs
        for place in _places(given, given.label, again, folder)
        for part in place.split("+")
    ]


def _places(given: LockedInput, reference: str, again: ReplanOptions, folder: str) -> list[str]:
    """Where an input may lie, the likeliest first."""
    places = []
    for name in dict.fromkeys((given.label, reference)):
        if name in again.places:
            return [again.places[name]]
        parts = [again.places.get(part, _pinned(part, given.commits)) for part in name.split("+")]
        places.append(resolve_reference("+".join(parts), folder))
    return places


def _pinned(part: str, commits: Mapping[str, str]) -> str:
    name = part.partition("@")[0]
    return f"{name}@{commits[name]}" if name in commits else part


def _first_existing(places: Sequence[str], is_on_hub: bool) -> str | None:
    """The first of the places where something is, or, of an input that came from there, that the hub may have."""

    def is_there(place: str) -> bool:
        is_adapted = split_adapter(place, is_path) is not None
        return (
            is_path(place)
            or is_adapted
            or (is_on_hub and all(is_path(p) or is_hub_reference(p) for p in place.split("+")))
        )

    return next((place for place in places if is_there(place)), None)


def replan(lock: Lock, again: ReplanOptions, stages: Mapping[str, Source]) -> Plan:
    """Plan one merge of a lock. ``stages`` stand for the outputs of others by their names.

    Errors: UncheckedError for another arithmetic, inputs that cannot be opened and inputs from which other tensors follow; ResourceError.
    """
    if lock.arithmetic != ARITHMETIC:
        raise UncheckedError(
            f"{lock.path}: was merged by alnico {lock.version} with arithmetic {lock.arithmetic}, here it is {ARITHMETIC}: the same recipe "
            f"has other bits. Use alnico {lock.version}."
        )
    recipe = recipe_in(lock, again)
    inputs = dict(zip(recipe.references, lock.models, strict=True))

    def opened(reference: str) -> Source:
        if inputs[reference].stage_lock is not None:
            return stages[inputs[reference].label]
        given = inputs[reference]
        place = (
            _first_existing(_places(given, reference, again, recipe.folder), bool(given.commits)) or reference
        )
        model = open_model(place, offline=again.run.offline)
        if isinstance(model, FileModel):
            model.label = inputs[reference].label
        return model

    try:
        plan = build_plan(recipe, run=again.run, open_source=opened)
    except (ModelError, MismatchError, HubError) as error:
        first, *rest = error.args
        raise UncheckedError(
            f"{lock.path}: could not be planned again from its inputs: {first}", *rest
        ) from None
    made = {job.name: (job.dtype, job.shape) for job in plan.jobs}
    said = {name: (tensor.dtype, tensor.shape) for name, tensor in lock.tensors.items()}
    if made != said:
        name = next(n for n in (*said, *made) if made.get(n) != said.get(n))
        for source in plan.sources:
            source.close()
        raise UncheckedError(
            f"{lock.path}: {name} is {_shown(made.get(name))} from the inputs that are found, the lock says {_shown(said.get(name))}; expected "
            "the inputs that were merged. Say where they are with --input NAME=PATH."
        )
    return plan


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def parse_places(words: Sequence[str]) -> dict[str, str]:
    """Read ``OLD=NEW`` words. Errors: ModelError.

    >>> parse_places(["a/b=c"])
    {'a/b': 'c'}
    """
    places = {}
    for word in words:
        old, sign, new = word.partition("=")
        if not (old and sign and new):
            raise ModelError(
                f"--input {word!r}: expected NAME=PATH, the name in the lock and where that lies now."
            )
        places[old] = os.fspath(new)
    return places
