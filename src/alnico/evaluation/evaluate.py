"""Scores models on tasks, and writes the scorecard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from alnico.checkpoint.reference import Paths
from alnico.devices import DEFAULT_DEVICE
from alnico.evaluation.memory_subject import is_alone, label_models, label_one, subjects_of, template_among
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.scorecard import Scorecard, check_once, score_models
from alnico.evaluation.scorecard_page import scorecard_folder, write_scorecard
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic


@counts_compiling
@ieee_arithmetic()
def evaluate(
    models: Paths | Sequence[Any] = (),
    tasks: TasksLike = (),
    *,
    base: Any = None,
    merged: Paths | Sequence[Any] = (),
    names: Sequence[str] | None = None,
    minimize: bool | Sequence[str] = False,
    out: str | os.PathLike[str] | None = None,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> Scorecard:
    """Score models on tasks, with intervals; compare merges with their parents and the base.

    Models are loaded one after another, on the processor or on a GPU. With ``cuda:all`` a model that no GPU has room
    for is spread over all of them; any other is scored on the first GPU with room. If a task is a function of yours,
    ``auto`` leaves modules where they are; a device that you name moves them. A model that is a subject stays where its
    module is. ``models`` are the parents of the ``merged`` ones and may contain the
    base and the merges again. In Python a model may be in memory: a module, a dict of tensors, a lazy model, or
    a task vector, which counts as ``tau.on(base)``; and ``tasks`` may be a function that scores a model, a dict
    of functions by name, or a list of functions and tasks. A function receives a copy of the module in
    evaluation mode; if no model is a module, the dict of tensors. A model may also be a subject, such as
    ``alnico.evaluation.loaded_model.ModuleSubject`` for a module with its tokenizer. With ``out`` the folder gets
    ``evaluation.json`` and, if the extra ``[report]`` is installed, ``report.html``. ``watch`` receives each score
    (:class:`alnico.events.Scored`).

    Options:
        models: Models: transformers checkpoints, URLs, or owner/name@revision on the hub; for functions of your own
            also folders or files that hold only weights.
        tasks: YAML file of the tasks.
        base: The model that the others were tuned from.
        merged: A merge of the models, compared with each of them and with the base; may be repeated.
        names: Names of the models in results; default: their paths, or models[0], models[1] and so on.
        minimize: Scores of functions for which lower is better: True for all, or their names.
        out: Folder for the JSON and the page.
        allow_code: Allow the tasks file to run code: functions, and task folders of the harness. Use it only
            if you trust its author.
    Errors: EvaluationError, ModelError, RecipeError, HubError, OutputError; ResourceError for a device that does
        not exist or is too small.

    >>> import numpy as np
    >>> a, b = {"w": np.float32([1, 2])}, {"w": np.float32([3, 4])}
    >>> card = evaluate([a, b], {"sum": lambda state: state["w"].sum()}, names=["a", "b"])
    >>> [(model.name, model.scores["sum"].value) for model in card.models]
    [('a', 3.0), ('b', 7.0)]
    """
    placement = ModulePlacement.of(device, dtype)
    read = as_tasks(tasks, allow_code=allow_code, minimize=minimize)
    placement = placement.for_tasks(read)
    folder = None if out is None else scorecard_folder(out)
    given = {} if _is_empty(models) else label_models(models, "models", names)
    of_base = {} if base is None else {label_one(base, "base", given): base}
    if is_alone(merged):
        of_merged = {label_one(merged, "merged", given): merged}
    else:
        of_merged = {} if _is_empty(merged) else label_models(merged, "merged")
    parents = {label: model for label, model in given.items() if label not in {*of_base, *of_merged}}
    check_once([*of_base, *parents, *of_merged])
    everything = of_base | parents | of_merged
    waiting = subjects_of(
        everything,
        template=template_among(everything),
        base=base,
        offline=offline,
        placement=placement,
        watch=watch,
    )
    card = score_models(
        (waiting.pop(0) for _ in range(len(waiting))),
        read,
        base=next(iter(of_base), None),
        merged=list(of_merged),
        watch=watch,
        placement=placement,
    )
    if folder is not None:
        write_scorecard(card, folder)
    return card


def _is_empty(models: Any) -> bool:
    return isinstance(models, (list, tuple)) and not models
