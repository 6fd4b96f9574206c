"""``alnico suggest``: a recipe to begin with, and why."""

from __future__ import annotations

from pathlib import Path

import click

from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, NEW_FILE, QUIET, Flag
from alnico.cli.printing import page, recipe_page
from alnico.errors import MismatchError


@command(
    "alnico.suggest", fills=("folder",), analysis=Flag(metavar="FOLDER"), out=NEW_FILE, json=JSON, quiet=QUIET
)
def run(call: CommandCall) -> None:
    models, base, out = call["models"], call["base"], call["out"]
    if (base is None or not models) if call["analysis"] is None else (base is not None or bool(models)):
        missing = (
            ""
            if call["analysis"] or not models
            else "--base is missing: the model that the others were tuned from. "
        )
        raise click.BadParameter(
            f"{missing}suggest needs --base and models, or --analysis alone. Give one or the other."
        )
    if out is not None:
        check_new_file(Path(out))
    suggestion = call.invoke(folder=Path(out).parent if out else ".")
    if suggestion.recipe is None:
        raise MismatchError(*suggestion.findings, *suggestion.reasons)
    if out is not None:
        write_new_file(Path(out), suggestion.recipe)
    call.note([*suggestion.findings, *(suggestion.reasons if out else ()), *suggestion.warnings])
    call.show(
        suggestion.data,
        lambda: page([f"{out}: {suggestion.method}"]) if out else recipe_page(suggestion.recipe),
        besides=out,
        even_quiet=True,
    )
