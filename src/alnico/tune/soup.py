"""Chooses which models to average (a soup) by scoring the averages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from alnico.checkpoint.reference import Paths, path_list
from alnico.engine.relatedness import PYTHON_OR_COMMAND
from alnico.errors import EvaluationError, RecipeError, visible
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.scorecard import Scorecard, score_models
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Goal, Task, shared_examples
from alnico.events import SoupTried, Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import relative_reference
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.tune.search.objective import MEAN, Objective

SoupOrder = Literal["sorted", "all", "uniform"]
"""How the models of a soup are chosen."""

SOUP, UNIFORM = "soup", "uniform soup"
"""Their labels in a report."""

MOST_IN_ALL = 16
"""A soup with replacement ends when its counts sum to this many times the number of models."""

Counts = Mapping[str, int]
"""How often each model is in a soup."""


@dataclass(frozen=True)
class SoupStep:
    """One average that was scored: the soup so far with the model ``tried`` added."""

    tried: str
    counts: Counts
    """The average's models, including ``tried``."""
    score: float
    best: float | None
    """The soup's score before; None for the first model."""
    is_kept: bool

    def data(self) -> dict[str, Any]:
        return {
            "tried": self.tried,
            "models": dict(self.counts),
            "score": self.score,
            "best": self.best,
            "kept": self.is_kept,
        }


