"""Finds the block of an image model that a tensor belongs to, and knows presets of block weights.

A U-Net has the blocks IN, MID and OUT, a Flux transformer D (double) and S (single).
Checkpoints in one file have the names of the original code (``model.diffusion_model.input_blocks.4``), folders of diffusers
their own (``down_blocks.1``). Both have the same blocks: the first convolution and three for each level, of two residual
blocks and a change of the resolution.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping

BLOCK = "block:"
"""The beginning of a filter by blocks."""

BASE = "BASE"
"""What is in no block: text encoders and the VAE."""
FIRST = "FIRST"
"""What comes before the blocks of the model: embeddings of time, labels, text and picture."""
LAST = "LAST"
"""What comes after its blocks."""

BLOCKS_PER_LEVEL = 3

_ORIGINAL = r"^(?:model\.diffusion_model\.)?"
_UNET = r"^(?:unet/)?"
_TRANSFORMER = r"^(?:transformer/)?"


def _numbered(letters: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{letters}{int(match[1]):02d}"


def _in_level(letters: str, first: int) -> Callable[[re.Match[str]], str]:
    """The name of a block of diffusers: its level, and its place in it. ``first`` is the number of the first level's first block."""
    return lambda match: f"{letters}{BLOCKS_PER_LEVEL * int(match[1]) + int(match[2]) + first:02d}"


def _after_level(letters: str, first: int) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{letters}{BLOCKS_PER_LEVEL * int(match[1]) + BLOCKS_PER_LEVEL - 1 + first:02d}"


_Place = str | Callable[[re.Match[str]], str]


@functools.cache
def _places() -> list[tuple[re.Pattern[str], _Place]]:
    """Patterns of names, each with the block or what makes it of the match. Compiled on first use: most merges are of no image models."""
    places: tuple[tuple[str, _Place], ...] = (
        (_ORIGINAL + r"input_blocks\.(\d{1,2})\.", _numbered("IN")),
        (_ORIGINAL + r"output_blocks\.(\d{1,2})\.", _numbered("OUT")),
        (_ORIGINAL + r"middle_block\.", "MID"),
        (_ORIGINAL + r"double_blocks[._](\d{1,3})[._]", _numbered("D")),
        (_ORIGINAL + r"single_blocks[._](\d{1,3})[._]", _numbered("S")),
        (_ORIGINAL + r"(?:time_embed|label_emb|img_in|txt_in|time_in|vector_in|guidance_in)\.", FIRST),
        (_ORIGINAL + r"out\.", LAST),
        (_ORIGINAL + r"final_layer[._]", LAST),
        (_UNET + r"conv_in(?:[._]|$)", "IN00"),
        (_UNET + r"down_blocks[._](\d{1,3})[._](?:resnets|attentions)[._](\d{1,3})[._]", _in_level("IN", 1)),
        (_UNET + r"down_blocks[._](\d{1,3})[._]downsamplers[._]", _after_level("IN", 1)),
        (_UNET + r"up_blocks[._](\d{1,3})[._](?:resnets|attentions)[._](\d{1,3})[._]", _in_level("OUT", 0)),
        (_UNET + r"up_blocks[._](\d{1,3})[._]upsamplers[._]", _after_level("OUT", 0)),
        (_UNET + r"mid_block[._]", "MID"),
        (_UNET + r"(?:time_embedding|add_embedding|class_embedding)(?:[._]|$)", FIRST),
        (_UNET + r"(?:conv_norm_out|conv_out)(?:[._]|$)", LAST),
        (_TRANSFORMER + r"transformer_blocks[._](\d{1,3})[._]", _numbered("D")),
        (_TRANSFORMER + r"single_transformer_blocks[._](\d{1,3})[._]", _numbered("S")),
        (_TRANSFORMER + r"(?:x_embedder|context_embedder|time_text_embed)(?:[._]|$)", FIRST),
        (_TRANSFORMER + r"(?:norm_out|proj_out)(?:[._]|$)", LAST),
    )
    return [(re.compile(pattern), place) for pattern, place in places]


