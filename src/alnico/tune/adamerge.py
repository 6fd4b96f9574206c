"""AdaMerging: how much of each task vector, learned from inputs without labels."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import yaml

from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.checkpoint.reference import Paths, path_list
from alnico.engine.fetch import fetch_weights
from alnico.engine.relatedness import PYTHON_OR_COMMAND, check_relatedness
from alnico.engine.stages import close
from alnico.errors import EvaluationError, MethodError, MismatchError, visible
from alnico.evaluation.extras import import_extra
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Differentiable, EvaluatedModel, Task
from alnico.events import Learned, Watcher
from alnico.methods.shared.sparsify import Scope
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.plan.layers import layer_position
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import relative_reference
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_RUN, RunOptions, Size
from alnico.tune.task_vectors import TaskVectors, Written

if TYPE_CHECKING:
    import torch

Per = Literal["task", "layer", "tensor"]
"""What has a coefficient of its own for each model: the whole task vector, each layer of it, or each tensor."""

WHOLE = "all"
"""The group of every tensor, where a model has one coefficient."""

PLACES = 6
"""Decimal places of the coefficients that a recipe has; the model is written with these."""

LEAST = 1e-6
"""What the first model keeps where a tensor's coefficients are all 0: a tensor that is not merged has no part in a model's threshold."""


@dataclass(frozen=True, eq=False)
class LearningStep:
    """One step: the loss (the sum of ``losses``, a task's mean entropy in nats) at ``coefficients``, an array (groups, models)."""

    number: int
    loss: float
    losses: Mapping[str, float]
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class AdaMergingResult:
    """Coefficients that were learned: an array (groups, models), float64; ``recipe`` is the YAML of the merge with them.

    ``groups`` names what each row is for: ``all``, layers and the tensors in none (``per: layer``), or tensors. ``steps`` is the course;
    each has the coefficients it was taken at. ``used`` counts the inputs of each task, none of whose labels was read.
    ``fixed`` are groups whose coefficients no input says anything about: they stayed as they were. ``left_out`` names the tensors that
    have no part in the entropy, and why: the recipe merges them with the coefficient of their group all the same.
    """

    models: tuple[str, ...]
    base: str
    per: Per
    groups: tuple[str, ...]
    coefficients: np.ndarray
    steps: tuple[LearningStep, ...]
    used: Mapping[str, int]
    fixed: tuple[str, ...]
    left_out: Mapping[str, str]
    recipe: str

    def data(self) -> dict[str, Any]:
        """The course as plain data, for JSON."""
        return {
            "models": list(self.models),
            "base": self.base,
            "per": self.per,
            "groups": list(self.groups),
            "fixed": list(self.fixed),
            "left_out": dict(self.left_out),
            "inputs": dict(self.used),
            "coefficients": self.coefficients.tolist(),
            "steps": [
                {
                    "step": step.number,
                    "loss": step.loss,
                    "losses": dict(step.losses),
                    "coefficients": step.coefficients.round(PLACES).tolist(),
                }
                for step in self.steps
            ],
        }


@dataclass(frozen=True)
class LearningOptions:
    """How coefficients are learned; see :func:`adamerge`, which has the defaults."""

    per: Per
    plus: bool
    density: float
    scope: Scope
    steps: int
    batch_size: int
    learning_rate: float
    init: float
    clamp: tuple[float, float] | None
    seed: int
    unrelated: str


@ieee_arithmetic()
def adamerge(
    models: Paths,
    *,
    base: str | os.PathLike[str],
    tasks: TasksLike,
    out: str | os.PathLike[str] | None = None,
    per: str = "tensor",
    plus: bool = False,
    density: float = 0.2,
    scope: str = "model",
    steps: int = 500,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    init: float = 0.3,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> AdaMergingResult:
    """Learn the coefficients of task vectors from inputs without labels (AdaMerging), and return the recipe.

    Coefficients are moved so that the merge becomes certain of its answers on the inputs of ``tasks``; labels
    are never read. Needs ``alnico[eval]``. ``watch`` receives each step (:class:`alnico.events.Learned`). The
    method, its edge cases and its differences from the paper are described in
    :func:`alnico.tune.adamerge.learn`.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        tasks: Tasks file whose inputs are learned from; its labels are never read (label: null where there
            are none).
        out: File of the recipe; its course is written next to it as NAME.course.json.
        per: What has a coefficient of its own for each model: task, layer or tensor.
        plus: AdaMerging++: trim the task vectors and elect signs first, as TIES does.
        density: With plus: share of each task vector that the trim keeps, in (0, 1].
        scope: With plus: what density is a share of: model or tensor.
        steps: Number of steps; each uses one batch of every task.
        batch_size: Number of inputs of each task in a step.
        learning_rate: Learning rate of Adam: about how far one step moves a coefficient.
        init: Value of every coefficient at the start.
        clamp: Keep coefficients in [0, 1]; in Python any range, or None.
        seed: Seed of the batches.
        memory: Memory for the task vectors, such as 2GiB; what does not fit is read again at each step.
    Errors: EvaluationError, MethodError, ModelError, MismatchError, OutputError, HubError.
    """
    run = RunOptions.of(memory=memory, offline=offline, watch=watch)
    names = [os.fspath(base), *path_list(models)]
    for path in () if out is None else (Path(out), course_beside(out)):
        check_new_file(path)
    options = LearningOptions(
        per,  # type: ignore[arg-type]
        plus,
        density,
        scope,  # type: ignore[arg-type]
        steps,
        batch_size,
        learning_rate,
        init,
        clamp,
        seed,
        unrelated,
    )
    learned = learn(
        names[1:],
        names[0],
        as_tasks(tasks, allow_code=allow_code),
        open_subject(base, offline=offline),
        options,
        run=run,
        written_from=[relative_reference(name, Path(out).parent) for name in names]
        if out is not None
        else None,
    )
    if out is not None:
        write_learned(learned, out)
    return learned


def learn(
    models: Sequence[str],
    base: str,
    tasks: Sequence[Task],
    subject: EvaluatedModel,
    options: LearningOptions,
    *,
    run: RunOptions = DEFAULT_RUN,
    written_from: Sequence[str] | None = None,
) -> AdaMergingResult:
    """Learn the coefficients of task vectors by making a merge sure of its answers; labels are never read.

    ``theta = base + sum_i c_i^l * vector_i^l`` for models i and groups of tensors l is written into the modules of ``subject``, which begin as
    the base's. The loss is the sum over tasks of the mean entropy of softmax(logits) over a batch: each step takes one batch of every task,
    so that no task pulls alone, and one task's graph is in memory at a time. The derivative of ``c_i^l`` is the inner product of the
    parameters' gradient with the task vector, so a step is an ordinary forward and backward pass and one reading of the task vectors. Adam moves the
    coefficients, in float64, and ``clamp`` puts them back into its range. At the end they are rounded to 6 places, ``subject`` holds the merge
    with them, and the recipe makes the same model.

    Use when: unlabelled inputs of every task are at hand and the tasks are classifications. The paper finds large gains over task arithmetic with
        a coefficient a tensor, small ones with a coefficient a model. Entropy says nothing of regression or generation, and a batch of one class
        teaches a model to say always that: give inputs as they come.

    ``written_from`` says how the recipe names the base and the models, where that differs from here. ``run.memory_bytes`` limits the
    task vectors; what does not fit is read again at every step. Without ``clamp`` coefficients may run away.

    Edge cases: tensors that are equal in base and models take no part; coefficients that no input has a gradient for, of a head that no task
        uses say, stay at ``init`` (``fixed``). Names are those of the files: experts that the module packs into one parameter have a
        coefficient for each of the files' matrices, and a tied tensor that the files hold twice has one.
    Errors: EvaluationError for tasks without logits or inputs, and for a loss that is not finite; MismatchError for models that do not fit together or
        not the module, and for models with classifiers of different classes; MethodError for options out of range; and those of a merge.
    Differs from the source: the authors clamp in the forward pass, where a coefficient outside has no gradient any more, and learn on test inputs.
    Source: Yang et al. 2024, AdaMerging, https://arxiv.org/abs/2310.02575, section 3.
    """
    _check_options(options, models, base)
    per, plus, scope = options.per, options.plus, options.scope
    import_extra("torch", "adamerge", "eval")
    asked = _logit_tasks(tasks)
    kinds = " and ".join(dict.fromkeys(task.kind for task in asked))
    names = tuple(written_from) if written_from is not None else (base, *models)
    plan = build_plan(
        load_recipe(_mapping((base, *models), options, 0.5)), run=RunOptions(offline=run.offline)
    )
    try:
        _check_heads(plan, asked)
        fetch_weights(plan)
        check_relatedness(plan, PYTHON_OR_COMMAND)
        vectors = TaskVectors(
            plan, density=options.density if plus else None, scope=scope, memory_bytes=run.memory_bytes
        )
        written = Written(
            vectors, {kind: subject.module(kind) for kind in dict.fromkeys(task.kind for task in asked)}, plan
        )
        try:
            groups = Groups(per, [job.name for job in vectors.changing], written.copies)
            course = _descend(
                asked,
                subject,
                written,
                groups,
                len(models),
                options,
                run,
            )
            final = course.coefficients.round(PLACES)
            if plus and scope == "model":
                final[~final.any(axis=1), 0] = LEAST
            written.write(_weights(written, groups, final, options.init))
        finally:
            written.close()
        weights = [
            _setting(groups, column, options.init, [job.name for job in vectors.jobs]) for column in final.T
        ]
    finally:
        close([plan])
    said = (
        f"# AdaMerging{'++' if plus else ''}, coefficients per {per}, {options.steps} steps of {options.batch_size} unlabelled inputs a task, seed {options.seed}.\n"
        f"# Learned on {', '.join(f'{visible(task)} ({count} inputs)' for task, count in course.used.items())}.\n"
    )
    text = said + yaml.safe_dump(
        _mapping(names, options, weights),
        sort_keys=False,
        default_flow_style=None,
        width=1000,
    )
    fixed = tuple(g for g, is_moved in zip(groups.names, course.moved, strict=True) if not is_moved)
    left_out = dict.fromkeys(written.absent, f"not in the module of the tasks ({kinds})")
    return AdaMergingResult(
        tuple(models), base, per, groups.names, final, course.steps, course.used, fixed, left_out, text
    )


def course_beside(recipe: str | os.PathLike[str]) -> Path:
    """Where the course of a learned recipe is kept.

    >>> course_beside("merges/mine.yml").as_posix()
    'merges/mine.course.json'
    """
    return Path(recipe).with_suffix(".course.json")


def write_learned(learned: AdaMergingResult, recipe: str | os.PathLike[str]) -> None:
    """Write the recipe, and the course beside it. Errors: OutputError, RunError."""
    write_new_file(course_beside(recipe), json.dumps(learned.data()) + "\n")
    write_new_file(Path(recipe), learned.recipe)


class Groups:
    """Which coefficient is a tensor's: the rows of an array (groups, models). ``copies`` have the coefficient of what they are copies of:
    a tied tensor that is in the files twice stays one."""

    def __init__(
        self, per: Per, names: Sequence[str], copies: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.per = per
        self.of = {name: group_of(copies.get(name, name), per) for name in names}
        self.names = tuple(dict.fromkeys(self.of.values()))
        self.row = {group: i for i, group in enumerate(self.names)}


def group_of(name: str, per: Per) -> str:
    """What a tensor shares its coefficient with.

    >>> [group_of("encoder.layer.3.output.weight", per) for per in ("task", "layer", "tensor")]
    ['all', 'encoder.layer.3', 'encoder.layer.3.output.weight']
    >>> group_of("pooler.weight", "layer")
    'pooler.weight'
    """
    if per == "task":
        return WHOLE
    place = layer_position(name) if per == "layer" else None
    return f"{place.stack}{place.layer}" if place is not None else name


@dataclass(frozen=True, eq=False)
class _Course:
    steps: tuple[LearningStep, ...]
    coefficients: np.ndarray
    moved: np.ndarray
    used: Mapping[str, int]


def _descend(
    tasks: Sequence[Differentiable],
    subject: EvaluatedModel,
    written: Written,
    groups: Groups,
    models: int,
    options: LearningOptions,
    run: RunOptions,
) -> _Course:
    """Take the steps."""
    steps, init, clamp = options.steps, options.init, options.clamp
    coefficients = np.full((len(groups.names), models), float(init))
    adam = _Adam(coefficients.shape, options.learning_rate)
    batches = [_batches(task.size, options.batch_size, options.seed, i) for i, task in enumerate(tasks)]
    seen: list[set[int]] = [set() for _ in tasks]
    moved = np.zeros(len(groups.names), bool)
    course = []
    for number in range(1, steps + 1):
        written.write(_weights(written, groups, coefficients, init))
        losses = {}
        for task, order, known in zip(tasks, batches, seen, strict=True):
            batch = next(order)
            known.update(batch)
            loss = entropy(task.logits(subject, batch))
            if not loss.requires_grad:
                raise EvaluationError(
                    f"{task.name}: its loss depends on no merged tensor; expected logits with the graph of the module's parameters. "
                    "Give tasks for the models that are merged, and models that differ from the base."
                )
            losses[task.name] = _finite(float(loss.detach()), task, number)
            loss.backward()  # type: ignore[no-untyped-call]
        slopes = np.zeros_like(coefficients)
        for job, slope in written.slopes():
            slopes[groups.row[groups.of[job.name]]] += slope
        if not np.isfinite(slopes).all():
            raise EvaluationError(
                f"step {number}: a gradient is not finite; the losses are {losses}. Lower the learning rate."
            )
        moved |= slopes.any(axis=1)
        step = LearningStep(number, math.fsum(losses.values()), losses, coefficients.copy())
        course.append(step)
        coefficients = adam.moved(coefficients, slopes)
        if clamp is not None:
            coefficients = coefficients.clip(*clamp)
        run.report(Learned(step, steps))
    return _Course(
        tuple(course), coefficients, moved, {t.name: len(k) for t, k in zip(tasks, seen, strict=True)}
    )


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy in nats of softmax(logits), (n, classes) with n examples."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


class _Adam:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1, with its defaults."""

    def __init__(self, shape: tuple[int, ...], rate: float) -> None:
        self.rate = rate
        self.mean, self.square = np.zeros(shape), np.zeros(shape)
        self.time = 0

    def moved(self, values: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.time += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.time), self.square / (1 - 0.999**self.time)
        found: np.ndarray = values - self.rate * mean / (np.sqrt(square) + 1e-8)
        return found


def _batches(size: int, batch_size: int, seed: int, task: int) -> Iterator[list[int]]:
    order = np.random.default_rng([seed % (1 << 64), task])
    length = min(size, batch_size)
    while True:
        shuffled = order.permutation(size).tolist()
        for start in range(0, size - length + 1, length):
            yield shuffled[start : start + length]


def _weights(
    written: Written, groups: Groups, coefficients: np.ndarray, init: float
) -> dict[str, np.ndarray]:
    """The coefficients of every merged tensor; those without a group are equal in all models, and any will do."""
    idle = np.full(coefficients.shape[1], init)
    return {
        job.name: coefficients[groups.row[groups.of[job.name]]] if job.name in groups.of else idle
        for job in written.vectors.jobs
    }


def _setting(groups: Groups, column: np.ndarray, init: float, names: Sequence[str]) -> Any:
    """One model's weights as a recipe has them."""
    values = [float(value) for value in column]
    if groups.per == "task":
        return values[0]
    filters = [
        (f, value)
        for group, value in zip(groups.names, values, strict=True)
        for f in _filters(group, groups, names)
    ]
    return [{"filter": f, "value": v} for f, v in filters] + [float(init)]


def _filters(group: str, groups: Groups, names: Sequence[str]) -> list[str]:
    """Filters that fit the tensors of a group alone."""
    part = f"{group}."
    of_group = [name for name, own in groups.of.items() if own == group]
    strangers = [f"={name}" for name in of_group if name == group or not name.startswith(part)]
    if len(strangers) == len(of_group):
        return strangers
    layer = part if all(name.startswith(part) for name in names if part in name) else f"re:^{re.escape(part)}"
    return [*strangers, layer]


def _mapping(names: Sequence[str], options: LearningOptions, weights: Any) -> dict[str, Any]:
    """The recipe of a base and models with these weights: one for all, or one each."""
    base, *models = names
    each = weights if isinstance(weights, list) else [weights] * len(models)
    trim = (
        {
            "parameters": {
                "density": options.density,
                "elect": "mass",
                "divide": "none",
                "scope": options.scope,
            }
        }
        if options.plus
        else {}
    )
    return {
        "merge_method": "ties" if options.plus else "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(models, each, strict=True)
        ],
        **trim,
        **({"unrelated": options.unrelated} if options.unrelated != "error" else {}),
    }


def _logit_tasks(tasks: Sequence[Task]) -> list[Differentiable]:
    asked = [task for task in tasks if isinstance(task, Differentiable)]
    for task in tasks:
        if not isinstance(task, Differentiable):
            raise EvaluationError(
                f"{task.name}: gives no scores of classes; expected a classification. Leave the task out: entropy is minimised over classes."
            )
        if not task.size:
            raise EvaluationError(
                f"{task.name}: has no examples; expected some inputs. Give the task's data."
            )
    if not asked:
        raise EvaluationError(
            "tasks: there are none; expected a classification of each model's kind. Add tasks to the file."
        )
    return asked


def _finite(loss: float, task: Task, step: int) -> float:
    if not math.isfinite(loss):
        raise EvaluationError(
            f"{task.name}: the entropy at step {step} is {loss}; expected a finite number. "
            "Lower the learning rate, clamp the coefficients, or run the task in float32."
        )
    return loss


def _check_heads(plan: Plan, tasks: Sequence[Differentiable]) -> None:
    """A classifier that is merged must mean the same in all models."""
    own = [task.name for task in tasks if task.kind == "classifier"]
    classes = [(source.label, source.config.get("id2label")) for source in plan.sources]
    other = next((c for c in classes if c[1] != classes[0][1]), None)
    if own and other is not None:
        raise MismatchError(
            f"{own[0]}: asks for the classifier of the merge, and {classes[0][0]} has other classes (id2label) than {other[0]}; "
            "expected one classifier for all. Give the task head: names, a head of the classes' words that is not merged."
        )


def _check_options(options: LearningOptions, models: Sequence[str], base: str) -> None:
    """Errors: MethodError for what is out of its range."""
    per, scope, density, clamp, init = (
        options.per,
        options.scope,
        options.density,
        options.clamp,
        options.init,
    )
    steps, batch_size, learning_rate = options.steps, options.batch_size, options.learning_rate
    low, high = clamp if clamp is not None else (-math.inf, math.inf)
    checks = [
        (per in get_args(Per), f"per is {per!r}", "task, layer or tensor", "Choose one."),
        (scope in get_args(Scope), f"scope is {scope!r}", "tensor or model", "Choose one."),
        (0 < density <= 1, f"density is {density:g}", "a share in (0, 1]", "The paper uses 0.2."),
        (steps >= 1, f"steps is {steps}", "at least 1", "The paper takes 500."),
        (batch_size >= 1, f"batch_size is {batch_size}", "at least 1", "The paper uses 16."),
        (
            0 < learning_rate < math.inf,
            f"learning_rate is {learning_rate:g}",
            "a number above 0",
            "The paper uses 1e-3.",
        ),
        (low < high, f"clamp is {clamp}", "a lower and a higher number, or None", "The default is (0, 1)."),
        (
            low <= init <= high,
            f"init is {init:g}",
            f"a number from {low:g} to {high:g}, the range of clamp",
            "Change one of them.",
        ),
        (bool(models), "there are no models", "at least one beside the base", "Give the models."),
        (
            base not in models,
            f"{base} is the base, and among the models",
            "models tuned from it",
            "Leave it out of the models.",
        ),
    ]
    for is_right, found, expected, remedy in checks:
        if not is_right:
            raise MethodError(f"adamerge: {found}; expected {expected}. {remedy}")
