"""What several adapters have in common: which of their updates are of one parameter, and whether they fit together."""

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


@dataclass(frozen=True)
class SharedModule:
    """One parameter that adapters update, with the update of each of them, or None where an adapter has none: a change of 0."""

    key: str
    module: str
    kind: ModuleKind
    parameter: str
    """The parameter's name in its module; of fused experts not ``weight``."""
    depth: int
    experts: int
    rows: int
    right_shape: tuple[int, ...]
    """What follows the rank in the shape of A: the inputs, and a convolution's window."""
    left_shape: tuple[int, ...]
    """What follows the rank in the shape of B: ones of a convolution."""
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
        """A pattern for the parameter, in PEFT's config; empty for a weight.

        Which of several parameters of a module an update is of follows from the order in which the model has them, which no adapter
        says. So one pattern is for all of them, and they have one rank.
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
    """The factors of one expert's update in float64, ``scale`` not in them: left (rows, r), right (r, columns)."""

    scale: float
    left: np.ndarray
    right: np.ndarray


def aligned(adapters: Sequence[Adapter]) -> list[SharedModule]:
    """The parameters that adapters update, in the order of the first that has each. Errors: MismatchError, ModelError."""
    for adapter in adapters:
        for update in adapter.updates.values():
            if update.is_inside:
                raise ModelError(
                    f"{adapter.label}: {update.module} is the output projection of an nn.MultiheadAttention, which PEFT loads at the rank of the "
                    "attention alone. Merge it by a recipe instead, as BASE+ADAPTER; `alnico lora extract` makes an adapter of the result."
                )
            if update.magnitude:
                raise ModelError(
                    f"{adapter.label}: {update.module} has DoRA's magnitudes, which turn the whole weight, so that what the adapter "
                    "adds cannot be told without its base. Merge it by a recipe instead, as BASE+ADAPTER, with the base as base_model "
                    "(task_arithmetic, say); `alnico lora extract` makes an adapter of the result."
                )
        for name, rows in adapter.rows.items():
            raise ModelError(
                f"{adapter.label}: {rows.name} are rows of {name} that were trained by themselves, which no sum of adapters keeps. Merge it "
                "by a recipe instead, as BASE+ADAPTER, with the base as base_model (task_arithmetic, say)."
            )
    named = {
        a.label: sorted(a.config.get("target_parameters") or [])
        for a in adapters
        if a.config.get("target_parameters")
    }
    (first, targets), *others = named.items() or [("", [])]
    for label, found in others:
        if found != targets:
            raise MismatchError(
                f"{label}: target_parameters is {found}, of {first} {targets}; expected one list, as PEFT does. Combine adapters of the "
                "same parameters."
            )
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.updates)
    return [_module(adapters, key) for key in keys]


def _module(adapters: Sequence[Adapter], key: str) -> SharedModule:
    updates = tuple(adapter.updates.get(key) for adapter in adapters)
    held = [(a, u) for a, u in zip(adapters, updates, strict=True) if u is not None]
    (adapter, update), *others = held
    shape = _described(adapter, update)
    for other, its in others:
        found = _described(other, its)
        if found != shape:
            raise MismatchError(
                f"{update.module}: {adapter.label} changes {_said(shape)}, {other.label} {_said(found)}; expected the same parameter in "
                "both. Combine adapters of one base."
            )
    kind, experts, rows, right, left = shape
    parameter = update.parameters[0]
    if kind == "parameter" and update.depth < len(update.parameters):
        parameter = sorted(update.parameters)[
            -1 - update.depth
        ]  # a name for each, which need not be its own: see `Module.target`
    turned = update.is_embedding or (
        kind == "linear" and any(a.config.get("fan_in_fan_out") for a, _ in held)
    )
    return SharedModule(
        key, update.module, kind, parameter, update.depth, experts, rows, right, left, updates, turned
    )


def _described(
    adapter: Adapter, update: Update
) -> tuple[ModuleKind, int, int, tuple[int, ...], tuple[int, ...]]:
    left, right = adapter.files.tensors[update.left].shape, adapter.files.tensors[update.right].shape
    kind: ModuleKind = "linear"
    if update.parameters != ("weight",):
        kind = "parameter"
    elif update.is_embedding:
        kind = "embedding"
    elif len(right) > 2:
        kind = "convolution"
    return kind, update.experts, left[0], tuple(right[1:]), tuple(left[2:])


