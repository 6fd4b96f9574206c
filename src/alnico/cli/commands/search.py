"""``alnico search``: the best values for what a recipe leaves open."""

from __future__ import annotations

import re
from pathlib import Path

from alnico.cli.command import CommandCall, command
from alnico.cli.commands.evaluate import scorecard_text
from alnico.cli.options import JSON, QUIET, Flag
from alnico.cli.printing import Page, page
from alnico.tune.search.files import BEST
from alnico.tune.search.result import SearchResult
from alnico.tune.search.windows import window_scores


@command(
    "alnico.search",
    fills=("minimize",),
    resumes="search",
    out=Flag(also=("-o",)),
    trials=Flag(least=1),
    workers=Flag(also=("-w",), least=1),
    json=JSON,
    quiet=QUIET,
)
def run(call: CommandCall) -> None:
    folder = call["out"] or f"{Path(call['recipe']).stem}-search"
    result = call.invoke(out=folder)
    call.show(result.data, lambda: search_text(result, Path(folder)), besides=folder, even_quiet=True)


MOST_WINDOWS = 8
"""Windows of layers that are listed; the page has all of them."""

DIGITS = 4
"""Significant digits of the values of a recipe that is shown; its file has all that were scored."""


def rounded(line: str) -> str:
    """Return a line of a recipe with its long numbers rounded; names with digits stay.

    >>> rounded("parameters: {weight: 0.43718610975120001, lambda: 1.5}, model: run-0.123456789")
    'parameters: {weight: 0.4372, lambda: 1.5}, model: run-0.123456789'
    """
    return re.sub(
        r"(?<=[-:,\[] )-?\d+\.\d{4,}(e[-+]?\d+)?(?=[,\]}]|$)|(?<=\[)-?\d+\.\d{4,}(e[-+]?\d+)?(?=[,\]])",
        lambda number: f"{float(number[0]):.{DIGITS}g}",
        line,
    )


def search_text(result: SearchResult, out: Path | None) -> Page:
    """The best recipe or recipes with their values, what mattered, and where it is written."""
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items())
    lines = [f"{len(result.trials)} trials: {counts}", ""]
    names = [o.name for o in result.objectives]
    width = max(10, *(len(n) for n in names)) + 2
    lines.append("".join(f"{name:>{width}}" for name in ("trial", *names)))
    lines += [
        "".join(f"{v:>{width}}" for v in (t.number, *(f"{v:.4g}" for v in t.values))) for t in result.best
    ]
    for o in result.objectives:
        better = "higher" if o.goal == "max" else "lower"
        what = (
            ""
            if [o.name] == [name for name, _ in o.tasks]
            else f", the weighted mean of {', '.join(name for name, _ in o.tasks)}"
        )
        lines.append(f"{o.name}: {better} is better{what}")
    if result.importances:
        lines += ["", "share of the variation explained"]
        lines += [
            f"  {share:6.1%}  {name}"
            for name, share in sorted(result.importances.items(), key=lambda i: -i[1])[:8]
        ]
    windows = window_scores(result)
    if windows is not None:
        lines += ["", f"{result.objectives[0].name} of the best windows of layers"]
        lines += [
            f"  {value:10.4g}  layers {first} to {first + length - 1}"
            for first, length, value in windows.ranked(result.objectives[0].goal)[:MOST_WINDOWS]
        ]
    if len(result.recipes) == 1:
        shown = [rounded(line) for line in result.recipe.text.rstrip().split("\n")]
        lines += ["", *shown]
        if out is not None and "\n".join(shown) != result.recipe.text.rstrip():
            lines.append(f"# values to {DIGITS} digits; {out / BEST} has all of them")
    if result.report is not None:
        lines += ["", "on the examples of the report:", *scorecard_text(result.report, 0).split("\n"), ""]
    lines += [f"note: {note}" for note in result.notes]
    if out is not None:
        lines += ["", f"written: {out}"]
    return page(lines)
