"""Chooses the candidates of a soup: the best model of each cluster of categories in a table of scores."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from alnico.errors import EvaluationError, near_name
from alnico.evaluation.examples import read_text

ScoresLike = str | os.PathLike[str] | Mapping[str, Mapping[str, float]]
"""A CSV file, or the scores of each model by category."""

JOINED = 0.5
"""Without a number of clusters, clusters whose mean correlation is at least this are joined."""

LEAST_MODELS = 3
"""Two models correlate every pair of categories with 1 or -1."""

MOST_CATEGORIES = 1_000


@dataclass(frozen=True)
class CategoryScores:
    """Scores of models by category, higher is better; ``values`` is (models, categories) float64."""

    name: str
    models: tuple[str, ...]
    categories: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class CategoryCluster:
    """Categories that rank the models alike, and the model that is best in them."""

    categories: tuple[str, ...]
    expert: str
    scores: Mapping[str, float]
    """The scores of the expert in these categories."""
    lead: float
    """How far the expert's mean is above the next model's, in standard deviations of the categories over the models."""
    outside: float | None
    """The largest mean correlation with another cluster; None if there is one cluster."""

    def data(self) -> dict[str, Any]:
        return {
            "categories": list(self.categories),
            "expert": self.expert,
            "scores": dict(self.scores),
            "lead": self.lead,
            "correlation_outside": self.outside,
        }

    @property
    def reason(self) -> str:
        """Why the expert was chosen, on one line."""
        scores = ", ".join(f"{name} {score:.4g}" for name, score in self.scores.items())
        apart = (
            "" if self.outside is None else f"; correlation with other clusters at most {self.outside:.2f}"
        )
        return f"{self.expert} is best in {scores} (by {self.lead:.2f} standard deviations{apart})"


@dataclass(frozen=True)
class CategoryExperts:
    """The expert of each cluster. ``left_out`` are the categories in which all models have one score."""

    clusters: tuple[CategoryCluster, ...]
    left_out: tuple[str, ...]
    means: Mapping[str, float]
    """The mean score of each candidate over all categories."""

    @property
    def models(self) -> tuple[str, ...]:
        """The experts, each once."""
        return tuple(dict.fromkeys(cluster.expert for cluster in self.clusters))

    def data(self) -> dict[str, Any]:
        return {"clusters": [c.data() for c in self.clusters], "left_out": list(self.left_out)}


def choose_experts(
    scores: ScoresLike, candidates: Sequence[str], *, clusters: int | None = None
) -> CategoryExperts:
    """Return the best candidate of each cluster of categories that rank the models of a table alike.

    Categories are joined by their Pearson correlation over all models of the table (average linkage), until ``clusters``
    are left, or until no two clusters have a mean correlation of :data:`JOINED`. The expert of a cluster has the highest
    mean over its categories, each divided by its standard deviation.
    Errors: EvaluationError for a table that cannot be read, candidates that it lacks, and too many clusters.
    Source: Maiti et al. 2025, https://arxiv.org/abs/2511.13254. Differs from the source: there each category of a pair with a
    low correlation gets its own expert; here categories that rank the models alike share one.
    """
    table = _table(scores)
    rows = {candidate: _row(candidate, table) for candidate in candidates}
    spread = np.ptp(table.values, axis=0) > 0
    used = np.flatnonzero(spread)
    if not len(used):
        raise EvaluationError(
            f"{table.name}: all models have the same scores; expected scores that differ. Check the table."
        )
    if clusters is not None and not 1 <= clusters <= len(used):
        raise EvaluationError(
            f"clusters is {clusters}, and {table.name} has {len(used)} categories with scores that differ; expected 1 to "
            f"{len(used)}. Choose such a number."
        )
    values = table.values[:, used] - table.values[:, used].mean(0)
    values /= np.abs(values).max(0)  # no square of a score overflows
    values /= np.sqrt((values**2).mean(0))
    correlation = values.T @ values / len(values)
    groups = _clusters(correlation, clusters)
    chosen = []
    for group in groups:
        means = {candidate: float(values[row][group].mean()) for candidate, row in rows.items()}
        ranked = sorted(candidates, key=lambda c: -means[c])
        others = [float(correlation[np.ix_(group, other)].mean()) for other in groups if other is not group]
        chosen.append(
            CategoryCluster(
                tuple(table.categories[used[i]] for i in group),
                ranked[0],
                {table.categories[used[i]]: float(table.values[rows[ranked[0]], used[i]]) for i in group},
                means[ranked[0]] - means[ranked[1]],
                max(others, default=None),
            )
        )
    return CategoryExperts(
        tuple(chosen),
        tuple(name for name, differs in zip(table.categories, spread, strict=True) if not differs),
        {candidate: float(table.values[row].mean()) for candidate, row in rows.items()},
    )


def _clusters(correlation: np.ndarray, wanted: int | None) -> list[list[int]]:
    """Join the two groups with the highest mean correlation until ``wanted`` are left, or none is joined any more."""
    groups = [[i] for i in range(len(correlation))]
    sums = correlation.copy()  # of the correlations between the members of two groups
    sizes = np.ones(len(correlation))
    while len(groups) > (wanted or 1):
        means = sums / np.outer(sizes, sizes)
        means[np.tril_indices(len(groups))] = -np.inf
        first, second = np.unravel_index(int(np.argmax(means)), means.shape)
        if wanted is None and means[first, second] < JOINED:
            break
        groups[first] = sorted(groups[first] + groups.pop(second))
        sums[first] += sums[second]
        sums[:, first] += sums[:, second]
        sizes[first] += sizes[second]
        sums = np.delete(np.delete(sums, second, 0), second, 1)
        sizes = np.delete(sizes, second)
    return sorted(groups)


def _row(candidate: str, table: CategoryScores) -> int:
    """Return the row of a model: by the whole reference, or by its last part. Errors: EvaluationError."""
    if candidate in table.models:
        return table.models.index(candidate)
    last = PurePath(candidate).name
    found = [i for i, model in enumerate(table.models) if PurePath(model).name == last]
    if len(found) == 1:
        return found[0]
    if found:
        raise EvaluationError(
            f"{table.name}: {len(found)} rows are called {last}; expected one for the model {candidate}. Write the model in the "
            "table as it is given."
        )
    called = f", called {last}" if last != candidate else ""
    near = near_name(last, [PurePath(model).name for model in table.models])
    raise EvaluationError(
        f"{table.name}: has no row for the model {candidate}; expected one{called}. "
        f"{f'Did you mean {near!r}?' if near else 'Add its scores.'}"
    )


def _table(scores: ScoresLike) -> CategoryScores:
    """Read a table. Errors: EvaluationError."""
    if isinstance(scores, Mapping):
        wrong = next((model for model, row in scores.items() if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise EvaluationError(
                f"scores[{wrong!r}] is a {type(scores[wrong]).__name__}; expected a mapping from categories to scores. Write "
                '{"model": {"category": 0.5}}.'
            )
        categories = tuple(dict.fromkeys(name for row in scores.values() for name in row))
        listed = [(str(model), [row.get(name) for name in categories]) for model, row in scores.items()]
        return _checked("scores", categories, [(model, model, cells) for model, cells in listed])
    name = os.fspath(scores)
    text = read_text(name).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, str, Sequence[Any]]] = []
    try:
        header = next(reader, [])
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(header):
                raise EvaluationError(
                    f"{name}:{reader.line_num}: has {len(row)} columns; expected {len(header)}, those of the header: a model "
                    "and its score in each category. Correct the line."
                )
            rows.append((str(reader.line_num), row[0].strip(), row[1:]))
    except csv.Error as error:
        raise EvaluationError(
            f"{name}:{reader.line_num}: is not CSV ({error}); expected a header with categories, and one line per model. "
            "Correct the line."
        ) from None
    return _checked(name, tuple(c.strip() for c in header[1:]), rows)


def _checked(
    name: str, categories: tuple[str, ...], rows: Sequence[tuple[str, str, Sequence[Any]]]
) -> CategoryScores:
    """Return the table of rows: place, model and cells. Errors: EvaluationError."""
    twice = [c for i, c in enumerate(categories) if c in categories[:i] or not c]
    if twice or not 1 <= len(categories) <= MOST_CATEGORIES:
        found = (
            f"the category {twice[0]!r}" + " twice" * bool(twice[0])
            if twice
            else f"{len(categories)} categories"
        )
        raise EvaluationError(
            f"{name}: has {found}; expected 1 to {MOST_CATEGORIES:,} categories, each with another name. Correct the header: a "
            "column for the model, and one for each category."
        )
    models = tuple(model for _, model, _ in rows)
    for i, (place, model, _) in enumerate(rows):
        if model in models[:i]:
            raise EvaluationError(
                f"{name}:{place}: has the model {model!r} a second time; expected one line per model. Remove one."
            )
    if len(models) < LEAST_MODELS:
        raise EvaluationError(
            f"{name}: has {len(models)} model{'s' * (len(models) != 1)}; expected {LEAST_MODELS} or more: with fewer, correlations between categories mean "
            "nothing. Add scores of other models; they need not be candidates."
        )
    values = np.array(
        [[_number(name, row, c, cell) for c, cell in zip(categories, row[2], strict=True)] for row in rows]
    )
    return CategoryScores(name, models, categories, values)


def _number(name: str, row: tuple[str, str, Sequence[Any]], category: str, cell: Any) -> float:
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= 1e300:
        raise EvaluationError(
            f"{name}:{row[0]}: the score of {row[1]} in {category} is {str(cell)[:40]!r}; expected a number. Complete the table, or "
            "leave out the category."
        )
    return value
