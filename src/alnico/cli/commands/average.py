"""``alnico average``: one model from the checkpoints of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.commands import plan
from alnico.cli.commands.merge import show_merge
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag, dtype_names
from alnico.cli.printing import recipe_page, show_result
from alnico.engine.average import average_recipe
from alnico.errors import RecipeError
from alnico.numerics.decay_schedule import SHAPES

OF_THE_RECIPE = ("run", "last", "every", "steps", "shape", "decay", "ema", "dtype")
"""The parameters that say what is averaged, and how."""


def steps_of(text: str, option: str) -> list[int]:
    """Steps separated by commas. Errors: a wrong command line."""
    parts = text.split(",")
    if not 2 <= len(parts) <= 3 or not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise click.BadParameter(
            f"{option} is {text[:100]!r}; expected the first and the last step, as 1000,8000, or also how far they are apart, as "
            "1000,8000,500."
        )
    return [int(part) for part in parts]


def shape_of(text: str, _option: str) -> str | list[float]:
    """The name of a shape, or factors separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


@command(
    "alnico.average",
    resumes="average",
    last=Flag(least=1, metavar="NUMBER"),
    every=Flag(least=1, metavar="NUMBER"),
    steps=Flag(metavar="FROM,TO[,EVERY]", parse=steps_of),
    shape=Flag(metavar="NAME", parse=shape_of, complete=lambda: SHAPES),
    decay=Flag(metavar="NUMBER"),
    dtype=Flag(metavar="NAME", complete=dtype_names),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
    more={
        "dry_run": Flag(
            "Print the plan, with the weight of each checkpoint, and stop.", type=bool, default=False
        ),
        "print_recipe": Flag("Print the recipe of the average, and stop.", type=bool, default=False),
    },
)
def run(call: CommandCall) -> None:
    with _words_of_options():
        if call["print_recipe"] or call["dry_run"]:
            recipe = average_recipe(**{name: call[name] for name in OF_THE_RECIPE})
            if call["print_recipe"]:
                show_result(recipe_page(recipe.text))
            else:
                plan.show_plans(call.of(plan.run), {"recipe": (recipe,)}, call["out"])
            return
        show_merge(call, [call.invoke(shows_tensors=True)], call["out"])


@contextmanager
def _words_of_options() -> Iterator[None]:
    """Let errors name options where they name parameters."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(
            *(re.sub(r"^(last|every|steps|shape|decay|dtype)\b", r"--\1", line) for line in error.args)
        ) from None
