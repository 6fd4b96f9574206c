"""Describes a combined adapter in the dialect of LoRA files without a config: names, alphas and header."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.checkpoint.lora_adapter import Adapter, AddedVector
from alnico.checkpoint.lora_dialects.base_modules import assumed_scale
from alnico.checkpoint.lora_dialects.factor_names import (
    ANY,
    DENOISER,
    FIRST_TEXT,
    LINEAR_LAYER,
    OLD_DIFFUSERS,
    PLAIN_UP_DOWN,
    PREFIXES,
    PROCESSOR,
    SECOND_TEXT,
    TEXT_ENCODERS,
    THIRD_TEXT,
    Dialect,
    FactorWords,
    ModuleName,
    diffusers_prefix,
)
from alnico.checkpoint.open_adapter import DIFFUSERS_WEIGHTS
from alnico.checkpoint.source import unwrap
from alnico.errors import MismatchError
from alnico.lora.combine_options import CombineOptions
from alnico.lora.matching import SharedModule
from alnico.lora.reduce import RankChoice
from alnico.lora.writer import OutputTensor, SpelledFactors
from alnico.numerics.sizes import count_of

FILE = DIFFUSERS_WEIGHTS[0]
"""The file of a folder: the name that diffusers looks for."""

UNDERSCORED = {
    DENOISER: "lora_unet_",
    FIRST_TEXT: "lora_te1_",
    SECOND_TEXT: "lora_te2_",
    THIRD_TEXT: "lora_te3_",
    ANY: "lycoris_",
}
"""How kohya begins the names of a part's modules."""

OF_TRANSFORMERS = ("transformer_blocks.", "single_transformer_blocks.")
"""How names of modules begin that diffusers' transformers have, and its U-Nets have not."""

NOT_KEPT = (
    "sshs_",
    "lora_adapter_metadata",
    "modelspec.hash",
    "ss_network_dim",
    "ss_network_alpha",
    "format",
)
"""How keys of a header begin that are not true of a combination: hashes, ranks and alphas."""


def spelled_factors(adapters: Sequence[Adapter], module: SharedModule) -> SpelledFactors:
    """Return the names of a module's tensors in the dialect of the first adapter. Errors: MismatchError."""
    dialect = _dialect(adapters[0])
    text = _text(adapters, module.key)
    words = _words(dialect, text, module.key)
    alpha = f"{text}.alpha" if dialect.has_alphas else ""
    return SpelledFactors(text + words.left, text + words.right, alpha, f"{text}.lora_B.bias")


def _dialect(adapter: Adapter) -> Dialect:
    assert adapter.dialect is not None
    return adapter.dialect


def _text(adapters: Sequence[Adapter], key: str) -> str:
    """Return a module's name in the dialect of the first adapter. Errors: MismatchError for a name that cannot be written there."""
    first = _dialect(adapters[0])
    holder = next(a for a in adapters if key in _dialect(a).modules)
    name = _dialect(holder).modules[key].name
    if holder is adapters[0] or (name.dialect == first.name == "ComfyUI"):
        return name.text
    if first.name == "kohya":
        is_general = name.text.startswith(UNDERSCORED[ANY]) and name.component != ANY
        return _underscored(first, name) if name.is_dotted or is_general else name.text
    if name.dialect == first.name and (prefix := _prefix(first, name)) is not None:
        return prefix + name.text.removeprefix(diffusers_prefix(name.text))
    raise MismatchError(
        f"{name.text}: {holder.label} has this module, and {adapters[0].label} has not, whose names are those of {first.name}; expected "
        f"modules that can be named so. Give {holder.label} first: the output has the names of the first adapter."
    )


def _prefix(first: Dialect, name: ModuleName) -> str | None:
    """Return what stands before a module's name in a file of diffusers, as in the first file; None if that is for another part alone."""
    of_first = {
        module.name.component: diffusers_prefix(module.name.text) for module in first.modules.values()
    }
    if name.component in of_first:
        return of_first[name.component]
    if "" in of_first.values():
        return None
    if name.component == DENOISER:
        return "transformer." if name.path.startswith(OF_TRANSFORMERS) else "unet."
    return f"{name.component}."


def _underscored(first: Dialect, name: ModuleName) -> str:
    """Return a module's name as kohya writes it, with the prefix that the first file has for its part."""
    texts = [module.name.text for module in first.modules.values()]
    own = (
        prefix
        for prefix, dialect, part in PREFIXES
        if dialect == "kohya" and part == name.component and any(text.startswith(prefix) for text in texts)
    )
    return next(own, UNDERSCORED[name.component]) + name.path.replace(".", "_")


def _words(dialect: Dialect, text: str, key: str) -> FactorWords:
    if dialect.words not in OLD_DIFFUSERS:
        return dialect.words
    if ".processor." in text:
        return PROCESSOR
    return LINEAR_LAYER if key.partition(":")[0] in TEXT_ENCODERS else PLAIN_UP_DOWN


