"""Equips a base with task vectors: an ordinary recipe of models ``BASE+store:NAME@VERSION``, and its merge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.output_path import check_publishable, check_replaceable, replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.planner import Planner, single_file_of
from alnico.engine.run import MergeResult
from alnico.errors import RecipeError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.methods import find, method_name
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.plan.job import Plan
from alnico.recipe.from_options import recipe_of_options
from alnico.recipe.load import load_recipe
from alnico.recipe.schema import Recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.store.chosen_vectors import ChosenVector, choose_vectors
from alnico.store.pair_interference import PairInterference, interference_of

if TYPE_CHECKING:  # scoring is imported where there are tasks: it takes as long as a small merge
    from alnico.evaluation.task_file import TasksLike
    from alnico.store.controls import Controls

ALLOW = "allow"


@dataclass(frozen=True)
class Equipped:
    """A base with task vectors. ``path`` is the model's; ``result`` is None where it was only planned.

    ``interference`` has each pair of vectors; ``controls`` are the scores, where tasks were given. ``recipe`` is an
    ordinary one, which is in the model's folder, too.
    """

    path: Path | None
    base: str
    vectors: tuple[ChosenVector, ...]
    interference: tuple[PairInterference, ...]
    recipe: Recipe
    plan: Plan
    result: MergeResult | None = None
    controls: Controls | None = None
    notes: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "path": None if self.path is None else str(self.path),
            "base": self.base,
            "vectors": [vector.data() for vector in self.vectors],
            "interference": [pair.data() for pair in self.interference],
            "recipe": self.recipe.canonical(),
            "bytes_to_read": self.plan.bytes_to_read,
            "bytes_to_write": self.plan.bytes_to_write,
            "controls": None if self.controls is None else self.controls.data(),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return result_line(
            f"{self.base} with {', '.join(v.label for v in self.vectors) or 'no task vector'}",
            f"in {self.path}" if self.result is not None else "planned",
        )

    @never_fails
    def _repr_html_(self) -> str:
        tables = [ResultTable(("vector", "weight"), [[v.label, v.weight] for v in self.vectors])]
        if self.interference:
            rows = [[p.a, p.b, p.cosine, p.sign_conflict] for p in self.interference]
            tables.append(ResultTable(("vector", "and", "cosine", "sign conflict"), rows))
        if self.controls is not None:
            tables.append(self.controls.table())
        facts = [("base", self.base), *([("path", str(self.path))] if self.path is not None else [])]
        return result_html("Equipped model", *tables, *self.notes, facts=facts, code=self.recipe.text)


@counts_compiling
@ieee_arithmetic()
def equip(
    base: str | os.PathLike[str],
    vectors: Sequence[str] | Mapping[str, float | None],
    out: str | os.PathLike[str] | None = None,
    *,
    method: str = "task_arithmetic",
    density: Sequence[float] | float | None = None,
    dtype: Any = None,
    tokenizer: str | None = None,
    missing: str = "error",
    unrelated: str = "error",
    tasks: TasksLike | None = None,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    store: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    restart: bool = False,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    strict_license: bool = False,
    allow_code: bool = False,
    interference: Sequence[PairInterference] | None = None,
    watch: Watcher | None = None,
    **options: Any,
) -> Equipped:
    """Put task vectors on a base, each with its weight, and write the model: ``base + sum of weight * vector``.

    It is a merge by an ordinary recipe, whose models are ``BASE+store:NAME@VERSION``, so any method of task vectors works,
    and exact vectors give the bits of merging the fine-tunes themselves. Every tensor of the base that a vector changes
    must have the hash that the vector recorded. With ``tasks`` the base, the equipped model and the base with random
    vectors of the same length are scored: a vector is worth its name if it beats those. In Python ``vectors`` may be a
    dict of names and weights, and ``options`` are further ones of the method.

    Options:
        base: The model that the vectors were made of: a directory, or owner/name@revision on the hub.
        vectors: Task vectors with their weights, as sql:0.7 or toxic:-0.3: names in the store (sql@2 for a version),
            paths, adapters or their hub ids. Without a weight, the one that the vector suggests.
        out: Directory to create; a name that ends in .safetensors makes one file.
        method: Merge method; `alnico methods` lists them.
        density: Share of each vector that is kept, in (0, 1], for ties, dare and others; one number, or one per vector.
        dtype: Dtype of the output, such as bfloat16; default: the promotion of the models' dtypes.
        tokenizer: Vocabulary of the output: base, where a vector has rows for tokens that the base lacks; they are left out.
        missing: What to do with tensors that the base or a vector lacks: error, copy or drop.
        tasks: YAML file of tasks to score: without vectors, with them, and with random vectors of the same length.
        dry_run: Only plan: nothing is written or scored.
        allow_base_mismatch: Put a vector of differences on a base that is not the one it was made of. The result may be
            of no use; vectors of new values are refused still.
        store: Folder of the store; default: the user's, or ALNICO_STORE.
        seed: Seed of random methods; default: 0.
        interference: That of the vectors, where it was computed before.
    Errors: RecipeError for vectors that are named twice and wrong weights; ModelError for vectors that are not found;
        MismatchError for a base that a vector was not made of; all others of :func:`alnico.merge`, and EvaluationError.
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch, device=device)
    start = model_path(base, "base").rstrip("/") or "/"
    chosen = choose_vectors(vectors, store)
    given = {**options, **({} if density is None else {"density": density})}
    recipe = equip_recipe(
        start,
        chosen,
        method,
        dtype=dtype,
        tokenizer=tokenizer,
        missing=missing,
        unrelated=unrelated,
        seed=seed,
        allow_base_mismatch=allow_base_mismatch,
        options=given,
    )
    may_replace = replace_mode(overwrite, overwrite_anything)
    planner = Planner.of(run, max_shard_size, strict_license)
    if out is None and not dry_run:
        raise RecipeError(
            "out: is missing; expected the directory of the new model. Name one, or only plan with dry_run."
        )
    target = None if out is None else Path(out)
    if target is not None:
        check_publishable(target, is_tried=not dry_run)
        if not dry_run:
            check_replaceable(target, may_replace)  # before anything is read or scored
    notes = [note for vector in chosen for note in vector.notes]
    pairs = tuple(interference_of(start, chosen, offline=offline) if interference is None else interference)
    if dry_run:
        plan = planner.plan(recipe, single_file=None if target is None else single_file_of(target))
        for source in plan.sources:
            source.close()
        notes += plan.notes
        return Equipped(target, start, chosen, pairs, recipe, plan, notes=tuple(dict.fromkeys(notes)))
    assert target is not None

    def merge() -> MergeResult:
        return planner.merge(recipe, target, overwrite=may_replace, restart=restart)

    if tasks is None:
        result, scored = merge(), None
    else:
        from alnico.store.controls import score_equipped

        result, scored = score_equipped(recipe, tasks, target, merge, run, allow_code=allow_code)
    notes += [*result.plan.notes, *result.notes]
    return Equipped(
        target, start, chosen, pairs, recipe, result.plan, result, scored, tuple(dict.fromkeys(notes))
    )


