"""Measures Gram matrices: sums of outer products of the inputs of linear layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from alnico.checkpoint.output_path import Replace, replace_mode
from alnico.checkpoint.statistics import check_statistics_folder, statistics_folder
from alnico.devices import DEFAULT_DEVICE, Device
from alnico.errors import EvaluationError, MismatchError, OutputError
from alnico.evaluation.module_names import PlacedElements
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.task_file import TasksLike, as_tasks
from alnico.evaluation.tasks import Differentiable, EvaluatedModel, ModelKind, Task
from alnico.events import Counted, Watcher
from alnico.installation import import_extra
from alnico.kernels.clock import counts_compiling
from alnico.methods.base import total_weight
from alnico.methods.regmean import solve
from alnico.models.open_models import AnyModels, name_models, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.arrays import AnyArray, to_numpy, to_torch
from alnico.plan.families import comes_first
from alnico.plan.layers import layer_position
from alnico.tune.statistics.measure import (
    MeasuredStatistics,
    Stored,
    computed_by,
    existing_paths,
    kind_of,
    named_memory,
    places,
    stored_in,
    subject_of,
    tasks_of,
)


@counts_compiling
@ieee_arithmetic()
def gram_statistics(
    models: AnyModels,
    out: str | os.PathLike[str],
    *,
    tasks: TasksLike | Sequence[TasksLike] | None = None,
    inputs: Any = None,
    examples: int = 256,
    vectors: bool = False,
    plus: bool = False,
    weights: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    offline: bool = False,
    device: Any = DEFAULT_DEVICE,
    dtype: Any = "auto",
    allow_code: bool = False,
    overwrite: bool = False,
    overwrite_anything: bool = False,
    watch: Watcher | None = None,
) -> tuple[Path, ...]:
    """Measure Gram matrices of models' linear layers on tasks, as files for ``merge_method: regmean``.

    The files of one model go to ``out``; those of several models go to one directory per model in ``out``,
    named after the model. Labels are never read. Needs the extra ``[eval]``. ``watch`` receives the number of
    tasks done, with ``plus`` of layers (:class:`alnico.events.Counted`).

    In Python models may also be ``nn.Module``s, and ``inputs`` are unlabelled inputs in memory, as for
    :func:`alnico.fisher_statistics`; for several models a list has those of each. The directories of objects
    are called ``models[0]``, ``models[1]`` and so on.

    Options:
        models: Models: transformers checkpoints, URLs, or owner/name@revision on the hub.
        out: Directory to create; for several models it gets one directory per model.
        tasks: Tasks file with the inputs to measure on; for several models one for all, or one per model.
        inputs: Inputs in memory to measure on; for several models those for all, or a list with those of each.
        examples: Largest number of inputs per task.
        vectors: Also measure what scales of norms and biases multiply, for regmean's vectors: inputs.
        plus: Measure for RegMean++: all models together, each layer on the outputs of the merged layers
            before it.
        weights: With plus: weight of each model; give the recipe the same.
        alpha: With plus: regmean's alpha, in [0, 1]; give the recipe the same.
        ridge: With plus: regmean's ridge, in [0, 1]; give the recipe the same.
        normalize: With plus: regmean's normalize; give the recipe the same.
        overwrite: Replace older statistics in the directory.
        overwrite_anything: Also write into a directory with other files, which are kept.
    Errors: EvaluationError, ModelError, MismatchError, OutputError, HubError; ResourceError for a device that does not
        exist, or that is too small.
    """
    if vectors and plus:
        raise EvaluationError(
            "vectors: is given together with plus; expected one of them, because RegMean++ measures matrices only. "
            "Remove vectors or plus."
        )
    placement = ModulePlacement.of(device, dtype)
    may_replace = replace_mode(overwrite, overwrite_anything)
    evaluated, tasks_of_each, folders = open_measured(
        models,
        Path(out),
        tasks,
        inputs,
        placement,
        may_replace,
        offline=offline,
        allow_code=allow_code,
        watch=watch,
    )
    if plus:
        measured = measure_gram_plus(
            evaluated,
            tasks_of_each,
            examples=examples,
            weight=weights,
            alpha=alpha,
            ridge=ridge,
            normalize=normalize,
            placement=placement,
            watch=watch,
        )
        for statistics, folder, subject in zip(measured, folders, evaluated, strict=True):
            statistics.write(folder, subject, overwrite=may_replace)
    else:
        for subject, own, folder in zip(evaluated, tasks_of_each, folders, strict=True):
            measure_gram(
                subject, own, examples=examples, vectors=vectors, placement=placement, watch=watch
            ).write(folder, subject, overwrite=may_replace)
    return tuple(folders)


def open_measured(
    models: AnyModels,
    out: Path,
    tasks: Any,
    inputs: Any,
    placement: ModulePlacement,
    may_replace: Replace,
    *,
    in_one_folder: bool = True,
    offline: bool = False,
    allow_code: bool = False,
    watch: Watcher | None = None,
) -> tuple[list[EvaluatedModel], list[tuple[Task, ...]], list[Path]]:
    """Open the models that are measured, with the tasks and the new directory of each.

    Those are directories in ``out``, named after the models; with ``in_one_folder`` a single model has ``out`` itself.
    Errors: EvaluationError, ModelError, OutputError, HubError.
    """
    named = name_models(models)
    names = list(named)
    is_one = in_one_folder and len(names) == 1
    folders = [out] if is_one else [out / statistics_folder(name) for name in names]
    if len({str(folder).casefold() for folder in folders}) < len(folders):
        raise OutputError(
            f"{out}: two models have the same name ({', '.join(f.name for f in folders)}); expected "
            "different names. Measure them one by one."
        )
    for folder in folders:
        check_statistics_folder(
            folder,
            may_replace,
            existing_paths(
                (*map(path_of, named.values()), *(tasks if isinstance(tasks, (list, tuple)) else (tasks,)))
            ),
        )
    tasks_of_each = _tasks_of_each(tasks, inputs, len(names), allow_code)
    evaluated = [
        subject_of(model, label, offline=offline, placement=placement, watch=watch)
        for label, model in named.items()
    ]
    return evaluated, tasks_of_each, folders


def _tasks_of_each(tasks: Any, inputs: Any, models: int, allow_code: bool) -> list[tuple[Task, ...]]:
    """Return the tasks of each model, from one list for all or one per model. Errors: EvaluationError."""
    if inputs is not None:
        is_each = models > 1 and isinstance(inputs, (list, tuple))
        if is_each and len(inputs) != models:
            raise EvaluationError(
                f"inputs: there are {len(inputs)} for {models} models; expected one for all, or one for each. "
                "Change the number."
            )
        own = [tasks_of(None, each) for each in (inputs if is_each else [inputs] * models)]
        more = _tasks_of_each(tasks, None, models, allow_code) if tasks is not None else [()] * models
        return [(*first, *second) for first, second in zip(more, own, strict=True)]
    if tasks is None:
        tasks_of(None, None)
    is_single = not isinstance(tasks, (list, tuple)) or not (
        tasks and isinstance(tasks[0], (str, os.PathLike, Mapping, Sequence))
    )
    listed: Sequence[Any] = [tasks] if is_single else tasks
    if len(listed) not in (1, models):
        raise EvaluationError(
            f"tasks: there are {len(listed)} for {models} models; expected one for all, or one for each. "
            "Change the number."
        )
    return [as_tasks(each, allow_code=allow_code) for each in listed] * (
        1 if len(listed) == models else models
    )


def measure_gram(
    subject: EvaluatedModel,
    tasks: Sequence[Task],
    *,
    examples: int = 256,
    vectors: bool = False,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> MeasuredStatistics:
    """Measure ``X^T X`` for the inputs X of every linear layer of a model, on ``examples`` of each task.

    Labels are never read if the task gives class scores. A row of X is a token; tokens that the attention
    mask marks as padding are left out. Products of a batch are float32, on the device of the module, which
    ``placement`` names; their sums are float64, on the processor. So a batch that is halved because memory
    ran out has the same sums, to the rounding of its products. Layers that
    always have the same input share one matrix. A layer whose weight has another use (a tied head) is left
    out. Experts that the module packs into one parameter, but the files store one by one, are measured as
    separate layers, one example at a time. With ``vectors`` the squares of what each entry of a scale or a bias
    multiplies are summed too: normalised inputs for the scale of a norm, 1 for the bias of a norm or a linear layer.
    ``watch`` receives the number of tasks done. Errors: EvaluationError, ModelError.
    Source: Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3.2.
    """
    kind = kind_of(tasks, "Gram matrices")
    module = subject.module(kind)
    stored = stored_in(subject, module, kind)
    layers = layers_of(module, stored)
    squares: dict[int, VectorInputs] | None = {} if vectors else None
    grams = collect_grams(subject, module, tasks, examples, layers, watch, squares)
    _check_called(grams, layers, subject)
    return measured_grams(stored, module, kind, grams, tasks, examples, {}, placement, squares or {})


def measure_gram_plus(
    models: Sequence[EvaluatedModel],
    tasks: Sequence[Sequence[Task]],
    *,
    examples: int = 256,
    weight: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    placement: ModulePlacement = ON_THE_PROCESSOR,
    watch: Watcher | None = None,
) -> list[MeasuredStatistics]:
    """Measure Gram matrices for RegMean++, of models to merge with one another, each on its own tasks.

    It proceeds layer by layer: the inputs of a layer come from the merged layers before it. RegMean merges
    them with ``weight`` (one number per model), ``alpha``, ``ridge`` and ``normalize``; use the same values
    for the merge; it solves its equations on the GPU if ``placement`` is on one. Tensors before the first layer are merged first. Tensors that are not matrices of linear
    layers become the weighted mean. The models' modules are restored at the end. ``watch`` receives the
    number of layers done.
    Errors: EvaluationError, ModelError; MismatchError for models with different layers.
    Source: Nguyen et al. 2025, https://arxiv.org/abs/2508.03121, section 3.
    """
    torch = import_extra("torch", "Gram matrices", "eval")
    kinds = [kind_of(t, "Gram matrices") for t in tasks]
    modules = [s.module(kind) for s, kind in zip(models, kinds, strict=True)]
    shares = np.array(weight if weight is not None else [1.0] * len(models))
    shares = shares / total_weight(list(shares), " of RegMean++")
    if len({id(m) for m in modules}) < len(modules):
        raise MismatchError(
            "models: two of them share one module; expected one module per model. Open each model separately."
        )
    stored = [stored_in(*arguments) for arguments in zip(models, modules, kinds, strict=True)]
    parameters = [dict(m.named_parameters()) for m in modules]
    shared = [
        n
        for n, p in parameters[0].items()
        if all(n in other and other[n].shape == p.shape for other in parameters[1:])
    ]
    steps: dict[Any, list[str]] = {}
    stacks = list(dict.fromkeys(place.stack for n in shared if (place := layer_position(n)) is not None))
    for name in sorted(shared, key=lambda n: _order(n, stacks)):
        steps.setdefault(_step_of(name), []).append(name)
    layers = [layers_of(m, of) for m, of in zip(modules, stored, strict=True)]
    all_grams: list[dict[str, LayerGram]] = [{} for _ in models]
    settings = {
        "plus": True,
        "models": [s.label for s in models],
        "weight": [float(s) for s in shares],
        "alpha": alpha,
        "ridge": ridge,
    }
    with ExitStack() as stack:
        for own in parameters:
            stack.enter_context(_restored([own[name] for name in shared]))
        for done, names in enumerate(steps.values()):
            called = [{n: m for n, m in all_of.items() if _parameter_of(n, m) in names} for all_of in layers]
            for i, (subject, own_tasks) in enumerate(zip(models, tasks, strict=True)):
                if called[i]:
                    all_grams[i] |= collect_grams(subject, modules[i], own_tasks, examples, called[i], None)
            with torch.no_grad():
                for name in names:
                    values = [own[name].detach().cpu().double().numpy() for own in parameters]
                    merged = sum((s * v for s, v in zip(shares, values, strict=True)), np.zeros(()))
                    for path, layer in layers[0].items():
                        if _parameter_of(path, layer) != name or any(
                            path not in grams_of for grams_of in all_grams
                        ):
                            continue
                        grams = [grams_of[path] for grams_of in all_grams]
                        index = getattr(layer, "expert", None)
                        index = ... if index is None else index
                        matrices = _MatricesInMemory(
                            [v[index] for v in values], [g.total for g in grams], placement.device
                        )
                        rows = tuple(float(g.rows) if normalize else 1.0 for g in grams)
                        turned = tuple(float(g.is_transposed) for g in grams)
                        with named_memory(
                            f"{path}: {placement.device}",
                            "the equations of RegMean",
                            "its matrices and Gram matrices next to the modules. Choose another device",
                        ):
                            merged[index] = to_numpy(
                                solve(matrices, tuple(map(float, shares)), rows, turned, alpha, ridge)
                            )
                    for own in parameters:
                        own[name].copy_(torch.from_numpy(np.ascontiguousarray(merged)))
            if watch:
                watch(Counted("layers", done + 1, len(steps)))
    for arguments in zip(all_grams, layers, models, strict=True):
        _check_called(*arguments)
    return [
        measured_grams(of, m, kind, f, t, examples, {**settings, "normalize": normalize}, placement)
        for of, m, kind, f, t in zip(stored, modules, kinds, all_grams, tasks, strict=True)
    ]


SUM = ".sum"
"""Ends the name under which the sum of a layer's inputs is stored, after that of their Gram matrix."""


