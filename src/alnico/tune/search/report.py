"""What a search is worth: its recipe beside base, parents, the uniform average and the default settings, on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from alnico.errors import AlnicoError
from alnico.evaluation.scorecard import Scorecard, paired, scorecard
from alnico.evaluation.splits import split
from alnico.evaluation.tasks import Score, Task
from alnico.recipe.schema import ModelEntry, Recipe
from alnico.tune.search.evaluator import CandidateFactory
from alnico.tune.search.space import SearchSpace

UNIFORM, DEFAULT, BEST = "uniform", "default", "best"
"""What the merges of a report are called."""

MOST_BEST = 10
"""Points of a Pareto front that are reported on."""


@dataclass(frozen=True)
class HeldOut:
    """A task to report on, and its examples; all of them, if none are named."""

    task: Task
    examples: tuple[int, ...] | None = None


def held_out(tasks: Sequence[Task], share: float) -> tuple[HeldOut, ...]:
    """The part of each task that a search with this share never scores."""
    return tuple(HeldOut(task, tuple(split(task, share)[1])) for task in tasks)


def report(
    space: SearchSpace,
    best: Sequence[Recipe],
    tasks: Sequence[HeldOut],
    open_maker: Callable[[], CandidateFactory],
) -> tuple[Scorecard, tuple[str, ...]]:
    """Score the best recipes beside what they must beat; returns notes on what could not be scored.

    Errors: AlnicoError where the best recipe itself, its base or a parent cannot be scored.
    """
    default = space.instantiate(space.default)
    base = default.base_model
    parents = [r for r in space.references if r != base]
    found: dict[str, dict[str, Score]] = {}
    notes = []
    with closing(open_maker()) as maker:
        for label, recipe in _rows(default, parents, best):
            try:
                subject = maker.make(recipe)
                found[label] = {h.task.name: h.task.evaluate(subject, h.examples) for h in tasks}
            except AlnicoError as error:
                if label not in (UNIFORM, DEFAULT):
                    raise
                notes.append(f"{label} is not in the report: {' '.join(error.args)}")
    scored = [h.task for h in tasks]
    of_best = _labels(best)
    card = scorecard(
        found, scored, base=base, merged=[label for label in found if label not in (base, *parents)]
    )
    differences = [d for d in card.differences if d.model in of_best]
    for label in of_best:
        for other in (UNIFORM, DEFAULT):
            if other in found:
                differences.append(
                    replace(paired(found[label], found[other], scored), model=label, other=other)
                )
    kept = {label: card.kept[label] for label in of_best if label in card.kept}
    return replace(card, differences=tuple(differences), kept=kept), tuple(notes)


def _labels(best: Sequence[Recipe]) -> list[str]:
    return [BEST] if len(best) == 1 else [f"{BEST}-{i + 1}" for i in range(min(len(best), MOST_BEST))]


def _rows(default: Recipe, parents: Sequence[str], best: Sequence[Recipe]) -> Iterator[tuple[str, Recipe]]:
    """What is scored, under its label: whole models by their references, then merges."""
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
    yield from zip(_labels(best), best, strict=False)
