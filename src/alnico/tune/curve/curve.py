"""Scores merges along the scale of their task vectors, or along the path from one model to another."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alnico.analysis.common_tensors import short_names
from alnico.checkpoint.reference import Paths
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.relatedness import PYTHON_OR_COMMAND
from alnico.errors import EvaluationError, MethodError, RecipeError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.scorecard import DRAWS, ModelScores, ResampledScores, Role, TaskScores, TaskSummary
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Goal, Task, counted_of, metric_of
from alnico.events import PointScored, Watcher
from alnico.kernels.clock import counts_compiling
from alnico.methods import find, registry
from alnico.models.open_models import name_models, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.from_options import IN_PYTHON, in_words, recipe_of
from alnico.recipe.load import load_recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.tune.curve.barrier import barriers_of
from alnico.tune.curve.files import POINTS, curve_folder, write_curve
from alnico.tune.curve.points import Key, PointFile
from alnico.tune.curve.result import Curve, CurveKind, CurvePoint, place_text
from alnico.tune.curve.scales import (
    DEFAULT_PATH,
    DEFAULT_SCALE,
    MOST_POINTS,
    Scales,
    scale_axes,
)
from alnico.tune.search.fingerprint import digest_of, source_data, tasks_data
from alnico.tune.search.objective import MEAN

ALONG_AN_ARC = ("slerp",)
"""Methods of a path other than ``linear``: they merge two models by one number t."""


@counts_compiling
@ieee_arithmetic()
def curve(
    base: Any,
    models: Paths | Sequence[Any],
    tasks: TasksLike,
    *,
    scale: str | Sequence[str] | Sequence[float] | Sequence[Sequence[float]] | None = None,
    path: bool = False,
    method: str | None = None,
    weights: Sequence[float] | float | None = None,
    density: Sequence[float] | float | None = None,
    objective: str = MEAN,
    minimize: bool | Collection[str] = False,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    factor_cache: str | os.PathLike[str] | None = None,
    watch: Watcher | None = None,
    **options: Any,
) -> Curve:
    """Score merges along the scale of their task vectors: a line per task and their mean, next to base and models.

    Merges are made in memory, with the bits of ``alnico merge``. With two values of ``scale`` each of two models
    has its own scale, and the curve is a surface. With ``path`` the merges are on the line
    ``(1 - t) * a + t * b`` from one model to another, and the result has the height of the barrier between
    them. The same call on ``out`` resumes. ``watch`` receives each point
    (:class:`alnico.events.PointScored`). ``options`` are further options of the method.

    Options:
        base: Model that the others were tuned from; on a path from it to one model, the start.
        models: Models: directories, files, URLs, or owner/name@revision on the hub. With ``path``: the end, or
            the start and the end.
        tasks: YAML file of the tasks to score on.
        scale: Scales to score: LOW:HIGH:STEP, or numbers separated by commas; default: 0:2:0.1. Give it
            twice for a surface: a scale for each of two models. With ``path``: positions t, default
            0:1:0.05.
        path: Score the straight path between two models instead of scales.
        method: Merge method with an option scale, such as ties; default: task_arithmetic. With ``path``:
            linear or slerp.
        weights: Weight of each model, which its scale multiplies; one number is for all.
        density: Share of each task vector that is kept, in (0, 1], for methods that have it.
        objective: What the best point is best at: mean (of all tasks, by their weights), or the name of one
            task.
        minimize: Functions whose scores are losses: all of them, or those of these names.
        out: Folder for the page, the picture, the table, the data and the best recipe.
        restart: Discard the points that are in the folder instead of resuming.
        names: Names of the models in the result; default: their paths, or their places in the call.
        seed: Seed of random methods.
    Errors: RecipeError for scales, models and methods that do not fit; EvaluationError for tasks; OutputError,
        also for a folder with points of other models, tasks or options; those of merging.
    Source: task arithmetic by scale: Ilharco et al. 2023, https://arxiv.org/abs/2212.04089; the barrier:
        Frankle et al. 2020, https://arxiv.org/abs/1912.05671, section 2. Differs from the source: positions
        are those of ``scale``, and the score of a task may be any, not only its error.
    """
    run = RunOptions.of(
        memory=memory, threads=threads, offline=offline, watch=watch, factor_cache=factor_cache
    )
    placement = ModulePlacement.of(device, dtype)
    scored = as_tasks(tasks, allow_code=allow_code, minimize=minimize)
    placement = placement.for_tasks(scored)
    averaged, objective = _seeks(scored, objective)
    if density is not None:
        options["density"] = density
    drawing = _drawing(
        base, models, scale, method, weights, options, path=path, names=names, seed=seed, unrelated=unrelated
    )
    folder = None if out is None else curve_folder(out)
    on = None if drawing.is_on_disk else base
    with Candidates(
        drawing.opened, base=on, run=run, caller=PYTHON_OR_COMMAND, placement=placement
    ) as candidates:
        identity = {} if folder is None else drawing.identity(scored, candidates, placement)
        kept = None if folder is None else folder / POINTS
        with PointFile(kept, identity, [t.name for t in scored], restart=restart) as points:
            scores = _score_all(drawing, scored, candidates, points, run)
    result = _result(drawing, scored, averaged, objective, scores, seed)
    result = replace(result, device=placement.where, dtype=placement.own_or_dtype)
    if folder is not None:
        write_curve(result, folder, is_on_disk=drawing.is_on_disk)
    return result


@dataclass(frozen=True)
class _Drawing:
    """What a curve is of: models by reference, axes, and the recipe of every point."""

    kind: CurveKind
    models: Mapping[str, Any]
    base: Mapping[str, Any]
    """Empty, or with one model."""
    names: Mapping[str, str]
    axes: tuple[Scales, ...]
    method: str
    weights: Any
    options: Mapping[str, Any]
    seed: int
    unrelated: str

    @property
    def opened(self) -> Mapping[str, Any] | list[str]:
        """What :class:`Candidates` opens."""
        return list(self._all) if self.is_on_disk else self._all

    @property
    def is_on_disk(self) -> bool:
        return all(path_of(model) is not None for model in self._all.values())

    @property
    def _all(self) -> Mapping[str, Any]:
        return {**self.base, **self.models}

    @property
    def lines(self) -> list[str]:
        """The models that are horizontal lines: on a path the base alone, as the models are its ends."""
        return [*self.base, *(() if self.kind == "path" else self.models)]

    def places(self) -> list[Scales]:
        return list(itertools.product(*self.axes))

    def recipe(self, place: Scales) -> dict[str, Any]:
        """Return the recipe of a point. Errors: RecipeError, MethodError."""
        references, base = list(self.models), next(iter(self.base), None)
        weights, options = self.weights, dict(self.options)
        if self.kind == "path":
            base = None if self.method == "linear" else references[0]
        if self.kind == "path" and self.method == "linear":
            weights = [1.0 - place[0], place[0]]
        elif self.kind == "surface":
            weights = list(place)
        else:
            options["t" if self.kind == "path" else "scale"] = place[0]
        return self._recipe(references, base, self.method, weights, options)

    def alone(self, reference: str) -> dict[str, Any]:
        """Return the recipe of a model as it is."""
        return self._recipe([reference], None, "passthrough", None, {})

    def _recipe(
        self,
        references: Sequence[str],
        base: str | None,
        method: str,
        weights: Any,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        return recipe_of(
            references,
            base,
            "models",
            method,
            weights=weights,
            dtype=None,
            seed=self.seed,
            missing="error",
            unrelated=self.unrelated,
            options=options,
        )

    def identity(
        self, tasks: Sequence[Task], candidates: Candidates, placement: ModulePlacement
    ) -> dict[str, str]:
        """Return a digest of each part of what scores belong to. Scales are no part: further ones may be added.

        Without a part about the device they are of the processor, in float32.
        """
        where = [placement.device.kind, placement.torch_dtype]
        method = [self.kind, self.method, self.weights, dict(self.options), self.seed, list(self._all)]
        return {
            "method": digest_of(method),
            "tasks": digest_of(tasks_data(tasks)),
            "models": digest_of([source_data(candidates.source(reference)) for reference in self._all]),
            **({} if placement == ON_THE_PROCESSOR else {"device": digest_of(where)}),
        }


def _drawing(
    base: Any,
    models: Any,
    scale: Any,
    method: str | None,
    weights: Any,
    options: Mapping[str, Any],
    *,
    path: bool,
    names: Sequence[str] | None,
    seed: int,
    unrelated: str,
) -> _Drawing:
    """Check what was requested. Errors: RecipeError, MethodError, ModelError."""
    of_base = {} if base is None else {path_of(base) or "base": base}
    if path and isinstance(models, (list, tuple)) and not models:
        named: Mapping[str, Any] = {}
    else:
        named = name_models(models)
    shown = list(name_models(models, names=names)) if named else []
    named = {_plain_path(label): model for label, model in named.items()}
    of_base = {_plain_path(label): model for label, model in of_base.items()}
    if twice := next((label for label in of_base if label in named), None):
        raise RecipeError(
            f"{twice}: is the base and one of the models; expected models tuned from it. Remove it from the models."
        )
    shown_as = {**{label: label for label in of_base}, **dict(zip(named, shown, strict=True))}
    own = ("scale", "lambda", "t", "weight")
    if idle := next((name for name in own if name in options), None):
        raise RecipeError(
            f"{idle}: is given as an option of the method, but the curve sets it; expected scale=, or weights=. Leave it out."
        )
    axes = scale_axes(scale if scale is not None else DEFAULT_PATH if path else DEFAULT_SCALE)
    if path:
        if weights is not None:
            raise RecipeError(
                "weights: are given for a path, whose positions are its weights; expected none. Leave them out."
            )
        method = _path_method(method)
        ends = {**of_base, **named} if len(named) == 1 else named
        of_base = {} if len(named) == 1 else of_base
        if len(ends) != 2:
            raise RecipeError(
                f"path: has {len(ends) or len(of_base)} model{'' if (len(ends) or len(of_base)) == 1 else 's'}; expected a start and an "
                "end. Give two models, or the base and one."
            )
        axes = (_with_ends(axes),)
        named = ends
    else:
        if not of_base:
            raise RecipeError(
                "base: is missing; expected the model that the others were tuned from. Give it."
            )
        method = _scale_method(method, len(axes))
        if len(axes) > 1:
            options = _surface_options(axes, len(named), method, weights, options)
    drawing = _Drawing(
        "path" if path else "line" if len(axes) == 1 else "surface",
        named,
        of_base,
        shown_as,
        axes,
        method,
        weights,
        options,
        seed,
        unrelated,
    )
    if (count := len(drawing.places())) > MOST_POINTS:
        raise RecipeError(
            f"scale: makes {count:,} points; expected at most {MOST_POINTS:,}. Choose larger steps."
        )
    try:
        load_recipe(drawing.recipe(drawing.places()[-1]))  # reported before the models are opened
    except (RecipeError, MethodError) as error:
        lines = (in_words(str(line), IN_PYTHON, options, list(named)) for line in error.args)
        raise type(error)(*lines) from None
    return drawing


def _plain_path(label: str) -> str:
    return label.rstrip("/") or label


def _path_method(method: str | None) -> str:
    """Return the method of a path. Errors: RecipeError."""
    if method not in (None, "linear", *ALONG_AN_ARC):
        find(method)
        raise RecipeError(
            f"method is {method}, which draws no path; expected linear (the straight line) or slerp (the arc). Leave "
            "it out, or leave path out."
        )
    return method or "linear"


def _scale_method(method: str | None, axes: int) -> str:
    """Return the method of a curve or a surface. Errors: RecipeError for one without a scale; MethodError."""
    method = method or "task_arithmetic"
    find(method)
    fit = [
        n
        for n, m in registry().items()
        if "scale" in m.options and not m.options["scale"].per_model and (axes == 1 or "divide" in m.options)
    ]
    if method not in fit:
        what = "has no option scale" if axes == 1 else "cannot add task vectors with a scale each"
        raise RecipeError(f"method is {method}, which {what}; expected {', '.join(fit)}. Choose one of them.")
    return method


def _surface_options(
    axes: Sequence[Scales], models: int, method: str, weights: Any, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the options of a surface, whose scales are the models' weights. Errors: RecipeError."""
    if len(axes) != 2 or models != 2:
        raise RecipeError(
            f"scale: is given {len(axes)} times for {models} model{'' if models == 1 else 's'}; expected one range for all models "
            "together, or two ranges for two models. Correct one of them."
        )
    if weights is not None:
        raise RecipeError(
            "weights: are given for a surface, whose scales are the weights; expected none. Leave them out."
        )
    if find(method).options["divide"].default != "none":  # the sum of the scales would divide
        options = {"divide": "none", **options}
    return options


