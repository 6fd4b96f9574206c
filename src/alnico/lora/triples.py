"""Adapters in memory: triples (A, B, scale) by the names of the base's tensors, and PEFT's modules and tensors."""

from __future__ import annotations

import enum
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.adapter_changes import AdapterEffect, TensorUpdate, adapter_effect
from alnico.checkpoint.factors import is_factor
from alnico.checkpoint.lora_adapter import Adapter, Update, check_config
from alnico.checkpoint.lora_dialects.dialect_adapter import adapter_without_config, is_dialect
from alnico.checkpoint.memory_model import (
    MemoryModel,
    import_torch,
    is_torch_module,
    is_torch_tensor,
    unwrap_module,
)
from alnico.checkpoint.open_adapter import open_adapter
from alnico.checkpoint.source import Source
from alnico.errors import MismatchError, ModelError, near_name
from alnico.models.open_models import path_of
from alnico.models.peft_modules import has_adapters
from alnico.numerics.numbers import finite_number
from alnico.run_options import ONLINE, Access

WEIGHT = ".weight"
KINDS = "the path of an adapter, a PEFT module, triples {name: (A, B, scale)} or a dict of LoRA tensors with config="


@dataclass(frozen=True, eq=False)
class Triples:
    """An adapter in memory: ``W + scale * B @ A`` for each tensor. It is read like a dict of triples (A, B, scale).

    A is (rank, columns), B is (rows, rank) and ``scale`` a number, so that the product has the shape of the
    base's tensor; of a convolution the last dimensions are one. ``saved`` are tensors that replace the base's,
    such as biases. ``error`` is the relative norm of what the ranks drop of the whole change.
    """

    triples: Mapping[str, tuple[Any, Any, float]]
    saved: Mapping[str, Any] = field(default_factory=dict)
    error: float = 0.0

    def keys(self) -> list[str]:
        return list(self.triples)

    def values(self) -> list[tuple[Any, Any, float]]:
        return list(self.triples.values())

    def items(self) -> list[tuple[str, tuple[Any, Any, float]]]:
        return list(self.triples.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.triples)

    def __len__(self) -> int:
        return len(self.triples)

    def __contains__(self, name: object) -> bool:
        return name in self.triples

    def __getitem__(self, name: str) -> tuple[Any, Any, float]:
        return self.triples[name]

    def __repr__(self) -> str:
        ranks = sorted({int(a.shape[0]) for a, _, _ in self.values()})
        shown = (
            f" of rank {ranks[0]}"
            if len(ranks) == 1
            else f" of rank {ranks[0]} to {ranks[-1]}"
            if ranks
            else ""
        )
        more = f", {len(self.saved)} saved tensors" if self.saved else ""
        return f"<adapter: {len(self)} updates{shown}{more}>"


@dataclass(frozen=True)
class OpenAdapters:
    """Adapters with their ``keys``: for triples, the name that the caller uses for each module."""

    adapters: Sequence[Adapter]
    keys: Sequence[Mapping[str, str]]
    gives_torch: bool
    counts: Sequence[int]
    """How many adapters each value has: a PEFT module may have several active ones."""

    def close(self) -> None:
        for adapter in self.adapters:
            adapter.close()


def is_adapter_object(value: Any) -> bool:
    """Is a value one adapter in memory, or something else that is no path?"""
    return path_of(value) is None and (
        isinstance(value, (Mapping, Triples)) or is_torch_module(value) or not isinstance(value, Sequence)
    )


def adapter_list(adapters: Any) -> list[Any]:
    """Return adapters as a list; one counts as a list of one."""
    if path_of(adapters) is not None or is_adapter_object(adapters):
        return [adapters]
    return list(adapters)


def open_adapters(adapters: Sequence[Any], config: Any = None, *, access: Access = ONLINE) -> OpenAdapters:
    """Open adapters of all kinds. ``config`` is that of dicts of LoRA tensors: one for all, or a list.

    Errors: ModelError, HubError.
    """
    configs = list(config) if isinstance(config, (list, tuple)) else [config] * len(adapters)
    if len(configs) != len(adapters):
        raise ModelError(
            f"config has {len(configs)} entries for {len(adapters)} adapters; expected one for all, or one for each. "
            "Use None for an adapter that needs none."
        )
    opened: list[Adapter] = []
    keys: list[Mapping[str, str]] = []
    counts: list[int] = []
    gives_torch = False
    try:
        for position, (value, own) in enumerate(zip(adapters, configs, strict=True)):
            label = f"adapters[{position}]"
            if (path := path_of(value)) is not None:
                opened.append(open_adapter(path, access=access))
                gives_torch = True
            elif is_torch_module(value):
                opened += _of_module(value, label)
                gives_torch = True
            else:
                adapter, names = _of_mapping(value, own, label)
                opened.append(adapter)
                keys.append(names)
                gives_torch |= any(map(is_torch_tensor, _tensors_of(value)))
            counts.append(len(opened) - sum(counts))
            keys += [{}] * (len(opened) - len(keys))
    except BaseException:
        for adapter in opened:
            adapter.close()
        raise
    return OpenAdapters(opened, keys, gives_torch, counts)


