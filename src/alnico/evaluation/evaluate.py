"""Scores models on tasks, and writes the scorecard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from alnico.checkpoint.reference import Paths
from alnico.evaluation.loaded_model import open_subject
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
    out: str | os.PathLike[str] | None = None,
    offline: bool = False,
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> Scorecard:
    """Score models on tasks, with intervals; compare merges with their parents and the base.

    Models are loaded one after another. ``models`` are the parents of the ``merged`` ones and may contain the
    base and the merges again. In Python a model may also be a subject, such as
    ``alnico.evaluation.loaded_model.ModuleSubject`` for a module in memory, and ``tasks`` may be a mapping or
    a list of tasks. With ``out`` the folder gets ``evaluation.json`` and, if the extra ``[report]`` is installed,
    ``report.html``. ``watch`` receives each score (:class:`alnico.events.Scored`).

    Options:
        models: Models: transformers checkpoints, or owner/name@revision on the hub; for functions of your own
            also folders or files that hold only weights.
        tasks: YAML file of the tasks.
        base: The model that the others were tuned from.
        merged: A merge of the models, compared with each of them and with the base; may be repeated.
        out: Folder for the JSON and the page.
        allow_code: Allow the tasks file to run code: functions, and task folders of the harness. Use it only
            if you trust its author.
    Errors: EvaluationError, ModelError, HubError, OutputError.
    """

    def open_one(model: Any) -> Any:
        return (
            open_subject(model, offline=offline, may_be_plain=True)
            if isinstance(model, (str, os.PathLike))
            else model
        )

    read = tuple(as_tasks(tasks, allow_code=allow_code))
    folder = None if out is None else scorecard_folder(out)
    of_merged = [open_one(model) for model in _as_list(merged)]
    of_base = [open_one(base)] if base is not None else []
    named = {subject.label for subject in (*of_base, *of_merged)}
    waiting = [*of_base, *(s for s in map(open_one, _as_list(models)) if s.label not in named), *of_merged]
    check_once([subject.label for subject in waiting])
    card = score_models(
        (waiting.pop(0) for _ in range(len(waiting))),
        read,
        base=of_base[0].label if of_base else None,
        merged=[subject.label for subject in of_merged],
        watch=watch,
    )
    if folder is not None:
        write_scorecard(card, folder)
    return card


def _as_list(models: Paths | Sequence[Any]) -> list[Any]:
    return [models] if isinstance(models, (str, os.PathLike)) else list(models)
