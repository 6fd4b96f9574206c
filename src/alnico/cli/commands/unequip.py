"""``alnico unequip``: an equipped model without some of its task vectors."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.merge import result_line
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag
from alnico.cli.printing import page


@command(
    "alnico.unequip",
    vectors=Flag(default=REQUIRED),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    equipped = call.invoke(shows_tensors=True)
    call.note(equipped.notes)
    left = ", ".join(f"{v.label} x {v.weight:g}" for v in equipped.vectors)
    stays = f"with {left}" if left else "the base alone, as no task vector is left"
    call.show(
        equipped.data,
        lambda: page([result_line(equipped.result), stays]),
        besides=call["out"],
    )
