"""``alnico store push``: publishes a task vector in a folder, on S3 and other file systems, or on the hub."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import page


@command("alnico.cli.store_functions.push_from_store", message=Flag(also=("-m",)), json=JSON, quiet=QUIET)
def run(call: CommandCall) -> None:
    address = call.invoke()
    call.show(lambda: {"address": address}, lambda: page([address]), besides=address)
