"""Searches at random for the scale of each model's task vector, with models and merges in memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import is_torch_module
from alnico.engine.merge_session import Resident
from alnico.engine.relatedness import IN_PYTHON
from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.tasks import checked_value, evaluation_failed
from alnico.events import ScaleTried, Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import fill, name_tensors, open_models, plain_copy
from alnico.numerics.arithmetic import callers_arithmetic, ieee_arithmetic
from alnico.recipe.from_options import recipe_of
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions

MOST_FAILURES = 5
"""Number of failed evaluations that ends the search."""


@dataclass(frozen=True)
class ScaleTrial:
    """One merge and its score; ``failure`` says why it has none."""

    scales: tuple[float, ...]
    score: float | None
    failure: str = ""


@dataclass(frozen=True)
class ScaleSearch:
    """The best scales, one per model, and all trials in order."""

    scales: tuple[float, ...]
    score: float
    trials: tuple[ScaleTrial, ...]
    compile_seconds: float = field(default=0.0, compare=False)


@counts_compiling
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

    ``base`` and ``models`` are modules, dicts of tensors or paths. ``evaluate`` gets the merge and returns a
    finite number; more is better, unless ``minimize`` is set. If ``base`` is a module, the merge is a module
    like it (the same copy each time); otherwise it is a dict of tensors, in memory that the next trial
    overwrites. The first trial has the scale 1/n for each of n models, which gives their mean; the others
    draw each scale uniformly from [``low``, ``high``]. To make the best merge again, bit for bit, pass
    ``weights=result.scales`` to :func:`alnico.merge_models` with the method ``task_arithmetic`` and the same
    ``base``, or put these weights into a recipe.

    The best score of many trials is too high: score the merge on data that was not used to choose it. Each
    trial is reported to ``watch``. An evaluation that raises, or returns no finite number, is a failed trial;
    the fifth one ends the search. To search more than scales, or to resume a study: ``alnico.search``.

    Models that were not tuned from ``base`` are refused, unless ``unrelated="allow"``.

    Errors: RecipeError for invalid options, EvaluationError for too many failed evaluations; those of
    merging.

    >>> import numpy as np
    >>> base, first, second = ({"w": np.array(v, np.float32)} for v in ([0, 0], [1, 0], [0, 1]))
    >>> def distance(merge):
    ...     return abs(merge["w"] - [0.5, 0.5]).sum()
    >>> result = search_scales(base, [first, second], distance, minimize=True)
    >>> result.scales, result.score
    ((0.5, 0.5), 0.0)
    """
    _check(models, trials, low, high, seed)
    random = np.random.default_rng(seed)
    references = [f"models[{i}]" for i in range(len(models))]
    opened = open_models({"base": base, **dict(zip(references, models, strict=True))})
    module = plain_copy(base) if is_torch_module(base) else None
    sign = -1.0 if minimize else 1.0
    tried: list[ScaleTrial] = []
    try:
        with Resident(
            opened.sources.__getitem__, run=RunOptions.of(threads=threads), caller=IN_PYTHON
        ) as resident:
            for number in range(trials):
                drawn = random.uniform(low, high, len(models))
                scales = tuple((np.full(len(models), 1 / len(models)) if number == 0 else drawn).tolist())
                recipe = recipe_of(
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
                plan = resident.plan(load_recipe(recipe))
                state = name_tensors(opened, plan, resident.merge(plan))
                if module is not None:
                    fill(module, state)
                tried.append(_run_trial(evaluate, state if module is None else module, scales, number))
                if watch is not None:
                    watch(ScaleTried(tried[-1], trials))
                _check_failures(tried)
    finally:
        opened.close()
    scored = [(sign * trial.score, trial) for trial in tried if trial.score is not None]
    if not scored:
        raise EvaluationError(f"all {trials} trials failed; {tried[0].failure}")
    best = max(scored, key=lambda pair: pair[0])[1]
    assert best.score is not None
    return ScaleSearch(best.scales, best.score, tuple(tried))


def _run_trial(
    evaluate: Callable[[Any], float], merged: Any, scales: tuple[float, ...], number: int
) -> ScaleTrial:
    where = f"trial {number}"
    try:
        with callers_arithmetic():
            value = evaluate(merged)
    except Exception as error:  # any exception of the caller's function is a failed trial
        return ScaleTrial(scales, None, str(evaluation_failed(where, error)))
    try:
        return ScaleTrial(scales, checked_value(value, where))
    except EvaluationError as error:
        return ScaleTrial(scales, None, str(error))


def _check_failures(trials: Sequence[ScaleTrial]) -> None:
    failed = [trial for trial in trials if trial.score is None]
    if len(failed) >= MOST_FAILURES:
        raise EvaluationError(f"{len(failed)} of {len(trials)} trials failed; the last: {failed[-1].failure}")


def _check(models: Sequence[Any], trials: int, low: float, high: float, seed: int) -> None:
    if isinstance(models, (str, Mapping)) or not isinstance(models, Sequence) or not models:
        raise RecipeError("models: expected a list of at least one model, in addition to the base.")
    if not isinstance(trials, numbers.Integral) or trials < 1:
        raise RecipeError(
            f"trials is {trials!r}; expected {'at least 1' if isinstance(trials, int) else 'a whole number'}."
        )
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise RecipeError(f"seed is {seed!r}; expected a whole number, at least 0.")
    if not isinstance(low, numbers.Real) or not isinstance(high, numbers.Real):
        raise RecipeError(f"scales from {low!r} to {high!r}; expected two numbers, low below high.")
    try:
        is_range = math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)
    except OverflowError:  # for whole numbers of hundreds of digits
        raise RecipeError("scales are beyond float64; expected two numbers, low below high.") from None
    if not is_range:
        raise RecipeError(f"scales from {low:g} to {high:g}; expected two numbers, low below high.")
