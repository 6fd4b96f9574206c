"""Writes report.html: an analysis as one interactive page that needs no network."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.analysis.entry_axis import axis_exponents, axis_place, axis_unit
from alnico.analysis.files import MAP, PAGE, PICTURE
from alnico.analysis.layer_parts import Cells, layer_parts, scale_end
from alnico.analysis.map_picture import write_map
from alnico.analysis.map_section import map_section
from alnico.analysis.model_map import ModelMap, map_models
from alnico.analysis.page import (
    CIVIDIS,
    Figure,
    PageSection,
    badge,
    bar_marker,
    cell,
    colour,
    copyable,
    escape,
    figure_html,
    format_count,
    has_report,
    ink_on,
    name,
    number,
    page,
    percent,
    ramp,
    scroller,
    select_box,
    series,
    shorten,
    superscript,
    table,
    tinted_cell,
)
from alnico.analysis.pair_measures import PAIR_MEASURES, group_names, pair_values, scopes_of, short_value
from alnico.analysis.pictures import write_group_bars
from alnico.analysis.results import (
    LEVELS,
    Analysis,
    DeltaStatistics,
    ScopeStatistics,
    TensorScope,
)
from alnico.analysis.suggest_rules import Suggestion
from alnico.errors import OutputError
from alnico.folders import write_new
from alnico.kernels.clock import time_text
from alnico.numerics.sizes import count_of

MOVERS = 20
"""Tensors of each model in the table of largest movers, for each of its three rankings."""

LISTED = 100
"""Longest list of skipped tensors, and of tensors outside the layers."""

GLOSSARY = (
    ("Task vector", "The difference model − base, entry by entry. All figures on this page are about task vectors."),
    ("L2 and L1 norm", "The length of the task vector: the root of the sum of its squares, and the sum of its magnitudes. Large tensors have large norms."),
    ("Relative change", "The L2 norm of the task vector divided by that of the base: 1 % is a light fine-tune, 10 % a long one. Comparable across tensors of all sizes."),
    ("Unchanged", "The share of entries that equal the base exactly: frozen layers, or steps too small for the dtype."),
    (
        "Effective sparsity",
        "0 where all entries changed by the same amount, 0.36 for a normal distribution, near 1 where few "
        "entries hold the whole change: trimming (ties, dare) then loses little.",
    ),
    ("Skewness, excess kurtosis", "How lopsided the entries are, and how heavy their tails are; both are 0 for a normal distribution."),
    ("Cosine", "The cosine of the angle between two task vectors: 1 is the same direction, 0 unrelated (usual for different tasks), below 0 opposed."),
    ("Sign conflict", "Of the entries that both models changed, the share they changed in opposite directions; 50 % is chance: unrelated task vectors have it."),
    ("Weighted conflict", "The same, with each entry weighted by the product of both changes: a conflict of large entries costs more than one of noise."),
    ("Top overlap", "The share of one model's largest changes that are also among the other's largest; chance gives the share of all entries that counts as largest, 20 % by default."),
    ("Subspace alignment", "Whether the strongest directions (leading singular vectors) of two task vectors span the same space: 1 is the same, 0 orthogonal. Left: the output directions of a matrix; right: its input directions."),
    ("Cancelled", "The share of all magnitude that is lost when the task vectors are added, because they oppose each other."),
    ("Quantiles", "The value below which that share of the entries is. Minimum and maximum are exact; other quantiles of groups and of the whole model are within 0.8 % of the exact value."),
)  # fmt: skip


@dataclass(frozen=True)
class ReportSubject:
    """What a report is about, where that is not an analysis: its title, the kind of page, and the command that made it.

    ``origin`` is what the models are compared with; ``map`` is the map that knows which model is the merge.
    """

    title: str = ""
    kind: str = "alnico analysis"
    command: str = ""
    origin: str = "base"
    map: ModelMap | None = None


def write_report(
    analysis: Analysis,
    path: Path,
    advice: Suggestion | None = None,
    sections: Sequence[PageSection] = (),
    *,
    subject: ReportSubject = ReportSubject(),
) -> None:
    """Write ``report.html``: everything of an analysis on one page, with its scripts in the file.

    ``advice`` is what alnico suggests; ``sections`` are more sections, shown before everything else if the page
    has a ``subject`` of its own, and after the advice if not.
    Errors: AlnicoError without the extra [report].
    """
    models = [m.name for m in analysis.models]
    listed: list[PageSection | None] = [
        *(sections if subject.title else ()),
        _models(analysis, subject.origin),
        map_section(map_models(analysis) if subject.map is None else subject.map),
        _advice(advice),
        *(() if subject.title else sections),
        _where(analysis),
        _groups(analysis),
        _pairs(analysis),
        _by_layer(analysis),
        _distributions(analysis),
        _movers(analysis),
        _skipped(analysis),
        _glossary(),
    ]
    changed = models[0] if len(models) == 1 else count_of(len(models), "model")
    text = page(
        subject.title or f"{changed} and {_base(analysis)}",
        subject.kind,
        _facts(analysis, subject.origin),
        [s for s in listed if s is not None],
        f"Made by alnico {analysis.version} with: {subject.command or _command(analysis)}. The same numbers are in "
        "summary.json and the CSV files next to this page.",
    )
    write_new(path, text.encode("utf-8", "replace").decode("utf-8"))


def write_pages(
    analysis: Analysis,
    folder: Path,
    advice: Suggestion | None = None,
    sections: Sequence[PageSection] = (),
    *,
    subject: ReportSubject = ReportSubject(),
) -> None:
    """Write the page and the pictures into the folder of a report; write nothing without the extra [report].

    The arguments are those of :func:`write_report`. Errors: OutputError if they cannot be written.
    """
    if not has_report():
        return
    try:
        for index, model in enumerate(analysis.models):
            write_group_bars(analysis, folder / model.name / PICTURE, [index])
        write_map(map_models(analysis) if subject.map is None else subject.map, folder / MAP)
        write_report(analysis, folder / PAGE, advice, sections, subject=subject)
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). Make room or choose another "
            "folder."
        ) from None


def _base(analysis: Analysis) -> str:
    """Return the base's name; ``the base``, where that is its name."""
    name = analysis.base.name
    return "the base" if name.lower() in ("base", "base-model", "base_model") else f"the base {name}"