IN, OUT, DOUBLE, SINGLE = (
    tuple(f"{letters}{i:02d}" for i in range(count))
    for letters, count in (("IN", 12), ("OUT", 12), ("D", 19), ("S", 38))
)
_SD = (*IN, "MID", *OUT)
_SDXL = (*IN[:9], "MID", *OUT[:9])
_FLUX = (*DOUBLE, *SINGLE)
_WITH_ATTENTION_SD = (*IN[1:3], *IN[4:6], *IN[7:9], "MID", *OUT[3:])
_WITH_ATTENTION_SDXL = (*IN[4:6], *IN[7:9], "MID", *OUT[:6])

LISTS: Mapping[int, tuple[str, ...]] = {
    len(blocks): blocks
    for blocks in (
        (BASE, *_SD),
        _SD,
        (BASE, *_SDXL),
        _SDXL,
        (BASE, *_FLUX),
        _FLUX,
        (BASE, *_WITH_ATTENTION_SD),
        (BASE, *_WITH_ATTENTION_SDXL),
    )
}
"""The blocks that a list of numbers means, by its length: 26 or 25 for SD 1 and 2, 20 or 19 for SDXL, 58 or 57 for Flux; 17 (SD) and
12 (SDXL) for the blocks with attention, which LoRA files for the U-Net change."""

RANGE = re.compile(r"(IN|OUT|D|S)(\d{1,2})-(?:IN|OUT|D|S)?(\d{1,2})")


@functools.lru_cache(maxsize=100_000)
def block_of(name: str) -> str:
    """Return the block of a tensor: ``IN00`` to ``IN11``, ``MID``, ``OUT00`` to ``OUT11``, ``D00``, ``S00`` and so on; ``FIRST`` for what
    comes before the blocks, ``LAST`` for what comes after them, ``BASE`` for what is outside of the U-Net or transformer.

    Names of diffusers' modules may have ``_`` in place of points, as in LoRA files.

    >>> block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight"), block_of("unet/down_blocks.1.attentions.0.proj_in.weight")
    ('IN04', 'IN04')
    >>> block_of("first_stage_model.decoder.conv_in.weight"), block_of("transformer/single_transformer_blocks.7.attn.to_q.weight")
    ('BASE', 'S07')
    """
    for pattern, place in _places():
        if match := pattern.match(name):
            return place if isinstance(place, str) else place(match)
    return BASE


def matches_blocks(blocks: str, name: str) -> bool:
    """Is a tensor in one of some blocks? ``blocks`` are names, ranges (``IN00-IN05``) and letters (``OUT``), with commas between them.

    >>> [matches_blocks(b, "unet/mid_block.resnets.0.conv1.weight") for b in ("MID", "IN00-IN03,MID", "OUT")]
    [True, True, False]
    """
    own = block_of(name)
    return any(_is_in(own, part.strip()) for part in blocks.split(","))


def _is_in(block: str, part: str) -> bool:
    if match := RANGE.fullmatch(part):
        letters, first, last = match.groups()
        digits = block.removeprefix(letters)
        return digits != block and digits.isdigit() and int(first) <= int(digits) <= int(last)
    return block == part or (
        part in ("IN", "OUT", "D", "S") and block[len(part) :].isdigit() and block.startswith(part)
    )


def are_blocks(blocks: str) -> bool:
    """Are these names of blocks, ranges and letters, with commas between them?

    >>> are_blocks("IN00-IN05, MID, OUT"), are_blocks("IN1x"), are_blocks("OUT05-OUT02")
    (True, False, False)
    """
    return all(_is_part(part.strip()) for part in blocks.split(","))


def _is_part(part: str) -> bool:
    if match := RANGE.fullmatch(part):
        return int(match[2]) <= int(match[3])
    return re.fullmatch(r"(IN|OUT|D|S)(\d\d)?|MID|BASE|FIRST|LAST", part) is not None


# Presets


def _smoothstep(x: float) -> float:
    return x * x * (3 - 2 * x)


def _fold(x: float) -> float:
    """Reflect a number into 0 to 1: it rises to 1, falls to 0, and rises again."""
    x %= 2
    return 2 - x if x > 1 else x


def _hermite(x: float) -> float:
    return 0.5 - 7 / 12 * (x - 0.5) + 19 / 3 * (x - 0.5) ** 3


def _true_hermite(x: float) -> float:
    return _hermite(x) + (1 - _smoothstep(x)) / 24 if x else 0.0


