"""Reads the parameters of one level: options with single values, gradients or filters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from alnico.checkpoint import patterns
from alnico.checkpoint.image_blocks import BLOCK, are_blocks
from alnico.errors import near_name
from alnico.methods.base import Method, Option
from alnico.methods.shared.other_words import OPTION_SYNONYMS
from alnico.numerics.numbers import complement
from alnico.recipe import dialect, scalars
from alnico.recipe.block_weights import read_blocks
from alnico.recipe.context import Context
from alnico.recipe.keys import CASE, TOP
from alnico.recipe.norm_weight import SCHEDULE, read_norm_weight
from alnico.recipe.options import translate_setting
from alnico.recipe.schema import (
    Case,
    Cases,
    EachModel,
    Gradient,
    NormWeight,
    PairWeight,
    Scalar,
    ScheduleWeight,
    Setting,
)
from alnico.recipe.yaml_nodes import Node, ParseContext, one_line, quote, shorten

SEARCH_VALUES = {
    "search": "a value to search",
    "choice": "a choice to search",
}
"""Keys of values that only `alnico search` can resolve."""

SYNONYMS = {
    **dict.fromkeys(("ratio", "alpha", "interpolation", "fraction", "lerp"), ("t", "weight")),
    **dict.fromkeys(("coefficient", "coefficients", "coef", "scaling_coefficient"), ("weight", "scale")),
    **dict.fromkeys(("scaling", "scaling_factor", "lambda_"), ("lambda", "scale", "weight")),
    **dict.fromkeys(("sparsity", "keep", "keep_ratio", "top_k", "topk", "trim"), ("density", "select_topk")),
}
"""Words that people write for options, with the options that they may mean."""

NO_NAME = re.compile(r"[\d(\[.,-]")
"""The beginning of a key that is no name."""

Taker = tuple[Method, Option]


def read_parameters(
    node: Node | None, where: str, level: Sequence[Method], context: Context, *, is_rule: bool = False
) -> dict[str, Setting]:
    """Read the options of one level, under the names that the recipe writes.

    ``level`` are the methods that these options can apply to. An option of another method of the recipe is
    ignored with a note. Under a rule (``is_rule``), a list gives one value per model for options of a model.
    """
    if node is None or node.value is None:
        return {}
    reading = context.reading
    if not isinstance(node.value, dict):
        hint = " Write one key per line, without dashes or brackets." if isinstance(node.value, list) else ""
        reading.wrong(
            node.line, f"{where} is {node.kind}; expected a mapping of option names to values.{hint}"
        )
        return {}
    settings: dict[str, Setting] = {}
    lines: dict[str, int] = {}
    for key, value in node.value.items():
        if key in dialect.WITHOUT_EFFECT:
            reading.note(value.line, f"{key} has no effect: it {dialect.WITHOUT_EFFECT[key]}.")
            continue
        takers = _takers(level, key)
        elsewhere = _takers(context.methods, key)
        if not takers and not elsewhere and _note_no_effect(value, key, where, level, context):
            continue
        if not takers and not elsewhere:
            options = [n for m in (*level, *context.methods) for n in dialect.option_names(m)]
            meant = [near_name(key, options), *SYNONYMS.get(key.casefold(), ())]
            context.failed |= {name for name in meant if name is not None}  # they are not missing too
            if context.is_complete:
                _report_unknown(value, where, key, level, context)
            continue
        if len({option.name for method, option in takers if dialect.synonym_of(method, key)}) > 1:
            _report_two_meanings(value, where, key, takers, context)
            continue
        if any(dialect.takes_boolean(m, key) for m, _ in takers or elsewhere):
            value = _convert_booleans(value, f"{where}.{key}", context)
        setting = _setting(value, f"{where}.{key}", takers or elsewhere, key, context, is_rule=is_rule)
        if setting is None:
            context.failed.add(key)
        elif takers:
            settings[key], lines[key] = setting, value.line
            for difference in (
                dialect.DIFFERS_FROM_MERGEKIT[m.name][key]
                for m, _ in takers
                if key in dialect.DIFFERS_FROM_MERGEKIT.get(m.name, {})
            ):
                reading.note(value.line, f"{where}.{key} {difference}.")
            _note_synonym(value, where, key, setting, takers[0], context)
        else:
            names = " and ".join(m.name for m, _ in elsewhere)
            reading.note(
                value.line,
                f"{where}.{key} has no effect: it is an option of {names}, which this level does not use.",
            )
    _check_aliases(settings, lines, where, level, context)
    return _in_own_words(settings, level)


def _in_own_words(settings: dict[str, Setting], level: Sequence[Method]) -> dict[str, Setting]:
    """Return settings with the options that synonyms stand for in the place of the synonyms."""
    named: dict[str, Setting] = {}
    for key, setting in settings.items():
        method, option = _takers(level, key)[0]
        if dialect.synonym_of(method, key) is None:
            named[key] = setting
        else:
            named[option.name] = translate_setting(method, key, setting)
    return named


def _note_synonym(node: Node, where: str, key: str, setting: Setting, taker: Taker, context: Context) -> None:
    """Note a synonym, with the option and the value that it stands for."""
    method, option = taker
    synonym = dialect.synonym_of(method, key)
    if synonym is None:
        return
    meant = translate_setting(method, key, setting)
    is_list = isinstance(setting, Cases)
    value = "" if is_list else f": {option.name} is {describe_setting(meant)}"
    context.reading.note(node.line, f"{where}.{key} is {synonym.describe(option.name)}{value}.")


def _report_two_meanings(node: Node, where: str, key: str, takers: Sequence[Taker], context: Context) -> None:
    """Report a synonym that stands for different options of the methods of its level."""
    meanings = " and ".join(
        f"{OPTION_SYNONYMS[key].describe(option.name)} under {method.name}" for method, option in takers
    )
    context.failed.add(key)
    context.reading.wrong(
        node.line, f"{where}.{key} is {meanings}; expected one meaning. Write the options by these names."
    )


def _convert_booleans(node: Node, where: str, context: Context) -> Node:
    """Convert numbers and text that mergekit reads as true or false, with one note per option."""
    converted: dict[str, bool] = {}

    def read(node: Node) -> Node:
        if isinstance(node.value, list):
            return Node([read(item) for item in node.value], node.line)
        if isinstance(node.value, dict):
            return Node({k: v if k == "filter" else read(v) for k, v in node.value.items()}, node.line)
        value = dialect.as_boolean(node.value)
        if value is node.value or isinstance(node.value, bool):
            return node
        converted[node.kind] = value
        return Node(value, node.line)

    result = read(node)
    if converted:
        readings = ", ".join(f"{written} as {quote(value)}" for written, value in converted.items())
        context.reading.note(node.line, f"{where}: {readings}, as in mergekit.")
    return result


def _note_no_effect(node: Node, key: str, where: str, level: Sequence[Method], context: Context) -> bool:
    """Note an option without effect on its level, as in mergekit; return whether it is one."""
    methods = level or context.methods
    reasons = {m.name: dialect.why_no_effect(m, key) for m in methods}
    if not methods or None in reasons.values():
        return False
    names = " and ".join(reasons)
    context.reading.note(node.line, f"{where}.{key} has no effect on {names}{next(iter(reasons.values()))}.")
    return True


def _takers(methods: Sequence[Method], key: str) -> list[Taker]:
    """The methods with the option that a key stands for. Where a method has it by this name, it is no synonym."""
    for name_of in (dialect.option_name, dialect.meant_option):
        named = [(m, name_of(m, key)) for m in methods]
        if takers := [(m, m.options[name]) for m, name in named if name is not None]:
            return takers
    return []


def _report_unknown(node: Node, where: str, key: str, level: Sequence[Method], context: Context) -> None:
    options = list(
        dict.fromkeys(name for m in (*level, *context.methods) for name in dialect.option_names(m))
    )
    names = " or ".join(m.name for m in level)
    hint = (
        scalars.nearest(key, options, list(dialect.WITHOUT_EFFECT)) if options else f"{names} has no options."
    )
    hint = "Write it at the top of the recipe." if key in TOP else hint
    synonym = next((name for name in SYNONYMS.get(key.casefold(), ()) if name in options), None)
    hint = f"Did you mean {synonym}?" if synonym else hint
    if node.value is None and NO_NAME.match(key):  # {t: 0,5} and {weight: (1, 2)}: the comma began a key
        hint = "Write numbers with a point, as in 0.5, and lists in brackets, as in [0.5, 0.5]."
    context.reading.wrong(node.line, f"{where}.{one_line(key)} is not an option of {names}. {hint}")


def _check_aliases(
    settings: dict[str, Setting], lines: dict[str, int], where: str, level: Sequence[Method], context: Context
) -> None:
    """Report an option that has different values under two names."""
    reported = set()
    for method in level:
        first: dict[str, str] = {}
        for key in settings:
            name = next((option.name for m, option in _takers(level, key) if m == method), None)
            if name is None:
                continue
            before = first.setdefault(name, key)
            earlier, later = (translate_setting(method, k, settings[k]) for k in (before, key))
            if earlier == later or (before, key) in reported or _are_same_pair(earlier, later):
                continue
            reported.add((before, key))
            values = ", ".join(
                f"{k} is {describe_setting(setting)}"
                if k == name
                else f"{k} means {name}: {describe_setting(setting)}"
                for k, setting in ((before, earlier), (key, later))
            )
            context.reading.wrong(
                lines[key],
                f"{where}: {before} and {key} are the same option and disagree ({values}). Remove one.",
            )


def _are_same_pair(*settings: Setting) -> bool:
    """Are a weight and an ``alpha`` the same: half and half?"""
    return set(settings) == {0.5, PairWeight(0.5)}


def describe_setting(setting: Setting) -> str:
    """Describe a setting for a message."""
    match setting:
        case Gradient(values) | EachModel(values):
            return shorten(f"[{', '.join(quote(v) for v in values)}]")
        case Cases():
            return "a list of filters"
        case PairWeight(share):
            shown = describe_setting(share)
            return (
                f"[{complement(share):g}, {share:g}]"
                if isinstance(share, float)
                else f"[1 - alpha, alpha] with alpha {shown}"
            )
        case NormWeight():
            return "a measured weight"
        case ScheduleWeight():
            return "a schedule"
    return quote(setting)


def _setting(
    node: Node,
    where: str,
    takers: Sequence[Taker],
    key: str,
    context: Context,
    *,
    is_rule: bool,
    in_places: bool = False,
) -> Setting | None:
    reading = context.reading
    is_pair = any(isinstance(translate_setting(m, key, 0.0), PairWeight) for m, _ in takers)
    if _is_measured(node) and is_pair:
        reading.wrong(
            node.line, f"{where} is a mapping with `from`; only weight is computed from norms. Write a value."
        )
        return None
    if _is_measured(node) and node.value["from"].value == SCHEDULE:
        from alnico.recipe.schedule_weight import read_schedule_weight  # with the shapes of schedules

        return read_schedule_weight(node, where, takers, context)
    if _is_measured(node):
        return read_norm_weight(node, where, takers, context)
    if isinstance(node.value, dict) and "blocks" in node.value:

        def read(value: Node, place: str) -> Setting | None:
            return _setting(value, place, takers, key, context, is_rule=is_rule, in_places=True)

        return read_blocks(node, where, read, context)
    if isinstance(node.value, dict):
        return _cases([node], [where], takers, key, context, is_rule=is_rule)
    if not isinstance(node.value, list):
        return _scalar(node, where, takers, key, context, in_places=in_places)
    if not node.value:
        reading.wrong(node.line, f"{where} is a list of 0; expected at least one value.")
        return None
    places = [f"{where}[{i}]" for i in range(len(node.value))]
    if any(isinstance(item.value, dict) for item in node.value):
        return _cases(node.value, places, takers, key, context, is_rule=is_rule)
    is_gradient = is_pair or not (is_rule and takers[0][1].per_model)
    values = []
    for item, place in zip(node.value, places, strict=True):
        if isinstance(item.value, list):
            reading.wrong(item.line, f"{place} is a list inside a list; expected one value.")
            continue
        value = _scalar(item, place, takers, key, context, in_places=in_places or is_gradient)
        values += [value] if value is not None else []
    if len(values) < len(node.value):
        return None
    if not is_gradient:
        return EachModel(tuple(values))
    if any(option.kind == "statistics" for _, option in takers):
        reading.wrong(
            node.line,
            f"{where} is a list over the layers; expected the path of one model's statistics. Put it under "
            "that model.",
        )
        return None
    return Gradient(tuple(values))


def _is_measured(node: Node) -> bool:
    return isinstance(node.value, dict) and "from" in node.value and not node.value.keys() & CASE.keys()


def _cases(
    nodes: Sequence[Node],
    places: Sequence[str],
    takers: Sequence[Taker],
    key: str,
    context: Context,
    *,
    is_rule: bool,
) -> Cases | None:
    """Read a list of filters with values. A bare value at the end applies to all other tensors."""
    reading = context.reading
    cases = []
    is_valid = True
    for i, (node, where) in enumerate(zip(nodes, places, strict=True)):
        is_last = i == len(nodes) - 1
        pattern: str | None = "*"
        inner: Node | None = node
        if isinstance(node.value, dict) and not _is_measured(node):
            pattern, inner = _filter_and_value(node, where, context)
            where = f"{where}.value"
        elif not is_last:
            reading.wrong(
                node.line,
                f"{where} is {node.kind} before other filters and would override them; expected filter and "
                "value. Move it to the end.",
            )
            is_valid = False
        setting = (
            _setting(inner, where, takers, key, context, is_rule=is_rule, in_places=True)
            if inner is not None
            else None
        )
        if pattern is None or setting is None:
            is_valid = False
            continue
        cases.append(Case(pattern, setting))
        if pattern == "*" and isinstance(node.value, dict) and not _is_measured(node) and not is_last:
            reading.note(
                nodes[i + 1].line,
                f"{places[i + 1]} and later entries have no effect: the entry before matches every tensor.",
            )
    return Cases(tuple(cases)) if is_valid else None


def _filter_and_value(node: Node, where: str, context: Context) -> tuple[str | None, Node | None]:
    reading = context.reading
    for kind, meaning in SEARCH_VALUES.items():
        if kind in node.value:
            reading.wrong(
                node.line,
                f"{where} is {meaning}; expected its value. Run `alnico search`, or write a value.",
            )
            return None, None
    if not node.value.keys() & CASE.keys():
        reading.wrong(
            node.line,
            f"{where} is an unknown kind of mapping; expected a value, a list of values, or filter and "
            "value.",
        )
        return None, None
    context.check_keys(node, where, CASE)
    if "value" not in node.value:
        reading.wrong(node.line, f"{where} has a filter without a value; expected both. Add value.")
    return read_filter(node.value.get("filter"), f"{where}.filter", context), node.value.get("value")


def read_filter(node: Node | None, where: str, context: Context) -> str | None:
    """Read a filter. A missing or empty one matches all tensors; returns None for an invalid one."""
    return "*" if node is None or node.value is None else parse_filter(node, where, context.reading)


def parse_filter(node: Node, where: str, reading: ParseContext) -> str | None:
    """Read a filter that must not be empty; return None if it is invalid."""
    pattern = node.value
    if pattern in ("", "=", "re:"):
        reading.wrong(
            node.line, f"{where} is {quote(pattern)}; expected part of a tensor's name, or * for all."
        )
        return None
    pattern = scalars.text(node, where, reading)
    if pattern is not None and pattern.startswith(BLOCK) and not are_blocks(pattern[len(BLOCK) :]):
        reading.wrong(
            node.line,
            f"{where} is {quote(pattern)}; expected blocks of an image model, as in block:IN04, block:IN00-IN05,MID or block:OUT. Correct the "
            "names.",
        )
        return None
    if pattern is None or not pattern.startswith("re:"):
        return pattern
    try:
        patterns.check_pattern(pattern[3:])
    except patterns.PatternError as error:
        reading.wrong(node.line, f"{where} is {quote(pattern)}, which {error}. Correct it.")
        return None
    return pattern


def _scalar(
    node: Node, where: str, takers: Sequence[Taker], key: str, context: Context, *, in_places: bool = False
) -> Scalar | None:
    """Read a value that all ``takers`` must allow; ``in_places``: in a gradient or under a filter."""
    checked = [(_problem(node, method, option, key, in_places), method, option) for method, option in takers]
    wrong = [(problem, method, option) for problem, method, option in checked if problem is not None]
    if wrong:
        problem, method, option = wrong[0]
        whose = f" (as {method.name} has it)" if len(wrong) < len(checked) else ""
        context.reading.wrong(
            node.line, f"{where} {problem}{whose}.{_meant_number(node.value, method, option, key)}"
        )
        return None
    if any(option.kind == "number" for _, option in takers):
        number = scalars.number(node.value)
        if number is not None and any(
            option.range.low_in_places and dialect.number_of(method, key, number) == option.range.low
            for method, option in takers
        ):
            context.reading.note(node.line, f"{where} is {number:g}: nothing is kept there.")
        return number
    value: Scalar = node.value
    return value


def _problem(node: Node, method: Method, option: Option, key: str, in_places: bool) -> str | None:
    value = dialect.translate_value(method, key, node.value)
    number = scalars.number(value) if option.kind == "number" else None
    if option.name != key and option.kind != "number" and not isinstance(node.value, bool):
        return f"is {node.kind}; expected true or false"
    if option.kind == "number":
        if number is None:
            return f"is {node.kind}; expected a number"
        if not math.isfinite(number):
            return f"is {node.kind}; expected a finite number"
        meant = dialect.number_of(method, key, number)
        problem = option.problem(meant, in_places=in_places)
        if problem is None or meant == number:
            return problem
        expected = dialect.range_of(method, key, option.range)
        return f"is {number:g}, and {key} is 1 - {option.name}; expected a number in {expected}"
    if option.kind == "statistics":
        return option.problem(value)
    if option.problem(value) is not None:
        return f"is {node.kind}; expected {'one of ' + ', '.join(option.choices) if option.choices else 'true or false'}"
    return None


def _meant_number(value: object, method: Method, option: Option, key: str) -> str:
    """Suggest the number that a percentage, a fraction, a comma or a slipped point means."""
    if option.kind != "number":
        return ""

    def is_valid(number: float) -> bool:
        return option.problem(dialect.number_of(method, key, number)) is None

    number = scalars.number(value)
    if number is not None and math.isfinite(number):
        slipped = (number / 10, number / 100)
        meant = next((n for n in slipped if is_valid(n)), None)
    else:
        meant = _number_in(value) if isinstance(value, str) else None
        meant = None if meant is None or not is_valid(meant) else meant
    return "" if meant is None else f" Did you mean {meant:g}?"


def _number_in(text: str) -> float | None:
    """Return the number of ``30%``, ``1/3`` or ``0,5``; None for other text.

    >>> _number_in("30%"), _number_in("1/4"), _number_in("0,5"), _number_in("half")
    (0.3, 0.25, 0.5, None)
    """
    match = re.fullmatch(r"\s*(-?\d{1,9}(?:[.,]\d{1,9})?)\s*(?:(%)|/\s*(\d{1,9}))?\s*", text)
    if match is None or (match[3] is not None and not int(match[3])):
        return None
    return float(match[1].replace(",", ".")) / (100 if match[2] else int(match[3] or 1))
