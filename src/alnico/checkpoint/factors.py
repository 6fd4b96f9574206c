"""Recognises adapters' factors by name: matrices whose product is added to a model.

The mean of products is not the product of means: ``mean(B) @ mean(A)`` of two LoRA files is off by most of
its norm. Factors are therefore never merged directly. Names are those of PEFT, kohya, LyCORIS, diffusers,
OneTrainer, ComfyUI, XLabs, MLX, NeMo, torchtune and LitGPT.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from alnico.errors import ModelError

LORA = (
    r"lora_(?:embedding_)?[AB]|lora_[abE]|lora_(?:up|down|mid|magnitude_vector|diag|left_weight|right_weight)"
)
LYCORIS = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale|oft_(?:r|blocks|diag)"
OF_PEFT = (
    r"(?:glora|gralora|delora|hira(?:_embedding)?|lily|peanut|adamss|poly_lora|supertuning_lora|randlora|p?vera|tinylora)_[A-EPv]|"
    r"gralora_[AB]_general|delora_lambda|p?vera_lambda_[bd]|randlora_(?:lambda|gamma)|(?:poly|lily)_router|deft_[PR]|psoft_R|oft_(?:embedding_)?R|"
    r"boft_[Rs]|hra_u|road_(?:theta|alpha)|ia3_l|vblora_(?:logits(?:_[AB])?|vector_bank)|unilora_theta_d|fourierft_spectrum|waveft_spectrum|"
    r"c3a_kernel|miss_block|bone_block|frod_(?:V|lambda_l|lambda_s_values)|osf_svd_params"
)
OTHERS = r"(?:\w+_)?lora(?:_linear_layer)?\d*\.(?:up|down)|lora_\w+_adapter\.linear_(?:in|out)"
GLORA = r"(?:lora|lycoris)_[^.]+\.[ab][12]"
"""LyCORIS's GLoRA: names such as ``a1`` mean nothing without the prefix of the file."""
FACTOR = re.compile(rf"(?P<module>.*?)(?:^|\.)(?:{LORA}|{LYCORIS}|{OF_PEFT}|{OTHERS}|{GLORA})(?:\.|$)")
PROMPT = re.compile(r"prompt_(?:embeddings|task_(?:cols|rows))|prefix_task_(?:cols|rows)")
"""What prompt tuning saves: no tensors of a model."""

WEIGHTS = (".weight", ".base_layer.weight", "")
"""Endings of the weight that a module's factors belong to; '' where the factors are those of the parameter
itself."""


def is_factor(name: str) -> bool:
    """Is a tensor a factor of an adapter's update, by its name?

    >>> [is_factor(n) for n in ("base_model.model.q.lora_A.weight", "lora_unet_q.lora_down.weight", "q.hada_w1_a", "to_q_lora.up.weight")]
    [True, True, True, True]
    >>> [is_factor(n) for n in ("layers.0.self_attn.kv_a_proj.weight", "attn.w_lora.lora.0.weight", "act.alpha", "lora.weight")]
    [False, False, False, False]
    """
    return FACTOR.match(name) is not None or PROMPT.fullmatch(name) is not None


def adapter_factors(names: Collection[str]) -> list[str]:
    """Return the factors among an adapter's tensors; none for a model, even if it stores factors next to its
    weights.

    >>> adapter_factors(["q.lora_A.weight", "q.lora_B.weight"]), adapter_factors(["q.weight", "q.lora_A.weight", "q.lora_B.weight"])
    (['q.lora_A.weight', 'q.lora_B.weight'], [])
    """
    all_names = set(names)
    factors = [name for name in names if is_factor(name)]
    modules = [match["module"] for name in factors if (match := FACTOR.match(name)) is not None]
    complete = [module for module in modules if any(module + weight in all_names for weight in WEIGHTS)]
    return [] if 2 * len(complete) > len(factors) else factors


def refuse_adapter(label: str, names: Collection[str]) -> None:
    """Refuse an adapter where a model is expected. Errors: ModelError."""
    factors = adapter_factors(names)
    if factors:
        raise ModelError(
            f"{label}: is an adapter ({len(factors)} of its {len(names)} tensors are factors of updates, "
            f"such as {factors[0]}); expected a whole model. The mean of factors is not the mean of their "
            "products. Fold it into its base (`alnico lora fold BASE ADAPTER OUT`, or BASE+ADAPTER in place of a "
            "model), or combine several into one with `alnico lora combine`."
        )
