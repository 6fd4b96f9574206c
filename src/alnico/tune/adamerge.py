"""Learns the coefficients of task vectors from unlabelled inputs (AdaMerging)."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import yaml

from alnico.analysis.charts import draw_lines, inline_picture, open_canvas
from alnico.analysis.page import series
from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.checkpoint.reference import Paths
from alnico.devices import DEFAULT_DEVICE, free_bytes
from alnico.engine.fetch import fetch_weights
from alnico.engine.relatedness import IN_PYTHON, PYTHON_OR_COMMAND, check_relatedness
from alnico.engine.stages import close
from alnico.errors import EvaluationError, MethodError, MismatchError, RecipeError, visible
from alnico.evaluation.batches import Batches, is_out_of_memory
from alnico.evaluation.input_batches import as_input_tasks
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.memory_subject import MemorySubject, label_one
from alnico.evaluation.module_places import needed_bytes, own_dtype, stored_sizes
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Differentiable, EvaluatedModel, Task
from alnico.evaluation.user_function import UserFunction
from alnico.events import Learned, Watcher
from alnico.installation import import_extra
from alnico.kernels.clock import counts_compiling
from alnico.methods import find
from alnico.methods.base import MatrixMethod
from alnico.methods.shared.sparsify import Scope
from alnico.models.memory_merge import MemoryMerge
from alnico.models.open_models import OpenModels, name_models, open_models, path_of, template_of
from alnico.notebook import ResultTable, name_text, names_text, never_fails, result_html, result_line
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.plan.layers import layer_position
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import relative_reference
from alnico.run_options import DEFAULT_BUDGET_BYTES, DEFAULT_RUN, Access, RunOptions, Size
from alnico.tune.gpu_room import check_room
from alnico.tune.statistics.measure import computed_by
from alnico.tune.task_vectors import MergedModules, TaskVectors

if TYPE_CHECKING:
    import torch

Per = Literal["task", "layer", "tensor"]
"""What has its own coefficient for each model: the whole task vector, each layer, or each tensor."""

WHOLE = "all"
"""The group of all tensors, if each model has one coefficient."""

PLACES = 6
"""Decimal places of the coefficients in a recipe; the module is written with the rounded values."""

LEAST = 1e-6
"""Coefficient in place of 0 where 0 would change the parts of the other models.

With ``plus`` it is the first model's if all coefficients of a tensor are 0: the merge would skip the tensor, and a model's
threshold would not count its entries. Methods over whole matrices orthogonalise the models of another weight than 0 only.
"""

ENTRIES = "task_arithmetic"
"""The method whose parts are the task vectors themselves."""

START = {"entries": 0.3, "matrices": 1.0}
"""Coefficients to start with: the paper's, and the untuned merge of a method over whole matrices."""

PLANNED = 0.5
"""The weight of every model in the plan that the parts are computed from. Dividing by it rounds nothing."""

RANGE = {"entries": (0.0, 1.0), "matrices": (0.0, 2.0)}
"""The default range of coefficients."""


