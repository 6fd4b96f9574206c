"""``alnico store show``: all that is known of a task vector."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, VERBOSE
from alnico.cli.printing import Page, page
from alnico.cli.tables import table_lines
from alnico.notebook import figure_text
from alnico.numerics.sizes import format_size
from alnico.store.details import SCORE_COLUMNS, VectorDetails


@command("alnico.cli.store_functions.show_vector", json=JSON, verbose=VERBOSE)
def run(call: CommandCall) -> None:
    details = call.invoke()
    call.note(details.licence_conflicts)
    call.show(details.data, lambda: details_text(details, call.verbose))


def details_text(details: VectorDetails, verbose: int) -> Page:
    """What it says of itself, its evaluations, and on request its tensors."""
    lines = [f"task vector    {details.label}", *(f"{name:<14} {text}" for name, text in details.facts())]
    manifest = details.manifest
    if manifest.evaluations:
        rows = [
            [figure_text(v) for v in (e.task, e.metric, e.base, e.value, e.scale)]
            for e in manifest.evaluations
        ]
        lines += ["", *table_lines(SCORE_COLUMNS, rows)]
    if verbose:
        tensors = [
            [
                t.encoding,
                t.dtype,
                str(t.shape),
                f"{t.error:.3%}",
                f"{t.norm:.4g}",
                format_size(t.byte_size),
                name,
            ]
            for name, t in manifest.tensors.items()
        ]
        columns = ("encoding", "dtype", "shape", "error", "norm", "size", "tensor")
        lines += ["", *table_lines(columns, tensors)]
        lines += [f"left out: {name}: {why}" for name, why in manifest.left_out.items()]
    return page(lines)