def _said(shape: tuple[ModuleKind, int, int, tuple[int, ...], tuple[int, ...]]) -> str:
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
    """The factors of a parameter: of each expert, one an adapter, or None. Errors: ModelError for what is not finite."""
    found: list[list[ExpertFactors | None]] = [[] for _ in range(module.experts)]
    for adapter, update in zip(adapters, module.updates, strict=True):
        if update is None:
            for of_expert in found:
                of_expert.append(None)
            continue
        left, right = adapter.matrices(update, np.dtype(np.float64))
        for expert, of_expert in enumerate(found):
            of_expert.append(ExpertFactors(update.scale, left[expert], right[expert]))
    return found


def read_biases(adapters: Sequence[Adapter], module: SharedModule) -> list[np.ndarray]:
    """What each adapter adds to the bias of a module, its scale in it; zeros where it adds nothing."""
    zeros = np.zeros(module.rows)
    return [
        a.read(u.bias, np.dtype(np.float64)).reshape(-1) * u.scale if u is not None and u.bias else zeros
        for a, u in zip(adapters, module.updates, strict=True)
    ]


def check_bases(adapters: Sequence[Adapter], unrelated: str) -> list[str]:
    """Were adapters trained on one base? Their configs name it; names agree by their last part. Errors: MismatchError; returns notes."""
    named = {a.label: a.trained_on for a in adapters if a.trained_on}
    (first, base), *others = named.items() or [("", "")]
    different = [(label, name) for label, name in others if _last_part(name) != _last_part(base)]
    if not different:
        return []
    said = f"{first} was trained on {base}, {different[0][0]} on {different[0][1]}"
    if unrelated != "allow":
        raise MismatchError(
            f"{said}; expected adapters of one base, as what they add means nothing to another. Use adapters of one base, or say "
            "unrelated: allow (--unrelated allow) if it has several names."
        )
    return [f"{said}; combined all the same."]


def _last_part(name: str) -> str:
    return Path(name.rstrip("/")).name.partition("@")[0].lower()


@dataclass(frozen=True)
class SharedSavedTensor:
    """A tensor that stands for the base's own. ``holders`` are the adapters that have it, by position, with its name there.

    ``is_trained`` is false for what PEFT only stores with an adapter: the base's embeddings, say.
    """

    name: str
    holders: tuple[tuple[int, str], ...]
    shape: tuple[int, ...]
    is_trained: bool

    @property
    def written(self) -> str:
        """Its name in the file, but for the prefix: as the first holder has it."""
        return self.holders[0][1].removeprefix(PREFIX)


def _is_tied(adapter: Adapter, name: str) -> bool:
    """Is a tensor the copy of a trained one, which ``ensure_weight_tying`` stores under the name of the other module too?"""
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
    """The tensors that adapters hold whole; those that were trained need not fit together if they are ``dropped``.

    Errors: MismatchError for shapes that differ, ModelError for what are no numbers.
    """
    found = []
    for name in dict.fromkeys(n for adapter in adapters for n in adapter.replaced):
        holders = [(i, a.replaced[name]) for i, a in enumerate(adapters) if name in a.replaced]
        tensors = [(adapters[i].label, adapters[i].files.tensors[stored]) for i, stored in holders]
        trained = any(is_trained(adapters[i].config, name) or _is_tied(adapters[i], name) for i, _ in holders)
        for label, tensor in [] if trained and dropped else tensors:
            if tensor.dtype not in MERGEABLE:
                raise ModelError(
                    f"{label}: {name} is {tensor.dtype}, expected numbers in floating point. Combine without it: take the module out of "
                    "modules_to_save, and its tensors out of the file."
                )
            if tensor.shape != tensors[0][1].shape:
                raise MismatchError(
                    f"{name}: {tensors[0][0]} has {tensors[0][1].shape}, {label} {tensor.shape}; expected one shape. Combine adapters of one "
                    "base with one vocabulary, or leave such tensors out with saved: drop (--saved drop)."
                )
        found.append(SharedSavedTensor(name, tuple(holders), tensors[0][1].shape, trained))
    return found
