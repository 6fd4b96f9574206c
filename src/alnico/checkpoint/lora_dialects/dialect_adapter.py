"""Makes an adapter of a LoRA file without a config, from the names, shapes and alphas of its tensors.

The scale of a module is ``alpha / rank``; without an alpha it is 1. diffusers states ranks and alphas in the header instead, as a PEFT config.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.json_files import parse_json
from alnico.checkpoint.lora_adapter import (
    CONFIG,
    PREFIX,
    Adapter,
    AddedVector,
    Update,
    check_config,
    scale_of,
)
from alnico.checkpoint.lora_dialects.canonical_names import canonical_name
from alnico.checkpoint.lora_dialects.factor_algebra import (
    Algebra,
    EntrywiseProduct,
    KroneckerProduct,
    StoredProduct,
    stored_whole,
)
from alnico.checkpoint.lora_dialects.factor_names import (
    ANY,
    B_A,
    DENOISER,
    FACTORS,
    LOHA,
    LOKR,
    LORA,
    OLD_DIFFUSERS,
    OTHERS,
    PREFIXES,
    TEXT_ENCODERS,
    UP_DOWN,
    WHOLE,
    WORDS,
    Dialect,
    FactorWords,
    ModuleName,
    StoredModule,
    module_name,
    split_ending,
)
from alnico.checkpoint.lora_dialects.unfolded_factors import DIFFERENCE, LEFT, RIGHT, UnfoldedFactors
from alnico.checkpoint.source import FactorSource, read_tensor
from alnico.errors import ModelError
from alnico.numerics import dtypes

METADATA = "lora_adapter_metadata"
"""The key of a header under which diffusers states the config of each part."""
STATED_ARCHITECTURES = ("modelspec.architecture", "ss_base_model_version")
"""Keys of a header that name the architecture that a file was trained for."""
KNOWN = tuple(prefix for prefix, _, _ in PREFIXES)
NO_CONFIG: Mapping[str, Any] = MappingProxyType({})

NEEDED: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    LORA: ((("left", "right"),),),
    LOHA: ((("w1_a", "w1_b", "w2_a", "w2_b"),),),
    LOKR: ((("w1",), ("w1_a", "w1_b")), (("w2",), ("w2_a", "w2_b"))),
    WHOLE: ((("difference",),),),
}
"""The parts that a module of each algebra must have: of each group all of one choice."""
SHOWN = {"left": "up (lora_B)", "right": "down (lora_A)"}
"""What messages call the parts of a LoRA."""


@dataclass
class _ModuleParts:
    """The tensors of one module, while they are collected."""

    name: ModuleName
    algebra: str = ""
    factors: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    """The rank that its alpha is divided by; 0 where no alpha applies."""
    alpha: float | None = None

    @property
    def stored(self) -> StoredModule:
        return StoredModule(self.name, self.algebra or WHOLE, self.factors, self.rank, self.alpha)

    @property
    def tensors(self) -> list[str]:
        return [*self.factors.values(), *self.others.values()]


def adapter_without_config(files: FactorSource) -> Adapter:
    """Return the adapter of a LoRA file without a config. Reads headers, and the alphas: a file on the hub is downloaded for them.

    Errors: ModelError for a name of an unknown kind, dialects of several programs, a factor without the other, shapes that do not
    fit together, and an alpha that is no finite number; HubError.
    """
    modules = _collect(files)
    _refuse_mixed(files, modules)
    stated = _stated_configs(files)
    updates: dict[str, Update] = {}
    vectors: dict[str, AddedVector] = {}
    algebra: dict[str, Algebra | StoredProduct] = {}
    for key, parts in modules.items():
        if "difference of the bias" in parts.others:
            vectors[f"{key}.bias"] = AddedVector(
                parts.name.text, "bias", _float(files, parts.others["difference of the bias"])
            )
        if set(parts.others) == {"difference of the bias"} and not parts.factors:
            continue
        product, rank = _product(files, parts)
        if product is None:
            vectors[f"{key}.weight"] = AddedVector(parts.name.text, "weight", parts.factors["difference"])
            continue
        parts.rank = rank
        update = _update(files, parts, product)
        if update.left.endswith(LEFT):
            algebra[parts.name.text] = product
        config = stated.get(parts.name.component)
        if config is not None and "alpha" not in parts.others and parts.algebra == LORA:
            update = _scaled_by_config(files, update, config)
        updates[key] = update
    source = UnfoldedFactors(files, algebra) if algebra else files
    return Adapter(source, NO_CONFIG, updates, vectors=vectors, dialect=_dialect_of(files, modules))


def _collect(files: FactorSource) -> dict[str, _ModuleParts]:
    """Return the tensors of each module. The key is the part of the image model and the canonical name. Errors: ModelError."""
    modules: dict[str, _ModuleParts] = {}
    for name in files.tensors:
        if name.startswith(PREFIX):
            raise ModelError(
                f"{files.label}: has PEFT's names, such as {name}; expected {CONFIG} next to it, which has the alphas. Give the "
                "folder of the adapter, with its config."
            )
        split = split_ending(name)
        if split is None:
            raise ModelError(
                f"{files.label}: {name} is of a kind that is not applied here; expected factors of LoRA, LoHa or LoKr, "
                "differences, alphas or DoRA's norms. Merge the file into its base with the program that wrote it, and use the result."
            )
        text, ending = split
        module = module_name(text, ending)
        key = module_key(module)
        parts = modules.setdefault(key, _ModuleParts(module))
        kind, part = FACTORS.get(ending, ("", OTHERS.get(ending, "")))
        held = parts.factors if kind else parts.others
        if part in held or (kind and parts.algebra not in ("", kind)):
            other = held.get(part) or next(iter(parts.factors.values()))
            raise ModelError(
                f"{files.label}: {other} and {name} are for one module, {text}; expected one of them. Remove the one that is not "
                "meant."
            )
        held[part] = name
        parts.algebra = parts.algebra or kind
    return modules


def module_key(module: ModuleName) -> str:
    """The part of an image model and the canonical name of a module, which are equal between dialects.

    >>> module_key(module_name("lora_unet_input_blocks_4_1_proj_in", ".alpha")), module_key(module_name("unet.conv_in", ".alpha"))
    ('unet:down_blocks_1_attentions_0_proj_in', 'unet:conv_in')
    """
    return f"{module.component}:{canonical_name(module.path, module.component)}"


def _endings(modules: Mapping[str, _ModuleParts]) -> dict[FactorWords, str]:
    """The endings of LoRA factors in a file, each with a name that has it: that of the first module."""
    return {
        words: parts.factors["left"]
        for parts in list(modules.values())[::-1]
        for words in WORDS
        if "left" in parts.factors and parts.factors["left"].endswith(words.left)
    }


def _refuse_mixed(files: FactorSource, modules: Mapping[str, _ModuleParts]) -> None:
    """Errors: ModelError where names are of several dialects."""
    backwards = list(modules.values())[::-1]  # of equal keys the first module stays
    first = {parts.name.dialect: parts.tensors[0] for parts in backwards}
    spellings = {
        ("old" if words in OLD_DIFFUSERS else words): name for words, name in _endings(modules).items()
    }
    for found in (first, spellings):
        if len(found) > 1:
            one, other, *_ = found.values()
            raise ModelError(
                f"{files.label}: mixes the names of several programs, such as {one} and {other}; expected those of one. Convert the "
                "file with one program, or split it."
            )


def _dialect_of(files: FactorSource, modules: Mapping[str, _ModuleParts]) -> Dialect:
    """Return the dialect of a file, after :func:`_refuse_mixed`."""
    name = next(parts.name.dialect for parts in modules.values())
    metadata: dict[str, str] = {}
    for shard in files.shards:
        metadata |= shard.header.metadata
    trained_for = next((metadata[k] for k in STATED_ARCHITECTURES if metadata.get(k)), "")
    has_alphas = any("alpha" in parts.others for parts in modules.values())
    words = next(iter(_endings(modules)), UP_DOWN if name == "kohya" else B_A)
    stored = {key: parts.stored for key, parts in modules.items()}
    is_bare = any(
        parts.name.dialect == "diffusers" and parts.name.component == ANY for parts in modules.values()
    )
    is_assumed = is_bare and not has_alphas and METADATA not in metadata
    return Dialect(name, words, has_alphas or name == "kohya", stored, trained_for, metadata, is_assumed)


def _float(files: FactorSource, name: str) -> str:
    """Return the name of a tensor of floating-point numbers. Errors: ModelError for another dtype, or no elements."""
    tensor = files.tensors[name]
    if tensor.dtype not in dtypes.MERGEABLE or not tensor.elements:
        raise ModelError(
            f"{files.label}: {name} is {tensor.dtype} of {tensor.shape}; expected floating-point numbers, at least one. Use another "
            "file."
        )
    return name


def _product(files: FactorSource, parts: _ModuleParts) -> tuple[Algebra | StoredProduct | None, int]:
    """Return what a module's factors make, and the rank that its alpha is divided by; 0 where no alpha applies. A vector is no product.

    Errors: ModelError for a factor that is missing, is of another dtype or does not fit the others.
    """
    for choices in NEEDED.get(parts.algebra, NEEDED[LORA]):
        if not any(set(choice) <= set(parts.factors) for choice in choices):
            needed = " or ".join(" and ".join(SHOWN.get(p, p) for p in choice) for choice in choices)
            raise ModelError(
                f"{files.label}: has {', '.join(parts.tensors)} for {parts.name.text}, and not all factors; expected {needed}. "
                "Complete the download."
            )
    shapes = {part: files.tensors[_float(files, name)].shape for part, name in parts.factors.items()}
    if parts.algebra == WHOLE and len(shapes["difference"]) < 2:
        return None, 0
    names = parts.factors
    made: Algebra | StoredProduct | None = None
    rank = 0
    if parts.algebra == WHOLE:
        made = stored_whole(names["difference"], shapes["difference"])
    elif parts.algebra == LORA:
        made, rank = _pair(names, shapes, "left", "right", "mid")
    elif parts.algebra == LOHA:
        first, rank = _pair(names, shapes, "w1_a", "w1_b", "t1")
        second, _ = _pair(names, shapes, "w2_a", "w2_b", "t2")
        if first and second and (first.rows, first.right_shape) == (second.rows, second.right_shape):
            made = EntrywiseProduct(first, second)
    else:
        first, of_first = _half(names, shapes, "1", "")
        second, of_second = _half(names, shapes, "2", "t2")
        rank = of_second or of_first
        made = KroneckerProduct(first, second) if first and second else None
    if made is None:
        found = ", ".join(f"{names[part]} is {shape}" for part, shape in shapes.items())
        raise ModelError(
            f"{files.label}: {found}; expected factors of {parts.algebra} that fit together. Get the file from its source."
        )
    return made, rank


def _half(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], number: str, core: str
) -> tuple[StoredProduct | None, int]:
    """Return one side of a Kronecker product, None if its shapes do not fit; and its rank if it is stored as two factors, else 0."""
    whole, left, right = f"w{number}", f"w{number}_a", f"w{number}_b"
    if whole not in names:
        return _pair(names, shapes, left, right, core)
    if len(shapes[whole]) < 2 or {left, right, core} & set(names):
        return None, 0
    return stored_whole(names[whole], shapes[whole]), 0


def _pair(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], left: str, right: str, core: str
) -> tuple[StoredProduct | None, int]:
    """Return the product of two stored factors, and a core if there is one, with the rank of the right one; None if they do not fit."""
    a, b, t = shapes[left], shapes[right], shapes.get(core, ())
    if len(a) < 2 or len(b) < 2:
        return None, 0
    is_turned = bool(t) and core != "mid"
    rows, rank = (math.prod(a[1:]), a[0]) if is_turned else (a[0], math.prod(a[1:]))
    right_shape, fits = b[1:], rank == b[0]
    if t:
        right_shape = (b[1], *t[2:])
        fits = len(t) > 2 and t[:2] == (rank, b[0]) and math.prod(b[2:]) == 1
    product = StoredProduct(
        names[left], names[right], names.get(core, ""), rows, rank, right_shape, is_turned
    )
    return (product if fits else None), b[0]


def _update(files: FactorSource, parts: _ModuleParts, product: Algebra | StoredProduct) -> Update:
    """Return the update of a module, scaled by its alpha."""
    text = parts.name.text
    left, right, difference = text + LEFT, text + RIGHT, text + DIFFERENCE
    if isinstance(product, StoredProduct):
        difference = "" if product.left else product.right
        if product.left and not product.core:
            left, right = product.left, product.right
    magnitude = parts.others.get("magnitude", "")
    by_input = bool(magnitude) and _is_by_input(files, magnitude, product.rows)
    bias = _float(files, parts.others["bias"]) if "bias" in parts.others else ""
    if parts.rank and "alpha" in parts.others:
        parts.alpha = _alpha(files, parts.others["alpha"])
    scale = 1.0 if parts.alpha is None else parts.alpha / parts.rank
    return Update(
        text,
        left,
        right,
        product.rank,
        scale,
        magnitude=magnitude and _float(files, magnitude),
        bias=bias,
        difference=difference,
        is_magnitude_by_input=by_input,
    )


def _is_by_input(files: FactorSource, magnitude: str, rows: int) -> bool:
    """Has DoRA a norm for each input, (1, inputs), and not for each output, (outputs, 1)?"""
    shape = files.tensors[magnitude].shape
    is_row = len(shape) > 1 and shape[0] == 1 and (math.prod(shape) > 1 or rows > 1)
    return is_row and magnitude.endswith(".dora_scale")  # PEFT stores (1, outputs, 1, 1) for convolutions


def _alpha(files: FactorSource, name: str) -> float:
    """Read an alpha. Errors: ModelError for one that is no finite number."""
    tensor = files.tensors[name]
    kind = dtypes.DTYPES[tensor.dtype].kind
    if tensor.elements != 1 or not (tensor.dtype in dtypes.MERGEABLE or kind == "integer"):
        raise ModelError(
            f"{files.label}: {name} is {tensor.dtype} of {tensor.shape}; expected one number. Get the file from its source."
        )
    value = float(np.asarray(read_tensor(files, name)).reshape(()))
    if not math.isfinite(value):
        raise ModelError(
            f"{files.label}: {name} is {value}; expected a finite number, which the factors are scaled by. Get the file from its "
            "source."
        )
    return value


def _stated_configs(files: FactorSource) -> dict[str, dict[str, Any]]:
    """Return the configs that diffusers states in the header, by the part that they are for. Errors: ModelError."""
    text = next((s.header.metadata[METADATA] for s in files.shards if METADATA in s.header.metadata), None)
    if text is None:
        return {}
    entries = parse_json(text.encode("utf-8", "surrogatepass"), Path(f"{files.label}: {METADATA}"))
    components = {
        "unet": DENOISER,
        "transformer": DENOISER,
        **{encoder: encoder for encoder in TEXT_ENCODERS},
    }
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        prefix, _, option = key.partition(".")
        component, option = (components[prefix], option) if option and prefix in components else (ANY, key)
        configs.setdefault(component, {"peft_type": "LORA"})[option] = value
    for config in configs.values():
        check_config(config, f"{files.label}: {METADATA}", len(files.tensors))
    return configs


def _scaled_by_config(files: FactorSource, update: Update, config: Mapping[str, Any]) -> Update:
    """Return an update with the scale that the header's config states for its module. Errors: ModelError."""
    module = module_name(update.module, "").path
    try:
        rank, scale = scale_of(replace(update, module=module), config)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(
            f"{files.label}: {METADATA} states no rank and alpha of {update.module} ({error}); expected numbers. Get the file from its source."
        ) from None
    if rank != update.rank:
        raise ModelError(
            f"{files.label}: {METADATA} states the rank {rank} of {update.module}, whose factors have {update.rank}; expected one rank. Get "
            "the file from its source."
        )
    return replace(update, scale=scale)


def is_dialect(names: Iterable[str]) -> bool:
    """Do the names of tensors say that they need no config: by the prefix of a program, or by alphas?

    >>> is_dialect(["lora_unet_q.lora_up.weight"]), is_dialect(["q.lora_A.weight"]), is_dialect(["q.lora_A.weight", "q.alpha"])
    (True, False, True)
    """
    listed = list(names)
    return all(name.startswith(KNOWN) for name in listed) or any(name.endswith(".alpha") for name in listed)
