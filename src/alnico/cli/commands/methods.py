"""``alnico methods``: the merge methods, or one in full."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag, method_names
from alnico.cli.printing import Page, page
from alnico.methods.base import Method
from alnico.methods.shared.documentation import (
    first_recipe,
    models_taken,
    one_line,
    read_documentation,
    recipe_text,
)


@command("alnico.methods", name=Flag(complete=method_names), json=JSON)
def run(call: CommandCall) -> None:
    methods = call.invoke()
    if call["name"] is not None:
        (method,) = methods.values()
        call.show(lambda: method_data(method), lambda: method_text(method))
    else:
        listed = methods.values()
        call.show(lambda: [method_data(m) for m in listed], lambda: methods_text(listed))


def method_data(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "space": method.space,
        "base": method.base,
        "models": list(method.models),
        "source": method.source,
        "options": {o.name: o.describe() for o in method.options.values()},
        "documentation": method.documentation,
    }


def methods_text(methods: Iterable[Method]) -> Page:
    """A line for each method, those that average models before those that add to a base."""
    listed = list(methods)
    width, room = max(len(m.name) for m in listed), max(len(models_taken(m)) for m in listed)
    lines = [f"{'method':{width}}  {'models':{room}}  what it does"]
    for title, deltas in (
        ("Of models as they are:", False),
        ("Of task vectors (model - base), added to the base:", True),
    ):
        group = [m for m in listed if (m.base == "required") == deltas]
        lines += (
            ["", title, *(f"{m.name:{width}}  {models_taken(m):{room}}  {m.summary}" for m in group)]
            if group
            else []
        )
    return page(
        [
            *lines,
            "",
            "`alnico methods NAME` shows one in full: when to use it, formula, options, a recipe, cost, source.",
        ]
    )


def method_text(method: Method) -> Page:
    """All of a method for people, in the width of a terminal."""
    documentation = read_documentation(method)
    lines = [method.name, "=" * len(method.name), "", *_wrapped(documentation.summary), ""]
    lines += [
        line
        for part in documentation.formula.replace("; ``", ";\n``").splitlines()
        for line in _wrapped(part)
    ] + [""]
    lines += _entry("models", models_taken(method))
    lines += _entry("use when", documentation.parts.get("Use when", ""))
    lines += _entry("cost", documentation.parts.get("Measures", ""))
    lines += [
        "",
        "Options, under parameters or under a model:"
        if any(o.per_model for o in method.options.values())
        else "Options:",
    ]
    for option in method.options.values():
        lines += [
            f"  {option.name}: {option.describe()}",
            *_wrapped(documentation.options.get(option.name, option.meaning), "      "),
        ]
    lines += [f"  preset {name}: {one_line(values)}" for name, values in method.presets.items()]
    lines += ["", "A recipe:", *(f"  {line}" for line in recipe_text(first_recipe(method)).splitlines()), ""]
    for label in ("Edge cases", "Errors", "Differs from the source", "Source"):
        lines += _entry(
            label.lower().replace("differs from the source", "differs"), documentation.parts.get(label, "")
        )
    return page(lines)


def _entry(label: str, text: str) -> list[str]:
    """A label and what it says beside it; nothing where nothing is said."""
    first, *rest = _wrapped(text, " " * 12) or [""]
    return [f"{label:12}{first[12:]}", *rest] if text else []


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text.replace("``", ""),
        100,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
