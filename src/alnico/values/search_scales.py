"""A random search of how much of each task vector a merge should have: a few lines for who has models in memory and a score."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import is_torch_module
from alnico.engine.merge_session import Resident
from alnico.engine.relatedness import IN_PYTHON
from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.tasks import checked_value, evaluation_failed
from alnico.events import ScaleTried, Watcher
from alnico.numerics.arithmetic import callers_arithmetic, ieee_arithmetic
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from alnico.values.merge import recipe_of
from alnico.values.models import fill, named, open_models, plain_copy

MOST_FAILURES = 5
"""Evaluations that may fail before the search gives up."""


@dataclass(frozen=True)
class ScaleTrial:
    """One merge that was tried; ``failure`` says why it has no score."""

    scales: tuple[float, ...]
    score: float | None
    failure: str = ""


@dataclass(frozen=True)
class ScaleSearch:
    """The best scales, one for each model, and all that was tried, in order."""

    scales: tuple[float, ...]
    score: float
    trials: tuple[ScaleTrial, ...]


@ieee_arithmetic()
def search_scales(
    base: Any,
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    trials: int = 20,
    *,
    low: float = 0.0,
    high: float = 1.0,
    minimize: bool = False,
    seed: int = 0,
    unrelated: str = "error",
    threads: int | None = None,
    watch: Watcher | None = None,
) -> ScaleSearch:
    """Try random scales of task vectors and return the best: ``base + sum_i scale_i * (model_i - base)``.

    ``base`` and ``models`` are modules, dicts of tensors or paths. ``evaluate`` gets the merge and returns a finite number, of which
    more is better unless ``minimize`` says otherwise: a module like ``base`` if that is one (a copy, the same object each time), else a
    dict of tensors, in memory that the next trial takes. The first trial has the scale 1/n for all n models, which is their mean;
    the others draw each scale evenly from [``low``, ``high``]. What is found is made again, bit for bit, by
    ``alnico.merge_models(models, "task_arithmetic", base=base, weights=found.scales)`` or a recipe with these weights.

    The score of the best of many is too good: score the merge on data that did not choose it. Each trial is told to ``watch``. An
    evaluation that raises, or gives no finite number, is a failed trial; after five of them the search ends.
    For more than scales, or a study that can be taken up again: ``alnico.search``.

    Models that were not tuned from ``base`` are refused, unless ``unrelated="allow"``.

    Errors: RecipeError for options that cannot be, EvaluationError for evaluations that fail too often; those of merging.

    >>> import numpy as np
    >>> base, one, other = ({"w": np.array(v, np.float32)} for v in ([0, 0], [1, 0], [0, 1]))
    >>> found = search_scales(base, [one, other], lambda made: abs(made["w"] - [0.5, 0.5]).sum(), minimize=True)
    >>> found.scales, found.score
    ((0.5, 0.5), 0.0)
    """
    _check(models, trials, low, high, seed)
    random = np.random.default_rng(seed)
    references = [f"models[{i}]" for i in range(len(models))]
    opened = open_models({"base": base, **dict(zip(references, models, strict=True))})
    module = plain_copy(base) if is_torch_module(base) else None
    sign = -1.0 if minimize else 1.0
    done: list[ScaleTrial] = []
    try:
        with Resident(
            opened.sources.__getitem__, run=RunOptions.of(threads=threads), caller=IN_PYTHON
        ) as resident:
            for number in range(trials):
                drawn = random.uniform(low, high, len(models))
                scales = tuple((np.full(len(models), 1 / len(models)) if number == 0 else drawn).tolist())
                asked = recipe_of(
                    references,
                    "base",
                    "models",
                    "task_arithmetic",
                    weights=scales,
                    dtype=None,
                    seed=0,
                    missing="error",
                    unrelated=unrelated,
                    options={},
                )
                plan = resident.plan(load_recipe(asked))
                state = named(opened, plan, resident.merge(plan))
                if module is not None:
                    fill(module, state)
                done.append(_tried(evaluate, state if module is None else module, scales, number))
                if watch is not None:
                    watch(ScaleTried(done[-1], trials))
                _check_failures(done)
    finally:
        opened.close()
    scored = [(sign * trial.score, trial) for trial in done if trial.score is not None]
    if not scored:
        raise EvaluationError(f"all {trials} trials failed; {done[0].failure}")
    best = max(scored, key=lambda one: one[0])[1]
    assert best.score is not None
    return ScaleSearch(best.scales, best.score, tuple(done))


def _tried(
    evaluate: Callable[[Any], float], merged: Any, scales: tuple[float, ...], number: int
) -> ScaleTrial:
    where = f"trial {number}"
    try:
        with callers_arithmetic():
            value = evaluate(merged)
    except Exception as error:  # whatever the caller's function raises is its failure
        return ScaleTrial(scales, None, str(evaluation_failed(where, error)))
    try:
        return ScaleTrial(scales, checked_value(value, where))
    except EvaluationError as error:
        return ScaleTrial(scales, None, str(error))


def _check_failures(done: Sequence[ScaleTrial]) -> None:
    failed = [trial for trial in done if trial.score is None]
    if len(failed) >= MOST_FAILURES:
        raise EvaluationError(f"{len(failed)} of {len(done)} trials failed; the last: {failed[-1].failure}")


def _check(models: Sequence[Any], trials: int, low: float, high: float, seed: int) -> None:
    if isinstance(models, (str, Mapping)) or not isinstance(models, Sequence) or not models:
        raise RecipeError("models: expected a list of one model at least, beside the base.")
    if not isinstance(trials, numbers.Integral) or trials < 1:
        raise RecipeError(
            f"trials is {trials!r}; expected {'1 at least' if isinstance(trials, int) else 'a whole number'}."
        )
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise RecipeError(f"seed is {seed!r}; expected a whole number of 0 at least.")
    if not isinstance(low, numbers.Real) or not isinstance(high, numbers.Real):
        raise RecipeError(f"scales from {low!r} to {high!r}; expected two numbers, low below high.")
    try:
        is_range = math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)
    except OverflowError:  # of whole numbers of hundreds of digits
        raise RecipeError("scales are beyond float64; expected two numbers, low below high.") from None
    if not is_range:
        raise RecipeError(f"scales from {low:g} to {high:g}; expected two numbers, low below high.")
