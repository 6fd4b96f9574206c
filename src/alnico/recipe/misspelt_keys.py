"""Reports misspelt keys of a recipe, and reads on with the right ones, so that one slip is one message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from alnico.methods import known_methods
from alnico.recipe import dialect
from alnico.recipe.keys import (
    BLOCKS,
    CASE,
    ENTRY,
    MIXTURE,
    MODULE,
    NORM_WEIGHT,
    RULE,
    SCHEDULE_WEIGHT,
    SLICE,
    SOURCE,
    TOP,
)
from alnico.recipe.norm_weight import SCHEDULE
from alnico.recipe.scalars import misspelt_key
from alnico.recipe.yaml_nodes import Node, ParseContext, holds_anchors, one_line, shorten

KINDS = {
    "models": (list,), "slices": (list,), "sources": (list,), "methods": (list,), "tasks": (list,), "layer_range": (list,),
    "modules": (dict,), "parameters": (dict,), "lines": (dict,), "protect": (dict,), "stack": (dict,),
    "model": (str, dict), "base_model": (str, dict), "merge_method": (str, dict), "checkpoints": (str, list, dict),
}  # fmt: skip
"""What the value of a key can be: a key is no misspelling of one whose value it cannot be."""

MODELS = frozenset(("models", "checkpoints", "slices", "modules"))
"""Of these a recipe has one: where one is there, no other is missing."""

SYNONYMS = {
    "method": "merge_method", "merge_type": "merge_method", "base": "base_model", "path": "model", "name": "model", "layers": "layer_range",
    "range": "layer_range", "options": "parameters", "params": "parameters", "output_dtype": "out_dtype", "torch_dtype": "dtype",
}  # fmt: skip
"""Words that people write for a key, where the key itself is missing."""

Change = Callable[[Node, str], Node]


def correct_keys(root: Node, reading: ParseContext, more: Iterable[str] = ()) -> Node:
    """Return a document with its misspelt keys corrected; each is reported. ``more`` are further top-level keys."""

    def holder(node: Node, where: str) -> Node:
        """Correct what a document, a slice, a module, a rule, a model and a source can hold."""
        changes: dict[str, Change] = {
            "models": items(level(ENTRY)),
            "slices": items(level(SLICE)),
            "sources": items(level(SOURCE)),
            "modules": values(level(MODULE)),
            "methods": items(level(RULE)),
            "parameters": values(option),
            "merge_method": chosen,
        }
        held = {
            key: changes[key](value, f"{where}.{key}".removeprefix(".")) if key in changes else value
            for key, value in node.value.items()
        }
        return replace(node, value=held)

    def level(keys: Mapping[str, str]) -> Change:
        def change(node: Node, where: str) -> Node:
            return (
                holder(_corrected(node, where, keys, reading), where)
                if isinstance(node.value, dict)
                else node
            )

        return change

    def option(node: Node, where: str) -> Node:
        """Correct filters, and the keys of a weight that is computed from norms or follows a schedule."""
        if isinstance(node.value, list):
            return items(option)(node, where)
        if not isinstance(node.value, dict) or node.value.keys() & {"search", "choice"}:
            return node
        if "from" in node.value:
            keys = SCHEDULE_WEIGHT if node.value["from"].value == SCHEDULE else NORM_WEIGHT
            return _corrected(node, where, keys, reading)
        if "blocks" in node.value:
            return _corrected(node, where, BLOCKS, reading)
        kinds = CASE if node.value.keys() & CASE.keys() else (*CASE, "blocks", "from", "search", "choice")
        node = _corrected(node, where, kinds, reading)
        held = {k: option(v, f"{where}.value") if k == "value" else v for k, v in node.value.items()}
        return replace(node, value=held)

    def chosen(node: Node, where: str) -> Node:
        return _corrected(node, where, ("choice",), reading) if isinstance(node.value, dict) else node

    def items(change: Change) -> Change:
        def each(node: Node, where: str) -> Node:
            if not isinstance(node.value, list):
                return node
            return replace(node, value=[change(v, f"{where}[{i}]") for i, v in enumerate(node.value)])

        return each

    def values(change: Change) -> Change:
        def each(node: Node, where: str) -> Node:
            if not isinstance(node.value, dict):
                return node
            return replace(
                node, value={k: change(v, f"{where}.{one_line(k)}") for k, v in node.value.items()}
            )

        return each

    if not isinstance(root.value, dict):
        return root
    return holder(_corrected(root, "", [*TOP, *more], reading), "")


def _corrected(node: Node, where: str, keys: Iterable[str], reading: ParseContext) -> Node:
    """Return a mapping with its misspelt keys corrected, and report them."""
    names = list(keys)
    corrected: dict[str, Node] = {}
    for key, value in node.value.items():
        near = _meant(key, value, where, names, node.value.keys() | corrected.keys())
        if near is not None:
            start = f"{where} has the unknown key" if where else "unknown key"
            reading.wrong(value.line, f"{start} {shorten(key)!r}. Did you mean {near}?")
        corrected[near or key] = value
    return replace(node, value=corrected)


def _meant(key: str, value: Node, where: str, keys: list[str], present: Iterable[str]) -> str | None:
    """Return the key that a misspelt one means; None if it is no misspelling of a missing key."""
    idle = dialect.WITHOUT_EFFECT if where else dialect.WITHOUT_EFFECT_AT_THE_TOP
    if key == "model" and "sources" in keys:
        return None  # a slice that names its model itself: the reader says how to write it
    if (
        key in keys
        or key in idle
        or (not where and key in MIXTURE)
        or (not where and holds_anchors(key, value, keys))
    ):
        return None
    others = MODELS if MODELS & set(present) else ()
    missing = [
        k
        for k in keys
        if k not in present and k not in others and isinstance(value.value, KINDS.get(k, object))
    ]
    synonym = SYNONYMS.get(key)
    if synonym in missing and not (where == "" and key in ("name", "path")):
        return synonym
    if any(dialect.meant_option(method, key) for method in known_methods().values()):
        return None
    return misspelt_key(key, missing)
