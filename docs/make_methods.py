"""Writes docs/methods.md from the docstrings of the methods: ``python docs/make_methods.py``.

A test says when the page is out of date.
"""

from __future__ import annotations

from pathlib import Path

from alnico.methods import registry
from alnico.methods.base import Method
from alnico.methods.shared.documentation import first_recipe, one_line, read_documentation, recipe_text, takes

PAGE = Path(__file__).with_name("methods.md")

START = """# The merge methods

Made from the docstrings by `python docs/make_methods.py`; `alnico methods NAME` shows the same of one.

**Models**: how many are merged; `base +` methods need a `base_model` besides, `[base +]` take one if there is one. A *task vector* is model - base.
**Options** stand under `parameters`, those of *one a model* also under a model; a range `(0, 1]` is without 0. **Cost**: a pass reads all inputs once; the page cache
serves the later ones where it can. *Blocks* are a few hundred KiB a thread whatever the model's size, so that every method runs inside `--memory`; the grain is what
must be in memory at once. **Differs** is from the source named there; what differs from mergekit is listed in [differences.md](differences.md).
Where to begin is asked of the literature, not of us: each *use when* says what papers found, and where they found nothing.
"""


def page() -> str:
    """The whole page: the methods of alnico itself, whatever else is installed."""
    methods = [m for m in registry().values() if m.factory.__module__.startswith("alnico.")]
    rows = [f"| [{m.name}](#{m.name}) | {takes(m)} | {m.summary} |" for m in methods]
    table = ["| method | models | what it does |", "|---|---|---|", *rows]
    return "\n".join([START, *table, "", *(section(m) for m in methods)])


def section(method: Method) -> str:
    """One method."""
    told = read_documentation(method)
    options = [
        f"| `{o.name}` | {_cell(o.describe())} | {_cell(told.options.get(o.name, ''))} |"
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
    lines = [f"- **{title}**: {_code(told.parts[label])}" for label, title in named if label in told.parts]
    return "\n".join(
        [
            f"## {method.name}",
            "",
            _code(told.summary),
            "",
            _code(told.formula),
            "",
            f"- **Models**: {takes(method)}",
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