class InputSums(NamedTuple):
    """Sums over the inputs of a layer: of their outer products, of themselves, and their number."""

    products: np.ndarray = np.zeros(())
    sum: np.ndarray = np.zeros(())
    rows: int = 0

    def __add__(self, other: InputSums) -> InputSums:  # type: ignore[override]
        return InputSums(self.products + other.products, self.sum + other.sum, self.rows + other.rows)


@dataclass
class LayerGram:
    """A layer's Gram matrix ``total`` (inputs, inputs) and the ``sum`` of its inputs (inputs,), float64, over ``rows``; equal
    inputs share them."""

    total: np.ndarray
    sum: np.ndarray
    rows: int
    is_transposed: bool


@dataclass
class VectorInputs:
    """The sums of the squares of what multiplies each entry of a scale or a bias, float64, over ``rows``."""

    squares: np.ndarray
    rows: int


class _MatricesInMemory:
    """Implements :class:`alnico.methods.base.MatrixReader` for matrices in memory, which are computed on a device."""

    def __init__(self, values: Sequence[np.ndarray], grams: Sequence[np.ndarray], device: Device) -> None:
        self.models = len(values)
        self._values = values
        self._grams = grams
        self._device = device

    def value(self, model: int) -> AnyArray:
        return self._there(self._values[model].copy())

    def side(self, kind: str, model: int) -> AnyArray:
        return self._there(
            self._grams[model].astype(np.float32).astype(np.float64)
        )  # the precision of the files

    def _there(self, matrix: np.ndarray) -> AnyArray:
        return to_torch(matrix, self._device.torch_name) if self._device.is_gpu else matrix