def _tensors_of(value: Any) -> list[Any]:
    tensors = [x for v in value.values() for x in (v if isinstance(v, (tuple, list)) else (v,))]
    return [*tensors, *value.saved.values()] if isinstance(value, Triples) else tensors


def _of_module(module: Any, label: str) -> list[Adapter]:
    """Return the active adapters of a PEFT module. Errors: ModelError."""
    inner = unwrap_module(module)
    if not has_adapters(inner):
        raise ModelError(
            f"{label}: is a {type(inner).__name__} without adapters; expected {KINDS}. Pass the module that PEFT made, or "
            "make triples of a fine-tune with alnico.lora.extract(tuned, base)."
        )
    configs = getattr(inner, "peft_config", None)
    active = getattr(inner, "active_adapters", None) or getattr(inner, "active_adapter", None)
    active = active() if callable(active) else active
    names = [active] if isinstance(active, str) else list(active or ())
    if not isinstance(configs, Mapping) or not names or any(name not in configs for name in names):
        raise ModelError(
            f"{label}: has adapters, but no active one with a config ({type(inner).__name__}); expected a module as "
            "peft.get_peft_model returns it. Pass that, or triples {name: (A, B, scale)}."
        )
    found = []
    for name in names:
        own = f"{label} ({name})" if len(names) > 1 else label
        state = sys.modules["peft"].get_peft_model_state_dict(inner, adapter_name=name)
        plain = _plain_config(configs[name], own)
        check_config(plain, f"{own}: its config", len(state))
        found.append(Adapter(MemoryModel(own, state), plain))
    return found


def _plain_config(config: Any, label: str) -> dict[str, Any]:
    """Return a config as adapter_config.json would hold it. Errors: ModelError."""
    given = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(given, Mapping):
        raise ModelError(
            f"{label}: its config is of type {type(config).__name__}; expected a mapping, such as "
            "{'r': 8, 'lora_alpha': 16}, or a peft.LoraConfig. Pass config=."
        )
    plain = {
        str(key): value.value
        if isinstance(value, enum.Enum)
        else sorted(value)
        if isinstance(value, (set, frozenset))
        else value
        for key, value in given.items()
    }
    if "alpha" in plain:
        plain.setdefault("lora_alpha", plain.pop("alpha"))
    return {"peft_type": "LORA", **plain}


def _of_mapping(value: Any, config: Any, label: str) -> tuple[Adapter, dict[str, str]]:
    """Return an adapter of triples or of LoRA tensors, and the caller's names of its modules. Errors: ModelError."""
    if not isinstance(value, (Mapping, Triples)):
        raise ModelError(f"{label} is of type {type(value).__name__}; expected {KINDS}. Pass one of these.")
    if not len(value) and not (isinstance(value, Triples) and value.saved):
        raise ModelError(f"{label} is empty; expected {KINDS}. Pass at least one triple.")
    entries = dict(value.items())
    if all(isinstance(v, (tuple, list)) for v in entries.values()):
        return _of_triples(entries, value.saved if isinstance(value, Triples) else {}, label)
    if any(isinstance(v, (tuple, list)) for v in entries.values()):
        name = next(n for n, v in entries.items() if not isinstance(v, (tuple, list)))
        raise ModelError(
            f"{label}: {name} is of type {type(entries[name]).__name__}, and others are triples; expected a triple "
            "(A, B, scale) for each tensor."
        )
    if any(is_torch_module(v) or isinstance(v, (str, Mapping, Triples)) for v in entries.values()):
        raise ModelError(f"{label} is a dict of adapters; expected a list. Pass list(adapters.values()).")
    wrapped = next((n for n in entries if ".base_layer." in str(n)), None)
    if wrapped is not None:
        raise ModelError(
            f"{label}: has {wrapped}, a weight of the base; expected the tensors of an adapter alone. Pass the PEFT "
            "module itself, or peft.get_peft_model_state_dict(module)."
        )
    if not any(is_factor(str(n)) for n in entries):
        raise ModelError(
            f"{label}: has no LoRA factors, such as fc1.lora_A.weight (its first tensor is {next(iter(entries))}); "
            f"expected {KINDS}. Pass a model as base, or make triples of it with alnico.lora.extract(tuned, base)."
        )
    if config is None and is_dialect(map(str, entries)):
        return adapter_without_config(MemoryModel(label, entries)), {}
    if config is None:
        raise ModelError(
            f"{label}: is a dict of LoRA tensors without a config, which its scale (alpha / r) depends on; expected "
            "one. Pass config={'r': 8, 'lora_alpha': 16}, or the peft.LoraConfig."
        )
    plain = _plain_config(config, label)
    check_config(plain, f"{label}: its config", len(entries))
    return Adapter(MemoryModel(label, entries), plain), {}


