"""Reads ``methods`` (rules that choose a method by tensor name), ``preset``, ``lines`` and ``protect``."""

from __future__ import annotations

from collections.abc import Mapping

from alnico.methods.base import Method
from alnico.recipe import scalars
from alnico.recipe.context import Context, RecipePart
from alnico.recipe.keys import LINES, PROTECT, RULE, RULE_MODEL
from alnico.recipe.models import MAX_MODELS, read_entries, read_reference
from alnico.recipe.options import starts_from_a_model
from alnico.recipe.parameters import read_filter, read_parameters
from alnico.recipe.schema import DROP, Lines, ModelEntry, Protect, Rule
from alnico.recipe.yaml_nodes import Node, quote


def read_rules(node: Node | None, context: Context) -> list[tuple[Rule, Method | None, int]]:
    """Read the rules, each with its method (None if it drops tensors) and line."""
    if node is None:
        return []
    reading = context.reading
    if not isinstance(node.value, list) or not 0 < len(node.value) <= MAX_MODELS:
        actual = f"a list of {len(node.value)}" if isinstance(node.value, list) else node.kind
        reading.wrong(
            node.line, f"methods is {actual}; expected a list of mappings with `filter` and `merge_method`."
        )
        return []
    rules: list[tuple[Rule, Method | None, int]] = []
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
        if "merge_method" in keys and keys["merge_method"].value == DROP:
            if pattern is not None and _is_bare(keys, where, context):
                rules.append((Rule(pattern, DROP), None, item.line))
            continue
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
        before = len(reading.mistakes)
        models, lines = _models(keys, where, method, context)
        base = _base(keys, where, context)
        if len(reading.mistakes) > before:
            continue
        rule = Rule(pattern, method.name, parameters, model, preset, models, base)
        rules.append((rule, method, item.line))
        if models:
            context.parts.append(
                _own_part(rule, where, (keys["models"].line, item.line, lines), method, context)
            )
    return rules


def _is_bare(keys: Mapping[str, Node], where: str, context: Context) -> bool:
    """Check that a rule that drops tensors has no settings of a merge."""
    others = [key for key in keys if key in RULE and key not in ("filter", "merge_method")]
    for key in others:
        context.reading.wrong(
            keys[key].line,
            f"{where} has {key}, but its merge_method is drop, which leaves the tensors out; expected a filter alone. "
            f"Remove {key}, or name a merge method.",
        )
    return not others


def _models(
    keys: Mapping[str, Node], where: str, method: Method, context: Context
) -> tuple[tuple[ModelEntry, ...], tuple[int, ...]]:
    """Read the models of a rule, each with its line; none if it merges those of the recipe."""
    for key in ("models", "base_model"):
        if "model" in keys and key in keys:
            context.reading.wrong(
                keys[key].line,
                f"{where} has model, whose tensors are copied, and {key}; expected one of them. Remove one.",
            )
            return (), ()
    if "models" not in keys:
        return (), ()
    return read_entries(keys["models"], f"{where}.models", (method,), context, RULE_MODEL)


def _base(keys: Mapping[str, Node], where: str, context: Context) -> str | None:
    """Read the base of a rule: empty if it is null, None if the rule names none."""
    node = keys.get("base_model")
    if node is None or node.value is None:
        return None if node is None else ""
    base = read_reference(node, f"{where}.base_model", 0, context.reading)
    if base is None:
        context.failed.add("base_model")
    return base


def _own_part(
    rule: Rule, where: str, lines: tuple[int, int, tuple[int, ...]], method: Method, context: Context
) -> RecipePart:
    """Return the part of a recipe that a rule with its own models is."""
    base = context.base_model or next((p.base_model for p in context.listed if p.base_model), None)
    levels = [level for part in context.listed for level in part.shared if level[1]]
    return RecipePart(
        f"{where}.models",
        lines[0],
        lines[1],
        method,
        rule.models,
        lines[2],
        rule.base_of(base, starts_from_a_model(method)),
        ((f"{where}.parameters", rule.parameters), *levels),
        rule,
    )


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


def read_protect(keys: Mapping[str, Node], context: Context) -> Protect | None:
    """Read what is protected; None if it is missing or invalid."""
    node, reading = keys.get("protect"), context.reading
    if node is None:
        return None
    expected = "a mapping with `gram` and optionally `energy`, `model` and `others`"
    given = scalars.mapping(node, "protect", PROTECT, expected, reading)
    if not isinstance(node.value, dict):
        return None
    before = len(reading.mistakes)
    if "gram" not in given:
        reading.wrong(
            node.line,
            "protect.gram is missing; expected the directory that `alnico statistics gram` wrote for the protected model.",
        )
    gram = scalars.text(given.get("gram"), "protect.gram", reading)
    energy: float | None = Protect.energy
    if "energy" in given:
        energy = scalars.finite_number(given["energy"], "protect.energy", node.line, reading)
        if energy is not None and not 0 < energy <= 1:
            reading.wrong(
                given["energy"].line,
                f"protect.energy is {energy:g}; expected the share of the inputs' squares that is kept, in (0, 1].",
            )
    model = read_reference(given["model"], "protect.model", 0, reading) if "model" in given else None
    others = scalars.other_tensors(given.get("others"), reading)
    if model is None and "model" not in given and "base_model" not in keys:
        reading.wrong(
            node.line,
            "protect keeps what the base gives, but there is no base_model; expected the model that must not change. Add "
            "model: PATH under protect, or base_model.",
        )
    if (parts := next((key for key in ("slices", "modules") if key in keys), None)) is not None:
        reading.wrong(
            node.line,
            f"protect is for models that are merged whole; found {parts}. Merge these first, and protect in a second stage.",
        )
    if len(reading.mistakes) > before or gram is None or energy is None:
        return None
    return Protect(gram, energy, model, others)
