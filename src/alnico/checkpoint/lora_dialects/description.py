"""Describes a LoRA file without a config: its program, the parts that it changes, and how modules are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from alnico.checkpoint.lora_dialects.canonical_names import OF_TEXT_ENCODER
from alnico.checkpoint.lora_dialects.factor_names import (
    ANY,
    DENOISER,
    FIRST_TEXT,
    LORA,
    OLD_DIFFUSERS,
    TEXT_ENCODERS,
    WHOLE,
    Dialect,
    StoredModule,
)

PROGRAMS = (
    ("lora_unet__", "kohya, as Wan's trainers write it"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS"),
)
"""How the names of modules begin that tell more than the dialect: the program that writes them."""

OF_UNET = ("down_blocks_", "mid_block_", "up_blocks_")
OF_TRANSFORMER = ("transformer_blocks_", "single_transformer_blocks_", "double_blocks_", "single_blocks_")
"""How canonical names of modules begin that only a U-Net has, or a transformer for pictures."""
NOT_NAMED = "a part that is not named"


def program_of(dialect: Dialect) -> str:
    """Return the program whose names a file has, as far as they tell.

    >>> from alnico.checkpoint.lora_dialects.factor_names import UP_DOWN, module_name
    >>> name = module_name("lora_transformer_x_embedder", ".alpha")
    >>> program_of(Dialect("kohya", UP_DOWN, True, {"unet:x_embedder": StoredModule(name, LORA)}))
    'OneTrainer'
    """
    texts = [module.name.text for module in dialect.modules.values()]
    found = next((program for prefix, program in PROGRAMS if any(t.startswith(prefix) for t in texts)), "")
    return found or ("diffusers, an older version" if dialect.words in OLD_DIFFUSERS else dialect.name)


def parts_of_model(keys: list[str]) -> Mapping[str, int]:
    """Return how many modules of each part of an image model a file changes, by the keys of its modules.

    >>> parts_of_model(["unet:down_blocks_0_conv", "unet:conv_in", "text_encoder:text_model_final_layer_norm", ":conv_out"])
    {'unet': 2, 'text_encoder': 1, 'a part that is not named': 1}
    >>> parts_of_model(["unet:x_embedder", ":single_transformer_blocks_0_proj_out"])
    {'transformer': 2}
    """
    places = [(component, canonical) for component, _, canonical in (key.partition(":") for key in keys)]
    denoiser = "unet" if any(canonical.startswith(OF_UNET) for _, canonical in places) else "transformer"

    def part(component: str, canonical: str) -> str:
        if component == DENOISER or (component == ANY and canonical.startswith(OF_UNET + OF_TRANSFORMER)):
            return denoiser
        if component == ANY:
            return FIRST_TEXT if canonical.startswith(OF_TEXT_ENCODER) else NOT_NAMED
        return component

    counts = Counter(part(*place) for place in places)
    order = (denoiser, *TEXT_ENCODERS, NOT_NAMED)
    return {name: counts[name] for name in order if counts[name]}


def kind_of(module: StoredModule, *, has_magnitude: bool) -> str:
    """Return how a module is stored: LoRA, LoHa, LoKr or a difference, with a core, with DoRA's norms.

    >>> from alnico.checkpoint.lora_dialects.factor_names import module_name
    >>> name = module_name("lora_unet_q", ".alpha")
    >>> kind_of(StoredModule(name, "LoHa", {"t1": "a"}), has_magnitude=True), kind_of(StoredModule(name, "LoRA"), has_magnitude=True)
    ('LoHa with cores and DoRA', 'DoRA')
    """
    cores = {"mid": "a core", "t1": "cores", "t2": "a core"}
    core = next((word for part, word in cores.items() if part in module.factors), "")
    kind = "difference" if module.kind == WHOLE else module.kind
    if has_magnitude and kind == LORA and not core:
        return "DoRA"
    extras = [*([core] if core else []), *(["DoRA"] if has_magnitude else [])]
    return f"{kind} with {' and '.join(extras)}" if extras else kind
