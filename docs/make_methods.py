"""Writes docs/methods.md from the docstrings of the methods: ``python docs/make_methods.py``.

A test fails when the page is out of date.
"""

from __future__ import annotations

import re
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

START = """# Merge methods

Every merge method, with its formula, options, a first recipe and its source.
`alnico methods` lists them on the command line, and `alnico methods NAME` shows one.

Where to start:

| you have | try |
| --- | --- |
| runs of one task | [linear](#linear) (a soup), [model_stock](#model_stock) |
| fine-tunes of one base for different tasks, full or adapters | [tsv](#tsv) or [dc_merge](#dc_merge), with nothing to tune |
| the same, and no minutes to decompose matrices | [task_arithmetic](#task_arithmetic) with a `scale` chosen on examples, then [pcb](#pcb) and [ties](#ties) |
| two models to blend | [slerp](#slerp), [nuslerp](#nuslerp) |
| layers to put together (a frankenmerge) | [passthrough](#passthrough), with [slices](recipes.md#layers-slices) |
| some data without labels | [tsv](#tsv), its coefficients learned by [`alnico adamerge --method tsv`](tuning.md#adamerging) |

`alnico suggest` measures your models and suggests a method: see [choosing.md](choosing.md).
[quality.md](quality.md) compares the methods on eight tasks.

## All methods

"""

TERMS = """
## How to read this page

- **Task vector**: model - base.
- **Options** go under `parameters`; an option with *one per model* may also go under a model.
  A range such as `(0, 1]` excludes 0.
- **Use when** reports what papers found, and says where they found nothing.
- **Models**: how many models are merged.
  `base +` methods need a `base_model`, and `[base +]` methods use one if you give it.
- **Cost**: a pass reads all inputs once; the page cache serves later passes where it can.
  *Blocks* are a few hundred KiB per thread for a model of any size, so every method runs within `--memory`.
  The *grain* is the smallest part that must be in memory as a whole: an element, a row or a tensor.
  The *Gram matrix* has the inner products of the models.
- **Differs**: how the method differs from the source that it names.
  [differences.md](differences.md) lists the differences from mergekit.

This page is made from the docstrings by `python docs/make_methods.py`.
"""


def page() -> str:
    """Return the whole page: the methods of alnico itself, whatever else is installed."""
    methods = [m for m in registry().values() if m.factory.__module__.startswith("alnico.")]
    rows = [f"| [{m.name}](#{m.name}) | {models_taken(m)} | {m.summary} |" for m in methods]
    table = ["| method | models | what it does |", "| --- | --- | --- |", *rows]
    return "\n".join([START + table[0], *table[1:], TERMS, *(section(m) for m in methods)])


def section(method: Method) -> str:
    """Return the section of one method."""
    parts = read_documentation(method)
    options = [
        f"| `{o.name}` | {_cell(o.describe())} | {_cell(parts.options.get(o.name, ''))} |"
        for o in method.options.values()
    ]
    named = [
        ("Measures", "Cost"),
        ("Edge cases", "Edge cases"),
        ("Errors", "Errors"),
        ("Differs from the source", "Differs"),
        ("Source", "Source"),
    ]
    return "\n".join(
        [
            f"## {method.name}",
            "",
            _code(parts.summary),
            "",
            "```yaml",
            recipe_text(first_recipe(method)) + "```",
            "",
            f"**Use when** {_lines(parts.parts['Use when'])}",
            "",
            f"**Formula**: {_lines(parts.formula)}",
            "",
            *(["| option | values | meaning |", "| --- | --- | --- |", *options, ""] if options else []),
            f"- **Models**: {models_taken(method)}",
            *(f"- **Preset** `{name}`: `{one_line(values)}`" for name, values in method.presets.items()),
            *(
                f"- **{title}**: {_lines(parts.parts[label], '  ')}"
                for label, title in named
                if label in parts.parts
            ),
            "",
        ]
    )


def _lines(text: str, indent: str = "") -> str:
    """Put each sentence on a line of its own, and make addresses links."""
    linked = re.sub(r"https://[^\s,;]*\w", lambda address: f"<{address[0]}>", _code(text))
    return re.sub(r"(?<!\bal)\. (?=[A-Z`]|mergekit|float64)", f".\n{indent}", linked)


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
