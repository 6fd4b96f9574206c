"""Searches at random for the weights of models in a merge, with models and merges in memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alnico.devices import DEFAULT_DEVICE
from alnico.errors import MethodError, RecipeError
from alnico.evaluation.memory_subject import label_one
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import name_models
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.from_options import IN_PYTHON, in_words, recipe_of
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.tune.search.objective import MEAN, ObjectiveLike, objective_of
from alnico.tune.weight_trials import Weights, WeightSearch, check_trials, try_weights


@counts_compiling
@ieee_arithmetic()
def search_weights(
    models: Sequence[Any],
    score: TasksLike,
    *,
    simplex: bool = True,
    trials: int = 50,
    base: Any = None,
    method: str = "linear",
    low: float = 0.0,
    high: float = 1.0,
    concentration: float = 1.0,
    objective: ObjectiveLike = MEAN,
    minimize: bool | Sequence[str] = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
    missing: str = "error",
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    allow_code: bool = False,
    watch: Watcher | None = None,
    **options: Any,
) -> WeightSearch:
    """Try random weights of models in a merge and return the best.

    With ``simplex`` weights are at least 0 and sum to 1. The first trials are each model alone and the plain
    average; the others are drawn from a Dirichlet distribution, which is uniform over the simplex with a
    ``concentration`` of 1. Without it the first trial has the weight 1/n for each of n models, and the others
    draw each weight uniformly from [``low``, ``high``]. ``score`` is a function that takes the merge and
    returns a finite number, a dict of functions by name, or other tasks, as for :func:`alnico.evaluate`.
    Merges are modules if a model or the base is one, on a GPU if ``device`` means one; otherwise dicts of tensors.
    ``options`` are those of the method.

    ``result.weights`` are the best weights, ``result.module()`` is their merge and ``result.ranked`` has all
    trials, the best first. :func:`alnico.merge_models` with ``weights=result.weights`` makes the same merge,
    bit for bit. The best score of many trials is too high: score the merge on data that did not choose it.
    Each trial is reported to ``watch`` (:class:`alnico.events.ScaleTried`). A score that raises an exception,
    or is no finite number, is a failed trial; the fifth one ends the search.

    Options:
        models: The models: modules, dicts of tensors, paths and hub ids, lazy models, task vectors on the base.
        score: What scores a merge: a function, a dict of functions, a tasks file, or tasks.
        simplex: Whether weights are at least 0 and sum to 1.
        trials: Number of merges to try.
        base: The model that the others were tuned from, for methods that need one.
        method: Name of a merge method.
        low: Without simplex: the least weight.
        high: Without simplex: the greatest weight.
        concentration: With simplex: 1 is uniform, larger favours equal weights, smaller favours single models.
        objective: What to improve: mean (of all scores), the name of one score, or the weight of each in the mean.
        minimize: Scores of functions for which lower is better: True for all, or their names.
        names: Names of the models in results; default: their paths, or models[0], models[1] and so on.
        seed: Seed of the weights, and of random methods.
        missing: What to do with tensors that some models lack, as in recipes.
    Errors: RecipeError for invalid options, EvaluationError for scores; those of merging.

    >>> import numpy as np
    >>> first, second = ({"w": np.float32(v)} for v in ([1, 0], [0, 1]))
    >>> result = search_weights([first, second], lambda merge: -abs(merge["w"] - [0.75, 0.25]).sum(), trials=100)
    >>> abs(result.weights[0] - 0.75) < 0.01, [trial.weights for trial in result.trials[:3]]
    (True, [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
    """
    named = name_models(models, names=names)
    check_trials(trials, seed, low, high, "weights")
    if simplex and len(named) < 2:
        raise RecipeError(
            "models: there is 1; expected at least two for weights that sum to 1. Give more models."
        )
    if (
        isinstance(concentration, bool)
        or not isinstance(concentration, numbers.Real)
        or not 0 < concentration < math.inf
    ):
        raise RecipeError(f"concentration is {concentration!r}; expected a number above 0, such as 1.")
    tasks = as_tasks(score, allow_code=allow_code, minimize=minimize, argument="score")
    seeks = objective_of(tasks, objective, may_be_min=minimize is True)
    base_label = None if base is None else label_one(base, "base", named)
    every = named if base_label is None else {base_label: base, **named}

    def recipe(weights: Weights) -> Mapping[str, Any]:
        return recipe_of(
            list(named),
            base_label,
            "models",
            method,
            weights=weights,
            dtype=None,
            seed=int(seed),
            missing=missing,
            unrelated=unrelated,
            options=options,
        )

    random = np.random.default_rng(seed)
    if simplex:
        points = simplex_points(len(named), trials, concentration, random)
    else:
        points = range_points(len(named), trials, low, high, random)
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, device=device)
    placement = ModulePlacement.of(device).for_tasks(tasks)
    try:
        return try_weights(
            every,
            points,
            recipe,
            tasks,
            seeks,
            listed=list(named),
            base=base,
            run=run,
            watch=watch,
            placement=placement,
        )
    except (RecipeError, MethodError) as error:
        lines = (in_words(str(line), IN_PYTHON, options, list(named)) for line in error.args)
        raise type(error)(*lines) from None


def simplex_points(
    models: int, trials: int, concentration: float, random: np.random.Generator
) -> list[Weights]:
    """Return the corners, the uniform average, and Dirichlet draws.

    >>> [tuple(round(w, 2) for w in p) for p in simplex_points(2, 4, 1.0, np.random.default_rng(0))]
    [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.4, 0.6)]
    """
    points = [tuple(row) for row in np.eye(models).tolist()]
    points.append((1 / models,) * models)
    while len(points) < trials:
        points.append(tuple(random.dirichlet([concentration] * models).tolist()))
    return points[:trials]


def range_points(
    models: int, trials: int, low: float, high: float, random: np.random.Generator
) -> list[Weights]:
    """Return 1/n for each of n models, and uniform draws from a range."""
    drawn = [tuple(random.uniform(low, high, models).tolist()) for _ in range(trials)]
    return [(1 / models,) * models, *drawn[1:]]
