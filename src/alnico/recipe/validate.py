"""What only a whole recipe can show: bases, numbers of models, options that are required or one value."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.errors import AlnicoError
from alnico.methods.base import Method, Option
from alnico.recipe import dialect
from alnico.recipe.context import Context, RecipePart
from alnico.recipe.norm_weight import find_norm_weight, with_equal_weights
from alnico.recipe.options import (
    Levels,
    TensorPlace,
    merged_entries,
    options_at,
    preset_options,
    translate_setting,
)
from alnico.recipe.parameters import describe_setting
from alnico.recipe.schema import Cases, EachModel, Gradient, ModelEntry, Parameters, Recipe, Rule, Setting

Placed = tuple[tuple[str, Parameters], ...]


def check(recipe: Recipe, rules: Sequence[tuple[Rule, Method, int]], context: Context) -> None:
    """Tell what is wrong with the recipe as a whole."""
    reading = context.reading
    for part in context.parts:
        _check_base(part.method, part, part.asked, "", context)
        preset = preset_options(part.method, recipe.preset)
        shared = (*part.shared, ("parameters", recipe.parameters), ("preset", preset))
        for option in part.method.options.values():
            if option.required and not any(
                dialect.option_name(part.method, key) == option.name for key in context.failed
            ):
                _check_required(option, part.method, part, shared, context)
            if not option.per_model:
                _check_shared(option, part.method, part, shared, context)
    for i, (rule, method, line) in enumerate(rules):
        _check_rule(rule, method, f"methods[{i}]", line, recipe, context)
    if reading.mistakes:
        return
    for part in context.parts:
        shared = (
            *part.shared,
            ("parameters", recipe.parameters),
            ("preset", preset_options(part.method, recipe.preset)),
        )
        _check_values(part.method, part, shared, context)


def _start(part: RecipePart) -> str:
    return "" if part.place == "models" else f"{part.place}: "


def _check_base(method: Method, part: RecipePart, line: int, start: str, context: Context) -> None:
    if (
        method.base not in ("required", "first")
        or part.base_model is not None
        or "base_model" in context.failed
    ):
        return
    what = (
        "one of its two models: the one to begin with"
        if method.base == "first"
        else "the model the others were tuned from"
    )
    told = (line, f"{start}{method.name} needs base_model, {what}. Add base_model: PATH.")
    if told not in context.reading.mistakes:
        context.reading.wrong(*told)


def _given(parameters: Parameters, method: Method, option: Option) -> Setting | None:
    """What is given for an option, in its own terms."""
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
    """An option without a default: given at a level, or under a model (under every one, if it is one a model)."""
    given = [_given(e.parameters, method, option) is not None for e in part.entries]
    if any(_given(p, method, option) is not None for _, p in shared) or (any(given) and not option.per_model):
        return
    meaning = f": {option.meaning}" if option.meaning else f" ({option.describe()})"
    if not option.per_model or not any(given):
        place = "under parameters, or under each model" if option.per_model else "under parameters"
        told = (part.asked, f"{method.name} needs the option {option.name}{meaning}. Give it {place}.")
        if told not in context.reading.mistakes:
            context.reading.wrong(*told)
        return
    for i, (entry, line) in enumerate(zip(part.entries, part.entry_lines, strict=True)):
        is_base = entry.reference == part.base_model and method.space == "delta"
        if not given[i] and not is_base:
            context.reading.wrong(
                line,
                f"{part.place}[{i}] lacks {option.name}{meaning}. Give it there, or under parameters for all.",
            )


def _check_shared(option: Option, method: Method, part: RecipePart, shared: Placed, context: Context) -> None:
    """An option that is one value, given under models: all that are given must agree, with the next level too."""
    under = {f"{part.place}[{i}]": _given(e.parameters, method, option) for i, e in enumerate(part.entries)}
    given = {place: setting for place, setting in under.items() if setting is not None}
    if not given:
        return
    above = next(
        ((place, s) for place, p in shared[:-1] if (s := _given(p, method, option)) is not None), None
    )
    if above is not None:
        given[above[0]] = above[1]
    first = next(iter(given.values()))
    if any(setting != first for setting in given.values()):
        places = ", ".join(f"{place}: {describe_setting(s)}" for place, s in given.items())
        scope = "the whole merge" if part.place == "models" else "all models of a slice or module"
        context.reading.wrong(
            part.line,
            f"{option.name} is one value for {scope}, and differs ({places}). Give it once, under parameters.",
        )


def _check_values(method: Method, part: RecipePart, shared: Placed, context: Context) -> None:
    entries = merged_entries(method, part.entries, part.base_model)
    if not entries and method.space == "delta" and part.place != "models":
        context.reading.note(part.line, f"{part.place} has the base alone, which is taken as it is.")
        return
    if (problem := _count_problem(method, part, len(entries))) is not None:
        context.reading.wrong(part.line, f"{_start(part)}{problem}")
        return
    levels = Levels({}, tuple(p for _, p in shared), tuple(e.parameters for e in part.entries))
    if (refused := _refusal(method, levels, entries, part.base_model)) is not None:
        context.reading.wrong(part.line, f"{_start(part)}{refused}")
    for i, entry in enumerate(part.entries):
        idle = [dialect.option_name(method, k) for k in entry.parameters]
        names = [n for n in idle if n is not None and method.options[n].per_model]
        if method.space == "delta" and entry.reference == part.base_model and names:
            context.reading.note(
                part.line, f"{part.place}[{i}] is the base; without effect under it: {', '.join(names)}."
            )


def _refusal(
    method: Method, levels: Levels, entries: Sequence[ModelEntry], base_model: str | None
) -> str | None:
    """What the method says of its options, where they are the same for every tensor; the plan asks for the others."""
    given = [v for p in (levels.rule, *levels.shared, *levels.models) for v in p.values()]
    if any(isinstance(v, (Gradient, Cases)) for v in given):
        return None
    try:
        options = options_at(method, levels, entries, TensorPlace("", 0.0), [""] * len(entries))
        setting = find_norm_weight(options, entries, base_model)
        method.bind(options if setting is None else with_equal_weights(options, setting), len(entries))
    except AlnicoError as error:
        return str(error)
    return None


def _count_problem(method: Method, part: RecipePart, count: int) -> str | None:
    low, high = method.models
    if method.base == "first" and sum(e.reference == part.base_model for e in part.entries) > 1:
        return "base_model is listed more than once under models; expected once. Remove the others."
    if count >= low and (high is None or count <= high):
        return None
    wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    noun = "model" if wanted.endswith("1") and not wanted.endswith("to 1") else "models"
    base = {True: " besides base_model"}.get(
        method.space == "delta", ", base_model one of them" if method.base == "first" else ""
    )
    return f"{method.name} merges {wanted} {noun}{base}; found {count}. {'Add' if count < low else 'Remove'} models."


def _check_rule(rule: Rule, method: Method, where: str, line: int, recipe: Recipe, context: Context) -> None:
    """A rule must fit one part at least: the plan knows which tensors of which part it is for."""
    reading = context.reading
    if (
        rule.model == "base"
        and not any(p.base_model for p in context.parts)
        and "base_model" not in context.failed
    ):
        reading.wrong(line, f"{where}.model is base, and there is no base_model. Add base_model: PATH.")
    if rule.model is not None or not context.parts:
        return
    fitting: list[tuple[RecipePart, tuple[ModelEntry, ...]]] = []
    problem = None
    for part in context.parts:
        entries = merged_entries(method, part.entries, part.base_model)
        found = _count_problem(method, part, len(entries))
        problem = problem or found
        if found is None:
            fitting.append((part, entries))
    if not fitting:
        if method.models == (1, 1):
            problem = f"{method.name} takes one model, and there are several. Add model: base, or the model to take."
        reading.wrong(line, f"{where}: {problem}")
        return
    _check_base(method, fitting[0][0], line, f"{where}: ", context)
    counts = {len(entries) for _, entries in fitting}
    for key, setting in rule.parameters.items():
        for values in _each_model(setting):
            if len(values) not in counts:
                wanted = " or ".join(map(str, sorted(counts)))
                besides = " besides base_model" if method.space == "delta" else ""
                reading.wrong(
                    line,
                    f"{where}.parameters.{key} has {len(values)} values, and there are {wanted} models{besides}; expected one each.",
                )
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
        if all(_given(p, method, option) is None for p in levels):
            meaning = f": {option.meaning}" if option.meaning else f" ({option.describe()})"
            context.reading.wrong(
                line,
                f"{where}: {method.name} needs the option {option.name}{meaning}. Give it under {where}.parameters.",
            )


def _each_model(setting: Setting) -> list[tuple[object, ...]]:
    match setting:
        case EachModel(values):
            return [values]
        case Cases(cases):
            return [v for c in cases for v in _each_model(c.value)]
    return []
