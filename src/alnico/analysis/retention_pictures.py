"""Draws what a merged model kept of its parents, each picture by its name, with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alnico.analysis.charts import (
    BarSeries,
    bars_size,
    chosen_positions,
    draw_bars,
    draw_lines,
    drawn_by,
    inline_picture,
    open_canvas,
)
from alnico.analysis.map_picture import INLINE_MAP_SIZE, plot_map
from alnico.analysis.map_section import is_worth_showing
from alnico.analysis.page import shorten
from alnico.analysis.retention import ParentRetention, Retention
from alnico.errors import AlnicoError, near_name

KEPT: Mapping[str, tuple[str, Callable[[ParentRetention], float | None]]] = {
    "projection": ("projection", lambda share: share.projection),
    "weight": ("weight", lambda share: share.weight),
    "top_kept": ("top kept", lambda share: share.top_kept),
    "signs": ("signs agree", lambda share: share.sign_agreement),
    "distance": ("distance", lambda share: share.distance),
    "relative_distance": ("relative distance", lambda share: share.relative_distance),
}
"""What can be drawn by group or by layer: its label and its value."""


def plot_retention(
    retention: Retention, name: str, *, parents: Any = None, measure: str | None = None, **canvas: Any
) -> Any:
    """Draw a picture of a comparison; see :meth:`alnico.Retention.plot`. Errors: AlnicoError."""
    draw = drawn_by(name, PICTURES, "a comparison")
    if measure is not None and name not in ("kept", "layers"):
        raise AlnicoError(
            f"plot: {name!r} takes no measure=; expected 'kept' or 'layers' with it. Leave it out."
        )
    if parents is not None and name in ("map", "scores"):
        raise AlnicoError(
            f"plot: {name!r} takes no parents=; expected 'kept' or 'layers' with it. Leave it out."
        )
    wanted = measure or ("distance" if retention.base is None else "projection")
    if wanted not in KEPT:
        near = near_name(wanted, KEPT)
        raise AlnicoError(
            f"measure: {wanted!r} is not measured; expected one of {', '.join(map(repr, KEPT))}. "
            f"{f'Did you mean {near!r}?' if near else 'Correct it.'}"
        )
    chosen = chosen_positions(parents, [p.name for p in retention.parents], "parents")
    return draw(retention, chosen, wanted, canvas)


def inline_retention(retention: Retention) -> str | None:
    """Return the picture that a notebook shows with a comparison: its map, if there is something to see."""
    places = retention.map
    if places is None or not is_worth_showing(places):
        return None
    label = "Map of the base, the parents and the merged model"
    return inline_picture(lambda theme: plot_map(places, dark=theme, figsize=INLINE_MAP_SIZE), label)()


def _map(retention: Retention, _: Sequence[int], __: str, canvas: dict[str, Any]) -> Any:
    if retention.map is None:
        raise AlnicoError("plot: this comparison has no map. Compare the models again.")
    return plot_map(retention.map, **canvas)


def _kept(retention: Retention, parents: Sequence[int], measure: str, options: dict[str, Any]) -> Any:
    title, value = KEPT[measure]
    scopes = [scope for kind, scope in retention.scopes() if kind != "layer"]
    labels = ["whole model", *(scope.name for scope in scopes[1:])]
    drawn = [
        BarSeries(
            f"{p + 1} {retention.parents[p].name}",
            p,
            [None if (share := scope.parents[p]) is None else value(share) for scope in scopes],
        )
        for p in parents
    ]
    canvas = open_canvas(default=bars_size(len(labels), len(drawn)), **options)
    draw_bars(canvas, canvas.axes[0], labels, drawn)
    canvas.frame(canvas.axes[0], title=f"What {shorten(retention.merged.name, 40)} kept", x=title, grid="x")
    canvas.legend()
    return canvas.figure


def _layers(retention: Retention, parents: Sequence[int], measure: str, options: dict[str, Any]) -> Any:
    title, value = KEPT[measure]
    canvas = open_canvas(default=(7.2, 4.0), **options)
    axes = canvas.axes[0]
    if not retention.layers:
        canvas.note(axes, "the models have no layers")
        return canvas.figure
    lines = [
        (
            f"{p + 1} {shorten(retention.parents[p].name, 30)}",
            p,
            [None if (share := s.parents[p]) is None else value(share) for s in retention.layers.values()],
        )
        for p in parents
    ]
    draw_lines(axes, list(retention.layers), lines)
    canvas.frame(axes, title=f"What {shorten(retention.merged.name, 40)} kept, by layer", x="layer", y=title)
    canvas.legend()
    return canvas.figure


def _scores(retention: Retention, _: Sequence[int], __: str, options: dict[str, Any]) -> Any:
    if not retention.scores:
        raise AlnicoError("plot: this comparison has no scores. Give them: alnico.compare(..., scores=...).")
    tasks = [s.task for s in retention.scores]
    drawn = [
        BarSeries(f"merged: {retention.merged.name}", 0, [s.merged for s in retention.scores]),
        BarSeries("best parent", 1, [s.of_best for s in retention.scores]),
    ]
    if any(s.of_base is not None for s in retention.scores):
        drawn.append(BarSeries("base", 6, [s.of_base for s in retention.scores]))
    canvas = open_canvas(default=bars_size(len(tasks), len(drawn)), **options)
    draw_bars(canvas, canvas.axes[0], tasks, drawn)
    canvas.frame(canvas.axes[0], title="Scores: the merge, the best parent, the base", x="score", grid="x")
    canvas.legend()
    return canvas.figure


PICTURES: dict[str, Callable[..., Any]] = {"map": _map, "kept": _kept, "layers": _layers, "scores": _scores}
"""All pictures of a comparison by name."""
