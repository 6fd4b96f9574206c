"""Works out which tensors of a base a LoRA file without a config changes.

Names are matched by their canonical form. A base may store as one matrix what the file has in parts (q, k and v), or the other way round.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

from alnico.checkpoint.adapter_changes import AdapterEffect, TensorUpdate
from alnico.checkpoint.lora_adapter import Adapter, AddedVector, Update
from alnico.checkpoint.lora_dialects.canonical_names import (
    SWAPPED,
    canonical_name,
    component_of,
    fused_with,
    parts_of,
)
from alnico.checkpoint.lora_dialects.factor_names import (
    ANY,
    DENOISER,
    FIRST_TEXT,
    SECOND_TEXT,
    TEXT_ENCODERS,
    THIRD_TEXT,
)
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Model, Tensor
from alnico.errors import ModelError
from alnico.numerics import dtypes

PLACES: dict[str, tuple[str, ...]] = {
    DENOISER: (DENOISER, ANY),
    FIRST_TEXT: (FIRST_TEXT, ANY),
    SECOND_TEXT: (SECOND_TEXT, THIRD_TEXT, ANY),
    THIRD_TEXT: (THIRD_TEXT, SECOND_TEXT, ANY),
    ANY: (ANY, DENOISER, *TEXT_ENCODERS),
}
"""Where in a base a part of a file is looked for. Programs count T5 as the second or the third text encoder."""

SHOWN = 3
"""Most modules that a message names."""
MAX_COMPARED = 20_000
"""Most names of the base among which the nearest one is looked for."""


def dialect_effect(label: str, base: Model | MemoryModel, adapter: Adapter) -> AdapterEffect:
    """Work out what a LoRA file without a config does to each tensor. Errors: ModelError naming modules that match nothing or do not fit."""
    matcher = _BaseModules(label, base, adapter)
    changes: dict[str, TensorUpdate] = {}
    unmatched: list[str] = []
    for key, update in adapter.updates.items():
        targets = matcher.targets(key, update)
        unmatched += [] if targets else [update.module]
        for target, change in targets:
            earlier = changes.get(target)
            if earlier is not None and not (earlier.joined and change.joined):
                raise ModelError(
                    f"{label}: {_named(earlier)} and {update.module} are for one tensor, {target}; expected one update. Remove the one that "
                    "is not meant."
                )
            changes[target] = (
                change if earlier is None else replace(earlier, joined=(*earlier.joined, *change.joined))
            )
            matcher.check(target, update, change)
            if update.bias:
                changes |= matcher.added(
                    target,
                    AddedVector(update.module, "bias", update.bias, update.scale),
                    is_swapped=change.is_swapped,
                )
    for key, vector in adapter.vectors.items():
        component, _, canonical = key.removesuffix(f".{vector.parameter}").partition(":")
        target = matcher.find(component, canonical)
        is_swapped = not target and canonical in SWAPPED
        if is_swapped:
            target = matcher.find(component, SWAPPED[canonical])
        unmatched += [] if target else [vector.module]
        if target:
            changes |= matcher.added(target, vector, is_swapped=is_swapped)
    if unmatched:
        more = f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
        raise ModelError(
            f"{label}: {len(unmatched)} of {len(adapter.updates) + len(adapter.vectors)} modules of {adapter.label} match nothing in "
            f"{getattr(base, 'innermost', base).label}: {', '.join(unmatched[:SHOWN])}{more}; expected modules of the base. "
            f"{_advice(base, adapter, unmatched)}"
        )
    return AdapterEffect(changes, frozenset(), base.config, tuple(assumed_scale(adapter)))


def assumed_scale(adapter: Adapter) -> list[str]:
    """A note on the scale of a file that does not state it."""
    if adapter.dialect is None or not adapter.dialect.is_scale_assumed:
        return []
    return [
        f"{adapter.label}: has no alphas and no config, and names without the prefix of a program; its factors are not scaled. If PEFT wrote "
        "it, give the folder with its config."
    ]


def _named(change: TensorUpdate) -> str:
    update = change.update or (change.joined[0][0] if change.joined else change.added)
    assert update is not None
    return update.module


def _advice(base: Model | MemoryModel, adapter: Adapter, unmatched: list[str]) -> str:
    """Say what the modules that match nothing may be meant for."""
    names = [n.replace(".", "_") for n in itertools.islice(base.tensors, MAX_COMPARED)]
    near = difflib.get_close_matches(unmatched[0].replace(".", "_"), names, 1, 0.5)
    hint = f"The nearest name in the base is {near[0]}. " if near else ""
    trained_for = adapter.dialect.trained_for if adapter.dialect is not None else ""
    stated = f"Its header says that it is for {trained_for}. " if trained_for else ""
    is_part = len(unmatched) < len(adapter.updates) + len(adapter.vectors)
    left_out = (
        " What is for a text encoder that the base does not have is left out with blocks (--blocks BASE=0)."
        if is_part
        else ""
    )
    return f"{hint}{stated}Use the base that it was trained for.{left_out}"


class _BaseModules:
    """The modules of a base by the part of the image model and their canonical names."""

    def __init__(self, label: str, base: Model | MemoryModel, adapter: Adapter) -> None:
        self._label = label
        self._adapter = adapter
        self._tensors: Mapping[str, Tensor] = base.tensors
        self._modules: dict[tuple[str, str], list[str]] = {}
        for name in base.tensors:
            place = component_of(name)
            if place is None or name.endswith(".bias"):
                continue
            component, path = place
            module = (
                path.removesuffix(".weight") if path.endswith(".weight") else path.removesuffix("_weight")
            )
            rules = (DENOISER, FIRST_TEXT) if component == ANY else (component,)
            for canonical in dict.fromkeys(canonical_name(module, rule) for rule in rules):
                self._modules.setdefault((component, canonical), []).append(name)

    def find(self, component: str, canonical: str) -> str:
        """The tensor of a module's weight; '' if there is none. Errors: ModelError if there are several."""
        for place in PLACES[component]:
            names = self._modules.get((place, canonical), [])
            if len(names) > 1:
                raise ModelError(
                    f"{self._label}: {canonical} fits {' and '.join(names[:SHOWN])} in the base; expected one fit. Use a base without the others."
                )
            if names:
                return names[0]
        return ""

    def targets(self, key: str, update: Update) -> list[tuple[str, TensorUpdate]]:
        """The tensors that an update changes: one, the parts of a fused one, rows of one, or one with other rows first. Empty if it matches
        nothing."""
        component, _, canonical = key.partition(":")
        if name := self.find(component, canonical):
            is_transposed = name.endswith("text_projection")
            own = replace(update, difference="") if is_transposed else update
            return [(name, TensorUpdate(own, is_transposed))]
        parts = [self.find(component, part) for part in parts_of(canonical)]
        if parts and all(parts):
            ends = [0]
            for part in parts:
                ends.append(ends[-1] + (self._tensors[part].shape or (0,))[0])
            if ends[-1] != self._adapter.shape(update)[0]:
                return [(parts[-1], TensorUpdate(update))]  # it does not fit, which the check says
            pieces = zip(parts, ends, ends[1:], strict=False)
            return [(part, TensorUpdate(update, part=(first, end))) for part, first, end in pieces]
        if canonical in SWAPPED and (name := self.find(component, SWAPPED[canonical])):
            return [(name, TensorUpdate(update, is_swapped=True))]
        whole = fused_with(canonical)
        if whole is not None and (name := self.find(component, whole[0])):
            shape = self._tensors[name].shape
            return [(name, TensorUpdate(joined=((update, whole[1] * math.prod(shape[1:])),)))]
        return []

    def added(self, weight: str, vector: AddedVector, *, is_swapped: bool = False) -> dict[str, TensorUpdate]:
        """What a difference of a vector changes: the bias of a weight, or a weight that is a vector. Errors: ModelError."""
        is_bias = vector.parameter == "bias"
        target = f"{weight.removesuffix('weight')}bias" if is_bias else weight
        tensor, added = self._tensors.get(target), self._adapter.files.tensors[vector.name]
        if tensor is None or tensor.elements != added.elements or tensor.dtype not in dtypes.MERGEABLE:
            found = f"is {tensor.dtype} of {tensor.shape}" if tensor is not None else "is not"
            raise ModelError(
                f"{self._label}: {target} {found} in the base, the adapter's {vector.name} is {added.shape}; expected one shape. Use the "
                "base that it was trained for."
            )
        update = Update(vector.module, "", "", 0, vector.scale, bias=vector.name)
        return {target: TensorUpdate(added=update, is_swapped=is_swapped)}

    def check(self, target: str, update: Update, change: TensorUpdate) -> None:
        """Errors: ModelError for an update that has not the shape of a tensor, or a norm of DoRA for something else."""
        tensor, adapter = self._tensors[target], self._adapter
        shape, kernel = tensor.shape, adapter.files.tensors[update.right].shape[2:]
        rows, columns = adapter.shape(update)
        matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
        if change.is_transposed:
            matrix = matrix[::-1]
        if change.part is not None:
            fits = len(shape) > 1 and matrix[1] == columns
        elif change.joined:
            end = change.joined[0][1] + rows  # q, k and v are square; what follows them ends with the matrix
            fits = matrix[1] == columns and end <= matrix[0] and (rows == columns or end == matrix[0])
        else:
            fits = matrix == (rows, columns) and not (change.is_swapped and rows % 2)
        if not fits or (kernel and len(shape) > 2 and kernel != shape[2:]):
            found = f"({rows}, {', '.join(map(str, adapter.files.tensors[update.right].shape[1:]))})"
            raise ModelError(
                f"{self._label}: {target} is {shape} in the base, the adapter's {update.module} is for {found}; expected one shape. Use "
                "the base that it was trained for."
            )
        if tensor.dtype not in dtypes.MERGEABLE:
            raise ModelError(
                f"{self._label}: {target} is {tensor.dtype} in the base; expected floating-point numbers, which the adapter changes. Use "
                "another base."
            )
        if update.magnitude:
            norms = adapter.files.tensors[update.magnitude].elements
            sides = shape[1] if update.is_magnitude_by_input else rows
            is_split = bool(change.joined) or (change.part is not None and update.is_magnitude_by_input)
            if is_split or norms != sides:
                raise ModelError(
                    f"{self._label}: {update.magnitude} has {norms} norms of DoRA, for {target} of {shape} in the base; expected "
                    f"{sides}, of a module that the base stores in the same way. Use the base that it was trained for."
                )
