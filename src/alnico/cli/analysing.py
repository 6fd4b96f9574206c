"""An analysis as text for people."""

from __future__ import annotations

from alnico.analysis.results import Analysis, DeltaStatistics, ScopeStatistics
from alnico.cli.printing import Page, page

NAME = 24
"""Room for the name of a model."""


def analysis_text(found: Analysis, verbose: int) -> Page:
    """Tables: the models, what changed by group, the pairs; with ``verbose`` also by layer and what was skipped, tensor by tensor."""
    first = found.whole.changes
    lines = [f"base {found.base.reference}", ""]
    lines.append(
        f"{'model':{NAME}}  {'L2':>9}  {'relative':>8}  {'max':>9}  {'unchanged':>9}  {'sparsity':>8}"
    )
    for model, change in zip(found.models, first, strict=True):
        lines.append(f"{model.name[:NAME]:{NAME}}  {_change(change)}")
    lines += ["", *_by_scope("relative change by group", list(found.groups.items()), found)]
    if verbose:
        lines += [
            "",
            *_by_scope(
                "relative change by layer", [(f"layer {n}", s) for n, s in found.layers.items()], found
            ),
        ]
    if found.whole.pairs:
        lines += ["", *_pairs(found)]
    if found.skipped:
        lines += ["", *_skipped(found, verbose)]
    return page(lines)


def _change(change: DeltaStatistics | None) -> str:
    if change is None:
        return "nothing to compare"
    size = _number(change.l2, 9, ".4g"), _percent(change.relative_l2, 8), _number(change.max_abs, 9, ".3g")
    return "  ".join([*size, _percent(change.unchanged, 9), _number(change.effective_sparsity, 8, ".2f")])


def _by_scope(title: str, scopes: list[tuple[str, ScopeStatistics]], found: Analysis) -> list[str]:
    lines = [f"{title:{NAME}}  " + "  ".join(f"{m.name[:14]:>14}" for m in found.models)]
    for name, scope in scopes:
        shares = (None if c is None else c.relative_l2 for c in scope.changes)
        lines.append(f"{name:{NAME}}  " + "  ".join(_percent(share, 14) for share in shares))
    return lines


def _pairs(found: Analysis) -> list[str]:
    width = 2 * NAME + 3
    lines = [
        f"{'pair':{width}}  {'cosine':>7}  {'sign conflict':>13}  {'weighted':>8}  {f'top {found.top_share:.0%} shared':>14}"
    ]
    for pair in found.whole.pairs:
        one, other = (found.models[i].name[:NAME] for i in pair.models)
        numbers = [
            _number(pair.cosine, 7, ".3f"),
            _percent(pair.sign_conflict, 13),
            _percent(pair.weighted_sign_conflict, 8),
        ]
        lines.append(
            f"{f'{one} - {other}':{width}}  " + "  ".join([*numbers, _percent(pair.top_overlap, 14)])
        )
    if found.whole.cancelled is not None:
        lines.append(
            f"added up, the task vectors lose {found.whole.cancelled:.1%} of their magnitude to one another"
        )
    return lines


def _skipped(found: Analysis, verbose: int) -> list[str]:
    if verbose:
        return [
            f"not compared: {s.tensor} of {s.model or found.base.reference}: {s.reason}"
            for s in found.skipped
        ]
    reasons: dict[tuple[str | None, str], int] = {}
    for s in found.skipped:
        reasons[s.model, s.reason] = reasons.get((s.model, s.reason), 0) + 1
    return [
        f"not compared: {count} {'tensor' if count == 1 else 'tensors'} of {model or found.base.reference}: {reason}"
        for (model, reason), count in reasons.items()
    ]


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _percent(share: float | None, width: int) -> str:
    return f"{'-' if share is None else f'{share:.2%}':>{width}}"
