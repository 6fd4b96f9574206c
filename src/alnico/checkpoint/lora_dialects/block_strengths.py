"""Scales an adapter by block of an image model: IN00 to IN11, MID, OUT00 to OUT11, and D00 and S00 on.

The lists of numbers are those that are common for LoRA: 17 and 26 numbers for SD 1 and SD 2, 12 and 20 for SDXL, 58 and 61 for Flux.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from alnico.checkpoint import image_blocks
from alnico.checkpoint.image_blocks import BASE, DOUBLE, FIRST, IN, LAST, OUT, SINGLE
from alnico.checkpoint.lora_adapter import Adapter
from alnico.checkpoint.lora_dialects.canonical_names import OF_TEXT_ENCODER, canonical_name
from alnico.checkpoint.lora_dialects.factor_names import ANY, DENOISER, TEXT_ENCODERS, THIRD_TEXT
from alnico.errors import ModelError, RecipeError, near_name
from alnico.numerics.numbers import finite_number

MID, CLIP, T5 = "MID", "CLIP", "T5"
"""The middle of a U-Net; the text encoders of each kind."""
GROUPS = {"IN": IN, "OUT": OUT, "D": DOUBLE, "S": SINGLE, "M00": (MID,), "MID00": (MID,)}
"""Words for several blocks, and other words for one."""
LISTS: dict[int, tuple[str, ...]] = {
    **{count: blocks for count, blocks in sorted(image_blocks.LISTS.items()) if BASE in blocks},
    61: (CLIP, T5, FIRST, *DOUBLE, *SINGLE, LAST),
}
"""What the numbers of a list stand for, by its length. Blocks that a list does not have are left out; what comes before and after the
blocks has the number of the first block and of the last."""
LABELS = (BASE, CLIP, T5, FIRST, *IN, MID, *OUT, *DOUBLE, *SINGLE, LAST)
OTHERS = "OTHERS"
"""In a reference: the strength of blocks that are not named."""

BlockInput = str | Mapping[str, float] | Sequence[float] | Sequence[str | Mapping[str, float] | None]
"""Strengths as a caller gives them: for all adapters, or a list with those of each."""


@dataclass(frozen=True)
class BlockStrengths:
    """A strength for each of some blocks; ``others`` is that of blocks without one."""

    values: Mapping[str, float]
    others: float = 1.0

    @property
    def text(self) -> str:
        """As :func:`parse_blocks` reads it."""
        values = {**self.values, **({OTHERS: self.others} if self.others != 1 else {})}
        return ",".join(f"{label}={value!r}" for label, value in values.items()).replace("e+", "e")

    def of(self, component: str, canonical: str) -> float:
        """The strength of a module; 1 for one that is in no block."""
        labels = labels_of(component, canonical)
        named = (self.values[label] for label in labels if label in self.values)
        return next(named, self.others if labels else 1.0)


def labels_of(component: str, canonical: str) -> tuple[str, ...]:
    """Return the block that a module is in, and the block that holds this one; empty for a module that is in none.

    >>> [labels_of("unet", n)[0] for n in ("down_blocks_1_attentions_0_proj_in", "up_blocks_2_upsamplers_0_conv", "single_blocks_7_linear1")]
    ['IN04', 'OUT08', 'S07']
    >>> labels_of("text_encoder", "text_model_encoder_layers_0_mlp_fc1"), labels_of("unet", "blocks_0_self_attn_q")
    (('CLIP', 'BASE'), ())
    """
    is_text = component == ANY and canonical.startswith(OF_TEXT_ENCODER)
    if component in TEXT_ENCODERS or is_text:
        is_t5 = component == THIRD_TEXT or canonical.startswith("encoder_block_")
        return (T5 if is_t5 else CLIP, BASE)
    block = image_blocks.block_of(canonical)
    return (block,) if block != BASE else ()


def parse_blocks(blocks: Any) -> BlockStrengths:
    """Read strengths: text or a mapping of blocks to numbers, or a list of 12, 17, 20, 26, 58 or 61 numbers.

    A block may be a range, or letters alone. A block without a strength keeps 1; one that a list of numbers does not have gets 0. Errors:
    RecipeError.

    >>> parse_blocks("IN04-IN05=0.5,MID=0").values
    {'IN04': 0.5, 'IN05': 0.5, 'MID': 0.0}
    >>> parse_blocks(",".join(["1"] * 12)).text[-39:]
    'OUT05=1.0,FIRST=1.0,LAST=1.0,OTHERS=0.0'
    """
    if isinstance(blocks, BlockStrengths):
        return blocks
    if isinstance(blocks, str):
        words = [word.strip() for word in blocks.split(",") if word.strip()]
        named = [word.partition("=") for word in words]
        is_named = bool(words) and all(equals for _, equals, _ in named)
        blocks = {label.strip(): value.strip() for label, _, value in named} if is_named else words
    if isinstance(blocks, Mapping):
        values: dict[str, float] = {}
        for written, value in blocks.items():
            values |= dict.fromkeys(_labels(str(written)), _number(value))
        others = values.pop(OTHERS, 1.0)
        return BlockStrengths(values, others)
    if not isinstance(blocks, Sequence) or len(blocks) not in LISTS:
        count = (
            f"{len(blocks)} values" if isinstance(blocks, Sequence) else f"of type {type(blocks).__name__}"
        )
        raise RecipeError(
            f"blocks: is {count}; expected BLOCK=NUMBER, such as IN04-IN08=0.5,MID=0, or a list of {', '.join(map(str, LISTS))} numbers. "
            "Change it."
        )
    listed = dict(zip(LISTS[len(blocks)], map(_number, blocks), strict=True))
    inner = [value for label, value in listed.items() if label not in (BASE, CLIP, T5)]
    return BlockStrengths({**listed, FIRST: inner[0], LAST: inner[-1]}, 0.0)


def _number(value: Any) -> float:
    try:
        given = float(value) if isinstance(value, str) else value
    except ValueError:
        given = value
    return finite_number(given, "blocks: a strength", error=RecipeError)


def _labels(written: str) -> Sequence[str]:
    """The blocks that a word or a range of blocks names. Errors: RecipeError."""
    if written == OTHERS:
        return [written]
    ends = [word.strip().upper() for word in written.split("-", 1)]
    if len(ends) == 1 and ends[0] in GROUPS:
        return GROUPS[ends[0]]
    for word in ends:
        if word not in LABELS:
            near = near_name(word, LABELS)
            hint = f" Did you mean {near}?" if near else ""
            raise RecipeError(
                f"blocks: {written!r} names no block; expected BASE, IN00 to IN11, MID, OUT00 to OUT11, D00 to D18, S00 to S37, FIRST, LAST, "
                f"CLIP or T5, or a range as IN00-IN05.{hint}"
            )
    first, last = LABELS.index(ends[0]), LABELS.index(ends[-1])
    if last < first:
        raise RecipeError(
            f"blocks: {written!r} ends before it begins; expected a range in the order of the model. Exchange its ends."
        )
    return LABELS[first : last + 1]


def with_strengths(adapter: Adapter, blocks: BlockStrengths) -> Adapter:
    """Scale what an adapter adds by the strengths of its blocks. A module of strength 0 is left out.

    Errors: ModelError for an adapter without blocks, and for one with DoRA's norms or whole tensors in a block whose strength is not 1.
    """
    strengths: dict[str, float] = {}
    has_blocks = False
    for key in (*adapter.updates, *adapter.vectors, *adapter.replaced):
        component, canonical = _place(adapter, key)
        strengths[key] = blocks.of(component, canonical)
        has_blocks |= bool(labels_of(component, canonical))
    if not has_blocks:
        raise ModelError(
            f"{adapter.label}: none of its {len(strengths)} modules is in a block of a U-Net or Flux; expected an adapter of an image "
            "model. Leave blocks out, and use weights."
        )
    for key, name in adapter.replaced.items():
        if strengths[key] != 1:
            raise ModelError(
                f"{adapter.label}: {name} replaces a tensor of a block with the strength {strengths[key]:g}; expected 1, or an adapter "
                "without whole tensors. Change the strength of this block."
            )
    for key, update in adapter.updates.items():
        if update.magnitude and strengths[key] not in (0, 1):
            raise ModelError(
                f"{adapter.label}: {update.module} has DoRA's norms, and its block the strength {strengths[key]:g}; expected 0 or 1, since "
                "a part of a DoRA is no DoRA. Use weights, or fold twice."
            )
    updates = {
        key: replace(update, scale=update.scale * strengths[key])
        for key, update in adapter.updates.items()
        if strengths[key]
    }
    vectors = {
        key: replace(vector, scale=vector.scale * strengths[key])
        for key, vector in adapter.vectors.items()
        if strengths[key]
    }
    scaled = Adapter(
        adapter.files, adapter.config, updates, adapter.replaced, vectors=vectors, dialect=adapter.dialect
    )
    scaled.rows, scaled.blocks = adapter.rows, blocks.text
    return scaled


def _place(adapter: Adapter, key: str) -> tuple[str, str]:
    """The part of the image model and the canonical name of a module, or of a tensor, of an adapter."""
    if adapter.dialect is not None:
        component, _, canonical = key.partition(":")
        return component, canonical.removesuffix(".bias").removesuffix(".weight")
    path = key.removesuffix(".weight").removesuffix(".bias")
    canonical = canonical_name(path, DENOISER)
    return ANY, canonical_name(path, TEXT_ENCODERS[0]) if canonical == path.replace(".", "_") else canonical


def block_list(blocks: Any, adapters: int) -> list[BlockStrengths | None]:
    """Return the strengths of each adapter, None for an adapter without. ``blocks`` is for all, or a list with one per adapter.

    Errors: RecipeError.

    >>> [s and s.text for s in block_list(["MID=0", None], 2)], block_list(None, 2)
    (['MID=0.0', None], [None, None])
    """
    is_list = isinstance(blocks, (list, tuple)) and not all(isinstance(b, Real) for b in blocks)
    each = list(blocks) if is_list else [blocks] * adapters
    if is_list and len(each) == 1:
        each *= adapters
    if len(each) != adapters:
        raise RecipeError(
            f"blocks: there are {len(each)} for {adapters} adapters; expected one for all, or one for each. Change the number."
        )
    return [None if b is None or b == "" else parse_blocks(b) for b in each]
