"""Holds the result of a search: its best recipes, trials, notes and report."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alnico.analysis.charts import inline_picture
from alnico.evaluation.scorecard import Scorecard
from alnico.models.memory_merge import MemoryMerge
from alnico.models.recipe_of_objects import BASE
from alnico.notebook import ResultTable, name_text, never_fails, result_html, result_line
from alnico.numerics.sizes import count_of
from alnico.recipe.reference import resolve_reference
from alnico.recipe.schema import Recipe
from alnico.tune.search.objective import Objective
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import SearchSettings

MOST_VALUES = 8
"""Values that were searched, in the table of a notebook: the most important ones."""


@dataclass(frozen=True)
class SearchResult:
    """The best recipe (or the recipes of the Pareto front, for several objectives) and all trials.

    ``recipes`` belong to the trials ``best``. ``report`` scores them next to the base, the parents, the uniform average,
    the default settings and ``random``, the best recipe with random vectors of the same norms, on examples that the search did not use; None if there are none.
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
    objects: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The models in memory, by the labels that the recipes name."""
    compile_seconds: float = field(default=0.0, compare=False)
    device: str = "cpu"
    dtype: str = "float32"
    """Where the trials of this run were scored, and in which dtype: ``own`` is the output dtype of the merges."""

    @property
    def recipe(self) -> Recipe:
        """The best recipe; for a Pareto front, the best in the first objective."""
        return self.recipes[0]

    def module(self) -> Any:
        """Return the merge of the best recipe as a module: a copy of the base or of the first module.

        Errors: RecipeError if no model is a module; those of merging.
        """
        return self._merge().module()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of the merge of the best recipe. Errors: those of merging."""
        return self._merge().state_dict()

    def _merge(self) -> MemoryMerge:
        models = {
            r: resolve_reference(r, self.recipe.folder)
            for r in self.recipe.references
            if r not in self.objects
        }
        every = {r: self.objects.get(r, models.get(r)) for r in (*self.objects, *models)}
        return MemoryMerge(every, self.recipe, self.objects.get(BASE))

    @property
    def counts(self) -> dict[str, int]:
        """The number of trials by state."""
        return dict(Counter(t.state for t in self.trials))

    def plot(
        self,
        name: str = "history",
        *,
        objective: str | None = None,
        value: str | None = None,
        figsize: tuple[float, float] | None = None,
        ax: Any = None,
        dark: bool = False,
    ) -> Any:
        """Draw a picture and return it as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        ``name`` is ``history`` (each trial, and the best so far), ``front`` (two objectives, with the Pareto front),
        ``importance``, ``values`` (the objective against each value that was searched, or one ``value``), ``parallel``
        (one line per trial through all values) or ``windows`` (a heat map of the windows of layers that were repeated).
        ``objective`` is the name of one of several, by default the first.
        ``figsize`` is in inches; ``ax`` are axes to draw in; ``dark`` takes the colours of the dark page. Needs the extra
        ``[report]``. Errors: AlnicoError, also for an unknown name.
        """
        from alnico.tune.search.pictures import plot_search

        return plot_search(self, name, objective=objective, value=value, figsize=figsize, ax=ax, dark=dark)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {state}" for state, count in self.counts.items())
        best = self.best[0] if self.best else None
        values = () if best is None else zip(self.objectives, best.values, strict=False)
        return result_line(
            f"search with {count_of(len(self.trials), 'trial')} ({counts})",
            ""
            if best is None
            else f"best trial {best.number}: {', '.join(f'{o.name} {v:.4g}' for o, v in values)}",
            "" if len(self.best) < 2 else f"{len(self.best):,} trials on the front",
        )

    @never_fails
    def _repr_html_(self) -> str:
        names = sorted(self.dimensions, key=lambda n: -self.importances.get(n, 0.0))[:MOST_VALUES]
        rows = [[t.number, *t.values, *(t.point.get(n) for n in names)] for t in self.best]

        from alnico.tune.search.pictures import plot_search

        draw = functools.partial(plot_search, self, "history", figsize=(6.4, 3.2))
        return result_html(
            f"Search: {name_text(self.name)}",
            ResultTable(
                ("trial", *(o.name for o in self.objectives), *names),
                rows,
                "The best" if len(rows) == 1 else "The Pareto front",
            ),
            *self.notes,
            facts=[
                ("sampler", self.settings.sampler),
                ("seed", self.settings.seed),
                ("device", self.device),
                ("dtype", self.dtype),
                ("trials", len(self.trials)),
                *self.counts.items(),
            ],
            picture=inline_picture(
                lambda theme: draw(dark=theme), "Points: the value of each trial, and the best so far"
            ),
        )

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "search": self.name,
            "objectives": [{"name": o.name, "goal": o.goal, "tasks": dict(o.tasks)} for o in self.objectives],
            "sampler": self.settings.sampler,
            "seed": self.settings.seed,
            "device": self.device,
            "dtype": self.dtype,
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
