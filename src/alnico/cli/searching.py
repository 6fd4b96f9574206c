"""A search as text for people: its trials as they end, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alnico.cli.evaluating import scorecard_text
from alnico.cli.printing import Page, page, say
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial


def watcher(quiet: bool) -> Callable[[Trial], None] | None:
    """What prints a line on stderr for each trial that ends."""
    return None if quiet else lambda trial: say(trial_text(trial))


def trial_text(trial: Trial) -> str:
    """One trial on one line."""
    seconds = "" if trial.seconds is None else f"  {trial.seconds:.1f} s"
    if trial.state == "complete":
        return f"trial {trial.number:4}  {'  '.join(f'{v:.6g}' for v in trial.values)}{seconds}"
    if trial.state == "pruned":
        return f"trial {trial.number:4}  given up at {trial.rungs[-1]:.6g}{seconds}"
    return f"trial {trial.number:4}  failed: {trial.reason}"


def search_text(found: SearchResult, out: Path | None) -> Page:
    """The best recipe or recipes with their values, what mattered, and where it is written."""
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    lines = [f"{len(found.trials)} trials: {counts}", ""]
    names = [o.name for o in found.objectives]
    width = max(10, *(len(n) for n in names)) + 2
    lines.append("".join(f"{name:>{width}}" for name in ("trial", *names)))
    lines += [
        "".join(f"{v:>{width}}" for v in (t.number, *(f"{v:.6g}" for v in t.values))) for t in found.best
    ]
    if found.importances:
        lines += ["", "share of the variation explained"]
        lines += [
            f"  {share:6.1%}  {name}"
            for name, share in sorted(found.importances.items(), key=lambda i: -i[1])[:8]
        ]
    if len(found.recipes) == 1:
        lines += ["", *found.recipe.text.rstrip().split("\n")]
    if found.report is not None:
        lines += ["", "on the examples of the report:", *scorecard_text(found.report, 0).split("\n"), ""]
    lines += [f"note: {note}" for note in found.notes]
    if out is not None:
        lines += ["", f"written: {out}"]
    return page(lines)