def _facts(analysis: Analysis, origin: str) -> list[tuple[str, str]]:
    base = (
        analysis.base.reference
        if analysis.base.commit is None
        else f"{analysis.base.reference}@{analysis.base.commit[:12]}"
    )
    elements = max((c.elements for c in analysis.whole.changes if c), default=0)
    return [
        (origin.capitalize(), base),
        ("Models", str(len(analysis.models))),
        ("Tensors", format_count(len(analysis.tensors))),
        ("Parameters compared", format_count(elements)),
        ("Layers", str(len(analysis.layers))),
        ("Top share", percent(analysis.top_share)),
        ("Took", time_text(analysis.seconds, analysis.compile_seconds)),
    ]


def _command(analysis: Analysis) -> str:
    references = " ".join(shlex.quote(m.reference) for m in analysis.models)
    return f"alnico analyze --base {shlex.quote(analysis.base.reference)} --models {references}"


def _models(analysis: Analysis, origin: str) -> PageSection:
    cards = []
    for index, model in enumerate(analysis.models):
        change = analysis.whole.changes[index]
        head = f"<h3>{badge(index)}{name(model.name)}</h3>"
        source = escape(model.reference if model.commit is None else f"{model.reference}@{model.commit[:12]}")
        if change is None:
            cards.append(
                f'<article class="card">{head}<p class="under">{source}: none of its tensors could be compared.</p></article>\n'
            )
            continue
        figures = (
            ("L2 norm", number(change.l2)),
            ("L1 norm", number(change.l1)),
            ("Largest change", number(change.max_abs)),
            ("Unchanged", percent(change.unchanged)),
            ("Effective sparsity", number(change.effective_sparsity)),
        )
        listed = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in figures)
        most = sorted(
            ((c.relative_l2, t.name) for t in analysis.tensors if (c := t.changes[index]) and c.relative_l2),
            key=lambda e: (-e[0], e[1]),
        )[:3]
        movers = "".join(f"<li>{name(tensor)}<span>{percent(share)}</span></li>" for share, tensor in most)
        cards.append(
            f'<article class="card">{head}<p class="big">{percent(change.relative_l2)}</p><p class="under">relative change · '
            f'<span class="name">{source}</span></p><dl class="figures">{listed}</dl>'
            + (f'<p class="under">Changed most for their size</p><ol>{movers}</ol>' if movers else "")
            + "</article>\n"
        )
    words = (
        f"How far each model is from the {origin}: the length of its task vector divided by the {origin}'s. "
        "A model has the same number and colour on the whole page."
    )
    return PageSection("models", "The models", [words], f'<div class="cards">\n{"".join(cards)}</div>\n')


