"""Chooses which models to average (a soup) by scoring the averages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from alnico.analysis.charts import inline_picture, mark_style, open_canvas, plain
from alnico.analysis.page import series
from alnico.checkpoint.reference import Paths
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.relatedness import IN_PYTHON, PYTHON_OR_COMMAND
from alnico.errors import EvaluationError, RecipeError, visible
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.memory_subject import label_one
from alnico.evaluation.placement import ModulePlacement
from alnico.evaluation.scorecard import Scorecard, score_models
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Goal, Task, shared_examples
from alnico.events import SoupTried, Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.memory_merge import MemoryMerge
from alnico.models.open_models import name_models, path_of
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of
from alnico.recipe.load import load_recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.tune.category_experts import CategoryExperts, ScoresLike, choose_experts
from alnico.tune.search.objective import MEAN, ObjectiveLike, objective_of

SoupOrder = Literal["sorted", "all", "grid", "uniform"]
"""How the models of a soup are chosen."""

SOUP, UNIFORM = "soup", "uniform soup"
"""Their labels in a report."""

MOST_IN_ALL = 16
"""A soup with replacement ends when its counts sum to this many times the number of models."""

TENTHS = 10
"""Weights of the grid are multiples of a tenth, at least one each."""

OF_TABLE = "mean of the table"
"""The objective of a soup that no task chose."""

Counts = Mapping[str, int]
"""How often each model is in a soup."""


@dataclass(frozen=True)
class SoupStep:
    """One average that was scored: the soup so far with the model ``tried`` added, or the weights ``tried`` of a grid."""

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
    ``uniform`` is the score of all models, merged by ``method``: of their plain mean by default. ``device`` and ``dtype``
    say where averages were scored, and in which dtype: ``own`` is the output dtype of the averages.
    ``experts`` says why the models were candidates, if a table of scores chose them; without tasks ``score`` and
    ``uniform`` are then None, and ``alone`` is the mean of each model's row in the table.
    """

    counts: Counts
    score: float | None
    alone: Mapping[str, float]
    uniform: float | None
    order: SoupOrder
    objective: str
    goal: Goal
    steps: tuple[SoupStep, ...]
    base: str | None = None
    unrelated: str = "error"
    method: str = "linear"
    device: str = "cpu"
    dtype: str = "float32"
    report: Scorecard | None = None
    """Scores of the soup, the uniform soup, every model and the base on tasks that did not choose."""
    experts: CategoryExperts | None = None
    """The candidates, if a table of scores chose them."""
    merge: MemoryMerge | None = field(default=None, repr=False, compare=False)
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def best(self) -> str:
        """The model with the best score of its own."""
        sign = 1.0 if self.goal == "max" else -1.0
        return max(self.alone, key=lambda reference: sign * self.alone[reference])

    def module(self) -> Any:
        """Return the soup as a module: a copy of the first module with the averaged tensors, in its training mode.

        Errors: RecipeError if no model is a module.
        """
        return self._merge().module()

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged tensors: torch tensors, or numpy arrays if all models are dicts of them."""
        return self._merge().state_dict()

    def _merge(self) -> MemoryMerge:
        assert self.merge is not None  # soup() sets it
        return self.merge

    def recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """Return the soup's recipe as YAML, with paths relative to ``folder``.

        Merging it gives the scored model, bit for bit. Errors: RecipeError for models in memory, which a recipe cannot
        name: ``module()`` and ``state_dict()`` return their soup.
        """
        kind = {"uniform": "uniform", "grid": "weighted"}.get(self.order, f"greedy ({self.order})")
        head = (
            f"# A {kind} soup {'' if self.method == 'linear' else f'by {self.method} '}of "
            f"{len(self.counts)} of {len(self.alone)} models"
        )
        if self.score is not None:
            head += f": {visible(self.objective)} {self.score:.6g} on the tasks it was chosen by"
        reasons = () if self.experts is None else (f"# {visible(c.reason)}.\n" for c in self.experts.clusters)
        return f"{head}.\n{''.join(reasons)}{self._merge().recipe_text(folder)}"

    def plot(self, *, figsize: tuple[float, float] | None = None, ax: Any = None, dark: bool = False) -> Any:
        """Draw the steps and return them as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        Each step is the score of an average that was tried: filled if its model was kept. Lines are the soup so far, the
        best model alone and the mean of all models. ``figsize`` is in inches; ``ax`` are axes to draw in; ``dark``
        takes the colours of the dark page. Needs the extra ``[report]``. Errors: AlnicoError.
        """
        return self._plot(figsize=figsize, ax=ax, dark=dark)

    def _plot(self, **options: Any) -> Any:
        canvas = open_canvas(default=(max(6.4, 0.5 * len(self.steps) + 3.0), 4.2), **options)
        axes = canvas.axes[0]
        if not self.steps:
            canvas.note(axes, "no average was scored")
            return canvas.figure
        at = range(1, len(self.steps) + 1)
        for is_kept, label in ((True, "kept"), (False, "not kept")):
            shown = [(i, s.score) for i, s in zip(at, self.steps, strict=True) if s.is_kept == is_kept]
            style = {
                **mark_style(0),
                **({} if is_kept else {"markerfacecolor": "none", "markeredgewidth": 1.2}),
            }
            axes.plot(
                [i for i, _ in shown],
                [v for _, v in shown],
                linestyle="none",
                markersize=7,
                label=label,
                **style,
            )
        so_far = [s.score if s.is_kept or s.best is None else s.best for s in self.steps]
        axes.step([*at], so_far, where="post", color=series(1)[0], linewidth=1.6, label="the soup so far")
        best_alone = self.alone[self.best]
        axes.axhline(
            best_alone,
            color=series(2)[0],
            linestyle="--",
            linewidth=1.2,
            label=plain(f"best alone: {self.best}", 36),
        )
        assert self.uniform is not None  # there are steps
        axes.axhline(self.uniform, color=series(6)[0], linestyle=":", linewidth=1.4, label="mean of all")
        if len(self.steps) <= 30:
            axes.set_xticks([*at], [plain(s.tried, 18) for s in self.steps], rotation=30, ha="right")
        canvas.frame(
            axes,
            title=f"The soup has {len(self.counts)} of {count_of(len(self.alone), 'model')}",
            x="model tried",
            y=self.objective,
        )
        canvas.legend()
        return canvas.figure

    def __repr__(self) -> str:
        return result_line(
            f"soup of {len(self.counts)} of {count_of(len(self.alone), 'model')}",
            f"{self.objective} {self.score:.4g}, best alone {self.alone[self.best]:.4g}, mean of all {self.uniform:.4g}"
            if self.uniform is not None
            else f"{self.objective}, best alone {self.alone[self.best]:.4g}",
            names_text(self.counts, 6),
        )

    @never_fails
    def _repr_html_(self) -> str:
        sign = -1.0 if self.goal == "max" else 1.0
        order = sorted(self.alone, key=lambda name: (name not in self.counts, sign * self.alone[name]))
        rows = [[name, self.alone[name], self.counts.get(name, 0)] for name in order]
        steps = [[i + 1, s.tried, s.score, s.best, s.is_kept] for i, s in enumerate(self.steps)]

        return result_html(
            f"Soup of {len(self.counts)} of {count_of(len(self.alone), 'model')}",
            *(
                []
                if self.experts is None
                else [
                    ResultTable(
                        ("categories", "expert"),
                        [[names_text(c.categories, 6), c.expert] for c in self.experts.clusters],
                    )
                ]
            ),
            ResultTable(("model", f"{self.objective} alone", "times in the soup"), rows),
            ResultTable(("step", "tried", "score", "before", "kept"), steps),
            facts=[
                ("objective", self.objective),
                ("score", self.score),
                ("best alone", self.alone[self.best]),
                ("mean of all", self.uniform),
            ],
            picture=inline_picture(
                lambda theme: self._plot(dark=theme, figsize=(6.8, 3.6)),
                "Points: the score of each average that was tried",
            ),
        )

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
            "device": self.device,
            "dtype": self.dtype,
            **(self.experts.data() if self.experts is not None else {}),
            **({"report": self.report.data()} if self.report is not None else {}),
        }


@counts_compiling
@ieee_arithmetic()
def soup(
    models: Paths | Sequence[Any],
    tasks: TasksLike | None = None,
    *,
    scores: ScoresLike | None = None,
    clusters: int | None = None,
    method: str = "linear",
    order: str | None = None,
    replace: bool = False,
    strict: bool = False,
    least_gain: float = 0.0,
    objective: ObjectiveLike = MEAN,
    base: Any = None,
    names: Sequence[str] | None = None,
    minimize: bool | Sequence[str] = False,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
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

    In Python models may be modules, dicts of tensors and other objects in memory, and ``tasks`` a function that
    scores a model, or a dict of functions, as for :func:`alnico.evaluate`. ``soup.module()`` is then the average
    as a module, and ``soup.state_dict()`` has its tensors. ``objective`` may give the weight of each score in the
    mean: ``{"A": 2, "B": 1}``.

    Options:
        models: Models: directories, files, URLs, or owner/name@revision on the hub.
        tasks: YAML file of the tasks to choose by.
        method: Merge method, with its defaults, by which the chosen models are merged: linear averages them; others
            sum task vectors of the base, such as tsv and task_arithmetic.
        scores: CSV file with a row per model and a column per category, higher is better: only the best model of each
            cluster of categories that rank the models alike is a candidate. Without tasks, these have equal weights.
        clusters: Number of clusters of categories; default: categories are joined while they correlate with 0.5 or more.
        order: How models are tried: sorted (the paper's greedy soup) tries each once, the best first; all
            tries every model in each round and keeps the best average; grid tries all weights in tenths;
            uniform takes all models. Default: sorted, and with scores grid.
        replace: With order all: a model may be added more than once, which gives it more weight.
        strict: Keep a model only if the average gets better; without it, equal is enough.
        least_gain: Smallest gain for which a model is kept; a negative number allows a loss.
        objective: What to improve: mean (of all tasks, by their weights), or the name of one task.
        base: Model whose config and tokenizer the soup gets, and the base of a method's task vectors; it is not
            averaged in.
        names: Names of the models in results; default: their paths, or models[0], models[1] and so on.
        minimize: Scores of functions for which lower is better: True for all, or their names.
        report: YAML file of other tasks, on which the soup, the uniform soup and each model are scored.
        shared: Accept a report on examples that also chose the soup; its score is then too high.
    Errors: RecipeError for fewer than two models, a repeated model, and options that exclude each other;
        EvaluationError, also for an unknown objective; those of merging.
    Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, algorithm 1. Differs from the source:
        nothing with ``sorted``; ``all``, ``replace``, ``least_gain`` and other methods than ``linear`` are not in the paper.
        ``scores`` and ``grid``: Maiti et al. 2025, https://arxiv.org/abs/2511.13254; :func:`alnico.tune.category_experts.choose_experts`
        says what differs.
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    placement = ModulePlacement.of(device, dtype)
    order = order or _default_order(tasks, scores, method)
    _check_table(tasks, scores, clusters, order, report)
    chosen_by = () if tasks is None else as_tasks(tasks, allow_code=allow_code, minimize=minimize)
    others = as_tasks(
        report or (), allow_code=allow_code, minimize=minimize, may_name_others=True, argument="report"
    )
    placement = placement.for_tasks((*chosen_by, *others))
    if others and not shared:
        _refuse_shared(others, chosen_by)
    named = _label(models, names)
    references = list(named)
    _check(references, named, order, replace, least_gain, method)
    donor = None if base is None else label_one(base, "base", named)
    experts = None
    if scores is not None:
        experts = choose_experts(scores, references, clusters=clusters)
        references = [reference for reference in references if reference in experts.models]
        named = {reference: named[reference] for reference in references}
        if method != "linear" and len(references) < 2:
            raise RecipeError(
                f"scores: {references[0]} is the best model of every cluster of categories, and method is {method}; expected two "
                "experts to merge. Raise clusters, or use the model."
            )
    if order == "grid":
        _check_grid(references, method)
    if tasks is None:
        assert experts is not None  # _check_table
        every = named if donor is None else {donor: base, **named}
        counts = dict.fromkeys(references, 1)
        return Soup(
            counts,
            None,
            {reference: experts.means[reference] for reference in references},
            None,
            "uniform",
            OF_TABLE,
            "max",
            (),
            donor,
            unrelated,
            method,
            experts=experts,
            merge=MemoryMerge(every, _recipe(counts, donor, unrelated, method), base, threads),
        )
    seeks = objective_of(chosen_by, objective, may_be_min=minimize is True)
    sought = {name for name, _ in seeks.tasks}
    every = named if donor is None else {donor: base, **named}
    with _candidates(every, base, run, placement) as candidates:

        @functools.cache
        def value(counts: tuple[int, ...]) -> float:
            models_in = {r: n for r, n in zip(references, counts, strict=True) if n}
            subject = candidates.make(
                load_recipe(_recipe(models_in, donor, unrelated, method)), label=" + ".join(models_in)
            )
            return seeks.value(
                {task.name: task.evaluate(subject).value for task in chosen_by if task.name in sought}
            )

        def score(counts: Sequence[int]) -> float:
            return value(_reduced(counts))

        singles = [_with([0] * len(references), i) for i in range(len(references))]
        alone = [score(single) for single in singles]
        chosen, steps = [1] * len(references), list[SoupStep]()
        sign = 1.0 if seeks.goal == "max" else -1.0
        if order == "grid":
            chosen, steps = _best_of_grid(references, score, sign, run)
        elif order != "uniform":
            greedy = _GreedySoup(references, alone, score, sign, strict, least_gain, run)
            chosen, steps = greedy.in_order() if order == "sorted" else greedy.trying_all(replace)
        counts = {r: n for r, n in zip(references, _reduced(chosen), strict=True) if n}
        each = dict(zip(references, alone, strict=True))
        uniform = score([1] * len(references))
        result = Soup(
            counts,
            score(chosen),
            each,
            uniform,
            order,  # type: ignore[arg-type]
            seeks.name,
            seeks.goal,
            tuple(steps),
            donor,
            unrelated,
            method,
            device=placement.where,
            dtype=placement.own_or_dtype,
            experts=experts,
        )
    merge = MemoryMerge(every, _recipe(result.counts, donor, unrelated, method), base, threads)
    result = dataclasses.replace(result, merge=merge)
    return _with_report(result, others, every, base, run, placement) if others else result


def _label(models: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """Return the models by label. Errors: RecipeError, ModelError; RecipeError for a model that appears twice."""
    listed = models if isinstance(models, (list, tuple)) else []
    if names is None and listed and all(path_of(model) is not None for model in listed):
        _refuse_twice([str(path_of(model)) for model in listed])
    return name_models(models, names=names)


def _candidates(
    models: Mapping[str, Any], base: Any, run: RunOptions, placement: ModulePlacement
) -> Candidates:
    if all(path_of(model) == label for label, model in models.items()):
        return Candidates(list(models), run=run, caller=PYTHON_OR_COMMAND, placement=placement)
    return Candidates(models, base=base, run=run, caller=IN_PYTHON, placement=placement)


def _with_report(
    soup: Soup,
    tasks: Sequence[Task],
    models: Mapping[str, Any],
    base: Any,
    run: RunOptions,
    placement: ModulePlacement,
) -> Soup:
    """Return the soup with the scores of it, the uniform soup, every model and the base on other tasks."""
    references = list(soup.alone)
    merges = {SOUP: soup.counts, UNIFORM: dict.fromkeys(references, 1)}
    every = [*([soup.base] if soup.base is not None and soup.base not in references else []), *references]
    with _candidates(models, base, run, placement) as candidates:
        each = (candidates.make(load_recipe(_recipe({r: 1}, None, soup.unrelated)), label=r) for r in every)
        merged = (
            candidates.make(load_recipe(_recipe(counts, soup.base, soup.unrelated, soup.method)), label=label)
            for label, counts in merges.items()
        )
        card = score_models(
            itertools.chain(each, merged),
            tasks,
            base=soup.base,
            merged=list(merges),
            watch=run.watch,
            placement=placement,
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


def _best_of_grid(
    references: Sequence[str], score: Callable[[Sequence[int]], float], sign: float, run: RunOptions
) -> tuple[list[int], list[SoupStep]]:
    """Try equal weights, then all weights in tenths; of equal scores the first counts."""
    steps: list[SoupStep] = []
    equal = [1] * len(references)
    chosen, best = equal, score(equal)
    for counts in [
        equal,
        *(c for c in _compositions(TENTHS, len(references)) if _reduced(c) != tuple(equal)),
    ]:
        value = score(counts)
        is_first = not steps
        is_kept = is_first or sign * value > sign * best
        models = dict(zip(references, _reduced(counts), strict=True))
        tried = f"weights {', '.join(f'{n / sum(counts):.3g}' for n in counts)}"
        steps.append(SoupStep(tried, models, value, None if is_first else best, is_kept))
        run.report(SoupTried(steps[-1]))
        if is_kept:
            chosen, best = list(counts), value
    return chosen, steps


def _compositions(total: int, parts: int) -> Iterator[list[int]]:
    """Yield all lists of ``parts`` whole numbers of 1 or more that sum to ``total``.

    >>> [*_compositions(4, 3)]
    [[1, 1, 2], [1, 2, 1], [2, 1, 1]]
    """
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield [b - a for a, b in itertools.pairwise((0, *cuts, total))]


def _refuse_twice(references: Sequence[str]) -> None:
    twice = [r for i, r in enumerate(references) if r in references[:i]]
    if twice:
        raise RecipeError(
            f"{twice[0]}: appears twice in the models; expected different models. Remove one, or use order "
            "all with replace."
        )


def _default_order(tasks: TasksLike | None, scores: ScoresLike | None, method: str) -> str:
    if scores is not None and tasks is None:
        return "uniform"
    return "sorted" if scores is None or method != "linear" else "grid"


def _check_table(
    tasks: TasksLike | None,
    scores: ScoresLike | None,
    clusters: int | None,
    order: str,
    report: TasksLike | None,
) -> None:
    """Check what needs tasks and what needs a table of scores. Errors: RecipeError."""
    if tasks is None and scores is None:
        raise RecipeError(
            "tasks is missing; expected tasks to choose the models by, or a table of scores. Give tasks (--tasks), or scores "
            "(--scores)."
        )
    if scores is None and clusters is not None:
        raise RecipeError(
            f"clusters is {clusters}, and there is no table of scores; expected one whose categories it joins. Give scores, or "
            "leave out clusters."
        )
    if tasks is None and (order != "uniform" or report is not None):
        found = f"order is {order}" if order != "uniform" else "report is given"
        raise RecipeError(
            f"{found}, and there are no tasks that score averages; expected tasks with it. Give tasks, or leave it out."
        )


def _check_grid(references: Sequence[str], method: str) -> None:
    """Refuse grids that have no point. Errors: RecipeError."""
    if len(references) > TENTHS:
        raise RecipeError(
            f"order is grid, and there are {len(references)} models; expected at most {TENTHS}, as each gets a tenth or more. "
            "Choose fewer clusters, or order sorted."
        )
    if method != "linear":
        raise RecipeError(
            f"order is grid with the method {method}; expected linear, whose weights it tries. Choose order sorted, all or "
            "uniform."
        )


def _check(
    references: Sequence[str],
    models: Mapping[str, Any],
    order: str,
    replace: bool,
    least_gain: float,
    method: str,
) -> None:
    if len(references) < 2:
        raise RecipeError(
            f"models: there are {len(references)}; expected at least two for a soup. Give more models."
        )
    for i, one in enumerate(references):
        if any(models[one] is models[other] for other in references[:i] if path_of(models[one]) is None):
            _refuse_twice([one, one])
    if order not in get_args(SoupOrder):
        raise RecipeError(f"order is {order!r}; expected sorted, all, grid or uniform. Choose one.")
    if replace and order != "all":
        raise RecipeError(
            f"replace is set, but order is {order}; expected order all. Remove replace, or choose order all."
        )
    if replace and method != "linear":
        raise RecipeError(
            f"replace is set with the method {method}; expected linear, where a model counts twice. Remove one of them."
        )
    if not math.isfinite(least_gain) or (replace and least_gain < 0):
        raise RecipeError(
            f"least_gain is {least_gain:g}; expected "
            f"{'0 or more with replace' if replace else 'a finite number'}. Choose such a number."
        )


def _recipe(counts: Counts, base: str | None, unrelated: str, method: str = "linear") -> dict[str, Any]:
    entries: list[dict[str, Any]] = [
        {"model": reference, **({"parameters": {"weight": count}} if method == "linear" else {})}
        for reference, count in counts.items()
    ]
    allowed = {"unrelated": unrelated} if unrelated != "error" else {}
    return {
        "merge_method": method,
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
