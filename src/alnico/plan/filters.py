"""Finds filters of a recipe that match no tensor, and so have no effect."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from alnico.checkpoint.image_blocks import BLOCK
from alnico.errors import RecipeError
from alnico.plan.sections import Section
from alnico.recipe.options import matches_filter
from alnico.recipe.schema import Cases, PairWeight, Parameters, Recipe, Setting


def unmatched_filters(recipe: Recipe, sections: Sequence[Section]) -> list[str]:
    """Return notes on filters that match no tensor and on rules that earlier rules override everywhere.

    Errors: RecipeError for an exact name (``=name``) that no tensor has.
    """
    names = dict.fromkeys(n for s in sections for n in s.names)
    unmatched = [
        (f"methods[{i}].filter", r.filter, names)
        for i, r in enumerate(recipe.methods)
        if not _any(r.filter, names)
    ]
    for where, parameters, candidates in _scopes(recipe, sections):
        for option, setting in parameters.items():
            unmatched += [
                (f"{where}.{option}{place}", pattern, names)
                for place, pattern, names in _idle(setting, candidates, "")
            ]
    exact = [
        (where, pattern, candidates) for where, pattern, candidates in unmatched if pattern.startswith("=")
    ]
    if exact:
        lines = [
            f"{recipe.name}: {where} is {pattern!r}, but no tensor has that name; expected a full name after "
            f"=. {_near(pattern, candidates)}"
            for where, pattern, candidates in exact
        ]
        raise RecipeError(*lines)
    return [
        f"{where} is {p!r}, which matches no tensor, so it has no effect. {_near(p, candidates)}"
        for where, p, candidates in unmatched
    ] + list(_hidden(recipe, names))


def _any(pattern: str, names: dict[str, None]) -> bool:
    return any(matches_filter(pattern, name) for name in names)


def _near(pattern: str, names: dict[str, None]) -> str:
    """Return a hint: the closest name for an exact name, the closest part of a name for a substring."""
    if pattern.startswith("re:"):
        return f"Correct the expression; an example of a name is {next(iter(names), 'none')}."
    candidates = (
        names
        if pattern.startswith("=")
        else dict.fromkeys(w for name in names for w in name.split(".") if not w.isdigit())
    )
    near = difflib.get_close_matches(pattern.removeprefix("="), candidates, 1)
    return f"Did you mean {near[0]}?" if near else f"An example of a name is {next(iter(names), 'none')}."


def _idle(setting: Setting, names: dict[str, None], place: str) -> Iterator[tuple[str, str, dict[str, None]]]:
    """Yield the filters of a setting that match no name, each with its place and its candidate names."""
    setting = setting.share if isinstance(setting, PairWeight) else setting
    if not isinstance(setting, Cases):
        return
    is_by_block = any(c.filter.startswith(BLOCK) and _any(c.filter, names) for c in setting.cases)
    for i, case in enumerate(setting.cases):
        where = f"{place}[{i}]"
        inside = dict.fromkeys(n for n in names if matches_filter(case.filter, n))
        if not inside and is_by_block and case.filter.startswith(BLOCK):
            continue  # a list of blocks has those of models with more blocks, too
        if not inside:
            yield f"{where}.filter", case.filter, names
        else:
            yield from _idle(case.value, inside, f"{where}.value")


def _scopes(recipe: Recipe, sections: Sequence[Section]) -> list[tuple[str, Parameters, dict[str, None]]]:
    """Return all levels of parameters, each with its place and the names that its filters could match."""
    modules = {id(m.parameters): f"modules.{m.name}.parameters" for m in recipe.modules}
    scopes: dict[int, tuple[str, Parameters, dict[str, None]]] = {}
    for section in sections:
        own = [dict.fromkeys((*part.names, *part.names.values())) for part in section.listed]
        every = dict.fromkeys(section.names) | {n: None for names in own for n in names}
        for level in section.shared:
            where = (
                "parameters"
                if level is recipe.parameters
                else modules.get(id(level), f"{section.label}.parameters")
            )
            scopes.setdefault(id(level), (where, level, {}))[2].update(every)
        for i, (part, names) in enumerate(zip(section.listed, own, strict=True)):
            start = f"modules.{section.label}.models" if section.label else "models"
            start = f"{section.label}.sources" if part.entry.layers is not None else start
            level = part.entry.parameters
            scopes.setdefault(id(level), (f"{start}[{i}].parameters", level, {}))[2].update(names)
    for i, rule in enumerate(recipe.methods):
        fitting = [(s, n) for s in sections for n in s.names if s.rule_of(n) is rule]
        if not fitting:
            continue
        names = dict.fromkeys(n for _, n in fitting)
        scopes[id(rule.parameters)] = (f"methods[{i}].parameters", rule.parameters, names)
        for j, entry in enumerate(rule.models):
            if not entry.parameters:
                continue
            of_label = {
                label: s.parts_of(rule)[j].names for label, s in {s.label: s for s, _ in fitting}.items()
            }
            names = dict.fromkeys(
                m for s, n in fitting for m in (n, of_label[s.label].get(n)) if m is not None
            )
            scopes[id(entry.parameters)] = (f"methods[{i}].models[{j}].parameters", entry.parameters, names)
    return list(scopes.values())


def _hidden(recipe: Recipe, names: dict[str, None]) -> Iterator[str]:
    """Yield notes on rules that match only tensors of earlier rules."""
    earlier: set[str] = set()
    for i, rule in enumerate(recipe.methods):
        fitting = {n for n in names if matches_filter(rule.filter, n)}
        if fitting and fitting <= earlier:
            yield f"methods[{i}] has no effect: earlier rules match all tensors that {rule.filter!r} matches. Move it up."
        earlier |= fitting