def _advice(advice: Suggestion | None) -> PageSection | None:
    if advice is None:
        return None
    parts = []
    if advice.recipe is not None:
        # The comments at its head are the lists below.
        recipe = "\n".join(line for line in advice.recipe.splitlines() if not line.startswith("#"))
        parts.append(copyable(recipe + "\n", "Recipe"))
        parts.append(
            "<p>To use it, call <code>alnico.suggest(models, base=base).merge()</code> in Python: "
            f"{escape(advice.in_memory[0])} is in memory.</p>\n"
            if advice.in_memory
            else "<p>To use it, save it as <code>recipe.yml</code> in the folder where you ran the command, then run "
            "<code>alnico merge recipe.yml merged</code>.</p>\n"
        )
    lists = (
        ("Why no recipe" if advice.method is None else f"Why {advice.method}", advice.reasons),
        ("About the models", advice.findings),
        ("Before you use it", advice.warnings),
    )
    for heading, lines in lists:
        listed = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
        parts.append(f'<h3>{escape(heading)}</h3>\n<ul class="advice">\n{listed}</ul>\n' if lines else "")
    words = (
        [] if advice.recipe is None else ["A recipe to begin with, derived from the numbers on this page."]
    )
    return PageSection("advice", "What alnico suggests", words, "".join(parts))


def _where(analysis: Analysis) -> PageSection | None:
    rows, cells = layer_parts(analysis)
    numbers = sorted({layer for _, layer in cells})
    outside = _outside(analysis)
    shares = [share for row in cells.values() for share, _ in row if share is not None]
    if not rows or not shares:
        body = outside
        figures: list[Figure] = []
    else:
        most = scale_end(shares)
        figures = [
            _heat_map(analysis, index, rows, numbers, cells, most) for index in range(len(analysis.models))
        ]
        least = (
            360 if len(numbers) <= 8 else 420 if len(numbers) <= 16 else 560 if len(numbers) <= 48 else 900
        )
        widest = max(574, 260 + 48 * len(numbers))
        over = "≥ " if max(shares) > most else ""
        maps = "".join(map(figure_html, figures))
        body = f'{ramp(CIVIDIS, "0 %", f"{over}{percent(most)} (halfway: {percent(most / 4)})")}<div class="maps" style="--least:{least}px;--most:{widest}px">\n{maps}</div>\n{outside}'
    words = (
        "Relative change of every part of every layer, on one scale for all models. Blank: missing, or not "
        "comparable. Columns are layers, from input to output."
        if figures
        else "Relative change of every tensor."
    )
    return PageSection("where", "Where the models changed", [words], body, figures) if body else None


