"""Matches the updates of several adapters by parameter, and checks that they fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alnico.checkpoint.lora_adapter import PREFIX, Adapter, Update, is_saved_module, is_trained
from alnico.checkpoint.statistics import compute_digest
from alnico.errors import MismatchError, ModelError
from alnico.lora.writer import ModuleKind
from alnico.numerics.dtypes import MERGEABLE

UpdateShape = tuple[ModuleKind, int, int, tuple[int, ...], tuple[int, ...]]
"""The kind of a module, its experts and rows, and the shapes of A and B without the rank."""


@dataclass(frozen=True)
class SharedModule:
    """A parameter that adapters update, with the update of each adapter, or None for an adapter that has none."""

    key: str
    module: str
    kind: ModuleKind
    parameter: str
    """The parameter's name in its module; for fused experts it is not ``weight``."""
    depth: int
    experts: int
    rows: int
    right_shape: tuple[int, ...]
    """The shape of A after the rank: the inputs, and a convolution's kernel size."""
    left_shape: tuple[int, ...]
    """The shape of B after the rank: ones for a convolution."""
    updates: tuple[Update | None, ...]
    is_turned: bool
    """The base stores the transpose: embeddings, and GPT-2's linear layers."""

    @property
    def columns(self) -> int:
        return math.prod(self.right_shape)

    @property
    def name(self) -> str:
        """The base's tensor."""
        return f"{self.module}.{self.parameter}"

    @property
    def target(self) -> str:
        """A pattern for the parameter in PEFT's config; empty for a weight.

        An adapter does not say which of several parameters of a module an update belongs to: that depends on their order
        in the model. So one pattern covers all of them, and they have one rank.
        """
        if self.kind != "parameter":
            return ""
        named = sorted({p for u in self.updates if u is not None for p in u.parameters})
        return named[0] if len(named) == 1 else f"({'|'.join(named)})"

    @property
    def ranks(self) -> list[int]:
        return [u.rank for u in self.updates if u is not None]

    @property
    def has_bias(self) -> bool:
        return any(u is not None and u.bias for u in self.updates)


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of one expert's update in float64, without ``scale``: left (rows, r), right (r, columns)."""

    scale: float
    left: np.ndarray
    right: np.ndarray


def match_updates(adapters: Sequence[Adapter]) -> list[SharedModule]:
    """Return all parameters that adapters update, in order of first appearance. Errors: MismatchError, ModelError."""
    for adapter in adapters:
        for update in adapter.updates.values():
            if update.is_attention_projection:
                raise ModelError(
                    f"{adapter.label}: {update.module} is the output projection of an nn.MultiheadAttention, "
                    "which PEFT loads only at the rank of the attention. Merge it with a recipe instead, as "
                    "BASE+ADAPTER; `alnico lora extract` turns the result into an adapter."
                )
            if update.magnitude:
                raise ModelError(
                    f"{adapter.label}: {update.module} has DoRA magnitudes, which rescale the whole weight, "
                    "so its update is not known without the base. Merge it with a recipe instead, as "
                    "BASE+ADAPTER, with the base as base_model (for example task_arithmetic); `alnico lora "
                    "extract` turns the result into an adapter."
                )
        for name, rows in adapter.rows.items():
            raise ModelError(
                f"{adapter.label}: {rows.name} are separately trained rows of {name}, which a combined "
                "adapter cannot hold. Merge it with a recipe instead, as BASE+ADAPTER, with the base as "
                "base_model (for example task_arithmetic)."
            )
    named = {
        a.label: sorted(a.config.get("target_parameters") or [])
        for a in adapters
        if a.config.get("target_parameters")
    }
    (first, targets), *others = named.items() or [("", [])]
    for label, parameters in others:
        if parameters != targets:
            raise MismatchError(
                f"{label}: target_parameters is {parameters}, but {targets} in {first}; expected the same "
                "list, as PEFT does. Combine adapters of the same parameters."
            )
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.updates)
    return [_module(adapters, key) for key in keys]


def _module(adapters: Sequence[Adapter], key: str) -> SharedModule:
    updates = tuple(adapter.updates.get(key) for adapter in adapters)
    holders = [(a, u) for a, u in zip(adapters, updates, strict=True) if u is not None]
    (adapter, update), *others = holders
    shape = _shape_of(adapter, update)
    for other, other_update in others:
        other_shape = _shape_of(other, other_update)
        is_file = adapter.dialect is not None or other.dialect is not None
        if is_file and _is_flattened(shape, other_shape):
            shape = max(shape, other_shape, key=lambda s: len(s[3]))
        elif other_shape != shape:
            raise MismatchError(
                f"{update.module}: {adapter.label} changes {_describe(shape)}, {other.label} "
                f"{_describe(other_shape)}; expected the same parameter in both. Combine adapters of one "
                "base."
            )
    kind, experts, rows, right, left = shape
    parameter = update.parameters[0]
    if kind == "parameter" and update.depth < len(update.parameters):
        # Each update gets a name, not always its own: see `SharedModule.target`.
        parameter = sorted(update.parameters)[-1 - update.depth]
    turned = update.is_embedding or (
        kind == "linear" and any(a.config.get("fan_in_fan_out") for a, _ in holders)
    )
    return SharedModule(
        key, update.module, kind, parameter, update.depth, experts, rows, right, left, updates, turned
    )


def _is_flattened(shape: UpdateShape, other: UpdateShape) -> bool:
    """Do two shapes differ in whether the kernel of a convolution is a dimension? LoHa and LoKr store it as columns."""
    return (
        shape[1:3] == other[1:3]
        and math.prod(shape[3]) == math.prod(other[3])
        and 1 in (len(shape[3]), len(other[3]))
    )


