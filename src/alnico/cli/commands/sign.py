"""``alnico sign``: signs a finished merge, or a stored task vector."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import page


@command("alnico.sign", key=Flag(metavar="KEY", is_option=True), json=JSON)
def run(call: CommandCall) -> None:
    path = call.invoke()
    call.show(
        lambda: {"signature": str(path)},
        lambda: page([f"{path}: signs all files in its folder"]),
        besides=path,
    )
