"""``alnico store update``: what remotes have now, or a task vector with other statements."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import Page, page
from alnico.numerics.sizes import count_of
from alnico.store.updating import StoreUpdate

SHOWN = 20
"""New versions of a remote that are listed."""


@command(
    "alnico.cli.store_functions.update_store",
    tasks=Flag(spelled=("--task",), metavar="TASK"),
    languages=Flag(spelled=("--language",), metavar="LANGUAGE"),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    update = call.invoke()
    call.show(update.data, lambda: update_text(update))


def update_text(update: StoreUpdate) -> Page:
    """A line for each remote with what is new there, and for each task vector that could be replaced."""
    if update.made is not None:
        return page([f"made {update.made.name}@{update.made.version}"])
    lines = []
    for remote in update.remotes:
        if remote.problem:
            lines.append(f"{remote.address}: did not answer ({remote.problem})")
            continue
        new = f", new: {', '.join(remote.new[:SHOWN])}" if remote.new else ", nothing new"
        more = f" and {len(remote.new) - SHOWN} more" if len(remote.new) > SHOWN else ""
        lines.append(f"{remote.address}: {count_of(remote.vectors, 'task vector')}{new}{more}")
    lines += [*update.newer, *update.moved]
    return page(
        lines
        or [f"{update.store}: knows no remote. `alnico store pull NAME --from ADDRESS` makes one known."]
    )
