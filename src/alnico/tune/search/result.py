"""Holds the result of a search: its best recipes, trials, notes and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alnico.evaluation.scorecard import Scorecard
from alnico.recipe.schema import Recipe
from alnico.tune.search.objective import Objective
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import SearchSettings


@dataclass(frozen=True)
class SearchResult:
    """The best recipe (or the recipes of the Pareto front, for several objectives) and all trials.

    ``recipes`` belong to the trials ``best``. ``report`` scores them next to the base, the parents, the uniform average
    and the default settings, on examples that the search did not use; None if there are none.
    """

    name: str
    recipes: tuple[Recipe, ...]
    best: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    objectives: tuple[Objective, ...]
    dimensions: tuple[str, ...]
    settings: SearchSettings
    importances: Mapping[str, float] = field(default_factory=dict)
    report: Scorecard | None = None
    notes: tuple[str, ...] = ()
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def recipe(self) -> Recipe:
        """The best recipe; for a Pareto front, the best in the first objective."""
        return self.recipes[0]

    @property
    def counts(self) -> dict[str, int]:
        """The number of trials by state."""
        return dict(Counter(t.state for t in self.trials))

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "search": self.name,
            "objectives": [{"name": o.name, "goal": o.goal, "tasks": dict(o.tasks)} for o in self.objectives],
            "sampler": self.settings.sampler,
            "seed": self.settings.seed,
            "counts": self.counts,
            "best": [
                {**trial_data(trial, self.objectives), "recipe": recipe.text}
                for trial, recipe in zip(self.best, self.recipes, strict=True)
            ],
            "importances": dict(self.importances),
            "report": None if self.report is None else self.report.data(),
            "notes": list(self.notes),
            "trials": [trial_data(trial, self.objectives) for trial in self.trials],
        }


def trial_data(trial: Trial, objectives: tuple[Objective, ...]) -> dict[str, Any]:
    """Return a trial as plain data."""
    return {
        "trial": trial.number,
        "state": trial.state,
        "values": dict(zip((o.name for o in objectives), trial.values, strict=False)),
        "scores": dict(trial.scores),
        "point": dict(trial.point),
        "rungs": list(trial.rungs),
        "seconds": trial.seconds,
        "reason": trial.reason,
    }
