"""Describes a combined adapter in the dialect of LoRA files without a config: names, alphas and header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from alnico.lora.writer import SpelledFactors

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


@dataclass(frozen=True)
class SharedVector:
    """A vector whose difference some adapters hold: its name in the output, its shape, and the sum of the differences."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def shared_vectors(adapters: Sequence[Adapter], combination: CombineOptions) -> list[SharedVector]:
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
        found.append(SharedVector(text + ending, shapes.pop(), values))
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
    first, *others = [_dialect(a).metadata for a in adapters if not a.config]  # adapters of PEFT have a config, and no header
    agreed = {
        key: value
        for key, value in first.items()
        if not key.startswith(NOT_KEPT) and all(other.get(key) == value for other in others)
    }
    made = {"alnico": __version__, "combined": [a.label.rpartition("/")[2] for a in adapters], **options}
    return {"format": "pt", **agreed, "alnico.combined": json.dumps(made, sort_keys=True)}


def dialect_notes(adapters: Sequence[Adapter]) -> list[str]:
    """Say which adapters have other factors than those of LoRA, which are written as LoRA, and which do not state their scale."""
    notes = []
    for adapter in adapters:
        notes += assumed_scale(adapter)
        stored = unwrap(adapter.files).tensors
        others = [u.module for u in adapter.updates.values() if u.left not in stored]
        if others:
            notes.append(
                f"{adapter.label}: {len(others)} modules, such as {others[0]}, are stored as LoHa, LoKr, with a core or whole; they are "
                "written as LoRA, exactly where the rank is large enough."
            )
    return notes
