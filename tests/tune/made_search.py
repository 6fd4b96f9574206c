"""A search without models: what is made of a recipe is its numbers, and tasks are formulas of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alnico.evaluation.tasks import Goal, Score
from alnico.recipe.schema import Recipe
from alnico.tune.search.fingerprint import Identity, tasks_data
from alnico.tune.search.objective import objectives_of
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import SearchSettings, read_search
from alnico.tune.search.space import SearchSpace
from alnico.tune.search.study import Study
from alnico.tune.search.trials import run_trials
from alnico.tune.search.workers import InProcessWorker, WorkerSpec

RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - model: code
    parameters: {weight: {search: [0.0, 1.5]}}
  - model: math
    parameters: {weight: {search: [0.0, 1.5]}}
parameters: {lambda: {search: [0.3, 2.0]}}
"""


class Made:
    """A recipe's numbers, where a model would be."""

    def __init__(self, recipe: Recipe) -> None:
        self.label = "made"
        self.recipe = recipe
        self.weights = [float(e.parameters.get("weight", 1.0)) for e in recipe.models]  # type: ignore[arg-type]
        self.scale = float(recipe.parameters.get("lambda", 1.0))  # type: ignore[arg-type]

    @property
    def directory(self) -> Path:
        raise NotImplementedError

    def module(self, kind: Any) -> Any:
        return self

    def tokenizer(self) -> Any:
        raise NotImplementedError


class Maker:
    """Makes :class:`Made`, and remembers for whom."""

    def __init__(self) -> None:
        self.made: list[Recipe] = []

    def make(self, recipe: Recipe, *, label: str | None = None) -> Any:
        self.made.append(recipe)
        return Made(recipe)

    def source(self, reference: str) -> Any:
        raise NotImplementedError

    def add(self, reference: str, open_source: Callable[[], Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def near(made: Made) -> float:
    """Best, 0, at weights of 0.9 and 0.4 and a scale of 1.1."""
    wanted = np.array([0.9, 0.4, 1.1])
    return -float(((np.array([*made.weights, made.scale]) - wanted) ** 2).sum())


class Formula:
    """A task whose score of every example is a number of the recipe; example i adds ``spread * (-1)**i``."""

    def __init__(
        self,
        name: str = "near",
        score: Callable[[Made], Any] = near,
        goal: Goal = "max",
        size: int = 8,
        spread: float = 0.0,
    ) -> None:
        self.name, self.score, self.goal, self.size, self.spread, self.weight = (
            name,
            score,
            goal,
            size,
            spread,
            1.0,
        )
        self.asked: list[list[int]] = []

    def evaluate(self, subject: Any, examples: Sequence[int] | None = None) -> Score:
        chosen = list(range(self.size) if examples is None else examples)
        self.asked.append(chosen)
        value = self.score(subject)
        if not isinstance(value, float):
            return value  # type: ignore[no-any-return]
        each = np.array([value + self.spread * (-1) ** i for i in chosen] or [value])
        return Score(float(each.mean()), each)

    def pooled(self, scores: Sequence[Score]) -> Score:
        each = np.concatenate([s.examples for s in scores if s.examples is not None])
        return Score(float(each.mean()), each)

    def digests(self) -> frozenset[str]:
        return frozenset(f"{self.name}{i}" for i in range(self.size))


def settings_of(keys: str, recipe: str = RECIPE) -> tuple[SearchSpace, SearchSettings]:
    return read_search(f"{recipe}search: {{{keys}}}\n")


def searched(
    keys: str,
    tasks: Sequence[Any] | None = None,
    storage: str | None = None,
    recipe: str = RECIPE,
    watch: Any = None,
) -> tuple[Trial, ...]:
    """Run a search in this process, without models; returns its trials."""
    space, settings = settings_of(keys, recipe)
    given = tuple(tasks or [Formula()])
    shares = settings.halving.shares() if settings.halving is not None else (1.0,)
    worker = InProcessWorker(WorkerSpec(space, given, shares, settings.held_out, lambda _: Maker()))
    with opened(space, settings, given, storage) as study:
        run_trials(space, settings, objectives_of(settings.objective, given), study, [worker], watch)
        return study.trials()


def opened(space: SearchSpace, settings: SearchSettings, tasks: Sequence[Any], storage: str | None) -> Study:
    goals = [o.goal for o in objectives_of(settings.objective, tasks)]
    return Study(
        storage,
        settings.study,
        space.dimensions,
        goals,
        Identity(space.data(), settings.data(), tasks_data(tasks)),
    )