def _with_ends(axes: Sequence[Scales]) -> Scales:
    """Return the positions of a path, with its ends. Errors: RecipeError."""
    if len(axes) != 1:
        raise RecipeError(
            f"scale: is given {len(axes)} times for a path; expected one range, of positions t. Give it once."
        )
    return tuple(sorted({0.0, 1.0, *axes[0]}))


def _seeks(tasks: Sequence[Task], objective: str) -> tuple[tuple[str, ...], str]:
    """Return the tasks in the mean, and the objective by its final name. Errors: EvaluationError.

    The mean is over the tasks where higher is better; if there are none, over all. A mean of one task is that task.
    """
    if not tasks:
        raise EvaluationError(
            "tasks: there are none; expected at least one to score merges by. Give a tasks file, or a function."
        )
    names = [task.name for task in tasks]
    averaged = [task.name for task in tasks if task.goal == "max"] or names
    if objective not in (MEAN, *names):
        raise EvaluationError(
            f"objective is {objective!r}, which is not a task; expected mean or {', '.join(names)}. Name one of them."
        )
    if len(averaged) == 1:
        return (), averaged[0] if objective not in names else objective
    return tuple(averaged), objective


def _score_all(
    drawing: _Drawing, tasks: Sequence[Task], candidates: Candidates, points: PointFile, run: RunOptions
) -> dict[Key, TaskScores]:
    """Score every model and point that is not kept."""
    wanted: dict[Key, tuple[str, dict[str, Any]]] = {
        ("model", label): (drawing.names[label], drawing.alone(label)) for label in drawing.lines
    }
    for place in drawing.places():
        wanted[(drawing.kind, *place)] = (place_text(drawing.kind, place), drawing.recipe(place))
    done = sum(key in points.kept for key in wanted)
    for key, (label, recipe) in wanted.items():
        if key in points.kept:
            continue
        subject = candidates.make(load_recipe(recipe), label=label)
        scores = {task.name: task.evaluate(subject) for task in tasks}
        points.add(key, scores)
        done += 1
        run.report(PointScored(label, scores, done, len(wanted)))
    return {key: points.kept[key] for key in wanted}


