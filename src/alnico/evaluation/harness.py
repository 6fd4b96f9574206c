"""Runs tasks of EleutherAI's lm-evaluation-harness, including your own task folders."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from alnico.errors import AlnicoError, EvaluationError
from alnico.evaluation.batches import Batches, is_out_of_memory
from alnico.evaluation.extras import quiet_transformers
from alnico.evaluation.tasks import EvaluatedModel, Goal, Score, checked_value, evaluation_failed, pool
from alnico.installation import import_extra


class Harness:
    """The mean of a metric over tasks of the harness (``lm_eval``).

    ``tasks`` are names in the harness; ``include_path`` is a folder of YAML files with more tasks. ``metric`` is a name
    such as ``acc``, or with a filter, ``acc,none``. If a single task reports a number per document whose mean is the
    metric, these are the examples; otherwise there are no intervals.

    Options:
        num_fewshot: solved examples before each question; default the task's own number.
        limit: score only the first documents of each task. With one task and a limit, a search can use a part of them.
        batch_size: requests in one pass of the model. Out of memory halves it, and the tasks run again.
        goal: max, or min if lower is better.
        weight: of the task in a mean over tasks.
        is_packaged: use only tasks of the harness itself, and no files. A task's YAML file is code: ``!function`` imports
            Python, and its templates are not sandboxed. Tasks whose metric the package evaluate would load are refused
            too: such a metric is a Python file on the hub, or in a folder of its name in the working directory.
    Data sets come from the hub or from files, as the task's YAML says; ``HF_HUB_OFFLINE=1`` uses only the cache.
    Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness. Errors: EvaluationError; AlnicoError without lm_eval.
    """

    counted = "documents"

    def __init__(
        self,
        name: str,
        tasks: Sequence[str],
        metric: str,
        *,
        include_path: str | os.PathLike[str] | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        goal: Goal = "max",
        weight: float = 1.0,
        is_packaged: bool = False,
    ) -> None:
        self.name = name
        self.goal: Goal = goal
        self.weight = weight
        self.size = limit if limit is not None and len(tasks) == 1 else 0
        self._tasks = list(tasks)
        self._metric = metric
        self.metric = metric.removesuffix(",none")
        self._include_path = None if include_path is None else os.fspath(include_path)
        self._asked: dict[str, Any] = {
            "num_fewshot": num_fewshot,
            "bootstrap_iters": 0,
        }
        self._sizes = Batches(name, batch_size, rows="requests")
        self._limit = limit
        self._is_packaged = is_packaged
        self._manager: Any = None

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Compute the metric on all documents, or on some of the first ``limit``."""
        _check_datasets(self.name)
        lm_eval = import_extra("lm_eval", self.name, "eval")
        models = import_extra("lm_eval.models.huggingface", self.name, "eval")
        where = f"{self.name}: {subject.label}"
        module, tokenizer = subject.module("causal"), subject.tokenizer()
        part: dict[str, Any] = {"limit": self._limit}
        if examples is not None:
            if not self.size:
                raise EvaluationError(
                    f"{self.name}: cannot be scored on a part of its documents; expected one task and a limit. Give both."
                )
            # Sorted: in another order the harness mixes up the numbers.
            part = {"samples": {self._tasks[0]: sorted(examples)}}

        def run(batch_size: int) -> Any:
            with _quietly(), self._without_code() as refused:
                try:
                    model = models.HFLM(
                        pretrained=module,
                        tokenizer=tokenizer,
                        batch_size=batch_size,
                        device=str(module.device),
                        trust_remote_code=False,
                    )
                    return lm_eval.simple_evaluate(
                        model=model,
                        tasks=self._tasks,
                        task_manager=self._task_manager(),
                        confirm_run_unsafe_code=False,
                        batch_size=batch_size,
                        **self._asked,
                        **part,
                    )
                except EvaluationError:
                    raise
                except (Exception, SystemExit) as error:
                    if refused:  # the harness turns it into another error
                        raise refused[0] from None
                    if is_out_of_memory(error):
                        raise
                    raise evaluation_failed(where, error) from error

        outcome = self._sizes.whole(run, subject)
        values = [self._value(outcome["results"], task, where) for task in self._tasks]
        value = checked_value(sum(values) / len(values), where)
        return Score(value, self._examples(outcome.get("samples") or {}, value, examples))

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores on different documents, if the metric is a mean."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Return the names of the tasks: the harness owns their documents."""
        return frozenset(f"lm_eval:{task}" for task in self._tasks)

    def _task_manager(self) -> Any:
        """Return the manager of tasks; the harness's thousands of own tasks are loaded only if the folder lacks one."""
        if self._manager is None:
            manager = import_extra("lm_eval.tasks", self.name, "eval").TaskManager
            if self._include_path is not None:
                self._manager = manager(include_path=self._include_path, include_defaults=False)
            if self._manager is None or not set(self._tasks) <= set(self._manager.all_tasks):
                self._manager = manager(include_path=self._include_path)
        strange = [task for task in self._tasks if self._is_packaged and task not in self._manager.task_index]
        if strange:  # the harness would read it as the path of a file and run its code
            raise EvaluationError(
                f"{self.name}: the harness has no task {strange[0][:100]!r}; expected names from `lm-eval ls tasks`. "
                "Check the name. For your own tasks give include_path and --allow-code (in Python allow_code=True)."
            )
        return self._manager

    @contextmanager
    def _without_code(self) -> Iterator[list[EvaluationError]]:
        """Prevent ``evaluate.load`` from loading a metric, and collect the refusals."""
        refused: list[EvaluationError] = []
        if not self._is_packaged:
            yield refused
            return
        loading = import_extra("evaluate.loading", self.name, "eval")

        def refuse(path: object, *_: object, **__: object) -> None:
            refused.append(
                EvaluationError(
                    f"{self.name}: a task of the harness loads the metric {str(path)[:100]!r} of the package evaluate, which is Python code from "
                    f"the hub, or from a folder {str(path)[:100]!r} here; expected metrics of the harness itself. Choose another task, or use "
                    "--allow-code (in Python allow_code=True) if you trust both."
                )
            )
            raise refused[-1]

        factory = loading.evaluation_module_factory
        loading.evaluation_module_factory = refuse
        try:
            yield refused
        finally:
            loading.evaluation_module_factory = factory

    def _value(self, results: Mapping[str, Mapping[str, Any]], task: str, where: str) -> float:
        of_task = results.get(task, {})
        matches = [key for key in of_task if self._metric in (key, key.partition(",")[0])]
        if not matches:
            metrics = sorted({key for key in of_task if "," in key and "_stderr" not in key})
            raise EvaluationError(
                f"{where}: {task} has no metric {self._metric!r}; found {', '.join(metrics) or 'none'}. Choose one of these."
            )
        if len(matches) > 1:
            raise EvaluationError(
                f"{where}: {task} has {self._metric!r} with {len(matches)} filters; expected one of {', '.join(matches)}."
            )
        return checked_value(of_task[matches[0]], f"{where}: {task}")

    def _examples(
        self, samples: Mapping[str, Sequence[Mapping[str, Any]]], value: float, asked: Sequence[int] | None
    ) -> np.ndarray | None:
        """Return the contribution of each document in order; None if unknown, or if their mean is not the value."""
        name, _, chosen = self._metric.partition(",")
        documents = [
            d for d in samples.get(self._tasks[0], ()) if not chosen or d.get("filter", chosen) == chosen
        ]
        by_document = {d["doc_id"]: d.get(name) for d in documents}
        numbers = [by_document.get(i) for i in (sorted(by_document) if asked is None else asked)]
        if (
            len(self._tasks) > 1
            or not numbers
            or not all(isinstance(number, int | float) for number in numbers)
        ):
            return None
        examples = np.array(numbers, np.float64)
        return examples if abs(examples.mean() - value) < 1e-9 else None


def is_task_file(name: object) -> bool:
    """Check whether the harness would read a file for this name.

    >>> is_task_file("./mine.yaml"), is_task_file("arc_easy")
    (True, False)
    """
    return isinstance(name, str) and (
        "/" in name or "\\" in name or name.endswith((".yaml", ".yml", ".py")) or name.startswith("~")
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the harness's progress bars and notes."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_transformers(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _check_datasets(name: str) -> None:
    """Refuse versions of datasets that run scripts of data sets. Errors: AlnicoError."""
    try:
        installed = version("datasets")
    except PackageNotFoundError:  # the import of lm_eval reports it
        return
    major = installed.partition(".")[0]
    if not major.isdecimal() or int(major) < 4:
        raise AlnicoError(
            f"{name}: datasets {installed} runs scripts of data sets; expected 4 or later. Run: pip install --upgrade 'datasets>=4'"
        )
