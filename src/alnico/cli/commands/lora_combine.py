"""``alnico lora combine``: one adapter from several, without their base."""

from __future__ import annotations

from typing import Any

import click

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.lora_fold import check_weights
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag
from alnico.cli.printing import Page, page
from alnico.kernels.clock import time_text
from alnico.lora.combine import Combined
from alnico.numerics.sizes import format_size


@command(
    "alnico.lora.combine",
    fills=("config",),
    adapters=Flag(default=REQUIRED),
    out=Flag(default=REQUIRED),
    weights=Flag(also=("-w",)),
    method=Flag(also=("-m",)),
    rank=Flag(also=("-r",), least=1),
    set=Flag(
        "An option of the method, NAME=VALUE; [a, b] gives one per adapter. May be repeated.", type=list[str]
    ),
    majority_sign_method=Flag("PEFT's name for the option elect: total or frequency.", type=str),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    check_weights(call, "adapters")
    options = dict(_method_option(text) for text in call["set"] or ())
    if call["majority_sign_method"] is not None:
        options["majority_sign_method"] = call["majority_sign_method"]
    combined = call.invoke(**options)
    call.note(combined.notes)
    call.show(
        combined.data,
        lambda: combined_text(combined, call.verbose),
        besides=combined.path,
        stated=combined.compile_seconds,
    )


def combined_text(combined: Combined, verbose: int) -> Page:
    """The result for people; with ``verbose`` a line for each update."""
    ranks = sorted({m.rank for m in combined.modules})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = (
        [f"{m.name}  rank {m.rank}  error {_percent(m.error)}" for m in combined.modules] if verbose else []
    )
    lines.append(
        f"{combined.path}: {len(combined.modules)} updates of rank {shown}, error {_percent(combined.error)}, {format_size(combined.byte_size)} in "
        f"{time_text(combined.seconds, combined.compile_seconds)}"
    )
    if not verbose and combined.error > 0:
        worst = max(combined.modules, key=lambda m: m.error)
        lines.append(f"largest error: {_percent(worst.error)}, {worst.name}")
        lines.append("error: what the rank drops, relative to the norm of the method's result.")
    return page(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _method_option(text: str) -> tuple[str, Any]:
    """An option and its value, read as in a recipe."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = None
    if not equals or not name.strip().isidentifier() or read is None:
        raise click.BadParameter(
            f"--set: {text!r} is not an option; expected NAME=VALUE, such as density=0.5."
        )
    return name.strip(), read
