"""``alnico lora extract``: what a fine-tune changed, as an adapter."""

from __future__ import annotations

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag
from alnico.cli.printing import Page, page
from alnico.kernels.clock import time_text
from alnico.lora.extract_result import Extraction

SHOWN = 10
"""Tensors that are listed, unless all are asked for."""


@command(
    "alnico.lora.extract",
    resumes="extraction",
    tuned=Flag(metavar="FINETUNED"),
    out=Flag(default=REQUIRED),
    rank=Flag(also=("-r",), least=1),
    max_rank=Flag(least=1),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    extraction = call.invoke()
    run_facts = {
        "out": str(extraction.path),
        "seconds": extraction.seconds,
        "resumed": extraction.resumed,
    }
    call.show(
        lambda: {**extraction.data(), **run_facts},
        lambda: extraction_text(extraction, call.verbose),
        besides=extraction.path,
        stated=extraction.compile_seconds,
    )


def extraction_text(extraction: Extraction, verbose: int) -> Page:
    """What became of the tensors, where most of the change is lost, and what is left out."""
    lines = [
        f"fine-tune {extraction.tuned}",
        f"base      {extraction.base}",
        *(f"          {line}" for line in extraction.summary()),
    ]
    worst = extraction.worst()
    if worst:
        lines += ["", f"{'energy kept':>11}  {'error':>7}  {'of the change':>13}  {'rank':>5}  tensor"]
        for t in worst if verbose else worst[:SHOWN]:
            rank = str(t.rank) if t.treatment == "factors" else "-"
            why = f" ({t.why})" if t.why else ""
            lines.append(
                f"{t.energy:11.2%}  {t.error:7.4f}  {extraction.share(t):13.3%}  {rank:>5}  {t.name}{why}"
            )
        if len(worst) > SHOWN and not verbose:
            lines.append(f"... and {len(worst) - SHOWN} more (-v prints all)")
    if extraction.unmatched:
        lines += ["", "left out, with nothing to compare"]
        shown = extraction.unmatched if verbose else extraction.unmatched[:SHOWN]
        lines += [f"  {name}: {why}" for name, why in shown]
        if len(extraction.unmatched) > len(shown):
            lines.append(f"  ... and {len(extraction.unmatched) - len(shown)} more (-v prints all)")
    lines += [
        "",
        "energy: the sum of the squares of fine-tune minus base. error: |folded - fine-tune| / |fine-tune - base|.",
        "of the change: the tensor's share of the energy of the whole model.",
    ]
    resumed = f", {extraction.resumed} tensors resumed" if extraction.resumed else ""
    lines.append(
        f"written: {extraction.path} in {time_text(extraction.seconds, extraction.compile_seconds)}{resumed}"
    )
    return page(lines)