def _constant(value: float) -> Callable[[float], float]:
    return lambda _: value


def _steps(*spans: tuple[int, int, float]) -> Callable[[float], float]:
    """A value for each span of the 25 blocks of SD, by the numbers of its first and last; 0 elsewhere."""
    return lambda x: next((value for first, last, value in spans if first <= round(24 * x) <= last), 0.0)


_CURVES: dict[str, Callable[[float], float]] = {
    "GRAD_V": lambda x: abs(2 * x - 1),
    "GRAD_A": lambda x: 1 - abs(2 * x - 1),
    "FLAT_25": _constant(0.25),
    "FLAT_75": _constant(0.75),
    "WRAP08": _steps((0, 3, 1), (21, 24, 1)),
    "WRAP12": _steps((0, 5, 1), (19, 24, 1)),
    "WRAP14": _steps((0, 6, 1), (18, 24, 1)),
    "WRAP16": _steps((0, 7, 1), (17, 24, 1)),
    "MID12_50": _steps((5, 18, 0.5)),
    "OUT07": _steps((18, 24, 1)),
    "OUT12": _steps((13, 24, 1)),
    "OUT12_5": _steps((12, 12, 0.5), (13, 24, 1)),
    "RING08_SOFT": _steps((5, 5, 0.5), (6, 8, 1), (9, 9, 0.5), (15, 15, 0.5), (16, 18, 1), (19, 19, 0.5)),
    "RING08_5": _steps((6, 9, 1), (15, 18, 1)),
    "RING10_5": _steps((5, 9, 1), (15, 19, 1)),
    "RING10_3": _steps((6, 10, 1), (14, 18, 1)),
    "SMOOTHSTEP": _smoothstep,
    **{f"SMOOTHSTEP*{n}": lambda x, n=n: _fold(n * _smoothstep(x)) for n in (2, 3, 4)},  # type: ignore[misc]
    **{f"SMOOTHSTEP/{n}": lambda x, n=n: _smoothstep(_fold(n * x)) for n in (2, 3, 4)},  # type: ignore[misc]
    "COSINE": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "TRUE_CUBIC_HERMITE": _true_hermite,
    "FAKE_CUBIC_HERMITE": _hermite,
    "ALL_A": _constant(0.0),
    "ALL_B": _constant(1.0),
}
_REVERSED = {
    "REVERSE-SMOOTHSTEP": "SMOOTHSTEP",
    **{f"R_SMOOTHSTEP{sign}{n}": f"SMOOTHSTEP{sign}{n}" for sign in "*/" for n in (2, 3, 4)},
    "REVERSE_COSINE": "COSINE",
    "TRUE_REVERSE_CUBIC_HERMITE": "TRUE_CUBIC_HERMITE",
    "FAKE_REVERSE_CUBIC_HERMITE": "FAKE_CUBIC_HERMITE",
}
PRESETS: tuple[str, ...] = (*_CURVES, *_REVERSED)
"""Names of the block weights that merge tools of Stable Diffusion share."""


def preset_weights(preset: str) -> dict[str, float]:
    """Return the number that a preset gives each block, BASE first.

    The blocks of SD have the numbers x = i / 24 of the preset's curve, i from IN00 to OUT11; SDXL has the blocks of these that it has. The
    blocks of Flux have x = i / 56. BASE is 0, and 1 with ALL_B. Source: the presets of sdweb-merge-block-weighted and supermerger; there
    Flux has none.

    >>> weights = preset_weights("GRAD_V")
    >>> [round(weights[b], 4) for b in ("BASE", "IN00", "IN01", "MID", "OUT11", "S37")]
    [0.0, 1.0, 0.9167, 0.0, 1.0, 1.0]
    """
    if preset in _REVERSED:
        curve = _CURVES[_REVERSED[preset]]
        return {BASE: 0.0} | _along(lambda x: 1 - curve(x))
    return {BASE: 1.0 if preset == "ALL_B" else 0.0} | _along(_CURVES[preset])


def _along(curve: Callable[[float], float]) -> dict[str, float]:
    return {block: float(curve(i / (len(line) - 1))) for line in (_SD, _FLUX) for i, block in enumerate(line)}
