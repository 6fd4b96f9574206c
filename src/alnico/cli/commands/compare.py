"""``alnico compare``: what a merged model kept of its parents."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.analysis.retention import ParentRetention, Retention, ScopeRetention
from alnico.analysis.scores import NO_GAIN, NO_GAIN_MEANS, Accuracy
from alnico.cli.command import CommandCall, command
from alnico.cli.commands.analyze import say_report
from alnico.cli.options import JSON, QUIET, SCORING_DTYPE, VERBOSE, Flag
from alnico.cli.printing import Page, page

NAME = 24
"""Room for the name of a model."""


@command(
    "alnico.compare",
    fills=("names",),
    parents=Flag(metavar="PARENT"),
    tasks=Flag(also=("-t",), metavar="FILE"),
    out=Flag(also=("-o",)),
    dtype=SCORING_DTYPE,
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    retention, folder = call.invoke(), call["out"]
    call.note(retention.notes)
    call.show(retention.data, lambda: retention_text(retention, call.verbose), besides=folder)
    say_report(call, folder)


def retention_text(retention: Retention, verbose: int) -> Page:
    """A table of the whole model and its groups, a line for each parent; with ``verbose`` of the layers too."""
    lines = [
        f"merged    {retention.merged.reference}",
        *(f"parent    {parent.reference}" for parent in retention.parents),
    ]
    lines.append(f"base      {retention.base.reference if retention.base is not None else 'not known'}")
    columns = f"{'of':10}  {'parent':{NAME}}  {'distance':>9}  {'relative':>8}"
    if retention.base is not None:
        columns += f"  {'projection':>10}  {'weight':>7}  {'signs agree':>11}  {'top kept':>8}"
    lines += ["", columns]
    for kind, scope in retention.scopes():
        if kind == "layer" and not verbose:
            continue
        lines += _scope(f"layer {scope.name}" if kind == "layer" else scope.name, retention, scope)
    if retention.scores:
        lines += [
            "",
            f"{'task':16}  {'merged':>8}  {'best parent':>11}  {'kept':>7}  {'of its gain':>11}  parent",
        ]
        lines += [_score(score) for score in retention.scores]
        lines += kept_legend(retention.scores)
    if retention.base is not None:
        lines += [
            "",
            "distance: |merged - parent|. relative: that over the base's length. (the base): |merged - base|.",
            "projection: of the merged task vector on the parent's, 1 is all of it. weight: the same without what the other parents",
            "explain. signs agree: of the entries that both changed. top kept: of the parent's largest fifth of changes."
            if retention.top_share == 0.2
            else f"explain. signs agree: of the entries that both changed. top kept: of the parent's largest {retention.top_share:.3g} of changes.",
        ]
    return page(lines)


def _scope(label: str, retention: Retention, scope: ScopeRetention) -> list[str]:
    lines = []
    if scope.distance is not None:
        outside = (
            ""
            if scope.outside is None
            else f"   {scope.outside:.1%} of its change is in no parent's direction"
        )
        lines.append(
            f"{label:10}  {'(the base)':{NAME}}  {scope.distance:9.3g}  {_percent(scope.relative_distance):>8}{outside}"
        )
        label = ""
    for parent, share in zip(retention.parents, scope.parents, strict=True):
        if share is not None:
            lines.append(
                f"{label:10}  {_cut(parent.name):{NAME}}  {_share(share, retention.base is not None)}"
            )
            label = ""
    return lines


def _share(share: ParentRetention, with_base: bool) -> str:
    distances = f"{share.distance:9.3g}  {_percent(share.relative_distance):>8}"
    if not with_base:
        return distances
    projection, weight = ("-" if v is None else f"{v:.3f}" for v in (share.projection, share.weight))
    return f"{distances}  {projection:>10}  {weight:>7}  {_percent(share.sign_agreement, 1):>11}  {_percent(share.top_kept, 1):>8}"


def _score(score: Accuracy) -> str:
    return (
        f"{_cut(score.task, 16):16}  {score.merged:8.4g}  {score.of_best:11.4g}  {_percent(score.kept, 1):>7}  "
        f"{gain_text(score):>11}  {score.best}"
    )


def gain_text(score: Accuracy) -> str:
    """The share of the best parent's gain over the base that a merge kept, or that there is none."""
    return NO_GAIN if score.has_no_gain else _percent(score.gain_kept, 1)


def kept_legend(scores: Sequence[Accuracy]) -> list[str]:
    """What the columns of what a merge kept mean."""
    lines = [
        "kept: the merge's score / the best parent's. of its gain: the same after the base's score is taken off both."
    ]
    return [*lines, *([NO_GAIN_MEANS] if any(score.has_no_gain for score in scores) else [])]


def _percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _cut(text: str, length: int = NAME) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
