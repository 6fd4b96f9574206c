"""Checks a recipe as a whole: bases, model counts, required options and shared options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from alnico.errors import AlnicoError
from alnico.methods.base import Method, Option
from alnico.recipe import dialect
from alnico.recipe.context import Context, RecipePart
from alnico.recipe.norm_weight import find_norm_weight, with_equal_weights
from alnico.recipe.options import (
    Levels,
    TensorPlace,
    merged_entries,
    not_a_pair,
    options_at,
    preset_options,
    starts_from_a_model,
    translate_setting,
)
from alnico.recipe.parameters import describe_setting
from alnico.recipe.schema import (
    PAIR_KEY,
    Cases,
    EachModel,
    Gradient,
    ModelEntry,
    NormWeight,
    PairWeight,
    Parameters,
    Recipe,
    Rule,
    Setting,
    is_varied,
)

Placed = tuple[tuple[str, Parameters], ...]


def check(recipe: Recipe, rules: Sequence[tuple[Rule, Method | None, int]], context: Context) -> None:
    """Report mistakes that only the whole recipe shows."""
    reading = context.reading
    for part in context.parts:
        _check_base(part.method, part.base_model, part.method_line, _rule_start(part), context)
        shared = _shared(part, recipe)
        for option in part.method.options.values():
            if option.required and not any(
                dialect.option_name(part.method, key) == option.name for key in context.failed
            ):
                _check_required(option, part.method, part, shared, context)
            if not option.per_model:
                _check_shared(option, part.method, part, shared, context)
        _check_pair(part, shared, context)
        _note_list_over_layers(part.method, part, recipe.parameters, context)
    for i, (rule, method, line) in enumerate(rules):
        if method is None:
            continue
        _check_rule(rule, method, f"methods[{i}]", line, recipe, context)
    if reading.mistakes:
        return
    for part in context.parts:
        _check_values(part.method, part, _shared(part, recipe), context)


def _shared(part: RecipePart, recipe: Recipe) -> Placed:
    """Return the levels of parameters above the models of a part."""
    own = part.rule.preset if part.rule is not None else None
    preset = preset_options(part.method, own or recipe.preset)
    return (*part.shared, ("parameters", recipe.parameters), ("preset", preset))


def _rule_start(part: RecipePart) -> str:
    return f"{part.place.removesuffix('.models')}: " if part.rule is not None else ""


def _check_pair(part: RecipePart, shared: Placed, context: Context) -> None:
    """Check that weights [1 - alpha, alpha] are those of two models, which have no weights of their own."""
    own = [entry.parameters.get("weight") for entry in part.entries]
    for i, (setting, line) in enumerate(zip(own, part.entry_lines, strict=True)):
        if isinstance(setting, PairWeight):
            context.reading.wrong(
                line,
                f"{part.place}[{i}].parameters.{PAIR_KEY} is for two models together; expected it under "
                "parameters. Move it there, or write weight.",
            )
            return
    place = next((p for p, parameters in shared if "weight" in parameters), "")
    setting = next((parameters["weight"] for _, parameters in shared if "weight" in parameters), None)
    if not isinstance(setting, PairWeight) or "weight" not in part.method.options:
        return
    start = f"{place}.{PAIR_KEY}"
    entries = merged_entries(part.method, part.entries, part.base_model)
    if (problem := _pair_problem(part.method, start, entries)) is not None:
        context.reading.wrong(part.line, f"{_start(part)}{problem}")


def _pair_problem(method: Method, where: str, entries: Sequence[ModelEntry]) -> str | None:
    """What is wrong with weights [1 - alpha, alpha] for the models of one merge; None if nothing is."""
    if len(entries) != 2:
        return f"{where} is {not_a_pair(method, len(entries))}"
    if any("weight" in entry.parameters for entry in entries):
        return (
            f"{where} is weight [1 - {PAIR_KEY}, {PAIR_KEY}], and models have a weight, too; expected one of them. "
            "Remove the other."
        )
    return None


def _note_list_over_layers(
    method: Method, part: RecipePart, parameters: Parameters, context: Context
) -> None:
    """Note a list of weights over the layers that looks like one weight per model."""
    setting = parameters.get("weight")
    count = len(merged_entries(method, part.entries, part.base_model))
    if part.place == "models" and isinstance(setting, Gradient) and len(setting.values) == count > 1:
        context.reading.note(
            part.method_line,
            "parameters.weight is a list over the layers, from the first to the last, for every model. "
            "For one value per model, write it under each model.",
        )


def _start(part: RecipePart) -> str:
    return "" if part.place == "models" else f"{part.place}: "


def _check_base(method: Method, base_model: str | None, line: int, start: str, context: Context) -> None:
    if method.base not in ("required", "first") or base_model is not None or "base_model" in context.failed:
        return
    role = (
        "the model to start from, one of its two"
        if method.base == "first"
        else "the model that the others were fine-tuned from"
    )
    mistake = (line, f"{start}{method.name} needs base_model, {role}. Add base_model: PATH.")
    if mistake not in context.reading.mistakes:
        context.reading.wrong(*mistake)


def _setting_of(parameters: Parameters, method: Method, option: Option) -> Setting | None:
    """Return the setting of an option, translated from mergekit's names; None if it has none."""
    return next(
        (
            translate_setting(method, k, v)
            for k, v in parameters.items()
            if dialect.option_name(method, k) == option.name
        ),
        None,
    )