@dataclass(frozen=True, eq=False)
class LearningStep:
    """One step: ``loss`` is the sum of ``losses``, each task's mean entropy (nats) at ``coefficients``."""

    number: int
    loss: float
    losses: Mapping[str, float]
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class AdaMergingResult:
    """The learned coefficients, float64 (groups, models); ``recipe`` is the YAML of the merge with them.

    ``groups`` names the rows: ``all``; layers, and the tensors outside layers (``per: layer``); or tensors.
    ``steps`` has the coefficients that each step started from. ``used`` counts the inputs of each task.
    ``fixed`` lists groups without a gradient from any input; their coefficients stayed at the start value.
    ``left_out`` maps tensors that the entropy does not depend on to the reason; the recipe still merges them
    with the coefficient of their group. ``device`` and ``dtype`` say where the modules computed, and in which dtype.
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
    method: str = ENTRIES
    compile_seconds: float = 0.0
    device: str = "cpu"
    dtype: str = "float32"
    merge: MemoryMerge | None = field(default=None, repr=False)

    def module(self) -> Any:
        """Return the merge with the learned coefficients as a module: a copy of the base or of the first module.

        Errors: RecipeError if no model is a module; those of merging.
        """
        return self._merge().module()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of the merge with the learned coefficients. Errors: those of merging."""
        return self._merge().state_dict()

    def _merge(self) -> MemoryMerge:
        assert self.merge is not None  # adamerge() sets it
        return self.merge

    def plot(self, *, figsize: tuple[float, float] | None = None, ax: Any = None, dark: bool = False) -> Any:
        """Draw the course and return it as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        Left: the entropy of each task at each step. Right: each model's coefficient, as its mean over the groups with the
        least and the largest as a band. ``figsize`` is in inches; ``ax`` are two axes to draw in; ``dark`` takes the
        colours of the dark page. Needs the extra ``[report]``. Errors: AlnicoError.
        """
        return self._plot(figsize=figsize, ax=ax, dark=dark)

    def _plot(self, **options: Any) -> Any:
        canvas = open_canvas(2, default=(9.2, 4.0), columns=2, **options)
        left, right = canvas.axes
        numbers = [step.number for step in self.steps]
        tasks = list(self.steps[0].losses) if self.steps else []
        draw_lines(
            left, numbers, [(task, i, [s.losses[task] for s in self.steps]) for i, task in enumerate(tasks)]
        )
        canvas.frame(left, title="Entropy of each task", x="step", y="nats")
        if tasks:
            left.legend(fontsize=8, frameon=False, labelcolor=canvas.theme.ink if canvas.is_own else None)
        for m, name in enumerate(self.models):
            course = [step.coefficients[:, m] for step in self.steps]
            middle = [float(c.mean()) for c in course]
            draw_lines(right, numbers, [(f"{m + 1} {name}", m, middle)])
            if len(self.groups) > 1:
                low, high = [float(c.min()) for c in course], [float(c.max()) for c in course]
                right.fill_between(numbers, low, high, color=series(m)[0], alpha=0.15, linewidth=0)
        words = "Coefficients" if len(self.groups) == 1 else "Coefficients: mean, least and largest"
        canvas.frame(right, title=words, x="step")
        canvas.legend(right)
        return canvas.figure

    def __repr__(self) -> str:
        means = (
            f"{name_text(m)} {c:.4g}"
            for m, c in zip(self.models, self.coefficients.mean(axis=0), strict=True)
        )
        return result_line(
            f"AdaMerging of {count_of(len(self.models), 'model')} per {self.per}",
            f"coefficients {'' if len(self.groups) == 1 else 'on average '}{names_text(means, 8)}",
            count_of(len(self.steps), "step"),
            f"entropy {self.steps[0].loss:.4g} to {self.steps[-1].loss:.4g}" if self.steps else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [
            [group, *map(float, of_group)]
            for group, of_group in zip(self.groups, self.coefficients, strict=True)
        ]
        return result_html(
            f"AdaMerging of {count_of(len(self.models), 'model')}",
            ResultTable(("group", *self.models), rows, "Coefficients"),
            f"Without a gradient, so at their start: {names_text(self.fixed)}." if self.fixed else "",
            facts=[
                ("base", self.base),
                ("method", self.method),
                ("per", self.per),
                ("steps", len(self.steps)),
                ("device", self.device),
                ("dtype", self.dtype),
                *((f"inputs of {t}", n) for t, n in self.used.items()),
            ],
            picture=inline_picture(
                lambda theme: self._plot(dark=theme), "Lines: entropy of each task and coefficients, by step"
            ),
        )

    def data(self) -> dict[str, Any]:
        """Return the steps and the result as plain data, for JSON."""
        return {
            "models": list(self.models),
            "base": self.base,
            "method": self.method,
            "per": self.per,
            "groups": list(self.groups),
            "fixed": list(self.fixed),
            "left_out": dict(self.left_out),
            "inputs": dict(self.used),
            "device": self.device,
            "dtype": self.dtype,
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
    """Options of the learning; :func:`adamerge` describes them and has the defaults."""

    method: str
    per: Per
    plus: bool
    density: float
    scope: Scope
    steps: int
    batch_size: int
    learning_rate: float
    init: float | None
    clamp: tuple[float, float] | Literal["auto"] | None
    seed: int
    unrelated: str

    @property
    def of(self) -> Literal["entries", "matrices"]:
        """What the parts of a model are: entries of its task vector, or made from whole matrices."""
        return "entries" if self.method == ENTRIES else "matrices"

    @property
    def start(self) -> float:
        return START[self.of] if self.init is None else self.init

    @property
    def range(self) -> tuple[float, float] | None:
        return RANGE[self.of] if self.clamp == "auto" else self.clamp


@counts_compiling
@ieee_arithmetic()
def adamerge(
    models: Paths | Sequence[Any],
    *,
    base: str | os.PathLike[str] | Any,
    tasks: TasksLike | None = None,
    inputs: Any = None,
    names: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    method: str = ENTRIES,
    per: str = "tensor",
    plus: bool = False,
    density: float = 0.2,
    scope: str = "model",
    steps: int = 500,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    init: float | None = None,
    clamp: tuple[float, float] | Literal["auto"] | None = "auto",
    seed: int = 0,
    unrelated: str = "error",
    memory: Size = DEFAULT_BUDGET_BYTES,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> AdaMergingResult:
    """Learn the coefficients of task vectors from inputs without labels (AdaMerging), and return the recipe.

    The coefficients are learned so that the merged model becomes certain of its answers on the inputs of
    ``tasks``. Labels are never read. Needs the extra ``[eval]``. ``watch`` receives each step
    (:class:`alnico.events.Learned`). The method, its edge cases and its differences from the paper are
    described in :func:`alnico.tune.adamerge.learn`. With ``method="tsv"`` they start at the untuned merge of that
    method, which already keeps most of the tasks.

    In Python models and base may be modules, dicts of tensors and other objects in memory, and ``inputs`` are the
    unlabelled inputs of each task, in a list or a dict by name: a tensor (n, ...), batches of tensors (a list or a
    DataLoader, whose labels are not read), or a function that takes the module, which may be on a GPU, and returns
    logits. A module returns logits (n, classes). ``result.module()`` and ``result.state_dict()`` are the merge.

    Options:
        models: Models: directories, files, URLs, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        tasks: Tasks file with the inputs to learn from; its labels are never read (label: null where there
            are none).
        inputs: Inputs in memory to learn from, for each task.
        names: Names of the models in results; default: their paths, or models[0], models[1] and so on.
        out: File of the recipe; the steps are written next to it as NAME.course.json.
        method: What the coefficients multiply: task_arithmetic, the task vectors; or a method over whole matrices
            that adds up a part of each model, such as tsv, with its defaults.
        per: What has its own coefficient for each model: task, layer or tensor.
        plus: AdaMerging++: trim the task vectors and elect signs first, as TIES does.
        density: With plus: share of each task vector that the trim keeps, in (0, 1].
        scope: With plus: what density is a share of: model or tensor.
        steps: Number of steps; each uses one batch of every task.
        batch_size: Number of inputs of each task in a step.
        learning_rate: Learning rate of Adam: about how far one step moves a coefficient.
        init: Value of every coefficient at the start; default: 0.3, and 1 with a method over whole matrices.
        clamp: Keep coefficients in [0, 1], or [0, 2] with a method over whole matrices; in Python any range,
            or None.
        seed: Seed of the batches.
        memory: Memory for the task vectors, such as 2GiB; what does not fit is read again at each step. On a GPU they
            first fill half of its free memory.
        dtype: Dtype in which the module computes: float32, bfloat16 or float16. auto is float32 on every device, because
            gradients need it; a module in memory keeps its own.
    Errors: EvaluationError, MethodError, ModelError, MismatchError, OutputError, HubError; ResourceError for a device that
        does not exist, or that is too small.
    """
    run = RunOptions.of(memory=memory, offline=offline, device=device, watch=watch)
    named = name_models(models, names=names)
    base_label = label_one(base, "base", named)
    is_on_disk = names is None and all(path_of(model) is not None for model in (base, *named.values()))
    if out is not None and not is_on_disk:
        raise RecipeError(
            "out is set, but the recipe of models in memory or with names=... cannot be merged from files; expected "
            "paths of models. Remove out, and use module() or state_dict() of the result."
        )
    for path in () if out is None else (Path(out), course_path(out)):
        check_new_file(path)
    options = LearningOptions(
        method,
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
    if tasks is None and inputs is None:
        raise EvaluationError(
            "tasks: there are none; expected inputs to learn from. Pass tasks=, a tasks file of classifications, or "
            "inputs=, the inputs of each task."
        )
    read = (
        *(as_tasks(tasks, allow_code=allow_code) if tasks is not None else ()),
        *(as_input_tasks(inputs) if inputs is not None else ()),
    )
    every = {base_label: base, **named}
    placement = ModulePlacement.of(device, dtype).for_tasks(read)
    if is_on_disk:
        if placement.dtype == "auto":
            placement = replace(placement, dtype="float32")
        opened, subject = None, open_subject(base, offline=offline, placement=placement, watch=watch)
    else:
        opened = functools.partial(open_models, every, base=base, access=Access(offline))
        in_memory = MemorySubject(
            base_label, base, template=template_of(every.values()), offline=offline, placement=placement
        )
        subject = ModuleSubject(base_label, in_memory.module("classifier"), watch=watch)
    learned = learn(
        list(named),
        base_label,
        read,
        subject,
        options,
        run=run,
        written_from=[relative_reference(name, Path(out).parent) for name in (base_label, *named)]
        if out is not None
        else None,
        opened=opened,
        placement=placement,
    )
    learned = replace(learned, merge=MemoryMerge(every, yaml.safe_load(learned.recipe), base))
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
    opened: Callable[[], OpenModels] | None = None,
    placement: ModulePlacement = ON_THE_PROCESSOR,
) -> AdaMergingResult:
    """Learn the coefficients of task vectors by minimising the entropy of the merge; labels are never read.

    ``theta = base + sum_i c_i^l * vector_i^l``, for models i and groups of tensors l, is written into the
    modules of ``subject``, which must hold the base's values. The loss is the sum over tasks of the mean
    entropy of softmax(logits) over a batch. Each step takes one batch of every task, so that no task
    dominates, and keeps one task's graph in memory at a time. The derivative of ``c_i^l`` is the inner
    product of the parameters' gradient with the task vector, so a step is an ordinary forward and backward
    pass plus one pass over the task vectors. Adam updates the coefficients in float64, and ``clamp`` clips
    them to its range. At the end they are rounded to 6 places, ``subject`` holds the merge with them, and the
    recipe gives the same model.

    With a ``method`` over whole matrices, a matrix has in place of the task vectors the parts that the method adds up, and
    every other tensor its mean, ``1/k`` of the task vectors of k models. The parts do not depend on the coefficients, so
    matrices are decomposed once. A coefficient of 0 is written as 1e-6, so that the recipe has the same
    parts. ``subject`` then holds the merge to the rounding of its dtype, not to the bit.

    Use when: the tasks are classifications, and you have unlabelled inputs of every task. The paper finds
        large gains over task arithmetic with one coefficient per tensor, small gains with one per model.
        Entropy does not apply to regression or generation. A batch of a single class teaches a model to
        always answer with that class: give inputs in their natural order.

    ``written_from`` has the names of the base and the models in the recipe, if they differ from ``base`` and
    ``models``. ``opened`` opens models in memory, by those names. ``run.memory_bytes`` limits the task vectors in memory; the
    others are read again at every step, parts of matrices from a temporary file. Without ``clamp`` coefficients may diverge.
    ``placement`` says where ``subject`` has its modules. On a GPU the task vectors are there, too, as far as half of its
    free memory holds them, and so are their products with the gradients. Out of memory halves the part of a batch that
    the module sees at once: the entropy is a mean over inputs, so gradients of parts add up to that of the batch.

    Edge cases: tensors that are equal in the base and all models take no part. Coefficients without a
        gradient, such as those of a head that no task uses, stay at ``init`` (``fixed``). Tensors have the
        names of the files: experts that the module packs into one parameter have one coefficient per matrix
        in the files, and a tied tensor that the files store twice has one.
    Errors: EvaluationError for tasks without logits or inputs, and for a loss that is not finite;
        MismatchError for models that do not fit one another or the module, and for classifiers of different
        classes; MethodError for options out of range; those of a merge.
    Differs from the source: methods over whole matrices are ours; the authors clamp in the forward pass, so a coefficient outside the range no
        longer has a gradient, and they learn on test inputs.
    Source: Yang et al. 2024, AdaMerging, https://arxiv.org/abs/2310.02575, section 3.
    """
    _check_options(options, models, base)
    per, plus, scope = options.per, options.plus, options.scope
    import_extra("torch", "adamerge", "eval")
    logit_tasks = _logit_tasks(tasks)
    kinds = " and ".join(dict.fromkeys(task.kind for task in logit_tasks))
    names = tuple(written_from) if written_from is not None else (base, *models)
    recipe = load_recipe(_mapping((base, *models), options, PLANNED))
    if opened is None:
        plan = build_plan(recipe, run=RunOptions(offline=run.offline))
    else:
        plan = opened().plan(recipe, run=RunOptions(offline=run.offline))
    try:
        _check_heads(plan, logit_tasks)
        loaded = list(dict.fromkeys(task.kind for task in logit_tasks))
        _check_gpus(plan, placement, len(loaded))
        fetch_weights(plan)
        check_relatedness(plan, PYTHON_OR_COMMAND if opened is None else IN_PYTHON)
        vectors = TaskVectors(
            plan,
            density=options.density if plus else None,
            scope=scope,
            memory_bytes=run.memory_bytes,
            weight=PLANNED,
            factor=1.0 if options.of == "entries" else 1 / len(models),
            device=placement.device,
        )
        own: dict[str, Any] = {kind: subject.module(kind) for kind in loaded}
        modules = MergedModules(vectors, own, plan, gpu_room=_room_for_vectors(own.values(), placement))
        try:
            groups = Groups(per, [job.name for job in vectors.changing], modules.copies)
            course = _descend(
                logit_tasks,
                subject,
                modules,
                groups,
                len(models),
                options,
                run,
            )
            final = course.coefficients.round(PLACES)
            if options.of == "matrices":
                final[final == 0] = LEAST
            elif plus and scope == "model":
                final[~final.any(axis=1), 0] = LEAST
            modules.write(_weights(modules, groups, final, options.start))
            dtype = computed_by(next(iter(own.values())), placement)["dtype"]
        finally:
            modules.close()
            vectors.close()
        weights = [
            _setting(groups, column, options.start, [job.name for job in vectors.jobs]) for column in final.T
        ]
    finally:
        close([plan])
    header = (
        f"# AdaMerging{'++' if plus else ''}{f' of {options.method}' if options.of == 'matrices' else ''}, coefficients per {per}, {options.steps} steps of "
        f"{options.batch_size} unlabelled inputs per task, seed {options.seed}.\n# Learned on "
        f"{', '.join(f'{visible(task)} ({count} inputs)' for task, count in course.used.items())}.\n"
    )
    text = header + yaml.safe_dump(
        _mapping(names, options, weights),
        sort_keys=False,
        default_flow_style=None,
        width=1000,
    )
    fixed = tuple(g for g, is_moved in zip(groups.names, course.moved, strict=True) if not is_moved)
    left_out = dict.fromkeys(modules.absent, f"not in the module of the tasks ({kinds})")
    return AdaMergingResult(
        tuple(models),
        base,
        per,
        groups.names,
        final,
        course.steps,
        course.used,
        fixed,
        left_out,
        text,
        options.method,
        device=placement.where,
        dtype=dtype,
    )


def course_path(recipe: str | os.PathLike[str]) -> Path:
    """Return the path of the steps of a learned recipe.

    >>> course_path("merges/mine.yml").as_posix()
    'merges/mine.course.json'
    """
    return Path(recipe).with_suffix(".course.json")


def write_learned(learned: AdaMergingResult, recipe: str | os.PathLike[str]) -> None:
    """Write the recipe, and the steps next to it. Errors: OutputError, RunError."""
    write_new_file(course_path(recipe), json.dumps(learned.data()) + "\n")
    write_new_file(Path(recipe), learned.recipe)


class Groups:
    """Assigns each tensor a row of the coefficients (groups, models).

    ``copies`` maps the second copy of a tied tensor to the first; both have one coefficient.
    """

    def __init__(
        self, per: Per, names: Sequence[str], copies: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.per = per
        self.of = {name: group_of(copies.get(name, name), per) for name in names}
        self.names = tuple(dict.fromkeys(self.of.values()))
        self.row = {group: i for i, group in enumerate(self.names)}


def group_of(name: str, per: Per) -> str:
    """Return the group of a tensor; its tensors share one coefficient per model.

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
    modules: MergedModules,
    groups: Groups,
    models: int,
    options: LearningOptions,
    run: RunOptions,
) -> _Course:
    """Run the gradient descent."""
    steps, init, clamp = options.steps, options.start, options.range
    coefficients = np.full((len(groups.names), models), float(init))
    adam = _Adam(coefficients.shape, options.learning_rate)
    batches = [_batches(task.size, options.batch_size, options.seed, i) for i, task in enumerate(tasks)]
    seen: list[set[int]] = [set() for _ in tasks]
    moved = np.zeros(len(groups.names), bool)
    parts = Batches("adamerge", options.batch_size, rows="inputs")
    course = []
    for number in range(1, steps + 1):
        weights = _weights(modules, groups, coefficients, init)
        if number == 1:
            modules.write(weights)
        else:
            modules.update(weights)
        chosen = [next(order) for order in batches]
        for used, batch in zip(seen, chosen, strict=True):
            used.update(batch)

        backward = functools.partial(_backward, tasks, subject, modules, chosen, number)
        losses = parts.whole(backward, subject)
        if modules.must_repeat():
            modules.write(weights)
            losses = parts.whole(backward, subject)
        slopes = np.zeros_like(coefficients)
        for job, slope in modules.slopes():
            slopes[groups.row[groups.of[job.name]]] += slope
        if not np.isfinite(slopes).all():
            raise EvaluationError(
                f"step {number}: a gradient is not finite (losses {losses}); expected finite numbers. Lower "
                "the learning rate."
            )
        moved |= slopes.any(axis=1)
        step = LearningStep(number, math.fsum(losses.values()), losses, coefficients.copy())
        course.append(step)
        coefficients = adam.step(coefficients, slopes)
        if clamp is not None:
            coefficients = coefficients.clip(*clamp)
        run.report(Learned(step, steps))
    return _Course(
        tuple(course), coefficients, moved, {t.name: len(k) for t, k in zip(tasks, seen, strict=True)}
    )


def _backward(
    tasks: Sequence[Differentiable],
    subject: EvaluatedModel,
    modules: MergedModules,
    chosen: Sequence[Sequence[int]],
    number: int,
    size: int,
) -> dict[str, float]:
    """Add the gradients of all entropies to the parameters; return each task's entropy on its ``chosen`` examples.

    The module sees at most ``size`` examples at once. Out of memory drops all gradients, so that the step can start again.
    """
    losses = {}
    try:
        for task, batch in zip(tasks, chosen, strict=True):
            found = []
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                loss = entropy(task.logits(subject, part))
                if not loss.requires_grad:
                    raise EvaluationError(
                        f"{task.name}: its loss does not depend on any merged tensor; expected logits computed "
                        "from the module's parameters. Give tasks for the merged models, and models that differ "
                        "from the base."
                    )
                share = len(part) / len(batch)
                found.append(share * _finite(float(loss.detach()), task, number))
                (loss if share == 1 else share * loss).backward()  # type: ignore[no-untyped-call]
            losses[task.name] = math.fsum(found)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        modules.drop_gradients()
        # Not as an error of the task, so that the caller halves the batch.
        raise MemoryError("out of memory") from None
    return losses


def _check_gpus(plan: Plan, placement: ModulePlacement, modules: int) -> None:
    """Refuse GPUs without room for modules and their gradients, whose sizes the headers tell. Errors: ResourceError."""
    if not placement.device.is_gpu:
        return
    base = next(job.base for job in plan.jobs if job.base is not None)
    stored = stored_sizes(plan.sources[base.model])
    dtype = placement.torch_dtype or own_dtype(stored)
    changed = {
        n: stored[n] for n in (job.base.name for job in plan.jobs if job.is_computed and job.base is not None)
    }
    check_room(
        "adamerge",
        {
            "the module": modules * needed_bytes(stored, dtype),
            "its gradients": modules * needed_bytes(changed, dtype),
        },
        dtype,
        placement,
    )


def _room_for_vectors(modules: Iterable[Any], placement: ModulePlacement) -> dict[str, int]:
    """Return the bytes of each GPU, by torch's name, for task vectors: half of what modules and their gradients leave free."""
    room: dict[str, int] = {}
    for gpu in placement.devices:
        if gpu.is_gpu:
            room[gpu.torch_name] = room.get(gpu.torch_name, 0) + free_bytes(gpu)
    for parameter in (p for module in modules for p in module.parameters()):
        if (name := str(parameter.device)) in room:
            room[name] -= parameter.numel() * parameter.element_size()
    return {name: max(0, left // 2) for name, left in room.items()}


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

    def step(self, values: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.time += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.time), self.square / (1 - 0.999**self.time)
        updated: np.ndarray = values - self.rate * mean / (np.sqrt(square) + 1e-8)
        return updated


def _batches(size: int, batch_size: int, seed: int, task: int) -> Iterator[list[int]]:
    order = np.random.default_rng([seed % (1 << 64), task])
    length = min(size, batch_size)
    while True:
        shuffled = order.permutation(size).tolist()
        for start in range(0, size - length + 1, length):
            yield shuffled[start : start + length]


def _weights(
    modules: MergedModules, groups: Groups, coefficients: np.ndarray, init: float
) -> dict[str, np.ndarray]:
    """Return the coefficients of every merged tensor; tensors without a group are equal in all models."""
    idle = np.full(coefficients.shape[1], init)
    return {
        job.name: coefficients[groups.row[groups.of[job.name]]] if job.name in groups.of else idle
        for job in modules.vectors.jobs
    }


def _setting(groups: Groups, column: np.ndarray, init: float, names: Sequence[str]) -> Any:
    """Return one model's weights in the form of a recipe."""
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
    """Return filters that match only the tensors of a group."""
    part = f"{group}."
    of_group = [name for name, own in groups.of.items() if own == group]
    outside = [f"={name}" for name in of_group if name == group or not name.startswith(part)]
    if len(outside) == len(of_group):
        return outside
    layer = part if all(name.startswith(part) for name in names if part in name) else f"re:^{re.escape(part)}"
    return [*outside, layer]


def _mapping(names: Sequence[str], options: LearningOptions, weights: Any) -> dict[str, Any]:
    """Return the recipe with these weights: one for all models, or one for each."""
    base, *models = names
    each = weights if isinstance(weights, list) else [weights] * len(models)
    parameters: dict[str, Any] = {}
    if options.plus:
        parameters = {"density": options.density, "elect": "mass", "divide": "none", "scope": options.scope}
    elif options.of == "matrices":
        parameters = {"others": "mean"}
    return {
        "merge_method": "ties" if options.plus else options.method,
        "base_model": base,
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(models, each, strict=True)
        ],
        **({"parameters": parameters} if parameters else {}),
        **({"unrelated": options.unrelated} if options.unrelated != "error" else {}),
    }


def _logit_tasks(tasks: Sequence[Task]) -> list[Differentiable]:
    logit_tasks = [task for task in tasks if isinstance(task, Differentiable)]
    for task in tasks:
        if isinstance(task, UserFunction):
            raise EvaluationError(
                f"{task.name}: is a function that scores a model, and AdaMerging learns from class scores of inputs; "
                "expected inputs without labels. Pass inputs=, the inputs of each task: inputs=[X1, X2]."
            )
        if not isinstance(task, Differentiable):
            raise EvaluationError(
                f"{task.name}: gives no class scores, whose entropy is minimised; expected a classification. "
                "Remove the task."
            )
        if not task.size:
            raise EvaluationError(
                f"{task.name}: has no examples; expected at least one input. Give the task's data."
            )
    if not logit_tasks:
        raise EvaluationError(
            "tasks: there are none; expected a classification for each model. Add tasks to the file."
        )
    return logit_tasks


def _finite(loss: float, task: Task, step: int) -> float:
    if not math.isfinite(loss):
        raise EvaluationError(
            f"{task.name}: the entropy at step {step} is {loss}; expected a finite number. "
            "Lower the learning rate, clamp the coefficients, or run the task in float32."
        )
    return loss


def _check_heads(plan: Plan, tasks: Sequence[Differentiable]) -> None:
    """Check that a merged classifier has the same classes in all models. Errors: MismatchError."""
    classifier_tasks = [task.name for task in tasks if task.kind == "classifier"]
    classes = [(source.label, source.config.get("id2label")) for source in plan.sources]
    other = next((c for c in classes if c[1] != classes[0][1]), None)
    if classifier_tasks and other is not None:
        raise MismatchError(
            f"{classifier_tasks[0]}: uses the merged classifier, but {classes[0][0]} has different classes "
            f"(id2label) from {other[0]}; expected the same classes in all models. Set head: names for the "
            "task, a head built from the class names that is not merged."
        )


def _adds_up_parts(name: str) -> bool:
    """Does a method add up a part of each model, which does not depend on the weights? Errors: MethodError for an unknown one."""
    method = find(name)
    if method.statistics or "others" not in method.options:
        return False
    bound = method.bind({}, 2)
    return isinstance(bound, MatrixMethod) and bound.parts is not None


def _check_options(options: LearningOptions, models: Sequence[str], base: str) -> None:
    """Check the ranges of the options. Errors: MethodError."""
    per, scope, density, clamp, init = (
        options.per,
        options.scope,
        options.density,
        options.range,
        options.start,
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
            options.of == "entries" or _adds_up_parts(options.method),
            f"method is {options.method!r}",
            f"{ENTRIES}, or a method over whole matrices that adds up a part of each model, such as tsv",
            "Choose one of them.",
        ),
        (
            options.of == "entries" or not options.plus,
            f"plus is set with the method {options.method}",
            f"{ENTRIES}, whose task vectors can be trimmed",
            "Remove one of the two.",
        ),
        (
            low <= init <= high,
            f"init is {init:g}",
            f"a number from {low:g} to {high:g}, the range of clamp",
            "Change one of them.",
        ),
        (bool(models), "there are no models", "at least one model besides the base", "Give the models."),
        (
            base not in models,
            f"{base} is both the base and one of the models",
            "models tuned from it",
            "Remove it from the models.",
        ),
    ]
    for is_right, value, expected, remedy in checks:
        if not is_right:
            raise MethodError(f"adamerge: {value}; expected {expected}. {remedy}")
