"""Gram matrices: the sums of outer products of what goes into each linear layer, measured on examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from alnico.errors import EvaluationError, MismatchError
from alnico.methods.base import total_weight
from alnico.methods.regmean import solve
from alnico.plan.families import comes_first
from alnico.plan.layers import place_of
from alnico.tune.extras import import_extra
from alnico.tune.statistics import Measured, checkpoint_names, kind_of, places
from alnico.tune.tasks import Differentiable, Subject, Task


def measure_gram(
    subject: Subject, tasks: Sequence[Task], *, examples: int = 256, watch: Callable[[int, int], None] | None = None
) -> Measured:
    """Measure ``X^T X`` of the inputs X of every linear layer of a model, on ``examples`` of each task; labels are never read where
    the task gives scores of classes.

    A row of X is a token; what an attention mask says is padding is left out. Products are float32 a batch, their sums float64.
    Layers that always have the same input share one matrix. A layer whose weight is also something else (a tied head) is left out.
    ``watch`` is told how many of how many tasks are done. Errors: EvaluationError, ModelError.
    Source: Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3.2.
    """
    module = subject.module(kind_of(tasks, "Gram matrices"))
    grams = _collected(subject, module, tasks, examples, linears(module), watch)
    return _measured(subject, module, grams, tasks, examples, {})


def measure_gram_plus(
    subjects: Sequence[Subject],
    tasks: Sequence[Sequence[Task]],
    *,
    examples: int = 256,
    weight: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Measure Gram matrices of models that are to be merged with one another, each on its own tasks, for RegMean++.

    Layer by layer: the inputs of a layer come from the layers before it as they are merged, by RegMean with ``weight`` (a number a
    model), ``alpha``, ``ridge`` and ``normalize``; give the merge the same. What is in no layer and comes before them is merged first, and
    what is no linear layer's matrix is the weighted mean. The models' modules are as before when this returns. ``watch`` is told how many of how
    many layers are done. Errors: EvaluationError, ModelError, MismatchError for models of different layers.
    Source: Nguyen et al. 2025, https://arxiv.org/abs/2508.03121, section 3.
    """
    torch = import_extra("torch", "Gram matrices", "eval")
    modules = [s.module(kind_of(t, "Gram matrices")) for s, t in zip(subjects, tasks, strict=True)]
    shares = np.array(weight if weight is not None else [1.0] * len(subjects))
    shares = shares / total_weight(list(shares), " of RegMean++")
    if len({id(m) for m in modules}) < len(modules):
        raise MismatchError("models: two of them are one module; expected modules of their own. Open each model once.")
    parameters = [dict(m.named_parameters()) for m in modules]
    shared = [n for n, p in parameters[0].items() if all(n in other and other[n].shape == p.shape for other in parameters[1:])]
    steps: dict[Any, list[str]] = {}
    stacks = list(dict.fromkeys(place.stack for n in shared if (place := place_of(n)) is not None))
    for name in sorted(shared, key=lambda n: _order(n, stacks)):
        steps.setdefault(_step_of(name), []).append(name)
    layers = [linears(m) for m in modules]
    found: list[dict[str, Gram]] = [{} for _ in subjects]
    settings = {
        "plus": True,
        "models": [s.label for s in subjects],
        "weight": [float(s) for s in shares],
        "alpha": alpha,
        "ridge": ridge,
    }
    with ExitStack() as stack:
        for own in parameters:
            stack.enter_context(_restored([own[name] for name in shared]))
        for done, names in enumerate(steps.values()):
            held = [{n: m for n, m in all_of.items() if f"{n}.weight" in names} for all_of in layers]
            for i, (subject, given) in enumerate(zip(subjects, tasks, strict=True)):
                if held[i]:
                    found[i] |= _collected(subject, modules[i], given, examples, held[i], None)
            with torch.no_grad():
                for name in names:
                    values = [own[name].detach().cpu().double().numpy() for own in parameters]
                    path = name.removesuffix(".weight")
                    grams = [grams_of[path] for grams_of in found if path in grams_of]
                    if len(grams) == len(subjects) and name.endswith(".weight"):
                        matrices = _Held(values, [g.total for g in grams])
                        rows = tuple(float(g.rows) if normalize else 1.0 for g in grams)
                        turned = tuple(float(g.is_transposed) for g in grams)
                        merged = solve(matrices, tuple(map(float, shares)), rows, turned, alpha, ridge)
                    else:
                        merged = sum((s * v for s, v in zip(shares, values, strict=True)), np.zeros(()))
                    for own in parameters:
                        own[name].copy_(torch.from_numpy(np.ascontiguousarray(merged)))
            if watch:
                watch(done + 1, len(steps))
    return [
        _measured(s, m, f, t, examples, {**settings, "normalize": normalize})
        for s, m, f, t in zip(subjects, modules, found, tasks, strict=True)
    ]


@dataclass
class Gram:
    """What was found of one layer: ``total`` (inputs, inputs) float64 over ``rows``. Layers with the same inputs share ``total``."""

    total: np.ndarray
    rows: int
    is_transposed: bool


class _Held:
    """Matrices in memory, as :class:`alnico.methods.base.Matrices`."""

    def __init__(self, values: Sequence[np.ndarray], grams: Sequence[np.ndarray]) -> None:
        self.models = len(values)
        self._values = values
        self._grams = grams

    def value(self, model: int) -> np.ndarray:
        return self._values[model].copy()

    def side(self, kind: str, model: int) -> np.ndarray:
        return self._grams[model].astype(np.float32).astype(np.float64)  # as the files will have them