def equip_recipe(
    base: str,
    vectors: Sequence[ChosenVector],
    method: str = "task_arithmetic",
    *,
    dtype: Any = None,
    tokenizer: str | None = None,
    missing: str = "error",
    unrelated: str = "error",
    seed: int | None = None,
    allow_base_mismatch: bool = False,
    options: Mapping[str, Any],
) -> Recipe:
    """Return the recipe of :func:`equip`. Errors: RecipeError, MethodError."""
    merges = find(method_name(method))
    if merges.space != "delta":
        raise RecipeError(
            f"method: {merges.name} merges models, not task vectors; expected a method of task vectors, such as "
            "task_arithmetic or ties. Choose one: `alnico methods` lists them."
        )
    if "weight" in options:
        raise RecipeError(
            "weight is given as an option of the method; expected the weight of each task vector after its name. Write it as sql:0.7."
        )
    takes_weights = "weight" in merges.options
    if not takes_weights and (weighted := next((v for v in vectors if not v.is_suggested), None)):
        raise RecipeError(
            f"{weighted.label}: has the weight {weighted.weight:g}, and {merges.name} takes no weights. Leave it out, or "
            "choose another method."
        )
    recipe = recipe_of_options(
        [f"{base}+{vector.reference}" for vector in vectors],
        method,
        base=base,
        weights=[vector.weight for vector in vectors] if takes_weights else None,
        dtype=dtype,
        tokenizer=tokenizer,
        missing=missing,
        unrelated=unrelated,
        seed=seed,
        options=options,
    )
    if not allow_base_mismatch:
        return recipe
    document = {**yaml.safe_load(recipe.text), "base_mismatch": ALLOW}
    return replace(load_recipe(document, seed=seed), notes=recipe.notes)