def _check_required(
    option: Option, method: Method, part: RecipePart, shared: Placed, context: Context
) -> None:
    """Check that an option without a default is set for all models, at a level or under each of them."""
    is_set = [_setting_of(e.parameters, method, option) is not None for e in part.entries]
    if any(_setting_of(p, method, option) is not None for _, p in shared) or (
        any(is_set) and not option.per_model
    ):
        return
    meaning = f": {option.meaning}" if option.meaning else f" ({option.describe()})"
    if not option.per_model or not any(is_set):
        start = _rule_start(part)
        place = f"under {part.shared[0][0]}" if start else "under parameters"
        place += ", or under each model" if option.per_model else ""
        mistake = (
            part.method_line,
            f"{start}{method.name} needs the option {option.name}{meaning}. Set it {place}.",
        )
        if mistake not in context.reading.mistakes:
            context.reading.wrong(*mistake)
        return
    for i, (entry, line) in enumerate(zip(part.entries, part.entry_lines, strict=True)):
        is_base = entry.reference == part.base_model and method.space == "delta"
        if not is_set[i] and not is_base:
            context.reading.wrong(
                line,
                f"{part.place}[{i}] lacks {option.name}{meaning}. Set it there, or for all models under "
                "parameters.",
            )


def _check_shared(option: Option, method: Method, part: RecipePart, shared: Placed, context: Context) -> None:
    """Check that an option with one shared value has the same value wherever it is set."""
    under = {
        f"{part.place}[{i}]": _setting_of(e.parameters, method, option) for i, e in enumerate(part.entries)
    }
    settings = {place: setting for place, setting in under.items() if setting is not None}
    if not settings:
        return
    above = next(
        ((place, s) for place, p in shared[:-1] if (s := _setting_of(p, method, option)) is not None), None
    )
    if above is not None:
        settings[above[0]] = above[1]
    first = next(iter(settings.values()))
    if any(setting != first for setting in settings.values()):
        places = ", ".join(f"{place}: {describe_setting(s)}" for place, s in settings.items())
        scope = "all models of a slice or module"
        if part.rule is not None:
            scope = "all models of a rule"
        elif part.place == "models":
            scope = "the whole merge"
        context.reading.wrong(
            part.line,
            f"{option.name} must have one value for {scope}, but it differs ({places}). Set it once, under "
            "parameters.",
        )


