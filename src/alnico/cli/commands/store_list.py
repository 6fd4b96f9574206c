"""``alnico store list``: the task vectors of a store."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import Page, page
from alnico.cli.tables import table_lines
from alnico.numerics.sizes import count_of, format_size
from alnico.store.listing import COLUMNS, FoundVectors


@command(
    "alnico.cli.store_functions.list_vectors",
    all_versions=Flag(spelled=("--all",)),
    json=JSON,
)
def run(call: CommandCall) -> None:
    found = call.invoke()
    call.note(found.notes)
    call.show(found.data, lambda: list_text(found))


def list_text(found: FoundVectors) -> Page:
    """A line for each task vector."""
    if not found.total:
        return page(
            [f"{found.store}: has no task vectors. `alnico store create FINETUNED --base BASE` makes one."]
        )
    columns, rows = COLUMNS[:-1], [row[:-1] for row in found.rows()]
    size = format_size(found.byte_size)
    return page(
        [*table_lines(columns, rows), "", f"{count_of(found.total, 'task vector')}, {size}, in {found.store}"]
    )