def _heat_map(
    analysis: Analysis, index: int, rows: Sequence[str], numbers: Sequence[int], cells: Cells, most: float
) -> Figure:
    def at(row: str, layer: int) -> tuple[float | None, float]:
        changes = cells.get((row, layer))
        return changes[index] if changes else (None, 0.0)

    values = [
        [None if (share := at(row, layer)[0]) is None else 100 * share for layer in numbers] for row in rows
    ]
    gap = 2 if len(numbers) <= 48 else 0
    trace = {
        "type": "heatmap",
        "name": escape(analysis.models[index].name),
        "x": numbers,
        "y": list(range(len(rows))),
        "z": [[None if v is None else math.sqrt(v) for v in row] for row in values],
        "customdata": [
            [[share, at(row, layer)[1]] for share, layer in zip(line, numbers, strict=True)]
            for row, line in zip(rows, values, strict=True)
        ],
        "hovertemplate": "layer %{x}, %{y}<br>%{customdata[0]:.3g} % · L2 %{customdata[1]:.3g}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[i / (len(CIVIDIS) - 1), c] for i, c in enumerate(CIVIDIS)],
        "zmin": 0,
        "zmax": math.sqrt(100 * most) or 1,
        "showscale": False,
        "xgap": gap,
        "ygap": gap,
    }
    places = numbers if len(numbers) <= 12 else numbers[:: math.ceil(len(numbers) / 16)]
    few = numbers if len(numbers) <= 12 else numbers[:: math.ceil(len(numbers) / 6)]
    layout = {
        "height": 22 * len(rows) + 62,
        "xaxis": {"title": {"text": "layer", "standoff": 6}, "tickvals": places, "ticktext": [str(n) for n in places], "showgrid": False, "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [escape(shorten(row, 30)) for row in rows],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
    }  # fmt: skip
    narrow = {
        "xaxis": {"tickvals": few, "ticktext": [str(n) for n in few]},
        "yaxis": {"ticktext": [escape(row if len(row) <= 16 else "…" + row[-15:]) for row in rows]},
    }
    behind = {
        "columns": ["relative change, %, by layer", *map(str, numbers)],
        "rows": [[row, *line] for row, line in zip(rows, values, strict=True)],
    }
    heading = f"{index + 1} · {analysis.models[index].name}"
    return Figure(
        f"map-{index}",
        f"Heat map: relative change of every part of every layer of {analysis.models[index].name}",
        {"": {"data": [trace], "layout": layout, "narrow": narrow, "table": behind}},
        heading=heading,
    )


def _outside(analysis: Analysis) -> str:
    """Return an HTML table of the tensors outside the layers."""
    tensors = [t for t in analysis.tensors if t.layer is None]
    if not tensors:
        return ""
    tensors.sort(key=lambda t: -max((c.relative_l2 or 0.0 for c in t.changes if c), default=0.0))
    most = scale_end([c.relative_l2 or 0.0 for t in tensors for c in t.changes if c] or [0.0]) or 1.0
    rows = []
    for tensor in tensors[:LISTED]:
        shares = [c.relative_l2 if c else None for c in tensor.changes]
        shown = "".join(
            tinted_cell(share, math.sqrt((share or 0.0) / most), percent(share), CIVIDIS) for share in shares
        )
        rows.append(f'<tr><th scope="row">{name(tensor.name)}</th>{shown}</tr>\n')
    heads = "".join(
        f'<th scope="col" class="n">{badge(i)}<span class="unseen"> {escape(m.name)}</span></th>'
        for i, m in enumerate(analysis.models)
    )
    left = (
        f"; the {LISTED} that changed most of {format_count(len(tensors))}" if len(tensors) > LISTED else ""
    )
    listed = (
        f'<table class="list"><thead><tr><th scope="col">tensor</th>{heads}</tr></thead><tbody>\n'
        f"{''.join(rows)}</tbody></table>"
    )
    return f"<h3>Outside the layers{left}</h3>\n" + scroller(listed, "Outside the layers", is_tall=True)


def _groups(analysis: Analysis) -> PageSection:
    groups = group_names(analysis)
    models = len(analysis.models)

    def view(relative: bool) -> dict[str, Any]:
        data = []
        for index, model in enumerate(analysis.models):
            changes = [analysis.groups[g].changes[index] for g in groups]
            values = [
                None
                if c is None
                else c.l2
                if not relative
                else None
                if c.relative_l2 is None
                else 100 * c.relative_l2
                for c in changes
            ]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": escape(f"{index + 1} {model.name}"),
                    "y": list(range(len(groups))),
                    "x": values,
                    "marker": bar_marker(index),
                    "text": [escape(shorten(model.name, 13))] * len(groups) if models > 1 else None,
                    "textposition": "outside",
                    "textfont": {"size": 10},
                    "textangle": 0,
                    "cliponaxis": False,
                    "hovertext": [
                        f"{escape(model.name)}, {g}<br>{percent(c.relative_l2)} · L2 {number(c.l2)}"
                        if c
                        else ""
                        for g, c in zip(groups, changes, strict=True)
                    ],
                    "hoverinfo": "text",
                }
            )
        title = "relative change, %" if relative else "L2 norm of the task vector"
        lengths: list[float] = [x for trace in data for x in trace["x"] if x is not None]  # type: ignore[union-attr,misc]
        most = max(lengths, default=0.0) or 1.0
        room, narrow = (1.2, 1.45) if models > 1 else (1.05, 1.05)  # for the names at the ends of the bars
        return {
            "data": data,
            "layout": {
                "height": max(len(groups) * (13 * models + 14), 60) + 60,
                "bargap": 0.22,
                "xaxis": {"title": {"text": title, "standoff": 8}, "range": [0, most * room], "nticks": 8},
                "yaxis": {
                    "tickvals": list(range(len(groups))),
                    "ticktext": groups,
                    "autorange": "reversed",
                    "showgrid": False,
                    "zeroline": False,
                },
            },
            "narrow": {
                "xaxis": {"title": {"text": title, "standoff": 8}, "range": [0, most * narrow], "nticks": 5}
            },
        }

    figure = Figure(
        "groups-bars",
        "Bars: change of every group of tensors, by model",
        {"0": view(True), "1": view(False)},
        [("Measure", ["relative change", "L2 norm"])],
    )
    words = (
        "The L2 norm shows where most of the change is, the relative change "
        "where the base changed most for its size."
    )
    return PageSection("groups", "Change by kind of tensor", [words], figure_html(figure), [figure])


