"""``alnico analyze``: how far models are from their base, and where."""

from __future__ import annotations

from pathlib import Path

from alnico.analysis.results import Analysis, DeltaStatistics, ScopeStatistics
from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, VERBOSE, Flag
from alnico.cli.printing import Page, page, say

NAME = 24
"""Room for the name of a model."""

CHANGES_MEAN = [
    "L2: length of the change from the base. relative: that over the base's length. max: largest change of an element.",
    "unchanged: share of elements equal to the base's. sparsity: 0 if all changes are equally large, near 1 if a few",
    "hold most of the change; 0.36 for a normal distribution.",
]


@command(
    "alnico.analyze",
    fills=("names",),
    resumes="analysis",
    out=Flag(also=("-o",)),
    subspace_side=Flag(least=0),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    analysis, folder = call.invoke(), call["out"]
    call.show(analysis.data, lambda: analysis_text(analysis, call.verbose), besides=folder, indent=None)
    say_report(call, folder)


def say_report(call: CommandCall, folder: str | None) -> None:
    """Say where a report is, and how to get the parts that could not be drawn."""
    from alnico.analysis.page import has_report
    from alnico.installation import install_hint

    if folder is None:
        return
    line = f"written: {Path(folder) / 'report.html'}"
    if not has_report():
        line = f"written: {folder}, without the page and pictures. {install_hint('report')}"
    say(line, call.is_quiet or call.is_json)


def analysis_text(analysis: Analysis, verbose: int) -> Page:
    """Tables: the models, what changed by group, the pairs; with ``verbose`` also by layer and what was skipped, tensor by tensor."""
    changes = analysis.whole.changes
    lines = [f"base {analysis.base.reference}", ""]
    lines.append(
        f"{'model':{NAME}}  {'L2':>9}  {'relative':>8}  {'max':>9}  {'unchanged':>9}  {'sparsity':>8}"
    )
    for model, change in zip(analysis.models, changes, strict=True):
        lines.append(f"{model.name[:NAME]:{NAME}}  {_change(change)}")
    lines += CHANGES_MEAN
    lines += ["", *_by_scope("relative change by group", list(analysis.groups.items()), analysis)]
    if verbose:
        lines += [
            "",
            *_by_scope(
                "relative change by layer", [(f"layer {n}", s) for n, s in analysis.layers.items()], analysis
            ),
        ]
    if analysis.whole.pairs:
        lines += ["", *_pairs(analysis)]
    if analysis.skipped:
        lines += ["", *_skipped(analysis, verbose)]
    return page(lines)


def _change(change: DeltaStatistics | None) -> str:
    if change is None:
        return "nothing to compare"
    size = _number(change.l2, 9, ".4g"), _percent(change.relative_l2, 8), _number(change.max_abs, 9, ".3g")
    return "  ".join([*size, _percent(change.unchanged, 9), _number(change.effective_sparsity, 8, ".2f")])


def _by_scope(title: str, scopes: list[tuple[str, ScopeStatistics]], analysis: Analysis) -> list[str]:
    names = [m.name[:NAME] for m in analysis.models]
    widths = [max(14, len(name)) for name in names]
    lines = [f"{title:{NAME}}  " + "  ".join(map(str.rjust, names, widths))]
    for name, scope in scopes:
        shares = (None if c is None else c.relative_l2 for c in scope.changes)
        lines.append(f"{name:{NAME}}  " + "  ".join(map(_percent, shares, widths)))
    return lines


def _pairs(analysis: Analysis) -> list[str]:
    width = 2 * NAME + 3
    lines = [
        f"{'pair':{width}}  {'cosine':>7}  {'sign conflict':>13}  {'weighted':>8}  {f'top {analysis.top_share:.0%} shared':>14}"
    ]
    for pair in analysis.whole.pairs:
        first, second = (analysis.models[i].name[:NAME] for i in pair.models)
        numbers = [
            _number(pair.cosine, 7, ".3f"),
            _percent(pair.sign_conflict, 13),
            _percent(pair.weighted_sign_conflict, 8),
        ]
        lines.append(
            f"{f'{first} - {second}':{width}}  " + "  ".join([*numbers, _percent(pair.top_overlap, 14)])
        )
    lines += [
        "cosine: 1 for the same direction, 0 for unrelated ones. sign conflict: of the elements that both changed,",
        "the share in opposite directions; 50 % is chance. weighted: the same, by the size of both changes.",
        f"top {analysis.top_share:.0%} shared: of each model's largest changes; {analysis.top_share:.0%} is chance.",
    ]
    if analysis.whole.cancelled is not None:
        lines.append(
            f"added up, the task vectors lose {analysis.whole.cancelled:.1%} of their magnitude to one another"
        )
    return lines


def _skipped(analysis: Analysis, verbose: int) -> list[str]:
    if verbose:
        return [
            f"not compared: {s.tensor} of {s.model or analysis.base.reference}: {s.reason}"
            for s in analysis.skipped
        ]
    reasons: dict[tuple[str | None, str], int] = {}
    for s in analysis.skipped:
        reasons[s.model, s.reason] = reasons.get((s.model, s.reason), 0) + 1
    return [
        f"not compared: {count} {'tensor' if count == 1 else 'tensors'} of {model or analysis.base.reference}: {reason}"
        for (model, reason), count in reasons.items()
    ]


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _percent(share: float | None, width: int) -> str:
    return f"{'-' if share is None else f'{share:.2%}':>{width}}"