def _check_values(method: Method, part: RecipePart, shared: Placed, context: Context) -> None:
    entries = merged_entries(method, part.entries, part.base_model)
    if not entries and method.space == "delta" and part.place != "models":
        context.reading.note(part.line, f"{part.place} has only the base, which is copied unchanged.")
        return
    if (problem := _count_problem(method, part, len(entries))) is not None:
        context.reading.wrong(part.line, f"{_start(part)}{problem}")
        return
    levels = Levels({}, tuple(p for _, p in shared), tuple(e.parameters for e in part.entries))
    if (refusal := _refusal(method, levels, entries, part.base_model)) is not None:
        context.reading.wrong(part.line, f"{_start(part)}{refusal}")
    for i, entry in enumerate(part.entries):
        idle = [dialect.option_name(method, k) for k in entry.parameters]
        names = [n for n in idle if n is not None and method.options[n].per_model]
        if method.space == "delta" and entry.reference == part.base_model and names:
            context.reading.note(
                part.line,
                f"{part.place}[{i}] is the base; these options have no effect under it: {', '.join(names)}.",
            )


def _refusal(
    method: Method, levels: Levels, entries: Sequence[ModelEntry], base_model: str | None
) -> str | None:
    """Return the method's error about options that are equal for all tensors; the plan checks others."""
    settings = [v for p in (levels.rule, *levels.shared, *levels.models) for v in p.values()]
    if any(map(is_varied, settings)):
        return None
    try:
        options = options_at(method, levels, entries, TensorPlace("", 0.0), [""] * len(entries))
        setting = find_norm_weight(options, entries, base_model)
        method.bind(options if setting is None else with_equal_weights(options, setting), len(entries))
    except AlnicoError as error:
        return str(error)
    return None


def _count_problem(method: Method, part: RecipePart, count: int, remedy: str = "") -> str | None:
    """Say that a method merges another number of models than ``count``, and the ``remedy``; None if it does not."""
    low, high = method.models
    if method.base == "first" and sum(e.reference == part.base_model for e in part.entries) > 1:
        return "base_model is listed more than once under models; expected once. Remove the repetitions."
    if count >= low and (high is None or count <= high):
        return None
    expected = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    noun = "model" if expected.endswith("1") and not expected.endswith("to 1") else "models"
    base = {True: " besides base_model"}.get(
        method.space == "delta", ", base_model one of them" if method.base == "first" else ""
    )
    listed = [entry.reference for entry in part.entries]
    if method.name == "slerp" and len(listed) == 2 and part.base_model not in listed:
        other = f" Or {remedy[:1].lower()}{remedy[1:]}" if remedy else ""
        remedy = f"For two models and a base that is neither of them, use nuslerp.{other}"
    remedy = remedy or ("Add models." if count < low else "Remove models.")
    if method.name == "passthrough" and part.place == "models":
        remedy = "Remove models, or put their layers together by slices in a recipe."
    return f"{method.name} merges {expected} {noun}{base}; found {count}. {remedy}"


