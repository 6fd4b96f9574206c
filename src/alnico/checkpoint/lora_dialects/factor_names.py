"""Splits the names in LoRA files without a config: which module, which factor, and which program's dialect.

| dialect | prefix of a module | factors |
| --- | --- | --- |
| kohya, OneTrainer, LyCORIS | ``lora_unet_``, ``lora_te1_``, ``lora_transformer_``, ``lycoris_``; dots are underscores | ``lora_up``, ``lora_down``, ``alpha`` |
| ComfyUI | ``diffusion_model.``, ``text_encoders.clip_l.transformer.`` | ``lora_up`` and ``lora_down``, or ``lora_B`` and ``lora_A`` |
| diffusers | ``unet.``, ``transformer.``, ``text_encoder.``, or none | ``lora_B`` and ``lora_A``; older: ``lora.up``, ``to_q_lora.up``, ``lora_linear_layer.up`` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DialectName = Literal["kohya", "ComfyUI", "diffusers"]

DENOISER, FIRST_TEXT, SECOND_TEXT, THIRD_TEXT, ANY = (
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "",
)
"""The parts of an image model that a module may belong to; ANY where its name does not say which."""
TEXT_ENCODERS = (FIRST_TEXT, SECOND_TEXT, THIRD_TEXT)

PREFIXES: tuple[tuple[str, DialectName, str], ...] = (
    ("lora_unet_", "kohya", DENOISER),
    ("lora_transformer_", "kohya", DENOISER),
    ("lora_prior_unet_", "kohya", DENOISER),
    ("lora_te_", "kohya", FIRST_TEXT),
    ("lora_te1_", "kohya", FIRST_TEXT),
    ("lora_te2_", "kohya", SECOND_TEXT),
    ("lora_te3_", "kohya", THIRD_TEXT),
    ("lora_prior_te_", "kohya", FIRST_TEXT),
    ("lycoris_", "kohya", ANY),
    ("diffusion_model.", "ComfyUI", DENOISER),
    ("model.diffusion_model.", "ComfyUI", DENOISER),
    ("text_encoders.clip_l.transformer.", "ComfyUI", FIRST_TEXT),
    ("text_encoders.clip_h.transformer.", "ComfyUI", FIRST_TEXT),
    ("text_encoders.clip_g.transformer.", "ComfyUI", SECOND_TEXT),
    ("text_encoders.t5xxl.transformer.", "ComfyUI", THIRD_TEXT),
    ("text_encoders.", "ComfyUI", ANY),
    ("unet.", "diffusers", DENOISER),
    ("transformer.", "diffusers", DENOISER),
    ("text_encoder.", "diffusers", FIRST_TEXT),
    ("text_encoder_2.", "diffusers", SECOND_TEXT),
    ("text_encoder_3.", "diffusers", THIRD_TEXT),
)
"""How the name of a module begins, in which dialect, and for which part. A name with none of these is diffusers' for one part alone."""


@dataclass(frozen=True)
class FactorWords:
    """How the names of the factors of ``left @ right`` end: those of LoRA's B and A."""

    left: str
    right: str