def linears(module: Any) -> dict[str, Any]:
    """Return linear layers (and transformers' Conv1D) whose weight has no other use, by path."""
    torch = import_extra("torch", "Gram matrices", "eval")
    holders: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        path: layer
        for path, layer in module.named_modules()
        if (isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D")
        and holders.get(id(layer.weight)) == 1
    }


def norms(module: Any) -> dict[str, Any]:
    """Return the norms over the last dimension that have a scale, by path.

    They are told by their class's name, as models define their own; their output is affine in the scale.
    """
    found = {}
    for path, layer in module.named_modules():
        name, own = type(layer).__name__, dict(layer.named_parameters())
        is_over_rows = "Norm" in name and not name.startswith(("BatchNorm", "GroupNorm", "InstanceNorm"))
        if is_over_rows and "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].dim() == 1:
            found[path] = layer
    return found


@dataclass(frozen=True, eq=False)
class Bare:
    """A matrix (outputs, inputs) outside of linear layers: a parameter, or with ``expert`` a part of one."""

    name: str
    weight: Any
    expert: int | None = None


def bare(module: Any, stored: Stored) -> dict[str, Bare]:
    """Return the matrices outside of linear layers, by path.

    These are routers, and experts that the module packs into one parameter but the checkpoint stores one by
    one.
    """
    torch = import_extra("torch", "Gram matrices", "eval")
    holders: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    matrices = {}
    for path, owner in module.named_modules():
        if isinstance(owner, torch.nn.Linear | torch.nn.Embedding) or type(owner).__name__ == "Conv1D":
            continue
        for own, weight in owner.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            files = stored.placement.files_of.get(id(weight), ())
            if weight.dim() == 2 and holders[id(weight)] == 1:
                matrices[name] = Bare(name, weight)
            elif weight.dim() == 3 and len(files) > 1 and all(len(stored.shapes[n]) == 2 for n in files):
                matrices |= {f"{name}[{i}]": Bare(name, weight, i) for i in range(len(weight))}
    return matrices


