"""``alnico recipe add_difference``: the recipe of A + (B - C) * M."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.recipe_chat_vector import DTYPE, KEEP, MODEL, write_recipe
from alnico.cli.options import NEW_FILE


@command(
    "alnico.recipe.add_difference",
    a=MODEL,
    b=MODEL,
    c=MODEL,
    keep=KEEP,
    dtype=DTYPE,
    out=NEW_FILE,
)
def run(call: CommandCall) -> None:
    write_recipe(call)
