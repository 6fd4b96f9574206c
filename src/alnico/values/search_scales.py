"""Searches at random for the scale of each model's task vector, with models and merges in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alnico.devices import DEFAULT_DEVICE
from alnico.evaluation.memory_subject import label_one
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import name_models
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.from_options import recipe_of
from alnico.run_options import RunOptions
from alnico.tune.search.objective import MEAN, ObjectiveLike, objective_of
from alnico.tune.search_weights import range_points
from alnico.tune.weight_trials import Weights, WeightSearch, check_trials, try_weights

ScaleSearch = WeightSearch
"""The result of a search for scales: ``scales`` are its weights."""


@counts_compiling
@ieee_arithmetic()
def search_scales(
    base: Any,
    models: Sequence[Any],
    evaluate: Callable[[Any], float] | TasksLike,
    trials: int = 20,
    *,
    low: float = 0.0,
    high: float = 1.0,
    minimize: bool | Sequence[str] = False,
    objective: ObjectiveLike = MEAN,
    names: Sequence[str] | None = None,
    seed: int = 0,
    unrelated: str = "error",
    threads: int | None = None,
    device: Any = DEFAULT_DEVICE,
    watch: Watcher | None = None,
) -> ScaleSearch:
    """Try random scales of task vectors and return the best: ``base + sum_i scale_i * (model_i - base)``.

    ``base`` and ``models`` are modules, dicts of tensors, paths or other objects in memory. ``evaluate`` gets the
    merge and returns a finite number; more is better, unless ``minimize`` is set. It may also be a dict of
    functions by name: their mean counts, or what ``objective`` says, as for :func:`alnico.search_weights`. The
    merge is a module if the base or a model is one: a copy of the first one, the same each time, in evaluation
    mode, on a GPU if ``device`` means one; otherwise it is a dict of tensors. The first trial has the scale 1/n
    for each of n models, which gives their mean; the others draw each scale uniformly from [``low``, ``high``]. ``result.trials`` are in the order
    in which they were tried, ``result.ranked`` has the best first, and ``result.module()`` is the best merge. To
    make it again, bit for bit, pass ``weights=result.scales`` to :func:`alnico.merge_models` with the method
    ``task_arithmetic`` and the same ``base``, or put these weights into a recipe.

    The best score of many trials is too high: score the merge on data that was not used to choose it. Each
    trial is reported to ``watch``. An evaluation that raises, or returns no finite number, is a failed trial;
    the fifth one ends the search. To search more than scales, or to resume a study: ``alnico.search``. To
    search weights that sum to 1: ``alnico.search_weights``.

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
    check_trials(trials, seed, low, high, "scales")
    named = name_models(models, names=names)
    tasks = as_tasks(evaluate, minimize=minimize, argument="evaluate")
    seeks = objective_of(tasks, objective, may_be_min=minimize is True)
    base_label = label_one(base, "base", named)

    def recipe(scales: Weights) -> Mapping[str, Any]:
        return recipe_of(
            list(named),
            base_label,
            "models",
            "task_arithmetic",
            weights=scales,
            dtype=None,
            seed=0,
            missing="error",
            unrelated=unrelated,
            options={},
        )

    points = range_points(len(named), trials, low, high, np.random.default_rng(seed))
    return try_weights(
        {base_label: base, **named},
        points,
        recipe,
        tasks,
        seeks,
        listed=list(named),
        base=base,
        run=RunOptions.of(threads=threads, device=device),
        watch=watch,
        placement=ModulePlacement.of(device).for_tasks(tasks),
    )
