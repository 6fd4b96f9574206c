"""``alnico statistics gram``: what RegMean measures of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, REQUIRED, Flag
from alnico.cli.printing import recipe_page
from alnico.methods.shared.documentation import recipe_text


@command(
    "alnico.gram_statistics",
    fills=("inputs",),
    tasks=Flag(default=REQUIRED),
    out=Flag(also=("-o",), is_option=True),
    examples=Flag(least=1),
    alpha=Flag(least=0, most=1),
    ridge=Flag(least=0, most=1),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    tasks = call["tasks"] if len(call["tasks"]) > 1 else call["tasks"][0]
    written = call.invoke(tasks=tasks)
    settings = {name: call[name] for name in ("alpha", "ridge", "normalize")} if call["plus"] else {}
    settings |= {"vectors": "inputs"} if call["vectors"] else {}
    show_statistics(call, "gram", "regmean", call["models"], written, settings)


def show_statistics(
    call: CommandCall,
    kind: str,
    method: str,
    models: Sequence[str],
    written: Sequence[Path],
    settings: Mapping[str, Any],
) -> None:
    """Print the part of a recipe that names the statistics."""
    entries = [
        {"model": model, "parameters": {kind: str(path)}} for model, path in zip(models, written, strict=True)
    ]
    recipe = {
        "merge_method": method,
        "models": entries,
        **({"parameters": dict(settings)} if settings else {}),
    }
    call.show(
        lambda: {"kind": kind, "written": [str(path) for path in written]},
        lambda: recipe_page(recipe_text(recipe).rstrip()),
        besides=call["out"],
        indent=None,
    )