@dataclass(frozen=True)
class Soup:
    """The chosen soup. All scores are on the tasks that chose it, so its own score is too high.

    ``counts`` has the models of the soup, in the caller's order; ``alone`` has the score of each model, and
    ``uniform`` is the score of the plain mean of all models.
    """

    counts: Counts
    score: float
    alone: Mapping[str, float]
    uniform: float
    order: SoupOrder
    objective: str
    goal: Goal
    steps: tuple[SoupStep, ...]
    base: str | None = None
    unrelated: str = "error"
    report: Scorecard | None = None
    """Scores of the soup, the uniform soup, every model and the base on tasks that did not choose."""
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def best(self) -> str:
        """The model with the best score of its own."""
        sign = 1.0 if self.goal == "max" else -1.0
        return max(self.alone, key=lambda reference: sign * self.alone[reference])

    def recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return the soup's recipe as YAML, with paths relative to ``folder``.

        Merging it gives the scored model, bit for bit.
        """
        mapping = _recipe(self.counts, self.base, self.unrelated)
        for entry in mapping["models"]:
            entry["model"] = relative_reference(entry["model"], folder)
        if self.base is not None:
            mapping["base_model"] = relative_reference(self.base, folder)
        head = (
            f"# A {'uniform' if self.order == 'uniform' else f'greedy ({self.order})'} soup of "
            f"{len(self.counts)} of {len(self.alone)} models: {visible(self.objective)} {self.score:.6g} on "
            "the tasks it was chosen by.\n"
        )
        return head + yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)

    def data(self) -> dict[str, Any]:
        """Return the soup as plain data, for ``--json``."""
        return {
            "order": self.order,
            "objective": self.objective,
            "goal": self.goal,
            "models": dict(self.counts),
            "score": self.score,
            "uniform": self.uniform,
            "alone": dict(self.alone),
            "steps": [step.data() for step in self.steps],
            **({"report": self.report.data()} if self.report is not None else {}),
        }


@counts_compiling
@ieee_arithmetic()
def soup(
    models: Paths,
    tasks: TasksLike,
    *,
    order: str = "sorted",
    replace: bool = False,
    strict: bool = False,
    least_gain: float = 0.0,
    objective: str = MEAN,
    base: str | os.PathLike[str] | None = None,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    allow_code: bool = False,
    report: TasksLike | None = None,
    shared: bool = False,
    watch: Watcher | None = None,
) -> Soup:
    """Find which models to average by scoring the averages, which are merged in memory.

    ``soup.recipe(folder)`` is the recipe of the result. An average is the mean of its models in float32,
    rounded once, so the model is the recipe's, bit for bit. ``watch`` receives each step
    (:class:`alnico.events.SoupTried`) and, with ``report``, each score. Needs
    the extra ``[eval]`` if a task does.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        tasks: YAML file of the tasks to choose by.
        order: How models are tried: sorted (the paper's greedy soup) tries each once, the best first; all
            tries every model in each round and keeps the best average; uniform takes all models.
        replace: With order all: a model may be added more than once, which gives it more weight.
        strict: Keep a model only if the average gets better; without it, equal is enough.
        least_gain: Smallest gain for which a model is kept; a negative number allows a loss.
        objective: What to improve: mean (of all tasks, by their weights), or the name of one task.
        base: Model whose config and tokenizer the soup gets; it is not averaged in.
        report: YAML file of other tasks, on which the soup, the uniform soup and each model are scored.
        shared: Accept a report on examples that also chose the soup; its score is then too high.
    Errors: RecipeError for fewer than two models, a repeated model, and options that exclude each other;
        EvaluationError, also for an unknown objective; those of merging.
    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, algorithm 1. Differs from the source:
        nothing with ``sorted``; ``all``, ``replace`` and ``least_gain`` are not in the paper.
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    references = path_list(models)
    donor = None if base is None else os.fspath(base)
    chosen_by, others = (as_tasks(each, allow_code=allow_code) for each in (tasks, report or ()))
    if others and not shared:
        _refuse_shared(others, chosen_by)
    _check(references, order, replace, least_gain)
    seeks = _objective(chosen_by, objective)
    sought = {name for name, _ in seeks.tasks}
    with Candidates(
        [*references, *([donor] if donor else [])],
        run=run,
        caller=PYTHON_OR_COMMAND,
    ) as candidates:

        @functools.cache
        def value(counts: tuple[int, ...]) -> float:
            models_in = {r: n for r, n in zip(references, counts, strict=True) if n}
            subject = candidates.make(
                load_recipe(_recipe(models_in, donor, unrelated)), label=" + ".join(models_in)
            )
            return seeks.value(
                {task.name: task.evaluate(subject).value for task in chosen_by if task.name in sought}
            )

        def score(counts: Sequence[int]) -> float:
            return value(_reduced(counts))

        singles = [_with([0] * len(references), i) for i in range(len(references))]
        alone = [score(single) for single in singles]
        chosen, steps = [1] * len(references), list[SoupStep]()
        if order != "uniform":
            greedy = _GreedySoup(
                references, alone, score, 1.0 if seeks.goal == "max" else -1.0, strict, least_gain, run
            )
            chosen, steps = greedy.in_order() if order == "sorted" else greedy.trying_all(replace)
        counts = {r: n for r, n in zip(references, _reduced(chosen), strict=True) if n}
        scores = dict(zip(references, alone, strict=True))
        uniform = score([1] * len(references))
        result = Soup(
            counts,
            score(chosen),
            scores,
            uniform,
            order,  # type: ignore[arg-type]
            objective,
            seeks.goal,
            tuple(steps),
            donor,
            unrelated,
        )
    return _with_report(result, others, run) if others else result


def _with_report(soup: Soup, tasks: Sequence[Task], run: RunOptions) -> Soup:
    """Return the soup with the scores of it, the uniform soup, every model and the base on other tasks."""
    references = list(soup.alone)
    merges = {SOUP: soup.counts, UNIFORM: dict.fromkeys(references, 1)}
    every = [*([soup.base] if soup.base is not None and soup.base not in references else []), *references]
    with Candidates(every, run=run) as candidates:
        each = (candidates.make(load_recipe(_recipe({r: 1}, None, soup.unrelated)), label=r) for r in every)
        merged = (
            candidates.make(load_recipe(_recipe(counts, soup.base, soup.unrelated)), label=label)
            for label, counts in merges.items()
        )
        card = score_models(
            itertools.chain(each, merged), tasks, base=soup.base, merged=list(merges), watch=run.watch
        )
    return dataclasses.replace(soup, report=card)


def _refuse_shared(tasks: Sequence[Task], chosen_by: Sequence[Task]) -> None:
    """Refuse a report on examples that chose the soup. Errors: EvaluationError naming the tasks."""
    for task, other, count in shared_examples(tasks, chosen_by):
        raise EvaluationError(
            f"{task.name}: {count} of its examples are also in {other.name}, which chose the models, so its "
            "score would be too high; expected other examples. Give held-out data, or accept shared examples "
            "(shared=True, --shared)."
        )


class _GreedySoup:
    """Greedy choices. ``score`` takes the count of each model; a larger score times ``sign`` is better."""

    def __init__(
        self,
        references: Sequence[str],
        alone: Sequence[float],
        score: Callable[[Sequence[int]], float],
        sign: float,
        strict: bool,
        least_gain: float,
        run: RunOptions,
    ) -> None:
        self._references = references
        self._score = score
        self._sign = sign
        self._strict = strict
        self._least_gain = least_gain
        self._run = run
        self._ranked = sorted(range(len(references)), key=lambda i: -sign * alone[i])
        first = self._ranked[0]
        self._counts = _with([0] * len(references), first)
        self._best = alone[first]
        self._steps: list[SoupStep] = []
        self._report(first, self._counts, self._best, None, is_kept=True)

    def in_order(self) -> tuple[list[int], list[SoupStep]]:
        """Try each model once, the best first."""
        for i in self._ranked[1:]:
            self._take([(i, self._score(_with(self._counts, i)))])
        return self._counts, self._steps

    def trying_all(self, replace: bool) -> tuple[list[int], list[SoupStep]]:
        """Try every candidate model in each round and add the best one, until none gains enough."""
        self._strict |= replace
        while True:
            open_ = [i for i in range(len(self._references)) if replace or not self._counts[i]]
            tried = [(i, self._score(_with(self._counts, i))) for i in open_]
            if not tried or sum(self._counts) >= MOST_IN_ALL * len(self._references) or not self._take(tried):
                return self._counts, self._steps

    def _take(self, tried: Sequence[tuple[int, float]]) -> bool:
        """Keep the best average of ``tried`` if it gains enough; return whether it does."""
        best, score = max(tried, key=lambda entry: self._sign * entry[1])
        gain = self._sign * (score - self._best)
        is_kept = gain > self._least_gain if self._strict else gain >= self._least_gain
        before = self._best
        for i, its_score in tried:
            self._report(i, _with(self._counts, i), its_score, before, is_kept=is_kept and i == best)
        if is_kept:
            self._counts, self._best = _with(self._counts, best), score
        return is_kept

    def _report(
        self, tried: int, counts: Sequence[int], score: float, before: float | None, *, is_kept: bool
    ) -> None:
        models = {r: n for r, n in zip(self._references, counts, strict=True) if n}
        step = SoupStep(self._references[tried], models, score, before, is_kept)
        self._steps.append(step)
        self._run.report(SoupTried(step))


def _objective(tasks: Sequence[Task], objective: str) -> Objective:
    if not tasks:
        raise EvaluationError(
            "tasks: there are none; expected at least one to choose a soup by. Add tasks to the tasks file."
        )
    by_name = {task.name: task for task in tasks}
    if objective in by_name:
        return Objective(objective, by_name[objective].goal, ((objective, 1.0),))
    if objective != MEAN:
        raise EvaluationError(
            f"objective is {objective!r}, which is not a task; expected mean or {', '.join(by_name)}. Name "
            "one of them."
        )
    unfit = [task.name for task in tasks if task.goal == "min"]
    if unfit and len(tasks) > 1:
        raise EvaluationError(
            f"objective is mean, but lower is better for {', '.join(unfit)}; expected tasks whose scores can "
            "be averaged. Name one task as the objective."
        )
    return Objective(MEAN, tasks[0].goal, tuple((task.name, task.weight) for task in tasks))


def _check(references: Sequence[str], order: str, replace: bool, least_gain: float) -> None:
    if len(references) < 2:
        raise RecipeError(
            f"models: there are {len(references)}; expected at least two for a soup. Give more models."
        )
    twice = [r for i, r in enumerate(references) if r in references[:i]]
    if twice:
        raise RecipeError(
            f"{twice[0]}: appears twice in the models; expected different models. Remove one, or use order "
            "all with replace."
        )
    if order not in ("sorted", "all", "uniform"):
        raise RecipeError(f"order is {order!r}; expected sorted, all or uniform. Choose one.")
    if replace and order != "all":
        raise RecipeError(
            f"replace is set, but order is {order}; expected order all. Remove replace, or choose order all."
        )
    if not math.isfinite(least_gain) or (replace and least_gain < 0):
        raise RecipeError(
            f"least_gain is {least_gain:g}; expected "
            f"{'0 or more with replace' if replace else 'a finite number'}. Choose such a number."
        )


def _recipe(counts: Counts, base: str | None, unrelated: str) -> dict[str, Any]:
    entries = [{"model": reference, "parameters": {"weight": count}} for reference, count in counts.items()]
    allowed = {"unrelated": unrelated} if unrelated != "error" else {}
    return {
        "merge_method": "linear",
        "models": entries,
        **({"base_model": base} if base is not None else {}),
        **allowed,
    }


def _with(counts: Sequence[int], index: int) -> list[int]:
    return [n + (i == index) for i, n in enumerate(counts)]


def _reduced(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the same proportions in the smallest whole numbers."""
    divisor = math.gcd(*counts)
    return tuple(n // divisor for n in counts)