def _of_triples(
    entries: Mapping[str, Sequence[Any]], saved: Mapping[str, Any], label: str
) -> tuple[Adapter, dict[str, str]]:
    tensors: dict[str, Any] = {}
    updates: dict[str, Update] = {}
    names: dict[str, str] = {}
    for key, triple in entries.items():
        if not isinstance(key, str):
            raise ModelError(
                f"{label}: has the name {key!r}; expected the text of a tensor's name, such as fc1.weight."
            )
        module = key.removesuffix(WEIGHT)
        if module in names:
            raise ModelError(f"{label}: has {names[module]} and {key}; expected one triple for a tensor.")
        names[module] = key
        rank, scale = _check_triple(triple, f"{label}: {key}")
        left, right = f"{module}.lora_B", f"{module}.lora_A"
        tensors[right], tensors[left] = triple[0], triple[1]
        updates[module] = Update(module, left, right, rank, scale)
    for name, value in saved.items():
        tensors[name] = value
    files = MemoryModel(label, tensors)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "bias": "all" if saved else "none"}
    config["modules_to_save"] = sorted({n.rpartition(".")[0] or n for n in saved}) or None
    return Adapter(files, MappingProxyType(config), updates, {n: n for n in saved}), names


def _check_triple(triple: Sequence[Any], where: str) -> tuple[int, float]:
    """Return rank and scale. Errors: ModelError for what is no triple, MismatchError for shapes."""
    if len(triple) != 3:
        raise ModelError(
            f"{where} has {len(triple)} values; expected a triple (A, B, scale), with A (rank, columns) and B (rows, rank). "
            "Without a scale, pass 1.0."
        )
    first, second, scale = triple
    for letter, value in (("A", first), ("B", second)):
        if not (isinstance(value, np.ndarray) or is_torch_tensor(value)):
            raise ModelError(
                f"{where}: {letter} is of type {type(value).__name__}; expected a numpy array or a torch tensor. "
                "Pass a triple (A, B, scale)."
            )
        if len(value.shape) < 2 or (letter == "B" and math.prod(value.shape[2:]) != 1):
            raise MismatchError(
                f"{where}: {letter} is {tuple(value.shape)}; expected a matrix, A (rank, columns) and B (rows, rank)."
            )
    if is_torch_tensor(scale) or isinstance(scale, (np.ndarray, np.generic)):
        scale = scale.item() if tuple(scale.shape) == () else scale
    if not isinstance(scale, Real):
        raise ModelError(
            f"{where}: the scale is of type {type(scale).__name__}; expected a number. Pass a triple (A, B, scale), in this order."
        )
    number = finite_number(scale, f"{where}: the scale", error=ModelError)
    rank = int(first.shape[0])
    if second.shape[1] != rank or rank < 1:
        swapped = first.shape[1] == second.shape[0] and len(first.shape) == 2
        advice = "Exchange A and B." if swapped else "Use factors of one update."
        raise MismatchError(
            f"{where}: A is {tuple(first.shape)} and B is {tuple(second.shape)}; expected one rank, A (rank, columns) "
            f"and B (rows, rank). {advice}"
        )
    return rank, number


