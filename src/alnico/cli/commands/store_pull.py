"""``alnico store pull``: downloads a task vector into a store, checked by its hashes."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import page


@command(
    "alnico.cli.store_functions.pull_into_store", source=Flag(spelled=("--from",)), json=JSON, quiet=QUIET
)
def run(call: CommandCall) -> None:
    pulled = call.invoke()
    call.note(pulled.notes)
    call.show(pulled.data, lambda: page([f"pulled {pulled.reference}"]), besides=pulled.reference)
