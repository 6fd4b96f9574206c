"""``alnico store search``: task vectors by words, base, task, language or licence."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, Flag
from alnico.cli.printing import Page, page
from alnico.cli.tables import table_lines
from alnico.numerics.sizes import count_of
from alnico.store.listing import COLUMNS, FoundVectors


@command(
    "alnico.cli.store_functions.search_vectors",
    base=Flag(metavar="MODEL"),
    limit=Flag(least=1),
    json=JSON,
)
def run(call: CommandCall) -> None:
    found = call.invoke()
    call.note(found.notes)
    call.show(found.data, lambda: search_text(found))


def search_text(found: FoundVectors) -> Page:
    """A line for each task vector, and what it says of itself."""
    if not found.total:
        asked = f" for {found.asked}" if found.asked else ""
        return page(
            [
                f"{found.store}: no task vector{asked}. `alnico store update` asks the remotes again; --hub asks the hub."
            ]
        )
    columns, rows = list(COLUMNS), found.rows()
    if any(v.cosine is not None for v in found):
        columns[1:1] = ["cosine", "sign conflict"]
        for row, v in zip(rows, found, strict=True):
            row[1:1] = (
                ("-", "-")
                if v.cosine is None
                else (f"{v.cosine:+.3f} +- {v.cosine_error:.3f}", f"{v.sign_conflict:.1%}")
            )
    more = f", the first {len(found)} of them (--limit)" if found.total > len(found) else ""
    return page(
        [*table_lines(columns, rows, whole=True), "", f"{count_of(found.total, 'task vector')}{more}"]
    )
