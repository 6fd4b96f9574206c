"""Plans a finished merge again from the recipe in its lock, and finds its inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_at_url, is_hub_reference, is_path, split_adapter
from alnico.checkpoint.source import Source
from alnico.errors import AlnicoError, HubError, MismatchError, ModelError, UncheckedError
from alnico.kernels.constants import ARITHMETIC
from alnico.methods import known_methods
from alnico.output.lock import Lock, LockedInput
from alnico.output.recipe_file import RECIPE
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.recipe.load import load_recipe, load_recipes
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import DROP, Recipe
from alnico.run_options import DEFAULT_RUN, RunOptions


@dataclass(frozen=True)
class ReplanOptions:
    """Options to plan a merge again. ``places`` maps inputs, as the lock names them, to their present paths.
    Other inputs are searched from the working directory, then next to the output, and on the hub at their
    commits."""

    places: Mapping[str, str] = field(default_factory=dict)
    run: RunOptions = DEFAULT_RUN

    @classmethod
    def of(cls, inputs: Mapping[str, str | os.PathLike[str]] | None, run: RunOptions) -> ReplanOptions:
        """Return the options of a call, whose ``inputs`` may be paths."""
        return cls({name: os.fspath(place) for name, place in (inputs or {}).items()}, run)


def stage_locks(lock: Lock) -> dict[str, Lock]:
    """Return the locks of a merge's stages by name, each before the stage that uses its output; last, as '',
    the merge's own lock."""
    locks: dict[str, Lock] = {}

    def visit(user: Lock) -> None:
        for model in user.models:
            if model.stage_lock is not None and model.label not in locks:
                visit(model.stage_lock)
                locks[model.label] = model.stage_lock

    visit(lock)
    return {**locks, "": lock}


def recipe_in(lock: Lock, options: ReplanOptions) -> Recipe:
    """Return the recipe in a lock, with the present paths of statistics and analyses. Its paths are also
    searched next to the output.

    Errors: UncheckedError for a recipe that this version cannot read.
    """
    models = {name for model in lock.models for name in (model.label, *model.label.split("+"))}
    moved = {old: new for old, new in options.places.items() if old not in models}
    for name in _methods_in(lock.recipe):
        if name not in known_methods() and name != DROP:
            raise UncheckedError(
                f"{lock.path}: its recipe needs the merge method {name}, which this version of alnico does not "
                f"have. Use alnico {lock.version}, or install the package of the method. If it was made by "
                "@alnico.method in a notebook, define it again, and call alnico.verify or alnico.reproduce there."
            )
    try:
        recipe = load_recipe(_renamed(lock.recipe, moved))
    except AlnicoError as error:
        raise UncheckedError(
            f"{lock.path}: this version of alnico cannot read its recipe ({' '.join(error.args)}). Use alnico {lock.version}."
        ) from None
    if len(recipe.references) != len(lock.models):
        raise UncheckedError(
            f"{lock.path}: its recipe names {len(recipe.references)} models, and it lists {len(lock.models)}; it was changed. Merge again."
        )
    written = recipe if moved else _as_written(lock, recipe)
    return dataclasses.replace(written, folder=str(lock.path.parent.absolute().parent))


def _methods_in(recipe: Any) -> list[str]:
    """Return the names of the methods in a recipe, those of its rules included.

    >>> _methods_in({"merge_method": "linear", "methods": [{"filter": "fc1", "merge_method": "ties"}]})
    ['linear', 'ties']
    """
    if isinstance(recipe, list):
        return [name for inner in recipe for name in _methods_in(inner)]
    if not isinstance(recipe, Mapping):
        return []
    own = recipe.get("merge_method")
    inside = [name for inner in recipe.values() for name in _methods_in(inner)]
    return [*([own] if isinstance(own, str) else []), *inside]


def _as_written(lock: Lock, recipe: Recipe) -> Recipe:
    """Return the recipe file next to the lock, if it has the same meaning, so that the new output gets it as
    it was written."""
    commits = {
        r: "+".join(_pinned(p, g.commits) for p in r.split("+"))
        for r, g in zip(recipe.references, lock.models, strict=True)
    }
    try:
        written = load_recipes(lock.path.parent / RECIPE)
    except AlnicoError:
        return recipe
    same = (recipe.canonical(), _renamed(recipe.canonical(), commits))
    return next((candidate for candidate in written if candidate.canonical() in same), recipe)


def _renamed(value: Any, moved: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(inner, moved) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, moved) for inner in value]
    return moved.get(value, value) if isinstance(value, str) else value


