"""``alnico lora fold``: a model from its base and adapters."""

from __future__ import annotations

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.merge import show_merge
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag


@command(
    "alnico.lora.fold",
    fills=("config",),
    resumes="fold",
    adapters=Flag(default=REQUIRED),
    out=Flag(default=REQUIRED),
    weights=Flag(also=("-w",)),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    check_weights(call, "adapters")
    show_merge(call, [call.invoke(shows_tensors=True)], call["out"])


def check_weights(call: CommandCall, models: str) -> None:
    """Refuse a number of weights that is not that of the models. Errors: a wrong command line."""
    weights, count = call["weights"], len(call[models])
    if isinstance(weights, list) and len(weights) != count:
        raise click.BadParameter(
            f"--weights: there are {len(weights)} for {count} {models}. Give one for all, or one for each."
        )
