"""Reads values by block of an image model: a preset, a list of numbers, or names of blocks with values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alnico.checkpoint.image_blocks import (
    BASE,
    BLOCK,
    FIRST,
    LAST,
    LISTS,
    PRESETS,
    are_blocks,
    preset_weights,
)
from alnico.recipe import scalars
from alnico.recipe.context import Context
from alnico.recipe.keys import BLOCKS
from alnico.recipe.schema import Case, Cases, Setting
from alnico.recipe.yaml_nodes import Node, quote


def read_blocks(
    node: Node, where: str, read: Callable[[Node, str], Setting | None], context: Context
) -> Cases | None:
    """Read a mapping with ``blocks``, and ``value`` for all other tensors; ``read`` reads one value."""
    context.check_keys(node, where, BLOCKS)
    blocks = _values(node.value["blocks"], f"{where}.blocks", context)
    if blocks is None:
        return None
    cases = []
    for names, value in blocks:
        setting = read(value, f"{where}.blocks")
        if setting is None:
            return None
        cases.append(Case(f"{BLOCK}{names}", setting))
    if "value" in node.value:
        rest = read(node.value["value"], f"{where}.value")
        if rest is None:
            return None
        cases.append(Case("*", rest))
    return Cases(tuple(cases))


def _values(node: Node, where: str, context: Context) -> list[tuple[str, Node]] | None:
    """Return names of blocks, each with its value."""
    if isinstance(node.value, str):
        return _preset(node, where, context)
    if isinstance(node.value, list):
        return _list(node, where, context)
    if isinstance(node.value, dict) and node.value:
        for names, value in node.value.items():
            if not are_blocks(str(names)):
                context.reading.wrong(
                    value.line,
                    f"{where} has {quote(names)}, which is no block; expected IN00 to IN11, MID, OUT00 to OUT11, D00 to D18, S00 to "
                    "S37, FIRST, LAST or BASE, or a range as IN00-IN05. Correct the name.",
                )
                return None
        return [(str(names), value) for names, value in node.value.items()]
    context.reading.wrong(
        node.line,
        f"{where} is {node.kind}; expected the name of a preset, a list of numbers, or blocks with values.",
    )
    return None


def _preset(node: Node, where: str, context: Context) -> list[tuple[str, Node]] | None:
    if node.value not in PRESETS:
        hint = scalars.nearest(node.value, list(PRESETS))
        context.reading.wrong(node.line, f"{where} is {quote(node.value)}, which is no preset. {hint}")
        return None
    weights = preset_weights(node.value)
    return _with_ends(list(weights), list(weights.values()), node)


def _list(node: Node, where: str, context: Context) -> list[tuple[str, Node]] | None:
    blocks = LISTS.get(len(node.value))
    if blocks is None:
        context.reading.wrong(
            node.line,
            f"{where} is a list of {len(node.value)}; expected 26 or 25 numbers for SD, 20 or 19 for SDXL, 58 or 57 for Flux (with or without "
            "BASE), or 17 (SD) or 12 (SDXL) for BASE and the blocks with attention.",
        )
        return None
    return _with_ends(blocks, [item.value for item in node.value], node)


def _with_ends(blocks: Sequence[str], values: Sequence[Any], node: Node) -> list[tuple[str, Node]]:
    """Give what comes before the blocks the value of the first one, and what comes after them that of the last."""
    inner = [block for block in blocks if block != BASE]
    by_block = dict(zip(blocks, values, strict=True))
    ends = {FIRST: by_block[inner[0]], LAST: by_block[inner[-1]]}
    return [(block, Node(value, node.line)) for block, value in (by_block | ends).items()]