def _check_rule(rule: Rule, method: Method, where: str, line: int, recipe: Recipe, context: Context) -> None:
    """Check that a rule's method can merge the models of at least one part.

    The plan checks it tensor by tensor.
    """
    reading = context.reading
    if (
        rule.model == "base"
        and not any(p.base_model for p in context.listed)
        and "base_model" not in context.failed
    ):
        reading.wrong(line, f"{where}.model is base, but there is no base_model. Add base_model: PATH.")
    if rule.model is not None or not context.parts:
        return
    if rule.base_model and method.base == "unused" and not _takes_norms(rule):
        reading.note(line, f"{where}.base_model has no effect: {method.name} uses no base.")
    if rule.models:
        own = next(p for p in context.parts if p.rule is rule)
        counts = {len(merged_entries(method, own.entries, own.base_model))}
        _check_each_model(rule, method, where, line, counts, context)
        return
    fitting: list[tuple[RecipePart, tuple[ModelEntry, ...]]] = []
    problem = None
    for part in context.listed:
        part = replace(part, base_model=rule.base_of(part.base_model, starts_from_a_model(method)))
        entries = merged_entries(method, part.entries, part.base_model)
        count_problem = _count_problem(
            method, part, len(entries), f"Name the models of this rule under {where}.models."
        )
        problem = problem or count_problem
        if count_problem is None:
            fitting.append((part, entries))
    if not fitting:
        if method.models == (1, 1):
            problem = (
                f"{method.name} takes one model, but there are several. Add model: base, or another model."
            )
        reading.wrong(line, f"{where}: {problem}")
        return
    _check_base(method, fitting[0][0].base_model, line, f"{where}: ", context)
    if isinstance(rule.parameters.get("weight"), PairWeight):
        start = f"{where}.parameters.{PAIR_KEY}"
        problems = [_pair_problem(method, start, entries) for _, entries in fitting]
        if all(problems):
            reading.wrong(line, str(problems[0]))
            return
    if not _check_each_model(rule, method, where, line, {len(entries) for _, entries in fitting}, context):
        return
    _check_required_of_rule(rule, method, where, line, [p for p, _ in fitting], recipe, context)
    if reading.mistakes:
        return
    refusals = []
    for part, entries in fitting:
        if any(len(v) != len(entries) for s in rule.parameters.values() for v in _each_model(s)):
            continue
        preset = preset_options(method, rule.preset or recipe.preset)
        under = tuple(e.parameters for e in part.entries)
        levels = Levels(rule.parameters, (*(p for _, p in part.shared), recipe.parameters, preset), under)
        refusals.append(_refusal(method, levels, entries, part.base_model))
    if refusals and all(refusals):
        reading.wrong(line, f"{where}: {refusals[0]}")


def _takes_norms(rule: Rule) -> bool:
    """Does a rule set weights from norms of task vectors, which need a base?"""
    levels = (rule.parameters, *(entry.parameters for entry in rule.models))
    return any(isinstance(setting, (NormWeight, Cases)) for level in levels for setting in level.values())


def _check_each_model(
    rule: Rule, method: Method, where: str, line: int, counts: Collection[int], context: Context
) -> bool:
    """Check that each list of a rule has one value per model; ``counts`` are the possible numbers of them."""
    for key, setting in rule.parameters.items():
        for values in _each_model(setting):
            if len(values) not in counts and not (rule.models and isinstance(setting, PairWeight)):
                expected = " or ".join(map(str, sorted(counts)))
                besides = " besides base_model" if method.space == "delta" else ""
                context.reading.wrong(
                    line,
                    f"{where}.parameters.{key} has {len(values)} values, but there are {expected} "
                    f"models{besides}; expected one per model.",
                )
                return False
    return True


def _check_required_of_rule(
    rule: Rule,
    method: Method,
    where: str,
    line: int,
    parts: Sequence[RecipePart],
    recipe: Recipe,
    context: Context,
) -> None:
    for option in method.options.values():
        if not option.required or any(
            dialect.option_name(method, key) == option.name for key in context.failed
        ):
            continue
        levels: list[Parameters] = [
            rule.parameters,
            recipe.parameters,
            preset_options(method, rule.preset or recipe.preset),
        ]
        levels += [
            p for part in parts for p in (*(s for _, s in part.shared), *(e.parameters for e in part.entries))
        ]
        if all(_setting_of(p, method, option) is None for p in levels):
            meaning = f": {option.meaning}" if option.meaning else f" ({option.describe()})"
            context.reading.wrong(
                line,
                f"{where}: {method.name} needs the option {option.name}{meaning}. Set it under "
                f"{where}.parameters.",
            )


def _each_model(setting: Setting) -> list[tuple[object, ...]]:
    match setting:
        case EachModel(values):
            return [values]
        case Cases(cases):
            return [v for c in cases for v in _each_model(c.value)]
    return []
