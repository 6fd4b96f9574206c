"""Filters of a recipe that fit no tensor: they do nothing, and whoever wrote them should hear of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from alnico.errors import RecipeError
from alnico.plan.sections import Section
from alnico.recipe.options import matches_filter
from alnico.recipe.schema import Cases, Parameters, Recipe, Setting


def unmatched_filters(recipe: Recipe, sections: Sequence[Section]) -> list[str]:
    """Return notes on filters that fit no tensor, and on rules that others come before everywhere.

    Errors: RecipeError for a whole name (``=name``) that no tensor has.
    """
    names = dict.fromkeys(n for s in sections for n in s.names)
    idle = [
        (f"methods[{i}].filter", r.filter, names)
        for i, r in enumerate(recipe.methods)
        if not _any(r.filter, names)
    ]
    for where, parameters, known in _scopes(recipe, sections):
        for option, setting in parameters.items():
            idle += [
                (f"{where}.{option}{place}", pattern, names)
                for place, pattern, names in _idle(setting, known, "")
            ]
    wrong = [(where, pattern, known) for where, pattern, known in idle if pattern.startswith("=")]
    if wrong:
        lines = [
            f"{recipe.name}: {where} is {pattern!r}, and no tensor has that name; expected a whole name after =. "
            f"{_near(pattern, known)}"
            for where, pattern, known in wrong
        ]
        raise RecipeError(*lines)
    return [
        f"{where} is {p!r}, which fits no tensor, so it has no effect. {_near(p, known)}"
        for where, p, known in idle
    ] + list(_hidden(recipe, names))


def _any(pattern: str, names: dict[str, None]) -> bool:
    return any(matches_filter(pattern, name) for name in names)


def _near(pattern: str, names: dict[str, None]) -> str:
    """The nearest name for a whole one, the nearest part of a name for a part."""
    if pattern.startswith("re:"):
        return f"Mend the expression: a name is {next(iter(names), 'none')}, say."
    known = (
        names
        if pattern.startswith("=")
        else dict.fromkeys(w for name in names for w in name.split(".") if not w.isdigit())
    )
    near = difflib.get_close_matches(pattern.removeprefix("="), known, 1)
    return f"Did you mean {near[0]}?" if near else f"A name is {next(iter(names), 'none')}, say."


def _idle(setting: Setting, names: dict[str, None], place: str) -> Iterator[tuple[str, str, dict[str, None]]]:
    """The filters in a setting that fit no name, each with its place and the names it looks at: inside of another, what that fits."""
    if not isinstance(setting, Cases):
        return
    for i, case in enumerate(setting.cases):
        where = f"{place}[{i}]"
        inside = dict.fromkeys(n for n in names if matches_filter(case.filter, n))
        if not inside:
            yield f"{where}.filter", case.filter, names
        else:
            yield from _idle(case.value, inside, f"{where}.value")


def _scopes(recipe: Recipe, sections: Sequence[Section]) -> list[tuple[str, Parameters, dict[str, None]]]:
    """All levels of parameters, each with where it stands and the names that its filters look at: of the output, and of the models."""
    modules = {id(m.parameters): f"modules.{m.name}.parameters" for m in recipe.modules}
    found: dict[int, tuple[str, Parameters, dict[str, None]]] = {}
    for section in sections:
        own = [dict.fromkeys((*part.names, *part.names.values())) for part in section.listed]
        every = dict.fromkeys(section.names) | {n: None for names in own for n in names}
        for level in section.shared:
            where = (
                "parameters"
                if level is recipe.parameters
                else modules.get(id(level), f"{section.label}.parameters")
            )
            found.setdefault(id(level), (where, level, {}))[2].update(every)
        for i, (part, names) in enumerate(zip(section.listed, own, strict=True)):
            start = f"modules.{section.label}.models" if section.label else "models"
            start = f"{section.label}.sources" if part.entry.layers is not None else start
            level = part.entry.parameters
            found.setdefault(id(level), (f"{start}[{i}].parameters", level, {}))[2].update(names)
    for i, rule in enumerate(recipe.methods):
        fitting = [n for s in sections for n in s.names if s.rule_of(n) is rule]
        if fitting:
            found[id(rule.parameters)] = (f"methods[{i}].parameters", rule.parameters, dict.fromkeys(fitting))
    return list(found.values())


def _hidden(recipe: Recipe, names: dict[str, None]) -> Iterator[str]:
    """Notes on rules that fit tensors, all of which an earlier rule takes."""
    taken: set[str] = set()
    for i, rule in enumerate(recipe.methods):
        fitting = {n for n in names if matches_filter(rule.filter, n)}
        if fitting and fitting <= taken:
            yield f"methods[{i}] has no effect: rules before it fit all that {rule.filter!r} fits, and the first one wins. Move it up."
        taken |= fitting
