"""Draws the pictures of an analysis, each by its name, with matplotlib."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alnico.analysis.charts import (
    MARKS,
    BarSeries,
    ChartCanvas,
    ChartTheme,
    Inches,
    bars_size,
    chosen_positions,
    draw_bars,
    draw_lines,
    draw_matrix,
    drawn_by,
    inline_picture,
    open_canvas,
    plain,
    write_png,
)
from alnico.analysis.entry_axis import axis_exponents, axis_place, axis_unit
from alnico.analysis.layer_parts import layer_parts, scale_end
from alnico.analysis.map_picture import INLINE_MAP_SIZE, plot_map
from alnico.analysis.map_section import is_worth_showing
from alnico.analysis.model_map import map_models
from alnico.analysis.page import CIVIDIS, percent, series, shorten, superscript
from alnico.analysis.pair_measures import (
    PAIR_MEASURES,
    group_names,
    pair_values,
    short_value,
)
from alnico.analysis.results import LEVELS, Analysis, DeltaStatistics, ScopeStatistics
from alnico.errors import AlnicoError, near_name

MOST_ROWS = 40
"""Tensors in the heat map of a model without layers."""

MOST_PAIRS = 6
"""Pairs whose lines are drawn together."""


@dataclass(frozen=True)
class PictureRequest:
    """What a picture shows: positions of models, and the options of :meth:`alnico.Analysis.plot`."""

    models: Sequence[int]
    over: str | int | None = None
    measure: str | None = None
    canvas: dict[str, Any] = field(default_factory=dict)

    def begin(self, default: Inches, panels: int = 1, **more: Any) -> ChartCanvas:
        """Return the axes to draw in."""
        return open_canvas(panels, default=default, **{**self.canvas, **more})


def plot_analysis(
    analysis: Analysis,
    name: str,
    *,
    models: Any = None,
    over: str | int | None = None,
    measure: str | None = None,
    figsize: Inches | None = None,
    ax: Any = None,
    dark: bool | ChartTheme = False,
    purpose: str = "plot()",
) -> Any:
    """Draw a picture of an analysis; see :meth:`alnico.Analysis.plot`. Errors: AlnicoError."""
    draw = drawn_by(name, PICTURES, "an analysis")
    for option, value in (("over", over), ("measure", measure)):
        takers = [n for n, options in _OPTIONS.items() if option in options]
        if value is not None and name not in takers:
            raise AlnicoError(
                f"plot: {name!r} takes no {option}=; expected one of {', '.join(map(repr, takers))} with it. Leave it out."
            )
    chosen = chosen_positions(models, [m.name for m in analysis.models])
    canvas = {"figsize": figsize, "ax": ax, "dark": dark, "purpose": purpose}
    return draw(analysis, PictureRequest(chosen, over, measure, canvas))


def inline_analysis(analysis: Analysis) -> str | None:
    """Return the picture that a notebook shows with an analysis: its map, or the bars of one model."""
    places = map_models(analysis)
    if is_worth_showing(places):
        draw = functools.partial(plot_map, places, figsize=INLINE_MAP_SIZE)
        return inline_picture(lambda theme: draw(dark=theme), "Map of the base and the models")()
    bars = functools.partial(plot_analysis, analysis, "bars")
    return inline_picture(lambda theme: bars(dark=theme), "Bars: relative change by group")()


def write_group_bars(analysis: Analysis, path: Path, models: Sequence[int] | None = None) -> None:
    """Write ``group_l2_bar.png``: the L2 norm of the task vectors by group, for all models or some positions.

    Errors: AlnicoError without the extra [report].
    """
    write_png(plot_analysis(analysis, "norms", models=models, purpose="group_l2_bar.png"), path)


def _labels(analysis: Analysis, models: Sequence[int], length: int = 16) -> list[str]:
    return [f"{m + 1} {shorten(analysis.models[m].name, length)}" for m in models]


def _map(analysis: Analysis, request: PictureRequest) -> Any:
    return plot_map(map_models(analysis, request.models), **request.canvas)


def _heat(analysis: Analysis, request: PictureRequest) -> Any:
    rows, cells = layer_parts(analysis)
    numbers = sorted({layer for _, layer in cells})
    if not rows:
        return _heat_of_tensors(analysis, request)
    shares = [share for place in cells.values() for m in request.models if (share := place[m][0]) is not None]
    most = scale_end(shares) if shares else 1.0
    columns = min(len(request.models), 3)
    lines = -(-len(request.models) // columns)
    default = (
        columns * max(3.4, 0.24 * len(numbers) + 1.6),
        lines * (0.24 * len(rows) + 0.9) + 0.5,
    )
    canvas = request.begin(default, len(request.models), columns=columns)
    for place, (axes, index) in enumerate(zip(canvas.axes, request.models, strict=True)):
        values = [
            [
                None if (row, n) not in cells or (share := cells[row, n][index][0]) is None else share
                for n in numbers
            ]
            for row in rows
        ]
        roots = [[None if v is None else math.sqrt(v) for v in line] for line in values]
        ends = (0.0, math.sqrt(most) or 1.0)
        shown = rows if place % columns == 0 else [""] * len(rows)
        every = max(1, math.ceil(len(numbers) / 12))
        ticks = [str(n) if i % every == 0 else "" for i, n in enumerate(numbers)]
        draw_matrix(canvas, axes, shown, ticks, roots, scale=CIVIDIS, ends=ends)
        name = f"{index + 1} {analysis.models[index].name}"
        canvas.frame(axes, title=shorten(name, 34), x="layer", grid="", is_boxed=True)
        axes.title.set_fontsize(9)
    _scale_bar(canvas, most, "relative change")
    return canvas.figure


def _heat_of_tensors(analysis: Analysis, request: PictureRequest) -> Any:
    tensors = sorted(
        analysis.tensors,
        key=lambda t: (
            -max((c.relative_l2 or 0.0 for m in request.models if (c := t.changes[m])), default=0.0)
        ),
    )[:MOST_ROWS]
    values = [[c.relative_l2 if (c := t.changes[m]) else None for m in request.models] for t in tensors]
    most = scale_end([v for row in values for v in row if v is not None] or [0.0])
    canvas = request.begin((0.9 * len(request.models) + 3.6, 0.26 * len(tensors) + 1.2))
    roots = [[None if v is None else math.sqrt(v) for v in row] for row in values]
    draw_matrix(
        canvas,
        canvas.axes[0],
        [t.name for t in tensors],
        [str(m + 1) for m in request.models],
        roots,
        scale=CIVIDIS,
        ends=(0.0, math.sqrt(most) or 1.0),
        text=lambda root: percent(root * root),
    )
    canvas.frame(canvas.axes[0], title="Relative change of every tensor", x="model", grid="", is_boxed=True)
    return canvas.figure


def _scale_bar(canvas: ChartCanvas, most: float, label: str) -> None:
    """Show the colour scale of heat maps, whose colours are of the root of the share."""
    if not canvas.is_own:
        return
    width = canvas.figure.get_figwidth()
    bar = canvas.figure.colorbar(
        canvas.axes[0].images[0], ax=list(canvas.axes), fraction=0.14 / width, pad=0.07 / width
    )
    bar.ax.set_box_aspect(None)
    places = [0.0, most / 4, most]
    bar.set_ticks([math.sqrt(p) for p in places], labels=[percent(p) for p in places])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=canvas.theme.ink)
    bar.set_label(label, color=canvas.theme.quiet, fontsize=9)


def _bars(analysis: Analysis, request: PictureRequest) -> Any:
    return _bars_of(
        analysis,
        request,
        "relative change, %",
        lambda c: None if c.relative_l2 is None else 100 * c.relative_l2,
    )


def _norms(analysis: Analysis, request: PictureRequest) -> Any:
    return _bars_of(analysis, request, "L2 norm of the task vector", lambda c: c.l2)


def _bars_of(
    analysis: Analysis, request: PictureRequest, title: str, value: Callable[[DeltaStatistics], float | None]
) -> Any:
    groups = group_names(analysis)
    drawn = []
    for m in request.models:
        changes = [analysis.groups[g].changes[m] for g in groups]
        name = analysis.models[m].name
        values = [None if c is None else value(c) for c in changes]
        drawn.append(BarSeries(f"{m + 1} {name}", m, values, ends=name if len(request.models) > 1 else ""))
    canvas = request.begin(bars_size(len(groups), len(drawn)))
    draw_bars(canvas, canvas.axes[0], groups, drawn)
    whose = f" of {analysis.models[request.models[0]].name}" if len(drawn) == 1 else ""
    canvas.frame(
        canvas.axes[0],
        title=f"Change{shorten(whose, 36)} from {shorten(analysis.base.name, 30)}, by group",
        x=title,
        grid="x",
    )
    if len(drawn) > 1:
        canvas.legend()
    return canvas.figure


def _scope(analysis: Analysis, over: str | int | None) -> tuple[str, ScopeStatistics]:
    """Return the label and the numbers of the whole model, a group, or a layer. Errors: AlnicoError."""
    if over is None or over == "whole":
        return "whole model", analysis.whole
    if isinstance(over, int) and over in analysis.layers:
        return f"layer {over}", analysis.layers[over]
    if isinstance(over, str) and over in analysis.groups:
        return over, analysis.groups[over]
    names = ["whole", *group_names(analysis)]
    near = near_name(over, names) if isinstance(over, str) else None
    layers = f", or a layer of {min(analysis.layers)} to {max(analysis.layers)}" if analysis.layers else ""
    raise AlnicoError(
        f"over: {over!r} is no part of these models; expected one of {', '.join(map(repr, names))}{layers}. "
        f"{f'Did you mean {near!r}?' if near else 'Correct it.'}"
    )


def _matrix_of(*measures: int) -> Callable[[Analysis, PictureRequest], Any]:
    def draw(analysis: Analysis, request: PictureRequest) -> Any:
        label, scope = _scope(analysis, request.over)
        count = len(request.models)
        side = max(2.4, 0.52 * count + 1.5)
        canvas = request.begin(
            (side + 1.2, side + 0.4) if len(measures) == 1 else (2 * side + 1.4, side + 0.4),
            len(measures),
            columns=2,
        )
        for axes, which in zip(canvas.axes, measures, strict=True):
            heading, explained, scale = PAIR_MEASURES[which]
            _draw_pairs(analysis, request.models, canvas, axes, scope, which, scale)
            title = f"{heading}, {label}"
            canvas.frame(axes, title=title, x=explained, grid="", is_boxed=True)
        return canvas.figure

    return draw


def _draw_pairs(
    analysis: Analysis,
    models: Sequence[int],
    canvas: ChartCanvas,
    axes: Any,
    scope: ScopeStatistics,
    which: int,
    scale: Sequence[str],
) -> None:
    of_pair = {frozenset(pair.models): pair_values(pair)[which] for pair in scope.pairs}
    values = [[None if a == b else of_pair.get(frozenset((a, b))) for b in models] for a in models]
    draw_matrix(
        canvas,
        axes,
        _labels(analysis, models),
        [str(m + 1) for m in models],
        values,
        scale=scale,
        ends=(-1.0 if which == 0 else 0.0, 1.0),
        text=lambda value: short_value(which, value),
    )
    if all(v is None for row in values for v in row):
        words = "one model has no pairs" if len(models) < 2 else "not measured"
        axes.text(
            0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=canvas.theme.quiet
        )


MEASURE_NAMES = {
    "cosine": 0,
    "conflict": 1,
    "weighted_conflict": 2,
    "overlap": 3,
    "top_conflict": 4,
    "subspace_left": 5,
    "subspace_right": 6,
}
"""Names of the measures of a pair in Python, and their positions in PAIR_MEASURES."""


def _layers(analysis: Analysis, request: PictureRequest) -> Any:
    which = MEASURE_NAMES.get(request.measure or "cosine")
    if which is None:
        near = near_name(str(request.measure), MEASURE_NAMES)
        raise AlnicoError(
            f"measure: {request.measure!r} is no measure of a pair; expected one of {', '.join(map(repr, MEASURE_NAMES))}. "
            f"{f'Did you mean {near!r}?' if near else 'Correct it.'}"
        )
    numbers = sorted(analysis.layers)
    models = request.models
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    one_by_one = len(pairs) > MOST_PAIRS
    if one_by_one:
        pairs = [(models[0], other) for other in models[1:]]
    lines = []
    for place, (a, b) in enumerate(pairs):
        found = [analysis.layers[n].pair(a, b) for n in numbers]
        names = (
            f"{a + 1} {shorten(analysis.models[a].name, 16)} – {b + 1} {shorten(analysis.models[b].name, 16)}"
        )
        values = [None if p is None else pair_values(p)[which] for p in found]
        lines.append((names, b if one_by_one else place, values))
    canvas = request.begin((7.2, 4.0))
    axes = canvas.axes[0]
    if not numbers or not pairs:
        canvas.note(axes, "one model has no pairs" if not pairs else "the models have no layers")
        return canvas.figure
    draw_lines(axes, numbers, lines)
    heading = PAIR_MEASURES[which][0]
    more = f", pairs of {shorten(analysis.models[models[0]].name, 20)}" if one_by_one else ""
    canvas.frame(axes, title=f"{heading} by layer{more}", x="layer", y=heading.lower())
    canvas.legend()
    return canvas.figure


def _together(analysis: Analysis, request: PictureRequest) -> Any:
    numbers = sorted(analysis.layers)
    canvas = request.begin((7.2, 3.8))
    axes = canvas.axes[0]
    if not numbers or len(analysis.models) < 2:
        canvas.note(axes, "the models have no layers" if not numbers else "one model has no conflict")
        return canvas.figure
    scopes = [analysis.layers[n] for n in numbers]
    draw_lines(
        axes,
        numbers,
        [
            ("opposite signs", 1, [s.sign_conflict for s in scopes]),
            ("cancelled by the sum", 0, [s.cancelled for s in scopes]),
        ],
    )
    canvas.frame(axes, title="Conflict among all models, by layer", x="layer", y="share")
    axes.set_ylim(bottom=0)
    canvas.legend()
    return canvas.figure


def _rows(analysis: Analysis, request: PictureRequest) -> tuple[str, list[tuple[int, DeltaStatistics]]]:
    label, scope = _scope(analysis, request.over)
    return label, [(m, c) for m in request.models if (c := scope.changes[m])]


def _entry_ticks(axes: Any, unit: float, far: float) -> None:
    exponents = axis_exponents(unit, far)
    shown = exponents[::-1][:: math.ceil(len(exponents) / 4)][::-1]
    places = [-(10.0**e) for e in reversed(shown)] + [0.0] + [10.0**e for e in shown]
    texts = [f"−10{superscript(e)}" for e in reversed(shown)] + ["0"] + [f"10{superscript(e)}" for e in shown]
    axes.set_xticks([axis_place(p, unit) for p in places], texts)
    end = axis_place(far or unit, unit) * 1.04
    axes.set_xlim(-end, end)


def _boxes(analysis: Analysis, request: PictureRequest) -> Any:
    label, rows = _rows(analysis, request)
    canvas = request.begin((7.2, 0.36 * max(len(rows), 1) + 1.1))
    axes = canvas.axes[0]
    unit = axis_unit([c for _, c in rows])
    far = max((c.max_abs for _, c in rows), default=0.0)
    for place, (m, change) in enumerate(rows):
        ground, mark = series(m)
        at = [axis_place(q, unit) for q in change.quantiles]
        for low, high, width, opacity in ((0, 10, 0.8, 0.9), (1, 9, 3, 0.75), (4, 6, 11, 0.6)):
            axes.plot(
                [at[low], at[high]],
                [place, place],
                color=ground,
                linewidth=width,
                alpha=opacity,
                solid_capstyle="butt",
            )
        hollow = mark.endswith("-open")
        axes.plot(
            [at[5]], [place], linestyle="none", marker=MARKS[mark.removesuffix("-open")], markersize=6,
            markerfacecolor="none" if hollow else ground, markeredgecolor=canvas.theme.ink, markeredgewidth=0.7,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [plain(n, 26) for n in _labels(analysis, [m for m, _ in rows], 22)])
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    _entry_ticks(axes, unit, far)
    canvas.frame(
        axes,
        title=f"Entries of the task vectors, {label}",
        x="line: 98 % of the entries, box: the middle half",
        grid="x",
    )
    return canvas.figure


def _histogram(analysis: Analysis, request: PictureRequest) -> Any:
    label, rows = _rows(analysis, request)
    canvas = request.begin((7.2, 4.0))
    axes = canvas.axes[0]
    unit = axis_unit([c for _, c in rows])
    far = max((c.max_abs for _, c in rows), default=0.0)
    for m, change in rows:
        edges, heights = _steps([axis_place(q, unit) for q in change.quantiles])
        name = f"{m + 1} {shorten(analysis.models[m].name, 24)}, {percent(change.unchanged)} unchanged"
        style = {"color": series(m)[0], "linestyle": "-" if m < 8 else "--", "linewidth": 1.6}
        if heights:
            axes.stairs(heights, edges, label=plain(name, 60), **style)
        else:
            axes.plot([0.0], [0.0], label=plain(name, 60), **style)
    _entry_ticks(axes, unit, far)
    axes.set_ylim(bottom=0)
    canvas.frame(
        axes,
        title=f"Distribution of the entries, {label}",
        x="entry (linear around 0, then logarithmic)",
        y="share per unit of the axis",
    )
    canvas.legend()
    return canvas.figure


def _steps(at: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return edges and heights of a histogram whose steps are between the quantiles; the area of a step is its share.

    Quantiles at one place, such as those of unchanged entries, have no width and are left out.
    """
    edges, heights = [at[0]], []
    share = 0.0
    for left, right, low, high in zip(at, at[1:], LEVELS, LEVELS[1:], strict=False):
        if right - left <= 1e-12:
            continue
        share = high - low
        heights.append(share / (right - left))
        edges.append(right)
    return edges, heights


Picture = Callable[[Analysis, PictureRequest], Any]

PICTURES: dict[str, Picture] = {
    "map": _map,
    "heat": _heat,
    "bars": _bars,
    "norms": _norms,
    "cosine": _matrix_of(0),
    "conflict": _matrix_of(1),
    "weighted_conflict": _matrix_of(2),
    "overlap": _matrix_of(3),
    "top_conflict": _matrix_of(4),
    "subspace": _matrix_of(5, 6),
    "layers": _layers,
    "together": _together,
    "boxes": _boxes,
    "histogram": _histogram,
}
"""All pictures of an analysis by name."""

_OF_PAIRS = ("cosine", "conflict", "weighted_conflict", "overlap", "top_conflict", "subspace")
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_OF_PAIRS, "boxes", "histogram"), ("over",)),
    "layers": ("measure",),
}
"""The options of :func:`plot_analysis` that a picture takes beyond those of all."""