def check_places(lock: Lock, options: ReplanOptions) -> None:
    """Refuse places of unknown inputs, and missing inputs, all at once. Errors: ModelError, UncheckedError."""
    locks = stage_locks(lock).values()
    inputs = {entry.label: entry for stage in locks for entry in stage.inputs if entry.stage_lock is None}
    names = {*inputs, *(part for label in inputs for part in label.split("+"))}
    names |= {r for stage in locks for r in recipe_in(stage, options).references}
    text = str([stage.recipe for stage in locks])
    unknown = [old for old in options.places if old not in names and repr(old) not in text]
    if unknown:
        raise ModelError(
            f"input {unknown[0]!r}: is not in {lock.path}; it lists {', '.join(inputs)}. Check the name before the =."
        )
    folder = str(lock.path.parent.absolute().parent)
    absent = [
        label
        for label, entry in inputs.items()
        if not entry.is_statistics
        and not _first_existing(_places(entry, label, options, folder), bool(entry.commits))
    ]
    if absent:
        raise UncheckedError(
            f"{lock.path.parent}: could not check against its inputs: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} neither here nor "
            f"next to it; expected the inputs of the merge. Say where with --input {absent[0]}=PATH."
        )


def input_places(lock: Lock, options: ReplanOptions) -> list[Path]:
    """List the paths that the inputs of a merge may have on this machine."""
    folder = str(lock.path.parent.absolute().parent)
    inputs = [
        entry for stage in stage_locks(lock).values() for entry in stage.inputs if entry.stage_lock is None
    ]
    return [
        Path(part)
        for entry in inputs
        for place in _places(entry, entry.label, options, folder)
        for part in place.split("+")
    ]


def _places(entry: LockedInput, reference: str, options: ReplanOptions, folder: str) -> list[str]:
    """List the places where an input may be, the likeliest first."""
    places = []
    for name in dict.fromkeys((entry.label, reference)):
        if name in options.places:
            return [options.places[name]]
        parts = [options.places.get(part, _pinned(part, entry.commits)) for part in name.split("+")]
        places.append(resolve_reference("+".join(parts), folder))
    return places


def _pinned(part: str, commits: Mapping[str, str]) -> str:
    name = part.partition("@")[0]
    return f"{name}@{commits[name]}" if name in commits else part


def _first_existing(places: Sequence[str], is_on_hub: bool) -> str | None:
    """Return the first place that exists, or that the hub may have, for an input that came from the hub."""

    def exists(place: str) -> bool:
        is_adapted = split_adapter(place, is_path) is not None
        return (
            is_path(place)
            or is_adapted
            or is_at_url(place)
            or (is_on_hub and all(is_path(p) or is_hub_reference(p) for p in place.split("+")))
        )

    return next((place for place in places if exists(place)), None)


def replan(lock: Lock, options: ReplanOptions, stages: Mapping[str, Source]) -> Plan:
    """Plan one merge of a lock. ``stages`` maps names to the outputs of its stages.

    Errors: UncheckedError for another arithmetic, inputs that cannot be opened, and inputs that give other
    tensors; ResourceError.
    """
    if lock.arithmetic != ARITHMETIC:
        raise UncheckedError(
            f"{lock.path}: was merged by alnico {lock.version} with arithmetic {lock.arithmetic}, here it is {ARITHMETIC}: the same recipe "
            f"has other bits. Use alnico {lock.version}."
        )
    recipe = recipe_in(lock, options)
    inputs = dict(zip(recipe.references, lock.models, strict=True))

    def open_input(reference: str) -> Source:
        if inputs[reference].stage_lock is not None:
            return stages[inputs[reference].label]
        entry = inputs[reference]
        place = (
            _first_existing(_places(entry, reference, options, recipe.folder), bool(entry.commits))
            or reference
        )
        if recipe.tokenizer is not None and recipe.tokenizer.approximate:
            from alnico.vocabulary.tokenizer_folder import tokenizer_alone  # with what such a recipe needs

            if (alone := tokenizer_alone(recipe, reference, place)) is not None:
                return alone
        model = open_model(place, access=options.run.access)
        if isinstance(model, FileModel):
            model.label = inputs[reference].label
        return model

    try:
        plan = build_plan(recipe, run=options.run, open_source=open_input)
    except (ModelError, MismatchError, HubError) as error:
        first, *rest = error.args
        raise UncheckedError(
            f"{lock.path}: could not be planned again from its inputs: {first}", *rest
        ) from None
    planned = {job.name: (job.dtype, job.shape) for job in plan.jobs}
    locked = {name: (tensor.dtype, tensor.shape) for name, tensor in lock.tensors.items()}
    if planned != locked:
        name = next(n for n in (*locked, *planned) if planned.get(n) != locked.get(n))
        for source in plan.sources:
            source.close()
        raise UncheckedError(
            f"{lock.path}: {name} is {_describe(planned.get(name))} from the inputs found, the lock says {_describe(locked.get(name))}; expected "
            "the inputs that were merged. Say where they are with --input NAME=PATH."
        )
    return plan


def _describe(tensor: tuple[str, tuple[int, ...]] | None) -> str:
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
                f"--input {word!r}: expected NAME=PATH: the name in the lock, and the path where it is now."
            )
        places[old] = os.fspath(new)
    return places
