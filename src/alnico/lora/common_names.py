"""Gives adapters of PEFT, and files of kohya, ComfyUI and others, common names, so that they can be combined.

A module is the same in two adapters if its canonical name is, and the part of the image model that it is in. PEFT's names, and names
without a prefix, do not say the part. It is the one in which the other adapters change most of these modules.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from alnico.checkpoint.lora_adapter import Adapter
from alnico.checkpoint.lora_dialects.canonical_names import OF_TEXT_ENCODER, canonical_name
from alnico.checkpoint.lora_dialects.dialect_adapter import module_key
from alnico.checkpoint.lora_dialects.factor_names import (
    ANY,
    B_A,
    DENOISER,
    LORA,
    TEXT_ENCODERS,
    Dialect,
    ModuleName,
    StoredModule,
)
from alnico.errors import MismatchError

Names = Mapping[str, ModuleName]
"""The names of an adapter's modules by their keys in it."""


def with_common_names(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """Return adapters whose keys are equal for the same module, and notes. All are in the form of the first: PEFT's, or that of a file.

    Errors: MismatchError for adapters of PEFT and files whose names have nothing in common, and for what the form of the first cannot
    hold.
    """
    if all(a.dialect is None for a in adapters):
        return list(adapters), []
    names, notes = _in_parts(adapters, [_names_of(a) for a in adapters])
    if any(a.dialect is None for a in adapters):
        _check_common(adapters, names)
    if adapters[0].dialect is None:
        return _in_peft(adapters, names), notes
    return [_in_a_file(a, n) for a, n in zip(adapters, names, strict=True)], notes


def _names_of(adapter: Adapter) -> Names:
    if adapter.dialect is not None:
        return {key: module.name for key, module in adapter.dialect.modules.items()}
    return {
        key: ModuleName(update.module, "diffusers", ANY, update.module, True)
        for key, update in adapter.updates.items()
    }


def _in_parts(adapters: Sequence[Adapter], names: Sequence[Names]) -> tuple[list[Names], list[str]]:
    """Return names that say the part of the image model where those of other adapters do, and notes on what was taken for which part."""
    known = {module_key(name) for of_one in names for name in of_one.values() if name.component != ANY}
    parts = [part for part in (DENOISER, *TEXT_ENCODERS) if any(key.startswith(f"{part}:") for key in known)]
    placed: list[Names] = []
    notes = []
    for adapter, of_one in zip(adapters, names, strict=True):
        unplaced = {key: name for key, name in of_one.items() if name.component == ANY}
        found = {
            key: part
            for key, name in unplaced.items()
            for part in reversed(parts)
            if f"{part}:{canonical_name(name.path, part)}" in known
        }
        if not found:
            placed.append(of_one)
            continue
        ((main, count),) = Counter(found.values()).most_common(1)
        is_text = main in TEXT_ENCODERS
        taken = {
            key: replace(name, component=found.get(key, main))
            for key, name in unplaced.items()
            if key in found or is_text == canonical_name(name.path, main).startswith(OF_TEXT_ENCODER)
        }
        placed.append({**of_one, **taken})
        notes.append(
            f"{adapter.label}: its names do not say the part of the model; {count} of {len(unplaced)} modules are in {main} of the other "
            f"adapters, which they are taken for."
        )
    return placed, notes


def _check_common(adapters: Sequence[Adapter], names: Sequence[Names]) -> None:
    """Errors: MismatchError for an adapter of PEFT that has no module in common with a file."""
    of_files = [i for i, a in enumerate(adapters) if a.dialect is not None]
    in_files = {module_key(name) for i in of_files for name in names[i].values()}
    for adapter, of_one in zip(adapters, names, strict=True):
        if adapter.dialect is not None or any(module_key(name) in in_files for name in of_one.values()):
            continue
        other = adapters[of_files[0]]
        one, another = (next(iter(n.values()), None) for n in (of_one, names[of_files[0]]))
        raise MismatchError(
            f"{adapter.label} is an adapter of PEFT, {other.label} a LoRA file without a config, and no module of one is in the other, such "
            f"as {one.text if one else 'none'} and {another.text if another else 'none'}; expected adapters of one model, with at least one "
            "module in common, which says how their names correspond. Fold both into their base instead."
        )


def _in_a_file(adapter: Adapter, names: Names) -> Adapter:
    """Return an adapter with the keys of a file without a config. Errors: MismatchError for what such a file cannot hold."""
    if adapter.dialect is None:
        _check_in_a_file(adapter)
    elif names == _names_of(adapter):
        return adapter
    keys = {key: module_key(name) for key, name in names.items()}
    if len(set(keys.values())) < len(keys):
        count = Counter(keys.values())
        one, other, *_ = (names[key].text for key, new in keys.items() if count[new] > 1)
        raise MismatchError(
            f"{adapter.label}: {one} and {other} are one module in other adapters; expected one. Remove the one that is not meant."
        )
    dialect = adapter.dialect or Dialect("diffusers", B_A, False, {})
    before = dialect.modules
    modules = {
        new: replace(before[key], name=names[key]) if key in before else StoredModule(names[key], LORA)
        for key, new in keys.items()
    }
    renamed = copy.copy(adapter)
    renamed.dialect = replace(dialect, modules=modules)
    renamed.updates = {keys[key]: update for key, update in adapter.updates.items()}
    renamed.vectors = {
        f"{keys[key.removesuffix(f'.{vector.parameter}')]}.{vector.parameter}": vector
        for key, vector in adapter.vectors.items()
    }
    return renamed


def _check_in_a_file(adapter: Adapter) -> None:
    """Errors: MismatchError for an adapter of PEFT with more than factors of matrices."""
    others = [
        u.module
        for u in adapter.updates.values()
        if u.is_embedding or u.depth or u.is_attention_projection or u.parameters != ("weight",)
    ]
    whole = [*adapter.replaced.values(), *(rows.name for rows in adapter.rows.values())]
    if others or whole:
        what = (
            f"{others[0]} is an embedding or a parameter of its own"
            if others
            else f"{whole[0]} replaces numbers of the base"
        )
        raise MismatchError(
            f"{adapter.label}: {what}, which a LoRA file without a config does not hold; expected factors of linear layers and convolutions. "
            "Give this adapter first, so that the output is PEFT's, or fold both into their base."
        )


def _in_peft(adapters: Sequence[Adapter], names: Sequence[Names]) -> list[Adapter]:
    """Return adapters with PEFT's names of modules. Errors: MismatchError for a file with a module whose name is not known, or a vector."""
    known = {
        module_key(name): name.path
        for adapter, of_one in zip(adapters, names, strict=True)
        if adapter.dialect is None
        for name in of_one.values()
    }
    parts = {name.component for name in names[0].values()}
    renamed = []
    for adapter, of_one in zip(adapters, names, strict=True):
        if adapter.dialect is None:
            renamed.append(adapter)
            continue
        paths = {
            key: known.get(module_key(name))
            or (name.path if name.dialect == "diffusers" and name.component in parts else "")
            for key, name in of_one.items()
        }
        for vector in adapter.vectors.values():
            raise MismatchError(
                f"{adapter.label}: {vector.name} is a difference of a vector, which an adapter of PEFT does not hold; expected factors of "
                f"matrices. Give {adapter.label} first: the output then has its names."
            )
        if unknown := [of_one[key].text for key in adapter.updates if not paths[key]]:
            raise MismatchError(
                f"{adapter.label}: {len(unknown)} of its {len(adapter.updates)} modules, such as {unknown[0]}, are not in {adapters[0].label}, "
                "and their names do not say what PEFT calls them; expected modules that it has, or names with dots of the same part. Give "
                f"{adapter.label} first: the output then has its names."
            )
        of_peft = copy.copy(adapter)
        of_peft.updates = {
            paths[key]: replace(update, module=paths[key]) for key, update in adapter.updates.items()
        }
        renamed.append(of_peft)
    return renamed
