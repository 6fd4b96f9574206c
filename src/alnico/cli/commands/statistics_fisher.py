"""``alnico statistics fisher``: what Fisher merging measures of a model."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.statistics_gram import show_statistics
from alnico.cli.options import JSON, QUIET, REQUIRED, Flag


@command(
    "alnico.fisher_statistics",
    fills=("inputs",),
    tasks=Flag(default=REQUIRED),
    out=Flag(also=("-o",), is_option=True),
    examples=Flag(least=1),
    expectation=Flag(spelled=("--exact/--sampled",), switch=("sampled", "exact")),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    written = call.invoke()
    show_statistics(call, "fisher", "fisher", [call["model"]], [written], {})