def _pairs(analysis: Analysis) -> PageSection | None:
    if len(analysis.models) < 2:
        return None
    scopes = scopes_of(analysis)
    words = (
        "Whether two models changed the same parameters, and in the same direction. With low conflict, "
        "their sum is a fair merge. With high conflict, each undoes part of what the other learned; methods "
        "that trim or elect a sign are made for this."
    )
    if len(analysis.models) == 2:
        return PageSection(
            "pairs", "How the models relate", [words], f"<p>{_joint(analysis.whole)}</p>\n{_one_pair(scopes)}"
        )
    parts = []
    for label, scope in scopes:
        matrices = "".join(_matrix(analysis, scope, which, label) for which in range(len(PAIR_MEASURES)))
        parts.append(
            f'<div role="group" aria-label="{escape(label)}"><p>{_joint(scope)}</p><div class="matrices" style="--least:{_least(analysis)}px">\n{matrices}</div></div>\n'
        )
    body = (
        select_box("Over", "matrices", [label for label, _ in scopes])
        + f'<div id="matrices">\n{"".join(parts)}</div>\n'
    )
    return PageSection("pairs", "How the models relate", [words], body)


def _joint(scope: ScopeStatistics) -> str:
    chance = " (50 % is chance)" if len(scope.changes) == 2 else ""
    signs = (
        "No two models changed the same entry."
        if scope.sign_conflict is None
        else f"Of the entries that two or more models changed, {percent(scope.sign_conflict)} have opposite "
        f"signs{chance}."
    )
    lost = (
        f" Adding the task vectors cancels {percent(scope.cancelled)} of their magnitude."
        if scope.cancelled is not None
        else ""
    )
    return signs + lost


def _one_pair(scopes: Sequence[tuple[str, ScopeStatistics]]) -> str:
    """Return a table of all measures for every scope, if there is only one pair of models."""
    heads = "".join(
        f'<th scope="col" class="n" title="{explained}">{heading}</th>'
        for heading, explained, _ in PAIR_MEASURES
    )
    rows = []
    for label, scope in scopes:
        values = pair_values(scope.pairs[0])
        shown = "".join(_tint(which, value) for which, value in enumerate(values))
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{shown}</tr>\n')
    listed = (
        f'<table class="list"><thead><tr><th scope="col">over</th>{heads}</tr></thead><tbody>\n'
        f"{''.join(rows)}</tbody></table>"
    )
    return scroller(listed, "Between the two models", is_tall=True)


def _tint(which: int, value: float | None) -> str:
    share = 0.0 if value is None else (value + 1) / 2 if which == 0 else value
    return tinted_cell(value, share, short_value(which, value or 0.0), PAIR_MEASURES[which][2])


def _least(analysis: Analysis) -> int:
    return max(290, 158 + 44 * len(analysis.models))


def _matrix(analysis: Analysis, scope: ScopeStatistics, which: int, label: str) -> str:
    heading, explained, scale = PAIR_MEASURES[which]
    values = {pair.models: pair_values(pair)[which] for pair in scope.pairs}
    if all(value is None for value in values.values()):
        return ""
    models = range(len(analysis.models))

    def entry(row: int, column: int) -> str:
        if row == column:
            return '<td class="self"></td>'
        value = values.get((row, column), values.get((column, row)))
        if value is None:
            return '<td class="none">–</td>'
        share = (value + 1) / 2 if which == 0 else value
        text = short_value(which, value)
        ground = colour(share, scale)
        title = escape(f"{analysis.models[row].name} and {analysis.models[column].name}: {number(value)}")
        return f'<td title="{title}" style="background:{ground};color:{ink_on(ground)}">{text}</td>'

    heads = "".join(
        f'<th scope="col" title="{escape(m.name)}">{badge(i)}<span class="unseen"> {escape(m.name)}</span></th>'
        for i, m in enumerate(analysis.models)
    )
    rows = "".join(
        f'<tr><th scope="row" title="{escape(analysis.models[row].name)}">{badge(row)} <span class="label">{escape(shorten(analysis.models[row].name, 16))}</span></th>'
        f"{''.join(entry(row, column) for column in models)}</tr>\n"
        for row in models
    )  # fmt: skip
    columns = '<col class="head">' + "<col>" * len(models)
    return scroller(
        f'<table class="matrix"><caption>{heading}<small>{explained}</small></caption><colgroup>{columns}</colgroup>'
        f'<thead><tr><td class="self"><span class="unseen">{escape(label)}</span></td>{heads}</tr></thead><tbody>\n{rows}</tbody></table>',
        heading,
    )


