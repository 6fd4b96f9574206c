"""Draws the pictures of a search, each by its name, with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alnico.analysis.charts import (
    BarSeries,
    bars_size,
    color_map,
    draw_bars,
    draw_matrix,
    draw_trials,
    drawn_by,
    mark_style,
    open_canvas,
    plain,
)
from alnico.analysis.page import CIVIDIS, series, shorten
from alnico.errors import AlnicoError, near_name
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.windows import window_scores


def plot_search(
    result: SearchResult, name: str, *, objective: str | None = None, value: str | None = None, **canvas: Any
) -> Any:
    """Draw a picture of a search; see :meth:`alnico.SearchResult.plot`. Errors: AlnicoError."""
    draw = drawn_by(name, PICTURES, "a search")
    names = [o.name for o in result.objectives]
    which = 0 if objective is None else _position(objective, names, "objective")
    if value is not None and name != "values":
        raise AlnicoError(f"plot: {name!r} takes no value=; expected 'values' with it. Leave it out.")
    complete = [t for t in result.trials if t.state == "complete"]
    if not complete:
        raise AlnicoError("plot: no trial of this search is complete; expected one or more. Run it longer.")
    return draw(result, complete, which, value, canvas)


def _position(name: str, names: Sequence[str], argument: str) -> int:
    if name in names:
        return names.index(name)
    near = near_name(name, names)
    raise AlnicoError(
        f"{argument}: {name!r} is not part of this search; expected one of {', '.join(map(repr, names))}. "
        f"{f'Did you mean {near!r}?' if near else 'Correct it.'}"
    )


def _history(
    result: SearchResult, complete: Sequence[Trial], which: int, _: str | None, options: dict[str, Any]
) -> Any:
    objective = result.objectives[which]
    canvas = open_canvas(default=(7.2, 4.0), **options)
    draw_trials(
        canvas, canvas.axes[0], [t.number for t in complete], [t.values[which] for t in complete],
        goal=objective.goal, title="How the search went", y=objective.name,
    )  # fmt: skip
    return canvas.figure


def _front(
    result: SearchResult, complete: Sequence[Trial], which: int, _: str | None, options: dict[str, Any]
) -> Any:
    if len(result.objectives) < 2:
        raise AlnicoError(
            "plot: 'front' needs two objectives or more, and this search has one. Draw 'history'."
        )
    other = 1 if which == 0 else 0
    canvas = open_canvas(default=(6.4, 4.8), **options)
    axes = canvas.axes[0]
    on_it = {t.number for t in result.best}
    rest = [t for t in complete if t.number not in on_it]
    front = sorted(result.best, key=lambda t: t.values[which])
    axes.plot([t.values[which] for t in rest], [t.values[other] for t in rest], linestyle="none", markersize=5, label="other trials", **mark_style(6))  # fmt: skip
    dotted = ":" if len(result.objectives) == 2 else "none"
    axes.plot([t.values[which] for t in front], [t.values[other] for t in front], linestyle=dotted, markersize=7, label="front", **mark_style(1))  # fmt: skip
    canvas.frame(
        axes,
        title="Pareto front",
        x=result.objectives[which].name,
        y=result.objectives[other].name,
        grid="both",
    )
    canvas.legend()
    return canvas.figure


def _importance(
    result: SearchResult, _: Sequence[Trial], __: int, ___: str | None, options: dict[str, Any]
) -> Any:
    shares = sorted(result.importances.items(), key=lambda item: -item[1])[:40]
    canvas = open_canvas(default=bars_size(max(len(shares), 1), 1), **options)
    axes = canvas.axes[0]
    if not shares:
        canvas.note(axes, "too few trials to say what mattered")
        return canvas.figure
    draw_bars(
        canvas, axes, [name for name, _ in shares], [BarSeries("importance", 0, [s for _, s in shares])]
    )
    canvas.frame(axes, title="What mattered", x="share of the variation explained", grid="x")
    return canvas.figure


def _values(
    result: SearchResult, complete: Sequence[Trial], which: int, value: str | None, options: dict[str, Any]
) -> Any:
    """Draw the objective against each value that was searched, the most important first."""
    order = sorted(result.dimensions, key=lambda n: -result.importances.get(n, 0.0))
    shown = (
        [result.dimensions[_position(value, result.dimensions, "value")]] if value is not None else order[:9]
    )
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    canvas = open_canvas(
        len(shown), default=(max(2.7 * columns, 4.4), 2.3 * rows + 0.5), columns=columns, **options
    )
    best = result.best[0] if result.best else None
    for place, (axes, name) in enumerate(zip(canvas.axes, shown, strict=True)):
        found = [t.point.get(name) for t in complete]
        is_text = any(isinstance(v, str) for v in found)
        at = [plain(str(v), 16) for v in found] if is_text else found
        axes.plot(at, [t.values[which] for t in complete], linestyle="none", markersize=4, **mark_style(0))
        if best is not None:
            place_of_best = best.point.get(name)
            axes.plot(
                [plain(str(place_of_best), 16) if is_text else place_of_best], [best.values[which]], linestyle="none", marker="o", markersize=11,
                markerfacecolor="none", markeredgecolor=series(1)[0], markeredgewidth=1.6,
            )  # fmt: skip
        title = shorten(name, 44) if len(shown) == 1 else shorten(name, 24)
        canvas.frame(
            axes, title=title, y=result.objectives[which].name if place % columns == 0 else "", grid="both"
        )
        axes.title.set_fontsize(9)
    return canvas.figure


def _parallel(
    result: SearchResult, complete: Sequence[Trial], which: int, _: str | None, options: dict[str, Any]
) -> Any:
    """Draw one line per trial through all values that were searched, coloured by the objective."""
    names = [n for n in result.dimensions if all(not isinstance(t.point.get(n), str) for t in complete)]
    canvas = open_canvas(default=(max(6.4, 0.9 * len(names) + 2), 4.2), **options)
    axes = canvas.axes[0]
    if not names:
        canvas.note(axes, "no value of this search is a number")
        return canvas.figure
    columns = [[float(t.point.get(n) or 0.0) for t in complete] for n in names]
    ranges = [(min(c), max(c)) for c in columns]
    goal = result.objectives[which].goal
    ranked = sorted(range(len(complete)), key=lambda i: complete[i].values[which], reverse=goal == "min")
    shades = color_map(CIVIDIS)
    for rank, i in enumerate(ranked):
        heights = [
            (c[i] - low) / ((high - low) or 1.0) for c, (low, high) in zip(columns, ranges, strict=True)
        ]
        share = rank / max(len(ranked) - 1, 1)
        axes.plot(range(len(names)), heights, color=shades(share), linewidth=2.6 if rank == len(ranked) - 1 else 1.0, alpha=0.4 + 0.6 * share)  # fmt: skip
    axes.set_xticks(range(len(names)), [plain(n, 22) for n in names], rotation=20, ha="right")
    axes.set_yticks([0, 1], ["least", "most"])
    canvas.frame(
        axes,
        title=f"One line per trial; yellow: the best {shorten(result.objectives[which].name, 30)}",
        grid="x",
    )
    return canvas.figure


def _windows(
    result: SearchResult, _: Sequence[Trial], which: int, __: str | None, options: dict[str, Any]
) -> Any:
    """Draw a heat map: the objective of each window of layers that was repeated, the best one framed."""
    scores = window_scores(result, which)
    if scores is None:
        raise AlnicoError(
            "plot: 'windows' needs a search of the first layer and the length of a window (stack.window), and this search has "
            "none. Draw 'values'."
        )
    objective = result.objectives[which]
    columns, rows = len(scores.firsts), len(scores.lengths)
    canvas = open_canvas(default=(max(4.4, 0.42 * columns + 1.6), max(2.4, 0.36 * rows + 1.2)), **options)
    axes = canvas.axes[0]
    draw_matrix(
        canvas, axes, [str(n) for n in scores.lengths], [str(n) for n in scores.firsts], scores.values,
        scale=CIVIDIS if objective.goal == "max" else tuple(reversed(CIVIDIS)), ends=(min(scores.found), max(scores.found)),
        text=(lambda value: f"{value:.3g}") if columns * rows <= 150 else None,
    )  # fmt: skip
    first, length, _value = scores.ranked(objective.goal)[0]
    axes.plot(
        [scores.firsts.index(first)], [scores.lengths.index(length)], linestyle="none", marker="s", markersize=16,
        markerfacecolor="none", markeredgecolor=series(1)[0], markeredgewidth=1.8,
    )  # fmt: skip
    canvas.frame(
        axes, title=f"{shorten(objective.name, 30)} of each window", x="first layer", y="length", grid=""
    )
    return canvas.figure


PICTURES: dict[str, Callable[..., Any]] = {
    "history": _history,
    "front": _front,
    "importance": _importance,
    "values": _values,
    "parallel": _parallel,
    "windows": _windows,
}
"""All pictures of a search by name."""
