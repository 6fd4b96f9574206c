"""An extraction as text for people."""

from __future__ import annotations

from alnico.cli.printing import Page, page
from alnico.lora.extract_result import Extraction

SHOWN = 10
"""Tensors that are listed, unless all are asked for."""


def extraction_text(found: Extraction, verbose: int) -> Page:
    """What became of the tensors, where most of the change is lost, and what is left out."""
    lines = [
        f"fine-tune {found.tuned}",
        f"base      {found.base}",
        *(f"          {line}" for line in found.summary()),
    ]
    worst = found.worst()
    if worst:
        lines += ["", f"{'energy kept':>11}  {'error':>7}  {'of the change':>13}  {'rank':>5}  tensor"]
        for t in worst if verbose else worst[:SHOWN]:
            rank = str(t.rank) if t.treatment == "factors" else "-"
            why = f" ({t.why})" if t.why else ""
            lines.append(
                f"{t.energy:11.2%}  {t.error:7.4f}  {found.share(t):13.3%}  {rank:>5}  {t.name}{why}"
            )
        if len(worst) > SHOWN and not verbose:
            lines.append(f"... and {len(worst) - SHOWN} more (-v prints all)")
    if found.unmatched:
        lines += ["", "left out, with nothing to compare"]
        shown = found.unmatched if verbose else found.unmatched[:SHOWN]
        lines += [f"  {name}: {why}" for name, why in shown]
        if len(found.unmatched) > len(shown):
            lines.append(f"  ... and {len(found.unmatched) - len(shown)} more (-v prints all)")
    lines += [
        "",
        "energy: the sum of the squares of fine-tune minus base. error: |folded - fine-tune| / |fine-tune - base|.",
    ]
    taken_up = f", {found.resumed} tensors taken up" if found.resumed else ""
    lines.append(f"written: {found.path} in {found.seconds:.1f} s{taken_up}")
    return page(lines)