def _by_layer(analysis: Analysis) -> PageSection | None:
    numbers = sorted(analysis.layers)
    models = len(analysis.models)
    if len(numbers) < 2 or models < 2:
        return None
    pairs = [(first, second) for first in range(models) for second in range(first + 1, models)]
    all_at_once = len(pairs) <= 6
    by_layer = {n: {pair.models: pair_values(pair) for pair in analysis.layers[n].pairs} for n in numbers}
    shown = [
        w
        for w in range(len(PAIR_MEASURES))
        if any(v[w] is not None for values in by_layer.values() for v in values.values())
    ]
    if not shown:
        return None
    views = {}
    for place, which in enumerate(shown):
        if all_at_once:
            lines = [
                _line(analysis, numbers, by_layer, which, pair, series(i)) for i, pair in enumerate(pairs)
            ]
            views[str(place)] = _lines(lines, PAIR_MEASURES[which][0], which, numbers)
            continue
        for model in range(models):
            lines = [
                _line(analysis, numbers, by_layer, which, (model, other), series(other))
                for other in range(models)
                if other != model
            ]
            views[f"{place}|{model}"] = _lines(lines, PAIR_MEASURES[which][0], which, numbers)
    choices: list[tuple[str, Sequence[str]]] = [("Measure", [PAIR_MEASURES[w][0] for w in shown])]
    if not all_at_once:
        choices.append(
            ("Pairs of", [f"{i + 1} {shorten(m.name, 30)}" for i, m in enumerate(analysis.models)])
        )
    figures = [
        Figure(
            "layer-pairs",
            "Lines: similarity and conflict of the pairs of models, by layer",
            views,
            choices,
            "Pair by pair",
        )
    ]
    scopes = [analysis.layers[n] for n in numbers]
    both = [
        ("opposite signs", [s.sign_conflict for s in scopes], series(1)),
        ("cancelled by the sum", [s.cancelled for s in scopes], series(0)),
    ]
    together = [
        _trace(label, numbers, values, style)
        for label, values, style in both
        if any(v is not None for v in values)
    ]
    if together:
        figures.append(
            Figure(
                "layer-together",
                "Lines: conflict among all models, by layer",
                {"": _lines(together, "share", 1, numbers)},
                heading="All models together",
            )
        )
    words = (
        "At which depth of the network the models agree. A recipe can give layers in conflict their own "
        "method or weight."
    )
    body = f'<div class="maps" style="--least:520px">\n{"".join(map(figure_html, figures))}</div>\n'
    return PageSection("layers", "How they relate, layer by layer", [words], body, figures)


def _line(
    analysis: Analysis,
    numbers: Sequence[int],
    by_layer: Mapping[int, Mapping[tuple[int, int], Sequence[float | None]]],
    which: int,
    pair: tuple[int, int],
    style: tuple[str, str],
) -> dict[str, Any]:
    first, second = pair
    values = [by_layer[n].get((min(pair), max(pair)), (None,) * len(PAIR_MEASURES))[which] for n in numbers]
    names = f"{first + 1} {analysis.models[first].name} – {second + 1} {analysis.models[second].name}"
    return _trace(names, numbers, values, style)


def _trace(
    label: str, numbers: Sequence[int], values: Sequence[float | None], style: tuple[str, str]
) -> dict[str, Any]:
    ground, mark = style
    every = math.ceil(len(numbers) / 20)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(label),
        "x": list(numbers),
        "y": list(values),
        "line": {"color": ground, "width": 2},
        "marker": {
            "color": ground,
            "symbol": mark,
            "size": [8 if i % every == 0 else 0 for i in range(len(numbers))],
            "opacity": 1,
            "line": {"width": 0},
        },
        "hovertemplate": "layer %{x}<br>%{fullData.name}: %{y:.3g}<extra></extra>",
    }