UP_DOWN = FactorWords(".lora_up.weight", ".lora_down.weight")
B_A = FactorWords(".lora_B.weight", ".lora_A.weight")
NAMED_B_A = FactorWords(".lora_B.default.weight", ".lora_A.default.weight")
PLAIN_UP_DOWN = FactorWords(".lora.up.weight", ".lora.down.weight")
PROCESSOR = FactorWords("_lora.up.weight", "_lora.down.weight")
LINEAR_LAYER = FactorWords(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")

WORDS = (UP_DOWN, B_A, NAMED_B_A, PLAIN_UP_DOWN, PROCESSOR, LINEAR_LAYER)
OLD_DIFFUSERS = (PLAIN_UP_DOWN, PROCESSOR, LINEAR_LAYER)
"""Those of older versions of diffusers, which stand in one file together."""

LORA, LOHA, LOKR, WHOLE = "LoRA", "LoHa", "LoKr", "a whole difference"

FACTORS: dict[str, tuple[str, str]] = {
    **{words.left: (LORA, "left") for words in WORDS},
    **{words.right: (LORA, "right") for words in WORDS},
    ".lora_mid.weight": (LORA, "mid"),
    **{f".hada_{part}": (LOHA, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": (LOKR, part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": (WHOLE, "difference"),
    ".w_norm": (WHOLE, "difference"),
}
"""How the name of a factor ends: its algebra, and its part in it."""

OTHERS: dict[str, str] = {
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_B.bias": "bias",
    ".diff_b": "difference of the bias",
    ".b_norm": "difference of the bias",
}
"""How the name of a number or vector beside the factors ends, and what it is."""

ENDINGS = tuple(sorted({**FACTORS, **OTHERS}, key=len, reverse=True))

OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Projections of a text encoder as older versions of diffusers call them, and their names in transformers."""


@dataclass(frozen=True)
class ModuleName:
    """The module that a tensor of a LoRA file belongs to."""

    text: str
    """As written in the file."""
    dialect: DialectName
    component: str
    """The part of the image model."""
    path: str
    """The module in that part; ``is_dotted`` says whether dots are still dots, or underscores."""
    is_dotted: bool


def split_ending(name: str) -> tuple[str, str] | None:
    """Split the name of a tensor into its module and its ending; None for an ending that is not known.

    >>> split_ending("lora_unet_mid_block_attn.lora_up.weight"), split_ending("a.to_q_lora.up.weight"), split_ending("a.weight")
    (('lora_unet_mid_block_attn', '.lora_up.weight'), ('a.to_q', '_lora.up.weight'), None)
    """
    ending = next((e for e in ENDINGS if name.endswith(e) and len(name) > len(e)), None)
    return None if ending is None else (name.removesuffix(ending), ending)


def module_name(text: str, ending: str) -> ModuleName:
    """Return what the name of a module says.

    >>> module_name("lora_unet__blocks_0_q", ".alpha").path, module_name("unet.a.processor.to_out", "_lora.up.weight").path
    ('blocks_0_q', 'a.to_out.0')
    """
    prefix, dialect, component = next(
        (entry for entry in PREFIXES if text.startswith(entry[0])), ("", "diffusers", ANY)
    )
    path = text[len(prefix) :]
    if dialect == "kohya":
        return ModuleName(text, dialect, component, path.lstrip("_"), False)
    if dialect == "diffusers":
        path = _modern(path, component, is_old=ending in (PROCESSOR.left, PROCESSOR.right))
    return ModuleName(text, dialect, component, path, True)


def diffusers_prefix(text: str) -> str:
    """Return how a module's name begins that says the part of a pipeline of diffusers; '' for a name that does not say it.

    >>> diffusers_prefix("text_encoder_2.text_model.q"), diffusers_prefix("down_blocks.0.q")
    ('text_encoder_2.', '')
    """
    return next((p for p, dialect, _ in PREFIXES if dialect == "diffusers" and text.startswith(p)), "")


def _modern(path: str, component: str, *, is_old: bool) -> str:
    """Return a module's name in today's diffusers and transformers."""
    is_old = is_old or ".processor." in path
    plain = path.replace(".processor.", ".")
    parent, _, last = plain.rpartition(".")
    if component in TEXT_ENCODERS and last in OLD_ATTENTION:
        return f"{parent}.{OLD_ATTENTION[last]}"
    return f"{plain}.0" if is_old and last == "to_out" else plain


@dataclass(frozen=True)
class StoredModule:
    """How a file stores what it adds to a module."""

    name: ModuleName
    kind: str
    """LORA, LOHA, LOKR or WHOLE."""
    factors: Mapping[str, str] = field(default_factory=dict)
    """The names of its factors, by their part in the algebra."""
    rank: int = 0
    """The rank that the alpha is divided by; 0 where no alpha applies."""
    alpha: float | None = None


@dataclass(frozen=True)
class Dialect:
    """How a LoRA file without a config is written, so that its combinations can be written in the same way."""

    name: DialectName
    words: FactorWords
    """The endings of its LoRA factors; where it has none, those that its program writes today."""
    has_alphas: bool
    modules: Mapping[str, StoredModule]
    """Its modules by the keys of their updates."""
    trained_for: str = ""
    """The architecture that the header states; '' if it states none."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_scale_assumed: bool = False
    """Does the file say nothing about its scales, and have names of one part alone, as PEFT's without a prefix are?"""