def effect_on(
    base: Source, adapter: Adapter, keys: Mapping[str, str], tied: Mapping[str, str]
) -> AdapterEffect | None:
    """Return what triples do to a base, by exact names and shapes; None for an adapter in PEFT's names.

    ``tied`` maps names of tied tensors to the one that the base has. Errors: ModelError for an unknown name,
    MismatchError for another shape.
    """
    if not keys:
        return None
    changes: dict[str, TensorUpdate] = {}
    for module, update in adapter.updates.items():
        key = keys[module]
        names = [tied.get(n, n) for n in (key, module + WEIGHT, module)]
        target = next((n for n in names if n in base.tensors), None)
        if target is None:
            near = near_name(key, [*base.tensors, *tied])
            hint = (
                f"Did you mean {near}?"
                if near
                else f"Its first tensor is {next(iter(base.tensors), 'none')}."
            )
            raise ModelError(
                f"{adapter.label}: {key}: is not in {base.label}; expected the name of a tensor of the base. {hint}"
            )
        if target in changes:
            raise ModelError(
                f"{adapter.label}: {key}: is tied to another tensor that has a triple; expected one of them."
            )
        shape = base.tensors[target].shape
        rows, columns = adapter.shape(update)
        matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape
        if matrix != (rows, columns):
            swapped = len(shape) == 2 and matrix == (columns, rows)
            advice = (
                "It is stored transposed: pass (B.T, A.T, scale)."
                if swapped
                else "Use factors of this tensor."
            )
            raise MismatchError(
                f"{adapter.label}: {key}: B A is ({rows}, {columns}), the tensor of {base.label} is {shape}; expected one "
                f"shape. {advice}"
            )
        changes[target] = TensorUpdate(update)
    for name, stored in adapter.replaced.items():
        target = tied.get(name, name)
        if target not in base.tensors or base.tensors[target].shape != adapter.files.tensors[stored].shape:
            raise MismatchError(
                f"{adapter.label}: {name}: the saved tensor is {adapter.files.tensors[stored].shape}, and {base.label} has "
                f"{base.tensors[target].shape if target in base.tensors else 'none'}; expected one shape. Use the adapter's base."
            )
        changes[target] = TensorUpdate(replaced=stored)
    return AdapterEffect(changes, frozenset(), base.config)


def read_triples(folder: Path, adapters: Sequence[Any], config: Any, error: float) -> Triples:
    """Read a combined adapter as triples, under the names and as the kind of array of the adapters in memory."""
    found = open_adapters(adapters, config)
    found.close()
    names = {module: key for keys in reversed(found.keys) for module, key in keys.items()}
    with open_adapter(os.fspath(folder)) as adapter:
        triples = {}
        for update in adapter.updates.values():
            if update.bias or update.experts > 1 or update.parameters != ("weight",):
                raise ModelError(
                    f"{update.module}: its update has {'a bias' if update.bias else 'several matrices'}, which no triple "
                    "(A, B, scale) holds; expected the weights of linear layers. Write the adapter to a folder with out=."
                )
            triples[names.get(update.module, update.module + WEIGHT)] = _triple_of(
                adapter, update, found.gives_torch, is_transposed=update.is_embedding
            )
        saved = {n: _read(adapter, stored, found.gives_torch) for n, stored in adapter.replaced.items()}
    return Triples(triples, saved, error)


def triples_on(adapter: Adapter, base: Any, gives_torch: bool, error: float) -> Triples:
    """Read an adapter as triples of a base's tensors: ``scale * B @ A`` has the shape that the base stores."""
    triples, saved = {}, {}
    for target, change in adapter_effect(adapter.label, base, adapter).changes.items():
        if change.replaced:
            saved[target] = _read(adapter, change.replaced, gives_torch)
        if change.update is not None:
            triples[target] = _triple_of(
                adapter, change.update, gives_torch, is_transposed=change.is_transposed
            )
    order = [name for name in base.tensors if name in triples]
    return Triples({name: triples[name] for name in order}, saved, error)


def _triple_of(
    adapter: Adapter, update: Update, gives_torch: bool, *, is_transposed: bool
) -> tuple[Any, Any, float]:
    wide = adapter.files.tensors[update.right].dtype == "F64"
    left, right = adapter.matrices(update, np.dtype(np.float64 if wide else np.float32))
    if is_transposed:
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    if update.experts == 1:
        left, right = left[0], right[0]
    return _array(right, gives_torch), _array(left, gives_torch), update.scale


def _read(adapter: Adapter, name: str, gives_torch: bool) -> Any:
    tensor = adapter.files.tensors[name]
    wide = tensor.dtype == "F64"
    return _array(adapter.read(name, np.dtype(np.float64 if wide else np.float32)), gives_torch)


def _array(values: np.ndarray, gives_torch: bool) -> Any:
    values = np.ascontiguousarray(values).reshape(values.shape)
    return import_torch("triples of torch tensors").from_numpy(values) if gives_torch else values
