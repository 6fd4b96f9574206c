"""Says what a curve shows, in words and rows, for its page, its pictures and the command line."""

from __future__ import annotations

from alnico.analysis.common_tensors import short_names
from alnico.analysis.scores import Estimate
from alnico.tune.curve.result import Barrier, Curve, CurvePoint
from alnico.tune.curve.scales import scale_text
from alnico.tune.search.objective import MEAN


def estimate_text(estimate: Estimate | None) -> str:
    """Return a score with its interval.

    >>> estimate_text(Estimate(0.8125, 0.79, 0.8333)), estimate_text(Estimate(12.0))
    ('0.812 [0.790, 0.833]', '12.000')
    """
    if estimate is None:
        return "-"
    values = [v for v in (estimate.value, estimate.low, estimate.high) if v is not None]
    shown = [f"{v:.3f}" if abs(v) < 100 else f"{v:.5g}" for v in values]
    return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _value_text(estimate: Estimate | None) -> str:
    return estimate_text(None if estimate is None else Estimate(estimate.value))


def ends_of(curve: Curve) -> tuple[str, str]:
    """Return the short names of the first two models."""
    first, second, *_ = short_names(list(curve.models))
    return first, second


def axis_words(curve: Curve) -> tuple[str, str]:
    """Return the words at the axis of scales (at both axes of a surface, with `` | `` between), and a title."""
    if curve.kind == "path":
        first, second = ends_of(curve)
        return f"t: from {first} (0) to {second} (1)", f"The path from {first} to {second}"
    if curve.kind == "surface":
        first, second = ends_of(curve)
        return f"scale of {first} | scale of {second}", f"{curve.method} of {first} and {second}"
    names = short_names(list(curve.models))
    of = names[0] if len(names) == 1 else f"{len(names)} models"
    return "scale", f"{curve.method} of {of}"


def corners_of(curve: Curve) -> dict[str, tuple[float, float]]:
    """Return where the base and the models are on a surface of task arithmetic, if its axes reach there."""
    if curve.kind != "surface" or curve.method != "task_arithmetic" or curve.base is None:
        return {}
    first, second = ends_of(curve)
    base = short_names([curve.base, *curve.models])[0]
    places = {base: (0.0, 0.0), first: (1.0, 0.0), second: (0.0, 1.0)}
    x, y = curve.axes
    return {n: (a, b) for n, (a, b) in places.items() if x[0] <= a <= x[-1] and y[0] <= b <= y[-1]}


def best_words(curve: Curve) -> str:
    """Return a sentence about the best point."""
    best = curve.best
    what = "The mean of the tasks" if curve.objective == MEAN and curve.averaged else curve.objective
    score = estimate_text(best.on(curve.objective))
    return f"{what} is best at {curve.place(best.scales)}: {score}."


def barrier_words(barrier: Barrier) -> str:
    """Return a barrier in words.

    >>> barrier_words(Barrier(Estimate(0.1, 0.05, 0.2), 0.5, {})), barrier_words(Barrier(Estimate(0.0), None, {}))
    ('0.100 [0.050, 0.200] at t 0.5', 'none')
    """
    if barrier.at is None:
        return "none"
    return f"{estimate_text(barrier.height)} at t {scale_text(barrier.at)}"


def summary_rows(curve: Curve) -> list[list[str]]:
    """Return a table: for the mean and each task the best point, its score, the base's and the best model's.

    Of a path: the scores of its ends, and the barrier.
    """
    rows = []
    for name in curve.views:
        best = curve.best_on(name)
        row = [name, scale_words(best), estimate_text(best.on(name))]
        if curve.kind == "path":
            ends = [next(p for p in curve.points if p.scales[0] == t).on(name) for t in (0.0, 1.0)]
            row += [*map(_value_text, ends), barrier_words(curve.barriers[name])]
        else:
            row += [_value_text(of_line(curve, name, i)) for i in range(len(curve.lines))]
        rows.append(row)
    if curve.kind == "path":
        return [["", "best t", "score", *short_names(list(curve.models)), "barrier"], *rows]
    heads = [line.name for line in curve.lines]
    return [["", f"best scale{'s' if curve.kind == 'surface' else ''}", "score", *heads], *rows]


def of_line(curve: Curve, name: str, index: int) -> Estimate | None:
    """Return the score of the base or a model on a task, or its mean."""
    line = curve.lines[index]
    return line.scores.get(name, line.mean)


def scale_words(point: CurvePoint) -> str:
    return ", ".join(map(scale_text, point.scales))


def point_rows(curve: Curve) -> list[list[str]]:
    """Return a table of all points, with a heading."""
    if curve.kind == "surface":
        heads = [f"scale of {name}" for name in ends_of(curve)]
    else:
        heads = ["t" if curve.kind == "path" else "scale"]
    rows = [
        [*map(scale_text, point.scales), *(estimate_text(point.on(name)) for name in curve.views)]
        for point in curve.points
    ]
    return [[*heads, *curve.views], *rows]
