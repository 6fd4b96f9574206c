"""The rows of the tables: each way to merge, and what of it is chosen on the validation part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quality.bench import say
from quality_decoder.bench import Bench, Measured, Models

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One recipe of a way, and what makes it differ from the others."""

    recipe: Recipe
    setting: str = ""


@dataclass(frozen=True)
class Way:
    """One row: its candidates for some models. Of several, the one that is most accurate on validation is taken."""

    name: str
    candidates: Callable[[Bench, Models], Sequence[Candidate]]


@dataclass(frozen=True)
class Row:
    """What a way came to for some models."""

    name: str
    setting: str
    measured: Measured
    tried: int
    """Models that were scored on the validation part; 0 if nothing was chosen."""
    recipe: Recipe


SHARES = (1.0, 0.7, 0.4)
"""Of their task vectors, at which the specialists are scored."""


def one(
    method: str, setting: str = "", base: bool = True, **parameters: Any
) -> Callable[..., Sequence[Candidate]]:
    """Take a method as it is."""
    return lambda bench, models: [Candidate(bench.recipe(models, method, base, **parameters), setting)]


def scales(method: str, values: Sequence[float], **parameters: Any) -> Callable[..., Sequence[Candidate]]:
    """Try a method at several scales."""
    return lambda bench, models: [
        Candidate(bench.recipe(models, method, scale=scale, **parameters), f"scale {scale}")
        for scale in values
    ]


def ties(bench: Bench, models: Models) -> Sequence[Candidate]:
    """Try TIES at densities and scales around those that are best for the encoder of docs/quality.md."""
    return [
        Candidate(
            bench.recipe(models, "ties", density=density, scale=scale), f"density {density}, scale {scale}"
        )
        for density, scale in ((0.2, 1.0), (0.2, 1.5), (0.2, 2.0), (0.5, 1.0))
    ]


def untouched(_bench: Bench, models: Models) -> Sequence[Candidate]:
    """Take the base."""
    return [Candidate(alone(models.folder("base")))]


def alone(model: str) -> Recipe:
    """Return the recipe that is one model as it is."""
    return {"merge_method": "passthrough", "models": [{"model": model}]}


ARITHMETIC = Way("task arithmetic", scales("task_arithmetic", (0.3, 0.45, 0.6, 0.75, 0.9)))
"""The row that all others are compared with."""
TSV = Way("tsv", one("tsv"))
PUBLISHED = Way("tsv as published", one("tsv", "preset paper, scale 1", preset="paper"))
TUNED = Way("tsv, scale tuned", scales("tsv", (0.55, 0.7, 0.85, 1.0)))
WAYS = (
    Way("base", untouched),
    Way("average", one("linear", base=False)),
    ARITHMETIC,
    Way("ties", ties),
    TSV,
    PUBLISHED,
    TUNED,
    Way("tsv, a quarter of the rank", one("tsv", "rank 0.25", rank=0.25)),
    Way("dc_merge", one("dc_merge")),
)
"""The rows for all four specialists."""


def take(bench: Bench, models: Models, way: Way) -> Row:
    """Choose on validation where there is something to choose, and measure the test part."""
    candidates = way.candidates(bench, models)
    best = candidates[0]
    if len(candidates) > 1:
        scored = [bench.score(candidate.recipe, "validation", models).mean for candidate in candidates]
        best = candidates[scored.index(max(scored))]
    measured = bench.score(best.recipe, "test", models)
    say(
        f"{' + '.join(models.tasks)} {models.variant}: {way.name} {best.setting}: {measured.mean:.4f}, loss {measured.loss:.3f}"
    )
    return Row(way.name, best.setting, measured, len(candidates) if len(candidates) > 1 else 0, best.recipe)


def specialists(bench: Bench, models: Models, share: float = 1.0) -> Row:
    """Measure each specialist on its own task, with its whole task vector or a share of it."""
    own = []
    for task in models.tasks:
        it = Models((task,), models.variant)
        recipe = alone(it.folder(task)) if share == 1 else bench.recipe(it, "task_arithmetic", scale=share)
        own.append(bench.score(recipe, "test", it))
    return Row(
        "specialists" if share == 1 else f"specialists at {share}",
        "each on its own task" if share == 1 else f"{share} of each task vector",
        Measured(
            {task: found.right[task] for task, found in zip(models.tasks, own, strict=True)},
            {task: found.losses[task] for task, found in zip(models.tasks, own, strict=True)},
            0.0,
        ),
        0,
        {},
    )


def measure_all(
    bench: Bench, models: Models, ways: Sequence[Way], shares: Sequence[float] = (1.0,)
) -> dict[str, Row]:
    """Make the rows of some models, the specialists first: with their whole task vectors, and with shares of them."""
    bench.open(models)
    made = [
        *(specialists(bench, models, share) for share in shares),
        *(take(bench, models, way) for way in ways),
    ]
    return {row.name: row for row in made}