def _shape_of(adapter: Adapter, update: Update) -> UpdateShape:
    left, right = adapter.files.tensors[update.left].shape, adapter.files.tensors[update.right].shape
    kind: ModuleKind = "linear"
    if update.parameters != ("weight",):
        kind = "parameter"
    elif update.is_embedding:
        kind = "embedding"
    elif len(right) > 2:
        kind = "convolution"
    return kind, update.experts, left[0], tuple(right[1:]), tuple(left[2:])


def _describe(shape: UpdateShape) -> str:
    kind, experts, rows, right, _ = shape
    what = (
        "a linear layer"
        if kind == "linear"
        else "a parameter"
        if kind == "parameter"
        else f"a{'n' * (kind[0] in 'aeiou')} {kind}"
    )
    many = f"{experts} experts of " if experts > 1 else ""
    return f"{what} of {many}({', '.join(str(n) for n in (rows, *right))})"


def read_factors(adapters: Sequence[Adapter], module: SharedModule) -> list[list[ExpertFactors | None]]:
    """Return the factors of a parameter: for each expert, one per adapter, or None. Errors: ModelError if not finite."""
    experts: list[list[ExpertFactors | None]] = [[] for _ in range(module.experts)]
    for adapter, update in zip(adapters, module.updates, strict=True):
        if update is None:
            for of_expert in experts:
                of_expert.append(None)
            continue
        left, right = adapter.matrices(update, np.dtype(np.float64))
        for expert, of_expert in enumerate(experts):
            of_expert.append(ExpertFactors(update.scale, left[expert], right[expert]))
    return experts


def read_biases(adapters: Sequence[Adapter], module: SharedModule) -> list[np.ndarray]:
    """Return what each adapter adds to the bias of a module, scaled; zeros where it adds nothing."""
    zeros = np.zeros(module.rows)
    return [
        a.read(u.bias, np.dtype(np.float64)).reshape(-1) * u.scale if u is not None and u.bias else zeros
        for a, u in zip(adapters, module.updates, strict=True)
    ]


def check_bases(adapters: Sequence[Adapter], unrelated: str) -> list[str]:
    """Check that the configs name one base (names are compared by their last part). Errors: MismatchError; returns notes."""
    named = {a.label: a.trained_on for a in adapters if a.trained_on}
    (first, base), *others = named.items() or [("", "")]
    different = [(label, name) for label, name in others if _last_part(name) != _last_part(base)]
    if not different:
        return []
    difference = f"{first} was trained on {base}, {different[0][0]} on {different[0][1]}"
    if unrelated != "allow":
        raise MismatchError(
            f"{difference}; expected adapters of one base, because an update has no meaning for another "
            "base. Use adapters of one base, or set unrelated: allow (--unrelated allow) if the base has "
            "several names."
        )
    return [f"{difference}; combined anyway."]


def _last_part(name: str) -> str:
    return Path(name.rstrip("/")).name.partition("@")[0].lower()


@dataclass(frozen=True)
class SharedSavedTensor:
    """A tensor that replaces the base's. ``holders`` are the positions of adapters that have it, with its name there.

    ``is_trained`` is false for tensors that PEFT only stores with an adapter, such as the base's embeddings.
    """

    name: str
    holders: tuple[tuple[int, str], ...]
    shape: tuple[int, ...]
    is_trained: bool

    @property
    def written(self) -> str:
        """Its name in the file of the first holder, without the prefix."""
        return self.holders[0][1].removeprefix(PREFIX)


def _is_tied(adapter: Adapter, name: str) -> bool:
    """Check whether a tensor is the second copy of a trained one, stored because of ``ensure_weight_tying``."""
    if not adapter.config.get("ensure_weight_tying"):
        return False
    stored = adapter.files.tensors
    shape = stored[adapter.replaced[name]].shape
    trained = [
        n
        for own, n in adapter.replaced.items()
        if is_saved_module(adapter.config, own) and stored[n].shape == shape
    ]
    return any(
        compute_digest(adapter.files, n) == compute_digest(adapter.files, adapter.replaced[name])
        for n in trained
    )


def saved_tensors(adapters: Sequence[Adapter], *, dropped: bool = False) -> list[SharedSavedTensor]:
    """Return the tensors that adapters hold whole; trained ones need not have one shape if they are ``dropped``.

    Errors: MismatchError for different shapes, ModelError for tensors that are not floating-point.
    """
    saved = []
    for name in dict.fromkeys(n for adapter in adapters for n in adapter.replaced):
        holders = [(i, a.replaced[name]) for i, a in enumerate(adapters) if name in a.replaced]
        tensors = [(adapters[i].label, adapters[i].files.tensors[stored]) for i, stored in holders]
        trained = any(is_trained(adapters[i].config, name) or _is_tied(adapters[i], name) for i, _ in holders)
        for label, tensor in [] if trained and dropped else tensors:
            if tensor.dtype not in MERGEABLE:
                raise ModelError(
                    f"{label}: {name} is {tensor.dtype}, expected a floating-point dtype. To combine without "
                    "it, remove the module from modules_to_save, and its tensors from the file."
                )
            if tensor.shape != tensors[0][1].shape:
                raise MismatchError(
                    f"{name}: {tensors[0][0]} has {tensors[0][1].shape}, {label} {tensor.shape}; expected "
                    "one shape. Combine adapters of one base with one vocabulary, or drop such tensors with "
                    "saved: drop (--saved drop)."
                )
        saved.append(SharedSavedTensor(name, tuple(holders), tensors[0][1].shape, trained))
    return saved
