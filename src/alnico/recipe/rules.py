"""Reads ``methods`` (rules that choose a method by tensor name), ``preset`` and ``lines``."""

from __future__ import annotations

from alnico.methods.base import Method
from alnico.recipe import scalars
from alnico.recipe.context import Context
from alnico.recipe.keys import LINES, RULE
from alnico.recipe.models import MAX_MODELS, read_reference
from alnico.recipe.parameters import read_filter, read_parameters
from alnico.recipe.schema import Lines, Rule
from alnico.recipe.yaml_nodes import Node, quote


def read_rules(node: Node | None, context: Context) -> list[tuple[Rule, Method, int]]:
    """Read the rules, each with its method and line."""
    if node is None:
        return []
    reading = context.reading
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        actual = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        reading.wrong(
            node.line, f"methods is {actual}; expected a list of mappings with `filter` and `merge_method`."
        )
        return []
    rules = []
    for i, item in enumerate(node.value):
        where = f"methods[{i}]"
        if not isinstance(item.value, dict):
            reading.wrong(
                item.line, f"{where} is {item.kind}; expected a mapping with `filter` and `merge_method`."
            )
            continue
        keys: dict[str, Node] = item.value
        context.check_keys(item, where, RULE, f"{where}.parameters")
        for key in ("filter", "merge_method"):
            if key not in keys:
                reading.wrong(
                    item.line, f"{where}.{key} is missing; expected {RULE[key][0].lower()}{RULE[key][1:]}"
                )
        pattern = read_filter(keys.get("filter"), f"{where}.filter", context)
        method = scalars.method(keys.get("merge_method"), f"{where}.merge_method", reading)
        if method is None or pattern is None:
            continue
        parameters = read_parameters(
            keys.get("parameters"), f"{where}.parameters", (method,), context, is_rule=True
        )
        model = read_reference(keys["model"], f"{where}.model", 0, reading) if "model" in keys else None
        if model is not None and method.models != (1, 1):
            reading.wrong(
                keys["model"].line,
                f"{where}.model is for methods of one model, but {method.name} merges several. Remove it, or "
                "use passthrough.",
            )
        preset = read_preset(keys.get("preset"), f"{where}.preset", (method,), context)
        rules.append((Rule(pattern, method.name, parameters, model, preset), method, item.line))
    return rules


def read_preset(node: Node | None, where: str, methods: tuple[Method, ...], context: Context) -> str | None:
    """Read the name of a preset of one of ``methods``."""
    name = scalars.text(node, where, context.reading)
    if node is None or name is None or not methods:
        return None
    presets = list(dict.fromkeys(preset for m in methods for preset in m.presets))
    if name not in presets:
        names = " or ".join(m.name for m in methods)
        hint = scalars.nearest(name, presets) if presets else f"{names} has no presets."
        context.reading.wrong(
            node.line, f"{where} is {quote(name)}, which is not a preset of {names}. {hint}"
        )
        return None
    return name


def read_lines(node: Node | None, context: Context) -> Lines | None:
    """Read the factors of LiNeS; None if they are missing or invalid."""
    if node is None:
        return None
    keys = scalars.mapping(node, "lines", LINES, "a mapping with `alpha` and `beta`", context.reading)
    if not isinstance(node.value, dict):
        return None
    alpha, beta = (
        scalars.finite_number(keys.get(key), f"lines.{key}", node.line, context.reading) for key in LINES
    )
    if context.is_complete and not any(m.space == "delta" and "scale" in m.options for m in context.methods):
        names = " and ".join(m.name for m in context.methods)
        context.reading.wrong(
            node.line,
            f"lines scales merged task vectors by layer, but {names} has no task vectors. Remove lines, or "
            "use a method such as task_arithmetic.",
        )
    return Lines(alpha, beta) if alpha is not None and beta is not None else None
