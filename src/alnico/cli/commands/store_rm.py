"""``alnico store rm``: removes task vectors from a store on this machine."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET
from alnico.cli.printing import page


@command("alnico.cli.store_functions.remove_vectors", json=JSON, quiet=QUIET)
def run(call: CommandCall) -> None:
    removed = [f"{entry.name}@{entry.version}" for entry in call.invoke()]
    call.show(
        lambda: {"removed": removed}, lambda: page(f"removed {name}" for name in removed), besides="removed"
    )
