"""Takes task vectors off an equipped model: makes its merge again without them, from the base and the vectors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_hub_reference, is_path
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.checkpoint.task_vectors.store_folder import PREFIX, vector_folder
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.planner import Planner
from alnico.errors import (
    MismatchError,
    ModelError,
    OutputError,
    RecipeError,
    UncheckedError,
    VerificationError,
    near_name,
)
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.output.hashes import hash_tensors
from alnico.output.lock import Lock
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.store.chosen_vectors import ChosenVector
from alnico.store.equip import Equipped
from alnico.threads import Crew
from alnico.verification.replan import ReplanOptions, recipe_in
from alnico.verification.verify import check_output, open_lock


@counts_compiling
@ieee_arithmetic()
def unequip(
    out: str | os.PathLike[str],
    vectors: str | Sequence[str],
    *,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    watch: Watcher | None = None,
) -> Equipped:
    """Take task vectors off an equipped model: its merge is made again without them, and replaces it when complete.

    The recipe is the one in the model's lock, without those vectors. It needs the base and the vectors that stay, and
    refuses to begin without one of them. The tensors of the model and of the base must have the hashes in the lock, so that no
    change of either is lost. Without any vector left, the base's tensors come back to the byte.

    Options:
        out: The directory of a model that `alnico equip` wrote.
        vectors: The task vectors to take off, as they were named: sql, or sql@2.
    Errors: ModelError for a vector that the model does not have; UncheckedError for an input that is missing;
        MismatchError for a base that was changed; VerificationError for a model that was; OutputError; all others of
        :func:`alnico.merge`.
    """
    folder = Path(merge_path(out, "unequip"))
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch, device=device)
    if folder.is_file():
        raise OutputError(
            f"{folder}: is one file, which has no recipe beside it; expected a directory that `alnico equip` wrote. Equip "
            "the base again with the vectors that stay."
        )
    options = ReplanOptions.of(inputs, run)
    lock = open_lock(folder)
    if not lock.recipe:
        raise _not_equipped(folder)
    recipe = recipe_in(lock, options)
    base, equipped = _vectors_of(folder, recipe)
    removed = _named([vectors] if isinstance(vectors, (str, os.PathLike)) else vectors, equipped, folder)
    kept = [reference for reference in equipped if reference not in removed]
    moved = _moved(lock, options)
    _refuse_missing(folder, base, kept, moved, recipe.folder)
    try:
        check_output(folder, options)
    except VerificationError as error:
        raise VerificationError(
            *error.args,
            f"{folder} would be made again without that change. Equip the base into another directory.",
        ) from None
    _check_base(lock, base, moved, recipe.folder, run)
    shorter = _without(recipe.canonical(), base, removed, moved)
    planned = replace(load_recipe(shorter), folder=recipe.folder)
    result = Planner.of(run, max_shard_size).merge(planned, folder, overwrite=True, restart=True)
    chosen = _still_there(kept, shorter)
    notes = tuple(dict.fromkeys([*result.plan.notes, *result.notes]))
    return Equipped(folder, base, chosen, (), planned, result.plan, result, None, notes)


def _not_equipped(folder: Path) -> OutputError:
    return OutputError(
        f"{folder}: was not made by `alnico equip`; expected a merge of a base with task vectors, each as BASE+VECTOR. Change "
        "its recipe, which is in its folder, and merge again."
    )


def _vectors_of(folder: Path, recipe: Recipe) -> tuple[str, list[str]]:
    """Return the base, and the references of the equipped vectors after ``BASE+``. Errors: OutputError."""
    base = recipe.base_model
    if base is None and recipe.merge_method == "passthrough" and len(recipe.models) == 1:
        return recipe.models[0].reference, []  # what stays when the last vector is taken off
    listed = [entry.reference for entry in recipe.models]
    is_equipped = base and listed and not recipe.modules and not recipe.slices and not recipe.methods
    if not base or not is_equipped or not all(reference.startswith(f"{base}+") for reference in listed):
        raise _not_equipped(folder)
    return base, [reference.removeprefix(f"{base}+") for reference in listed]


def _names_of(reference: str) -> tuple[str, ...]:
    """Return the words by which a caller may name a vector.

    >>> _names_of("store:sql@2"), _names_of("owner/sql@v1"), _names_of("./sql")
    (('store:sql@2', 'sql@2', 'sql', 'store:sql'), ('owner/sql@v1', 'owner/sql', 'sql'), ('./sql', 'sql'))
    """
    if reference.startswith(PREFIX):
        plain = reference.removeprefix(PREFIX)
        bare = plain.partition("@")[0]
        return (reference, plain, bare, f"{PREFIX}{bare}")
    if is_hub_reference(reference) and not is_path(reference):
        place = reference.partition("@")[0]
        return (reference, place, place.partition("/")[2])
    path = Path(reference)
    # A store that is not the user's: STORE/vectors/NAME/VERSION
    is_version = path.name.isdigit() and path.parent.parent.name == "vectors"
    stored = (f"{path.parent.name}@{path.name}", path.parent.name) if is_version else ()
    return (reference, *stored, path.name)


def _named(names: Iterable[Any], equipped: Sequence[str], folder: Path) -> list[str]:
    """Return the references of the vectors to take off. Errors: ModelError, RecipeError."""
    removed: list[str] = []
    for name in map(os.fspath, names):
        found = [reference for reference in equipped if name in _names_of(reference)]
        if len(found) != 1:
            shown = [_names_of(r)[1] if r.startswith(PREFIX) else r for r in found or equipped]
            near = near_name(name, [word for r in equipped for word in _names_of(r)])
            advice = f"Did you mean {near}?" if near and not found else "Name one of them."
            if not equipped:
                raise ModelError(
                    f"{folder}: has no task vector {name!r}, as every one was taken off; expected an equipped model. Check the path."
                )
            raise ModelError(
                f"{folder}: has {'no' if not found else 'more than one'} task vector {name!r}; expected one of "
                f"{', '.join(shown)}. {advice}"
            )
        if found[0] in removed:
            raise RecipeError(f"vectors: {name} is named twice; expected each once. Leave one out.")
        removed += found
    if not removed:
        raise RecipeError("vectors: there are none; expected at least one to take off. Name it.")
    return removed


def _moved(lock: Lock, options: ReplanOptions) -> dict[str, str]:
    """Return where inputs are now: those that the caller moved, and hub models at the commit of the merge."""
    commits = {name: f"{name}@{commit}" for model in lock.models for name, commit in model.commits.items()}
    return {**commits, **options.places}


def _refuse_missing(
    folder: Path, base: str, kept: Sequence[str], moved: Mapping[str, str], place: str
) -> None:
    """Errors: UncheckedError that names everything that is missing."""
    missing = []
    there = resolve_reference(moved.get(base, base), place)
    if not is_path(there) and not is_hub_reference(there) and "+" not in base:
        missing.append(f"the base {base}")
    for reference in kept:
        at = moved.get(reference, reference)
        if at.startswith(PREFIX):
            try:
                vector_folder(at)
            except ModelError:
                missing.append(f"the task vector {at.removeprefix(PREFIX)}")
        elif not is_path(resolve_reference(at, place)) and not is_hub_reference(at):
            missing.append(f"the task vector {at}")
    if missing:
        raise UncheckedError(
            f"{folder}: cannot be made again: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; expected "
            f"the base and every task vector that stays. Pull or restore {'it' if len(missing) == 1 else 'them'}, or say where it "
            "is with --input NAME=PATH."
        )


def _check_base(lock: Lock, base: str, moved: Mapping[str, str], place: str, run: RunOptions) -> None:
    """Compare the base with the hashes that the lock has of it. Errors: MismatchError, those of reading."""
    locked = {
        name: digest
        for model in lock.models
        if model.label.partition("@")[0] == base.partition("@")[0]
        for name, digest in model.tensors.items()
    }
    with closing(open_model(resolve_reference(moved.get(base, base), place), access=run.access)) as source:
        lacking = next((name for name in locked if name not in source.tensors), None)
        if lacking is not None:
            raise MismatchError(
                f"{base}: has no tensor {lacking}, which it had when it was equipped; expected the base of the merge. "
                "Restore it, or say where it is with --input NAME=PATH."
            )
        source.fetch(source.absent(list(locked), False))
        with Crew(run.threads, run.watch, "alnico-base") as crew:
            found = hash_tensors(source, locked, crew)
    changed = [name for name, digest in found.items() if digest != locked[name]]
    if changed:
        more = f" {len(changed)} of {len(locked)} tensors differ." if len(changed) > 1 else ""
        raise MismatchError(
            f"{base}: {changed[0]} was changed since it was equipped; expected the tensors of that time.{more} Restore the "
            "base, or say where it is with --input NAME=PATH."
        )


def _without(
    recipe: Mapping[str, Any], base: str, removed: Sequence[str], moved: Mapping[str, str]
) -> dict[str, Any]:
    """Return the recipe without some vectors; without any, the base alone."""

    def now(reference: str) -> str:
        _, plus, vector = reference.partition(f"{base}+")
        vector = moved.get(vector, vector)
        return f"{moved.get(base, base)}+{vector}" if plus else moved.get(reference, reference)

    models = [m for m in recipe["models"] if m["model"].removeprefix(f"{base}+") not in removed]
    if not models:
        return {"merge_method": "passthrough", "models": [moved.get(base, base)], "seed": recipe["seed"]}
    listed = [{**entry, "model": now(entry["model"])} for entry in models]
    return {**recipe, "base_model": moved.get(base, base), "models": listed}


def _still_there(kept: Sequence[str], recipe: Mapping[str, Any]) -> tuple[ChosenVector, ...]:
    """Return the vectors that stay, with their weights."""
    chosen = []
    for entry, reference in zip(recipe["models"] if kept else (), kept, strict=True):
        weight = entry.get("parameters", {}).get("weight", 1.0)
        number = float(weight) if isinstance(weight, (int, float)) else 1.0
        label = _names_of(reference)[1] if reference.startswith(PREFIX) else reference
        chosen.append(ChosenVector(label, reference, number, False, reference))
    return tuple(chosen)
