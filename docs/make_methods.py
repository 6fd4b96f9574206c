"""Writes docs/methods.md from the docstrings of the methods: ``python docs/make_methods.py``.

A test says when the page is out of date.
"""

from __future__ import annotations

from pathlib import Path

from alnico.methods import registry
from alnico.methods.base import Method
from alnico.methods.shared.documentation import (
    first_recipe,
    models_taken,
    one_line,
    read_documentation,
    recipe_text,
)

PAGE = Path(__file__).with_name("methods.md")

START = """# The merge methods

Generated from the docstrings by `python docs/make_methods.py`; `alnico methods NAME` shows one method.

**Models**: how many are merged. `base +` methods also need a `base_model`; `[base +]` methods take one if it is given. A *task vector* is model - base.
**Options** go under `parameters`; an option with *one per model* may also go under a model. A range `(0, 1]` excludes 0. **Cost**: a pass reads all inputs once; the
page cache serves later passes where it can. *Blocks* are a few hundred KiB per thread for a model of any size, so every method runs inside `--memory`; the grain is
what must be in memory at once. **Differs**: from the source named there; [differences.md](differences.md) lists differences from mergekit.
*Use when* reports what papers found, and says where they found nothing.
"""


def page() -> str:
    """The whole page: the methods of alnico itself, whatever else is installed."""
    methods = [m for m in registry().values() if m.factory.__module__.startswith("alnico.")]
    rows = [f"| [{m.name}](#{m.name}) | {models_taken(m)} | {m.summary} |" for m in methods]
    table = ["| method | models | what it does |", "|---|---|---|", *rows]
    return "\n".join([START, *table, "", *(section(m) for m in methods)])


def section(method: Method) -> str:
    """One method."""
    parts = read_documentation(method)
    options = [
        f"| `{o.name}` | {_cell(o.describe())} | {_cell(parts.options.get(o.name, ''))} |"
        for o in method.options.values()
    ]
    presets = [f"- **Preset** `{name}`: `{one_line(values)}`" for name, values in method.presets.items()]
    named = [
        ("Use when", "Use when"),
        ("Measures", "Cost"),
        ("Edge cases", "Edge cases"),
        ("Errors", "Errors"),
    ]
    named += [("Differs from the source", "Differs"), ("Source", "Source")]
    lines = [f"- **{title}**: {_code(parts.parts[label])}" for label, title in named if label in parts.parts]
    return "\n".join(
        [
            f"## {method.name}",
            "",
            _code(parts.summary),
            "",
            _code(parts.formula),
            "",
            f"- **Models**: {models_taken(method)}",
            *lines[:2],
            *presets,
            "",
            *(["| option | values | meaning |", "|---|---|---|", *options, ""] if options else []),
            *(f"    {line}" for line in recipe_text(first_recipe(method)).splitlines()),
            "",
            *lines[2:],
            "",
        ]
    )


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