def _lines(
    data: Sequence[Mapping[str, Any]], title: str, which: int, numbers: Sequence[int]
) -> dict[str, Any]:
    values = [v for trace in data for v in trace["y"] if v is not None]
    least = min(0.0, *values) if values else 0.0
    most = max(0.2, *values) if values else 1.0
    room = 0.06 * (most - least)
    return {
        "data": list(data),
        "layout": {
            "height": 360,
            "hovermode": "closest",
            "xaxis": {
                "title": {"text": "layer", "standoff": 6},
                "tickformat": "d",
                "nticks": 16,
                "showgrid": False,
                "zeroline": False,
            }
            | ({"tickvals": list(numbers)} if len(numbers) <= 12 else {}),
            "yaxis": {
                "title": {"text": title.lower(), "standoff": 8},
                "range": [least - room if least < 0 else 0, most + room],
                **({} if which in (0, 5, 6) else {"tickformat": ".3~%"}),
                "zeroline": True,
            },
        },
        "narrow": {"xaxis": {"nticks": 7}},
    }


def _distributions(analysis: Analysis) -> PageSection:
    scopes = scopes_of(analysis)
    styles = [series(i) for i in range(len(analysis.models))]
    views: dict[str, Mapping[str, Any]] = {}
    labels: list[str] = []
    for label, scope in scopes:
        rows = [
            (f"{i + 1} {m.name}", c, styles[i])
            for i, m in enumerate(analysis.models)
            if (c := scope.changes[i])
        ]
        views[str(len(labels))] = _boxes(rows, [r[0].partition(" ")[0] for r in rows])
        labels.append(f"all models, {label}")
    for index, model in enumerate(analysis.models):
        rows = [(label, c, styles[index]) for label, scope in scopes if (c := scope.changes[index])]
        views[str(len(labels))] = _boxes(rows, [shorten(label, 11) for label, _, _ in rows])
        labels.append(f"{index + 1} {shorten(model.name, 30)}, by group")
    figure = Figure(
        "boxes", "Box plot: quantiles of the entries of the task vectors", views, [("Show", labels)]
    )
    words = (
        "The entries of the task vectors, on an axis that is linear around 0 and logarithmic further out. "
        "Thin line: all entries; line: 98 % of them; box: the middle half; mark: the median. Where a box is "
        "far narrower than its lines, few entries hold the change, and trimming loses little."
    )
    return PageSection(
        "distributions", "How the changes are distributed", [words], figure_html(figure), [figure]
    )


def _boxes(
    rows: Sequence[tuple[str, DeltaStatistics, tuple[str, str]]], short: Sequence[str]
) -> dict[str, Any]:
    unit = axis_unit([change for _, change, _ in rows])

    def at(value: float) -> float:
        return axis_place(value, unit)

    data: list[dict[str, Any]] = []
    for place, (label, change, (ground, mark)) in enumerate(rows):
        q = change.quantiles
        texts = [
            f"{escape(label)}<br>{percent(level)} of the entries are below {number(v)}"
            for level, v in zip(LEVELS, q, strict=True)
        ]
        for low, high, width, opacity in ((0, 10, 1, 0.9), (1, 9, 4, 0.75), (4, 6, 15, 0.6)):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [at(q[low]), at(q[high])],
                    "y": [place, place],
                    "line": {"color": ground, "width": width},
                    "opacity": opacity,
                    "hoverinfo": "skip",
                }
            )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [at(v) for v in q],
                "y": [place] * len(q),
                "marker": {
                    "color": ground,
                    "symbol": mark,
                    "size": [10 if i == 5 else 4 for i in range(len(q))],
                    "line": {"width": 0},
                },
                "hovertext": texts,
                "hoverinfo": "text",
            }
        )
    far = max((c.max_abs for _, c, _ in rows), default=0.0)
    exponents = axis_exponents(unit, far)

    def ticks(step: int) -> dict[str, Any]:
        shown = exponents[::-1][::step][::-1]
        places = [-(10.0**e) for e in reversed(shown)] + [0.0] + [10.0**e for e in shown]
        texts = (
            [f"−10{superscript(e)}" for e in reversed(shown)] + ["0"] + [f"10{superscript(e)}" for e in shown]
        )
        return {"tickvals": [at(p) for p in places], "ticktext": texts}

    end = at(far or unit) * 1.04
    return {
        "data": data,
        "layout": {
            "height": 34 * max(len(rows), 1) + 68,
            "hovermode": "closest",
            "xaxis": {"range": [-end, end], "zeroline": True, "tickangle": 0, **ticks(math.ceil(len(exponents) / 5))},
            "yaxis": {
                "tickvals": list(range(len(rows))),
                "ticktext": [escape(shorten(label, 26)) for label, _, _ in rows],
                "range": [len(rows) - 0.4, -0.6],
                "showgrid": False,
                "zeroline": False,
            },
        },
        "narrow": {"xaxis": ticks(math.ceil(len(exponents) / 2)), "yaxis": {"ticktext": [escape(s) for s in short]}},
        "table": {
            "columns": ["", *(percent(level) for level in LEVELS), "mean", "std", "skewness", "excess kurtosis"],
            "rows": [
                [label, *(number(v) for v in (*c.quantiles, c.mean, c.std, c.skewness, c.excess_kurtosis))]
                for label, c, _ in rows
            ],
        },
    }  # fmt: skip