def linears(module: Any) -> dict[str, Any]:
    """The linear layers of a module, by path, whose weight is nothing else besides. transformers' Conv1D is one, turned."""
    torch = import_extra("torch", "Gram matrices", "eval")
    holders: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        path: layer
        for path, layer in module.named_modules()
        if (isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D") and holders.get(id(layer.weight)) == 1
    }


def _order(name: str, stacks: Sequence[str]) -> tuple[int, int, int]:
    """What comes before the layers, then one stack after the other (an encoder before its decoder), then what comes after."""
    place = place_of(name)
    if place is not None:
        return 1, stacks.index(place.stack), place.layer
    return (0 if comes_first(name) else 2), 0, 0


def _step_of(name: str) -> object:
    place = place_of(name)
    return (place.stack, place.layer) if place is not None else comes_first(name)


@contextmanager
def _restored(parameters: Sequence[Any]) -> Iterator[None]:
    """Give parameters their values back."""
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for p, value in zip(parameters, kept, strict=True):
            p.data.copy_(value)


class _Collector:
    """Sums of outer products of the inputs of ``layers``, one forward pass of ``module`` after the other.

    ``groups`` are layers that have had the same inputs in every pass: they share a sum. One that leaves its group takes a copy along.
    """

    def __init__(self, module: Any, layers: Mapping[str, Any]) -> None:
        self.torch = import_extra("torch", "Gram matrices", "eval")
        self.module = module
        self.layers = layers
        self.groups: dict[tuple[str, ...], tuple[np.ndarray, int]] = {}
        self._mask: Any = None
        self._inputs: dict[str, list[Any]] = {}
        self._parameters = signature(module.forward)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_forward_hook(self._end),
        ]
        handles += [layer.register_forward_pre_hook(self._noting(path)) for path, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._inputs = {}
        self._mask = self._parameters.bind(*given, **named).arguments.get("attention_mask")

    def _noting(self, path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def note(_: Any, given: tuple[Any, ...]) -> None:
            self._inputs.setdefault(path, []).append(given[0])

        return note

    def _end(self, module: Any, given: tuple[Any, ...], result: Any) -> None:
        """Take in a pass."""
        parts: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
        group_of = {path: group for group in self.groups for path in group}
        for path in self.layers:
            if path in self._inputs or path in group_of:
                seen = tuple(id(x) for x in self._inputs.get(path, []))
                parts.setdefault((group_of.get(path, ()), seen), []).append(path)
        products: dict[int, tuple[np.ndarray, int]] = {}
        groups: dict[tuple[str, ...], tuple[np.ndarray, int]] = {}
        for (before, seen), paths in parts.items():
            inputs = {id(x): x for x in self._inputs.get(paths[0], [])}
            for key in seen:
                if key not in products:
                    products[key] = self._product(inputs[key])
            total, rows = self.groups.get(before, (np.zeros(()), 0))
            total = total + sum((products[key][0] for key in seen), np.zeros(()))
            groups[tuple(paths)] = total, rows + sum(products[key][1] for key in seen)
        self.groups = groups
        self._inputs = {}

    def _product(self, x: Any) -> tuple[np.ndarray, int]:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        mask = self._mask
        if mask is not None and mask.dim() == 2 and rows.shape[0] == mask.numel():
            rows = rows[mask.reshape(-1).bool()]
        return (rows.T @ rows).double().cpu().numpy(), len(rows)


def _collected(
    subject: Subject,
    module: Any,
    tasks: Sequence[Task],
    examples: int,
    layers: Mapping[str, Any],
    watch: Callable[[int, int], None] | None,
) -> dict[str, Gram]:
    """Run a model on its tasks and return what went into ``layers``, by path; those that were never called are not there."""
    torch = import_extra("torch", "Gram matrices", "eval")
    collector = _Collector(module, layers)
    with collector.hooks(), torch.no_grad():
        for done, task in enumerate(tasks):
            if isinstance(task, Differentiable):
                task.logits(subject, places(task, examples))
            else:
                task.evaluate(subject, places(task, examples))
            if watch:
                watch(done + 1, len(tasks))
    found: dict[str, Gram] = {}
    for paths, (total, rows) in collector.groups.items():
        if not np.isfinite(total).all():
            raise EvaluationError(
                f"{subject.label}: the inputs of {paths[0]} are not finite. Look for NaN in the model: `alnico inspect`."
            )
        if rows:
            found |= {path: Gram(total, rows, type(layers[path]).__name__ == "Conv1D") for path in paths}
    if layers and not found:
        raise EvaluationError(
            f"{subject.label}: the tasks call none of its linear layers; expected some. Give tasks of this model."
        )
    return found


def _measured(
    subject: Subject, module: Any, grams: Mapping[str, Gram], tasks: Iterable[Task], examples: int, settings: Mapping[str, Any]
) -> Measured:
    names, left_out = checkpoint_names(subject, module)
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    stored_as: dict[int, str] = {}
    for path, gram in grams.items():
        for own in names[f"{path}.weight"]:
            stored = stored_as.setdefault(id(gram.total), own)
            tensors[stored] = gram.total.astype(np.float32)
            entries[own] = {"stored": stored, "rows": gram.rows, "is_transposed": gram.is_transposed}
    taken = {task.name: min(task.size, examples) for task in tasks}
    told = {"examples": sum(taken.values()), "tasks": taken, "settings": dict(settings)}
    return Measured("gram", tensors, entries, told, tuple(n for n in left_out if n.removesuffix(".weight") in grams))
