"""``alnico complete``: a fine-tune with what its training program left out."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.merge import show_merge
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag


@command(
    "alnico.complete",
    resumes="completion",
    base=Flag(spelled=("--from",), is_option=True, metavar="BASE", default=REQUIRED),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    show_merge(call, [call.invoke(shows_tensors=True)], call["out"])
