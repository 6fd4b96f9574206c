"""``alnico recipe retain``: the recipe of a mean of the model before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.recipe_chat_vector import DTYPE, MODEL, write_recipe
from alnico.cli.options import NEW_FILE, Flag


def weights_of(words: Sequence[str], option: str) -> dict[str, float]:
    """Weights by module, from ``NAME=NUMBER`` words. Errors: a wrong command line."""
    weights: dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            equals, weight = "", 0.0
        if not equals or not name or name in weights:
            problem = (
                f"{name} is given twice" if equals and name in weights else f"{word!r} is not NAME=NUMBER"
            )
            raise click.BadParameter(f"{option}: {problem}. Write it once, as vision_tower=0.3.")
        weights[name] = weight
    return weights


@command(
    "alnico.recipe.retain",
    pretrained=MODEL,
    finetuned=MODEL,
    alpha=Flag(metavar="NUMBER"),
    modules=Flag(spelled=("--module",), metavar="NAME=NUMBER", parse=weights_of),
    dtype=DTYPE,
    out=NEW_FILE,
)
def run(call: CommandCall) -> None:
    write_recipe(call)
