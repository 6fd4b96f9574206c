"""``alnico store create``: the task vector of a fine-tune and its base, measured and kept in a store."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag
from alnico.cli.printing import Page, page
from alnico.cli.tables import table_lines
from alnico.numerics.sizes import count_of, format_size
from alnico.store.create import Created


@command(
    "alnico.cli.store_functions.create_in_store",
    base=Flag(metavar="MODEL"),
    tasks=Flag(spelled=("--task",)),
    languages=Flag(spelled=("--language",)),
    scale_range=Flag(metavar="LEAST,MOST"),
    evaluations=Flag(metavar="FILE"),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    created = call.invoke()
    call.note(created.notes)
    call.show(created.data, lambda: created_text(created, call.verbose), besides=created.path)


def created_text(created: Created, verbose: int) -> Page:
    """What was measured, what each encoding would cost and lose, and what was stored."""
    measured, manifest = created.measured, created.manifest
    lines = [
        f"fine-tune  {manifest.finetuned.id or 'in memory'}",
        f"base       {manifest.base.id or 'in memory'}",
    ]
    if created.options:
        rank = ""
        if measured.effective_rank is not None and measured.full_rank is not None:
            rank = f"; matrices have an effective rank of {measured.effective_rank:.0f} of {measured.full_rank:.0f} on average"
        lines += [
            f"           {count_of(measured.elements, 'parameter')}, {measured.equal_share:.1%} of them equal in both{rank}",
            "",
            *table_lines(["encoding", "size", "error"], cost_rows(created)),
            "",
            "error: |decoded - difference| / |difference|; about: from a sample of each tensor.",
        ]
    if verbose:
        rows = [
            [n, t.encoding, format_size(t.byte_size), f"{t.error:.2g}"] for n, t in manifest.tensors.items()
        ]
        lines += ["", *table_lines(["tensor", "encoding", "size", "error"], rows)]
    stored = ", ".join(f"{count} {name}" for name, count in created.encodings.items())
    lines += [
        "",
        f"{created.label}: {format_size(created.byte_size)}, relative error {manifest.error:.2g} ({stored})",
        f"why: {created.chosen}",
    ]
    for name, why in list(manifest.left_out.items())[: None if verbose else 3]:
        lines.append(f"left out: {name}, {why}")
    lines.append("nothing was written (--dry-run)" if created.path is None else f"written: {created.path}")
    return page(lines)


def cost_rows(created: Created) -> list[list[str]]:
    """The rows of the table of encodings, the smallest first."""
    ordered = sorted(created.options, key=lambda one: (one.byte_size, one.error))
    return [
        [
            one.encoding,
            format_size(one.byte_size),
            "none" if not one.error else f"{'about ' if one.is_estimate else ''}{one.error:.2g}",
        ]
        for one in ordered
    ]