def _movers(analysis: Analysis) -> PageSection:
    rows = []
    for index, model in enumerate(analysis.models):
        changed = [(t, c) for t in analysis.tensors if (c := t.changes[index]) and c.l2]
        movers: dict[str, tuple[TensorScope, DeltaStatistics]] = {}
        for rank in (lambda c: c.l2, lambda c: c.relative_l2 or 0.0, lambda c: c.max_abs):
            largest = sorted(changed, key=lambda entry, rank=rank: -rank(entry[1]))[:MOVERS]  # type: ignore[misc]
            movers |= {t.name: (t, c) for t, c in largest}
        for tensor, change in sorted(movers.values(), key=lambda entry: -entry[1].l2):
            rows.append(
                f'<tr data-model="{index + 1} {escape(shorten(model.name, 30))}"><td data-value="{index + 1}">{badge(index)}<span class="unseen"> {escape(model.name)}</span></td>'
                f"<td>{name(tensor.name)}</td><td>{tensor.group}</td>"
                f'<td class="n" data-value="{change.elements}">{"×".join(map(str, tensor.shape))}</td>'
                f"{cell(number(change.l2), change.l2)}{cell(percent(change.relative_l2), change.relative_l2)}"
                f"{cell(number(change.max_abs), change.max_abs)}{cell(percent(change.unchanged), change.unchanged)}</tr>\n"
            )  # fmt: skip
    if not rows:
        return PageSection("movers", "Tensors that changed most", ["No tensor changed."], "")
    columns = (
        ("model", "text"),
        ("tensor", "text"),
        ("group", "text"),
        ("shape", "number"),
        ("L2", "number"),
        ("relative", "number"),
        ("largest", "number"),
        ("unchanged", "number"),
    )
    names = "".join(
        f"<option>{i + 1} {escape(shorten(m.name, 30))}</option>" for i, m in enumerate(analysis.models)
    )
    choice = f'<div class="choices"><label>Model<select data-filters="movers-table"><option value="">all</option>{names}</select></label></div>\n'
    words = (
        f"For each model the {MOVERS} tensors with the longest task vector, the {MOVERS} that changed most "
        f"for their size and the {MOVERS} with the largest single entry. Click a heading to sort."
    )
    body = (choice if len(analysis.models) > 1 else "") + table(
        columns, rows, label="Tensors that changed most", anchor="movers-table", sortable=True
    )
    return PageSection("movers", "Tensors that changed most", [words], body)


def _skipped(analysis: Analysis) -> PageSection | None:
    if not analysis.skipped:
        return None
    rows = [
        f"<tr><td>{name(s.tensor)}</td><td>{name(s.model) if s.model is not None else 'base'}</td>"
        f'<td class="prose">{escape(s.reason)}</td>{cell(format_count(s.elements), float(s.elements))}</tr>\n'
        for s in analysis.skipped[:LISTED]
    ]
    elements = sum(s.elements for s in analysis.skipped)
    count = f"{count_of(len(analysis.skipped), 'tensor')} with {count_of(elements, 'element')}"
    words = f"These are counted nowhere on this page: {count}."
    if len(analysis.skipped) > LISTED:
        words += f" The first {LISTED} are listed here, all of them in summary.json."
    columns = (("tensor", "text"), ("model", "text"), ("reason", "text"), ("elements", "number"))
    return PageSection("skipped", "Not compared", [words], table(columns, rows, label="Not compared"))


def _glossary() -> PageSection:
    listed = "".join(
        f"<div><dt>{escape(word)}</dt><dd>{escape(meaning)}</dd></div>\n" for word, meaning in GLOSSARY
    )
    return PageSection("glossary", "Glossary", [], f'<dl class="glossary">\n{listed}</dl>\n')
