"""Reads the parts of a method's docstring for ``alnico methods`` and docs/methods.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from alnico.methods.base import Method

PARTS = (
    "Use when", "Start with", "Options", "Presets", "Shapes", "Measures", "Edge cases", "Errors", "Differs from the source", "Source",
)  # fmt: skip


@dataclass(frozen=True)
class Documentation:
    """The parts of a method's docstring. ``parts`` maps the labels of :data:`PARTS` to one line of text
    each."""

    summary: str
    formula: str
    parts: Mapping[str, str]
    options: Mapping[str, str]


def read_documentation(method: Method) -> Documentation:
    """Split a method's docstring into its parts; missing parts are absent.

    >>> from alnico.methods import find
    >>> read_documentation(find("slerp")).options["t"].partition(";")[0]
    'the place on the arc, any number'
    """
    text = method.documentation.partition("\n>>>")[0]
    summary, _, rest = text.partition("\n")
    pieces = re.split(rf"^({'|'.join(PARTS)}):", rest, flags=re.MULTILINE)
    raw = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    entries = re.split(r"^    (\w+): ", raw.pop("Options", ""), flags=re.MULTILINE)
    return Documentation(
        summary,
        _one_line(pieces[0]),
        {label: _one_line(part) for label, part in raw.items()},
        {name: _one_line(part) for name, part in zip(entries[1::2], entries[2::2], strict=True)},
    )


def models_taken(method: Method) -> str:
    """The number of models a method takes, and whether a base.

    >>> from alnico.methods import find
    >>> [models_taken(find(name)) for name in ("ties", "slerp", "linear", "nuslerp")]
    ['base + 1 or more', 'base + 1', '1 or more', '[base +] 2']
    """
    low, high = (None if n is None else n - (method.base == "first") for n in method.models)
    count = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    return {"unused": count, "optional": f"[base +] {count}"}.get(method.base, f"base + {count}")


def first_recipe(method: Method) -> dict[str, Any]:
    """The smallest recipe that shows the method, with the options of "Start with" in its docstring."""
    least = method.models[0] - (method.base == "first")
    count = max(least, 2) if method.models[1] is None else least
    start = read_documentation(method).parts.get("Start with")
    models: list[Any] = [f"path/to/{name}" for name in ("one", "other", "third")[:count]]
    if method.statistics:
        own = {model: {kind: f"{model}-{kind}" for kind in method.statistics} for model in models}
        models = [{"model": model, "parameters": named} for model, named in own.items()]
    return {
        "merge_method": method.name,
        **({"base_model": "path/to/base"} if method.base != "unused" else {}),
        "models": models,
        **({"parameters": yaml.safe_load(start)} if start else {}),
    }


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, one key per line."""
    return "".join(f"{key}: {one_line(value)}\n" for key, value in recipe.items())


def one_line(value: Any) -> str:
    """A value as YAML on one line.

    >>> one_line({"density": 0.2, "weight": (1, 2), "normalize": True})
    '{density: 0.2, weight: [1, 2], normalize: true}'
    """
    if isinstance(value, Mapping):
        value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=9999).strip()
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