def layers_of(module: Any, stored: Stored) -> dict[str, Any]:
    return {**linears(module), **bare(module, stored)}


def _parameter_of(path: str, layer: Any) -> str:
    return layer.name if isinstance(layer, Bare) else f"{path}.weight"


def _order(name: str, stacks: Sequence[str]) -> tuple[int, int, int]:
    """Sort key: what precedes the layers, the stacks in order (encoder, decoder), then the rest."""
    place = layer_position(name)
    if place is not None:
        return 1, stacks.index(place.stack), place.layer
    return (0 if comes_first(name) else 2), 0, 0


def _step_of(name: str) -> object:
    place = layer_position(name)
    return (place.stack, place.layer) if place is not None else comes_first(name)


@contextmanager
def _restored(parameters: Sequence[Any]) -> Iterator[None]:
    """Restore the values of parameters after the block."""
    values = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for p, value in zip(parameters, values, strict=True):
            p.data.copy_(value)


class _Collector:
    """Sums outer products of the inputs of ``layers`` over forward passes of ``module``.

    Layers that had the same inputs in every pass form one of ``groups`` and share a sum. A layer that leaves
    its group takes a copy of the sum.
    With ``has_norms`` it also sums the squares of what the scales of norms multiply.
    """

    def __init__(self, module: Any, layers: Mapping[str, Any], *, has_norms: bool = False) -> None:
        self.torch = import_extra("torch", "Gram matrices", "eval")
        self.module = module
        self.layers = layers
        self.groups: dict[tuple[str, ...], InputSums] = {}
        self._mask: Any = None
        self._inputs: dict[str, list[Any]] = {}
        self._parameters = signature(module.forward)
        self._packed: dict[tuple[int, tuple[int, ...]], str] = {}
        self.norms = norms(module) if has_norms else {}
        self.squares: dict[str, tuple[np.ndarray, int]] = {}
        """The sum of the squares of what each scale of a norm multiplies, and its rows, by the norm's path."""
        self._passing: list[tuple[str, np.ndarray, int]] = []
        """What a forward pass adds to the squares when it has ended."""
        self._is_alone = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_forward_hook(self._end),
        ]
        packed = {path: layer for path, layer in self.layers.items() if isinstance(layer, Bare)}
        handles += [
            layer.register_forward_pre_hook(self._recorder(path))
            for path, layer in self.layers.items()
            if path not in packed
        ]
        handles += [
            norm.register_forward_hook(self._measurer(path), with_kwargs=True)
            for path, norm in self.norms.items()
        ]
        try:
            with self._recorded(packed) if packed else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _recorded(self, packed: Mapping[str, Bare]) -> Iterator[None]:
        """Record the inputs that are multiplied with the matrices of ``packed`` inside the block."""
        torch = self.torch
        inputs = self._inputs_of

        class RecordInputs(torch.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
            def __torch_function__(
                self, function: Any, _: Any, arguments: Any = (), keywords: Any = None
            ) -> Any:
                if function is torch.nn.functional.linear:
                    inputs(
                        arguments[0] if arguments else keywords["input"],
                        arguments[1] if len(arguments) > 1 else keywords["weight"],
                    )
                return function(*arguments, **(keywords or {}))

        for path, layer in packed.items():
            matrix = layer.weight if layer.expert is None else layer.weight[layer.expert]
            self._packed[matrix.data_ptr(), tuple(matrix.shape)] = path
        has_experts = any(layer.expert is not None for layer in packed.values())
        chosen: dict[str, Any] = (
            getattr(self.module, "get_experts_implementation", dict)() if has_experts else {}
        )
        if chosen:
            self.module.set_experts_implementation("eager")
        try:
            with RecordInputs():
                yield
        finally:
            if chosen:
                self.module.set_experts_implementation(chosen)

    def _inputs_of(self, x: Any, weight: Any) -> None:
        path = self._packed.get((weight.data_ptr(), tuple(weight.shape)))
        if path is not None:
            self._inputs.setdefault(path, []).append(x)

    def _begin(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._inputs = {}
        self._passing = []
        self._mask = self._parameters.bind(*arguments, **keywords).arguments.get("attention_mask")

    def _recorder(self, path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def record(_: Any, arguments: tuple[Any, ...]) -> None:
            self._inputs.setdefault(path, []).append(arguments[0])

        return record

    def _measurer(self, path: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]:
        def measure(norm: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
            shape = getattr(result, "shape", None)
            if self._is_alone or not shape or shape[-1] != len(norm.weight):
                return
            self._is_alone = True  # the norm is called here, and calls this again
            try:
                inputs, rest = (self._alone(norm, scale, arguments, keywords) for scale in (1.0, 0.0))
            finally:
                self._is_alone = False
            x = inputs - rest
            mask = self._mask
            if x.dim() > 3 and mask is not None and x.shape[: mask.dim()] == mask.shape and mask.dim() == 2:
                rows = x[mask.bool().to(x.device)].reshape(-1, x.shape[-1])  # a norm of each head
            else:
                rows = self._unmasked(x)
            squares = (rows.double() ** 2).sum(0).cpu().numpy()
            self._passing.append((path, squares, len(rows)))

        return measure

    def _alone(self, norm: Any, scale: float, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a norm with one scale for all, and without its bias."""
        fill = self.torch.full_like
        values = {n: fill(p, scale if n == "weight" else 0.0) for n, p in norm.named_parameters()}
        return self.torch.func.functional_call(norm, values, arguments, keywords)

    def _end(self, module: Any, arguments: tuple[Any, ...], result: Any) -> None:
        """Add the inputs of one forward pass to the sums."""
        for path, squares, rows in self._passing:
            total, count = self.squares.get(path, (np.zeros(len(squares)), 0))
            self.squares[path] = total + squares, count + rows
        parts: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
        group_of = {path: group for group in self.groups for path in group}
        for path in self.layers:
            if path in self._inputs or path in group_of:
                seen = tuple(id(x) for x in self._inputs.get(path, []))
                parts.setdefault((group_of.get(path, ()), seen), []).append(path)
        products: dict[int, InputSums] = {}
        groups: dict[tuple[str, ...], InputSums] = {}
        for (before, seen), paths in parts.items():
            inputs = {id(x): x for x in self._inputs.get(paths[0], [])}
            for key in seen:
                if key not in products:
                    products[key] = self._product(inputs[key])
            added = sum((products[key] for key in seen), InputSums())
            groups[tuple(paths)] = self.groups.get(before, InputSums()) + added
        self.groups = groups
        self._inputs = {}

    def _unmasked(self, x: Any) -> Any:
        """Return the rows of tokens that are no padding."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        mask = self._mask
        if mask is not None and mask.dim() == 2 and rows.shape[0] == mask.numel():
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        return rows

    def _product(self, x: Any) -> InputSums:
        rows = self._unmasked(x)
        return InputSums(
            (rows.T @ rows).cpu().double().numpy(), rows.sum(0).cpu().double().numpy(), len(rows)
        )


def collect_grams(
    subject: EvaluatedModel,
    module: Any,
    tasks: Sequence[Task],
    examples: int,
    layers: Mapping[str, Any],
    watch: Watcher | None,
    vectors: dict[int, VectorInputs] | None = None,
) -> dict[str, LayerGram]:
    """Run a model on its tasks; return the Gram matrices of the ``layers`` that were called, by path.

    ``vectors`` gets what is known of scales and biases, by the ``id`` of their parameters.
    """
    torch = import_extra("torch", "Gram matrices", "eval")
    collector = _Collector(module, layers, has_norms=vectors is not None)
    has_experts = any(getattr(layer, "expert", None) is not None for layer in layers.values())
    with collector.hooks(), torch.no_grad():
        for done, task in enumerate(tasks):
            if isinstance(task, Differentiable):
                chosen = places(task, examples)
                # Experts get tokens without a mask; a single example has no padding.
                for part in [[example] for example in chosen] if has_experts else [chosen]:
                    task.logits(subject, part)
            else:
                task.evaluate(subject, places(task, examples))
            if watch:
                watch(Counted("tasks", done + 1, len(tasks)))
    grams: dict[str, LayerGram] = {}
    for paths, sums in collector.groups.items():
        if not np.isfinite(sums.products).all():
            raise EvaluationError(
                f"{subject.label}: the inputs of {paths[0]} are not finite; expected finite numbers. Look "
                "for NaN in the model with `alnico inspect`."
            )
        if sums.rows:
            grams |= {
                path: LayerGram(sums.products, sums.sum, sums.rows, type(layers[path]).__name__ == "Conv1D")
                for path in paths
            }
    if vectors is not None:
        vectors |= _vectors(module, layers, grams, collector)
    return grams


def _vectors(
    module: Any, layers: Mapping[str, Any], grams: Mapping[str, LayerGram], collector: _Collector
) -> dict[int, VectorInputs]:
    """Return the squares of what scales of norms and biases multiply, by the ``id`` of their parameters."""
    uses: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: dict[int, VectorInputs] = {}
    biases = [(collector.norms[path], rows) for path, (_, rows) in collector.squares.items()]
    biases += [(layers[path], gram.rows) for path, gram in grams.items()]
    for layer, rows in biases:
        bias = getattr(layer, "bias", None)
        if bias is not None and bias.dim() == 1:
            found[id(bias)] = VectorInputs(np.full(len(bias), float(rows)), rows)
    for path, (squares, rows) in collector.squares.items():
        found[id(collector.norms[path].weight)] = VectorInputs(squares, rows)
    return {
        key: one
        for key, one in found.items()
        if uses.get(key) == 1 and one.rows and np.isfinite(one.squares).all()
    }


def _check_called(grams: Mapping[str, LayerGram], layers: Mapping[str, Any], subject: EvaluatedModel) -> None:
    if layers and not grams:
        raise EvaluationError(
            f"{subject.label}: the tasks call none of its linear layers; expected at least one call. Give "
            "tasks for this model."
        )


def measured_grams(
    stored: Stored,
    module: Any,
    kind: ModelKind,
    grams: Mapping[str, LayerGram],
    tasks: Iterable[Task],
    examples: int,
    settings: Mapping[str, Any],
    placement: ModulePlacement,
    vectors: Mapping[int, VectorInputs] = MappingProxyType({}),
) -> MeasuredStatistics:
    layers = layers_of(module, stored)
    weights = {
        (id(layer.weight), getattr(layer, "expert", None) or 0): path for path, layer in layers.items()
    }
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    stored_as: dict[int, str] = {}
    for name, parts in stored.placement.of.items():
        shape = stored.shapes[name]
        paths = [weights.get((id(part.own), _expert_at(part)), "") for part in parts]
        if not parts:
            left_out[name] = f"not in the module of the tasks ({kind})"
        elif len(shape) == 1 and all(id(part.own) in vectors for part in parts):
            own_vectors = [vectors[id(part.own)] for part in parts]
            tensors[name] = _in_order(parts, own_vectors, shape)
            rows = max(one.rows for one in own_vectors)
            entries[name] = {"stored": name, "rows": rows, "is_transposed": False}
        elif not all(paths) or len(shape) != 2:
            left_out[name] = "not the weight of a linear layer alone"
        elif not all(path in grams for path in paths):
            is_bare = all(isinstance(layers[path], Bare) and layers[path].expert is None for path in paths)
            left_out[name] = (
                "not the weight of a linear layer alone" if is_bare else "the tasks have no input for it"
            )
        else:
            own_grams = [grams[path] for path in paths]
            transposed = {
                _is_transposed(part, shape, gram) for part, gram in zip(parts, own_grams, strict=True)
            }
            if len({id(gram.total) for gram in own_grams}) > 1 or len(transposed) > 1 or None in transposed:
                left_out[name] = "its inputs are not in the order of the module's layer"
                continue
            first = stored_as.setdefault(id(own_grams[0].total), name)
            tensors[first] = own_grams[0].total.astype(np.float32)
            tensors[f"{first}{SUM}"] = own_grams[0].sum.astype(np.float32)
            entries[name] = {
                "stored": first,
                "parts": {"sum": f"{first}{SUM}"},
                "rows": own_grams[0].rows,
                "is_transposed": transposed.pop(),
            }
    taken = {task.name: min(task.size, examples) for task in tasks}
    summary = {
        "examples": sum(taken.values()),
        "tasks": taken,
        **computed_by(module, placement),
        "settings": dict(settings),
    }
    return MeasuredStatistics("gram", tensors, entries, summary, left_out)


def _in_order(
    parts: Sequence[PlacedElements], vectors: Sequence[VectorInputs], shape: tuple[int, ...]
) -> np.ndarray:
    """Return squares in the order of the checkpoint's tensor."""
    squares = np.zeros(shape, np.float32)
    for part, vector in zip(parts, vectors, strict=True):
        at, of = (i if isinstance(i, slice) else i.cpu().numpy() for i in (part.at, part.of))
        squares[of] = vector.squares[at]
    return squares


def _expert_at(part: PlacedElements) -> int:
    """Return the index of a part's matrix in a packed parameter; 0 for an ordinary matrix."""
    if part.own.dim() != 3:
        return 0
    first = part.at.start if isinstance(part.at, slice) else int(part.at.min())
    return int(first // part.own[0].numel())


def _is_transposed(part: PlacedElements, shape: tuple[int, ...], gram: LayerGram) -> bool | None:
    """Return whether the checkpoint's matrix is (inputs, outputs); None if its inputs are reordered."""
    inputs = len(gram.total)
    if isinstance(part.at, slice):
        columns = part.own.shape[-1]
        has_rows = shape[-1] == columns and part.at.start % columns == 0
        return gram.is_transposed if has_rows else None
    if not isinstance(part.of, slice) or len(part.at) != shape[0] * shape[1] or gram.is_transposed:
        return None
    column = (part.at % inputs).reshape(shape).cpu().numpy()
    order = np.arange(inputs)
    if shape[1] == inputs and (column == order).all():
        return False
    return True if shape[0] == inputs and (column == order[:, None]).all() else None
