"""Scores the best recipes, the base, the models and the default recipe on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from alnico.errors import AlnicoError
from alnico.evaluation.scorecard import Scorecard, ScoreDifference, paired, scorecard
from alnico.evaluation.splits import split
from alnico.evaluation.tasks import Score, Task
from alnico.recipe.schema import ModelEntry, Recipe
from alnico.tune.search.evaluator import CandidateFactory
from alnico.tune.search.random_vectors import random_control, why_no_control
from alnico.tune.search.space import SearchSpace

UNIFORM, DEFAULT, CONTROL, BEST = "uniform", "default", "random", "best"
"""Names of the merges in a report. ``random`` is the best recipe with random vectors in the place of its task vectors."""

OPTIONAL = (UNIFORM, DEFAULT, CONTROL)
"""Merges that a report can do without."""

MOST_BEST = 10
"""Points of a Pareto front that are reported."""


@dataclass(frozen=True)
class HeldOut:
    """A task to report, and its examples; None means all."""

    task: Task
    examples: tuple[int, ...] | None = None


def held_out(tasks: Sequence[Task], share: float) -> tuple[HeldOut, ...]:
    """Return the part of each task that a search with this share never scores."""
    return tuple(HeldOut(task, tuple(split(task, share)[1])) for task in tasks)


def report(
    space: SearchSpace,
    best: Sequence[Recipe],
    tasks: Sequence[HeldOut],
    open_factory: Callable[[], CandidateFactory],
    *,
    control_seed: int | None = None,
) -> tuple[Scorecard, tuple[str, ...]]:
    """Score the best recipes and their baselines; also returns notes on baselines that could not be scored.

    With ``control_seed`` one of them is the (first) best recipe with a random vector of the same norm in the place of each
    task vector: how far it gets is luck.
    Errors: AlnicoError if the best recipe, its base or a parent cannot be scored.
    """
    default = space.instantiate(space.default)
    base = default.base_model
    parents = [r for r in space.references if r != base]
    scores: dict[str, dict[str, Score]] = {}
    notes = []
    with closing(open_factory()) as factory:
        for label, recipe in _rows(default, parents, best, control_seed is not None):
            try:
                if label == CONTROL:
                    if (why := why_no_control(recipe)) is not None:
                        notes.append(f"{CONTROL} is not in the report: {why}.")
                        continue
                    recipe = random_control(recipe, factory, control_seed or 0)
                model = factory.make(recipe, label=label)
                scores[label] = {h.task.name: h.task.evaluate(model, h.examples) for h in tasks}
            except AlnicoError as error:
                if label not in OPTIONAL:
                    raise
                notes.append(f"{label} is not in the report: {' '.join(error.args)}")
    task_list = [h.task for h in tasks]
    of_best = _labels(best)
    card = scorecard(
        scores, task_list, base=base, merged=[label for label in scores if label not in (base, *parents)]
    )
    differences = [d for d in card.differences if d.model in of_best]
    for label in of_best:
        for other in OPTIONAL:
            if other in scores and (other != CONTROL or label == of_best[0]):
                differences.append(
                    replace(paired(scores[label], scores[other], task_list), model=label, other=other)
                )
    retained = {label: card.kept[label] for label in of_best if label in card.kept}
    if (luck := _luck(differences, task_list)) is not None:
        notes.append(luck)
    return replace(card, differences=tuple(differences), kept=retained), tuple(notes)


def _luck(differences: Sequence[ScoreDifference], tasks: Sequence[Task]) -> str | None:
    """Return a note where the best recipe is not clearly better than its control: in the mean, or in the only task."""
    for difference in differences:
        found, sign = difference.mean, 1.0
        if found is None and len(tasks) == 1:
            found, sign = difference.scores[tasks[0].name], -1.0  # no mean: lower is better
        if difference.other != CONTROL or found is None:
            continue
        ends = [end for end in (found.low, found.high) if end is not None]
        if min(sign * end for end in (*ends, found.value)) <= 0:
            interval = f", 95 % interval {ends[0]:.4g} to {ends[1]:.4g}" if len(ends) == 2 else ""
            return (
                f"{difference.model} is not clearly better than {CONTROL}, the same recipe with random vectors of the same norms "
                f"(difference {found.value:.4g}{interval}): its score may be luck."
            )
    return None


def _labels(best: Sequence[Recipe]) -> list[str]:
    return [BEST] if len(best) == 1 else [f"{BEST}-{i + 1}" for i in range(min(len(best), MOST_BEST))]


def _rows(
    default: Recipe, parents: Sequence[str], best: Sequence[Recipe], has_control: bool
) -> Iterator[tuple[str, Recipe]]:
    """Yield what to score with its label: whole models by their references, then merges."""
    for reference in [*([default.base_model] if default.base_model else []), *parents]:
        yield (
            reference,
            Recipe("passthrough", (ModelEntry(reference),), name=default.name, folder=default.folder),
        )
    if default.models:
        whole = tuple(ModelEntry(reference) for reference in parents)
        yield (
            UNIFORM,
            replace(
                default,
                merge_method="linear",
                models=whole,
                parameters={},
                methods=(),
                preset=None,
                lines=None,
                text="",
            ),
        )
    yield DEFAULT, default
    if has_control:
        yield CONTROL, best[0]
    yield from zip(_labels(best), best, strict=False)