def _result(
    drawing: _Drawing,
    tasks: Sequence[Task],
    averaged: Sequence[str],
    objective: str,
    scores: Mapping[Key, TaskScores],
    seed: int,
) -> Curve:
    labels = {key: repr(key) for key in scores}
    drawn = ResampledScores({labels[key]: scores[key] for key in scores}, tasks, seed=seed, averaged=averaged)
    points = {
        place: CurvePoint(place, *drawn.scores(labels[(drawing.kind, *place)])) for place in drawing.places()
    }
    shown = dict(zip(drawing.names, short_names(list(drawing.names.values())), strict=True))
    lines = tuple(
        ModelScores(
            shown[reference],
            drawing.names[reference],
            _role(reference, drawing),
            *drawn.scores(labels[("model", reference)]),
        )
        for reference in drawing.lines
    )
    goals: dict[str, Goal] = {task.name: task.goal for task in tasks}
    if averaged:
        goals = {MEAN: goals[averaged[0]], **goals}
    barriers = {}
    if drawing.kind == "path":
        on_path = {t: labels[("path", t)] for (t,) in points if 0 <= t <= 1}
        barriers = barriers_of(drawn, on_path, goals)
    made = Curve(
        drawing.kind,
        drawing.method,
        next((drawing.names[b] for b in drawing.base), None),
        tuple(drawing.names[m] for m in drawing.models),
        tuple(
            TaskSummary(t.name, t.goal, t.weight, drawn.examples(t.name), metric_of(t), counted_of(t))
            for t in tasks
        ),
        tuple(averaged),
        objective,
        drawing.axes,
        tuple(points.values()),
        lines,
        {},
        DRAWS,
        seed,
        barriers,
    )
    return replace(made, best_recipe=drawing.recipe(made.best.scales))


def _role(reference: str, drawing: _Drawing) -> Role:
    return "base" if reference in drawing.base else "model"