def kept_factors(
    adapters: Sequence[Adapter], module: SharedModule, combination: CombineOptions, choice: RankChoice
) -> tuple[OutputTensor, ...]:
    """Return the tensors of a module in the form that its file has, scaled; empty where the result is no multiple of one stored module.

    A sum of which one adapter alone has the module, at a rank that cuts nothing, is such a multiple: LoHa, LoKr, a core or a whole
    difference. Its alpha takes the factor; without an alpha the first of its factors does.
    """
    holders = [(i, update) for i, update in enumerate(module.updates) if update is not None]
    if combination.kind not in ("cat", "sum") or len(holders) > 1 or choice.energy is not None:
        return ()
    ((position, update),) = holders
    adapter = adapters[position]
    is_plain = update.left in unwrap(adapter.files).tensors
    is_cut = choice.rank is not None and choice.rank < update.rank
    is_spelled = _dialect(adapters[0]).name != "diffusers" or position == 0
    if is_plain or is_cut or not is_spelled or update.bias:
        return ()
    stored = _dialect(adapter).modules[module.key]
    text = _text(adapters, module.key)
    factor = combination.coefficients[position] * update.scale
    of_alpha = factor * stored.rank
    tensors = []
    for number, name in enumerate(stored.factors.values()):
        ending = name.removeprefix(stored.name.text)
        share = factor if not stored.rank and number == 0 else 1.0
        values = _read_scaled(adapter, name, share)
        tensors.append(OutputTensor(text + ending, adapter.files.tensors[name].shape, values))
    if stored.rank:
        tensors.append(OutputTensor(f"{text}.alpha", (), lambda: np.array(of_alpha), "F32"))
    return tuple(tensors)


def _read_scaled(adapter: Adapter, name: str, factor: float) -> Callable[[], np.ndarray]:
    return lambda: factor * adapter.read(name, np.dtype(np.float64))


def shared_vectors(adapters: Sequence[Adapter], combination: CombineOptions) -> list[OutputTensor]:
    """Return the weighted sums of the differences of vectors, such as biases. Errors: MismatchError."""
    found = []
    for key in dict.fromkeys(key for a in adapters for key in a.vectors):
        holders = [(i, a.vectors[key]) for i, a in enumerate(adapters) if key in a.vectors]
        shapes = {adapters[i].files.tensors[v.name].shape for i, v in holders}
        if len(shapes) > 1 or combination.kind not in ("cat", "sum"):
            labels = " and ".join(adapters[i].label for i, _ in holders)
            why = (
                f"of {len(shapes)} shapes" if len(shapes) > 1 else f"and {combination.method} is for matrices"
            )
            raise MismatchError(
                f"{holders[0][1].name}: {labels} hold differences of a vector, {why}; expected adapters of one base and a weighted sum. "
                "Choose the method svd or cat, or leave the adapter out."
            )
        text = _text(adapters, key.rpartition(".")[0])
        ending = ".diff_b" if holders[0][1].parameter == "bias" else ".diff"
        values = _sum_of(adapters, holders, combination.coefficients)
        found.append(OutputTensor(text + ending, shapes.pop(), values))
    return found


def _sum_of(
    adapters: Sequence[Adapter], holders: Sequence[tuple[int, AddedVector]], coefficients: Sequence[float]
) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        parts = [
            coefficients[i] * vector.scale * adapters[i].read(vector.name, np.dtype(np.float64))
            for i, vector in holders
        ]
        total: np.ndarray = np.sum(parts, axis=0)
        return total

    return values


def header_of(adapters: Sequence[Adapter], options: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of the output: what all headers of files agree on, and how it was combined."""
    first, *others = [
        _dialect(a).metadata for a in adapters if not a.config
    ]  # adapters of PEFT have a config, and no header
    agreed = {
        key: value
        for key, value in first.items()
        if not key.startswith(NOT_KEPT) and all(other.get(key) == value for other in others)
    }
    made = {"alnico": __version__, "combined": [a.label.rpartition("/")[2] for a in adapters], **options}
    return {"format": "pt", **agreed, "alnico.combined": json.dumps(made, sort_keys=True)}


def dialect_notes(adapters: Sequence[Adapter], kept: Collection[str]) -> list[str]:
    """Say which modules have other factors than those of LoRA, and in which form they are written; and which scales are not stated.

    ``kept`` are the keys of modules that keep their form.
    """
    notes = []
    for adapter in adapters:
        notes += assumed_scale(adapter)
        stored = unwrap(adapter.files).tensors
        others = {key: u.module for key, u in adapter.updates.items() if u.left not in stored}
        as_stored = [module for key, module in others.items() if key in kept]
        as_lora = [module for key, module in others.items() if key not in kept]
        what = f"{adapter.label}: factors of LoHa, LoKr, cores and whole differences"
        if as_stored:
            notes.append(
                f"{what} in {count_of(len(as_stored), 'module')}, such as {as_stored[0]}, keep their form, since no other adapter changes the "
                "same modules."
            )
        if as_lora:
            notes.append(
                f"{what} in {count_of(len(as_lora), 'module')}, such as {as_lora[0]}, are written as LoRA, exactly where the rank is large "
                "enough."
            )
    return notes
