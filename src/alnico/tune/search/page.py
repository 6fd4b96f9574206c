"""search.html: what was tried, what mattered, and what was found, as a page that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from alnico.analysis.page import (
    Figure,
    PageSection,
    cell,
    escape,
    figure_html,
    format_count,
    number,
    page,
    percent,
    series,
    table,
)
from alnico.evaluation.scorecard_page import scorecard_sections
from alnico.tune.search.objective import is_better
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import SAME

MOST_ROWS = 1_000
"""Trials in the table of the page: the best. All are in trials.csv."""


def search_page(found: SearchResult) -> str:
    """Make the page. Errors: AlnicoError without plotly."""
    complete = [t for t in found.trials if t.state == "complete"]
    sections = [_best(found)]
    if found.report is not None:
        first, *others = scorecard_sections(found.report)
        of = "searched on" if found.settings.report == SAME else "held out: no trial was scored on them"
        sections += [replace(first, words=[f"On the examples {of}.", *first.words]), *others]
    if complete:
        sections.append(_history(found, complete))
    if len(found.objectives) > 1 and complete:
        sections.append(_front(found, complete))
    if found.importances:
        sections.append(_importance(found))
    if complete:
        sections.append(_slices(found, complete))
    sections.append(_trials(found, complete))
    counts = found.counts
    facts = [
        ("Sampler", found.settings.sampler),
        ("Seed", str(found.settings.seed)),
        ("Trials", format_count(len(found.trials))),
        *(
            (state.capitalize(), format_count(counts[state]))
            for state in ("complete", "pruned", "failed")
            if counts.get(state)
        ),
        ("Values searched", str(len(found.dimensions))),
    ]
    return page(
        found.name,
        "alnico search",
        facts,
        sections,
        "alnico search: scores in this page but those of the report are of the examples searched on.",
    )


def _best(found: SearchResult) -> PageSection:
    names = ", ".join(o.name for o in found.objectives)
    words = [f"The best of {format_count(len(found.trials))} trials by {names}, on the examples searched on."]
    if len(found.best) > 1:
        words = [
            f"The {len(found.best)} trials that no other beats in all of {names}, on the examples searched on."
        ]
    body = "".join(
        f'<h3>Trial {trial.number}: {escape(_values(found, trial))}</h3><pre class="scroll">{escape(recipe.text)}</pre>\n'
        for trial, recipe in zip(found.best[:20], found.recipes, strict=False)
    )
    return PageSection(
        "best", "The recipe" if len(found.best) == 1 else "The recipes", [*words, *found.notes], body
    )


def _values(found: SearchResult, trial: Trial) -> str:
    return ", ".join(f"{o.name} {number(v)}" for o, v in zip(found.objectives, trial.values, strict=True))


def _history(found: SearchResult, complete: Sequence[Trial]) -> PageSection:
    views = {str(i): _course(found, complete, i) for i in range(len(found.objectives))}
    label = "Points: the value of each trial, and the best so far as a line"
    figure = Figure("history-drawing", label, views if len(views) > 1 else {"": views["0"]}, _choices(found))
    return PageSection(
        "history",
        "History",
        ["Each point is a trial; the line is the best so far."],
        figure_html(figure),
        [figure],
    )


def _choices(found: SearchResult) -> list[tuple[str, list[str]]]:
    return [("Objective", [o.name for o in found.objectives])] if len(found.objectives) > 1 else []


def _course(found: SearchResult, complete: Sequence[Trial], index: int) -> dict[str, Any]:
    objective = found.objectives[index]
    best, line = None, []
    for trial in complete:
        value = trial.values[index]
        best = value if best is None or is_better(value, best, objective.goal) else best
        line.append(best)
    numbers = [t.number for t in complete]
    traces = [
        _points("complete", 0, numbers, [t.values[index] for t in complete], [_told(found, t) for t in complete]),
        {
            "type": "scatter", "mode": "lines", "name": "best so far", "x": numbers, "y": line, "hoverinfo": "skip",
            "line": {"color": series(1)[0], "width": 2, "shape": "hv"}, "marker": {"color": series(1)[0]},
        },
    ]  # fmt: skip
    pruned = [t for t in found.trials if t.state == "pruned" and t.rungs]
    if pruned and len(found.objectives) == 1:
        traces.append(
            _points(
                "given up",
                6,
                [t.number for t in pruned],
                [t.rungs[-1] for t in pruned],
                [_told(found, t) for t in pruned],
            )
        )
    rows = [[f"trial {t.number}", t.values[index], so_far] for t, so_far in zip(complete, line, strict=True)]
    shown = {"columns": ["", objective.name, "best so far"], "rows": rows}
    return {"data": traces, "layout": _axes("trial", objective.name, 380), "table": shown}


def _points(
    label: str, index: int, x: Sequence[Any], y: Sequence[float], hover: Sequence[str]
) -> dict[str, Any]:
    ground, mark = series(index)
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": list(x), "y": list(y),
        "marker": {"color": ground, "symbol": mark, "size": 8, "opacity": 0.75, "line": {"width": 0}},
        "hovertext": list(hover), "hoverinfo": "text",
    }  # fmt: skip


def _told(found: SearchResult, trial: Trial) -> str:
    lines = [f"trial {trial.number}"]
    lines += [f"{o.name} {number(v)}" for o, v in zip(found.objectives, trial.values, strict=False)]
    lines += [f"{name}: {_text(value)}" for name, value in list(trial.point.items())[:12]]
    return "<br>".join(map(escape, lines))


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _axes(x: str, y: str, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": escape(x), "standoff": 6},
            "showgrid": False,
            "zeroline": False,
            "nticks": 12,
        },
        "yaxis": {"title": {"text": escape(y), "standoff": 8}, "zeroline": False, "nticks": 8},
    }


def _front(found: SearchResult, complete: Sequence[Trial]) -> PageSection:
    pairs = list(combinations(range(len(found.objectives)), 2))
    views = {str(i): _of_pair(found, complete, *pair) for i, pair in enumerate(pairs)}
    names = [f"{found.objectives[a].name} and {found.objectives[b].name}" for a, b in pairs]
    choices = [("Objectives", names)] if len(pairs) > 1 else []
    figure = Figure(
        "front-drawing",
        "Points: two objectives of each trial, the Pareto front marked",
        views if len(pairs) > 1 else {"": views["0"]},
        choices,
    )
    words = [
        "On the front are the trials that no other equals in all objectives and beats in one. Each has a recipe of its own."
    ]
    return PageSection("front", "Pareto front", words, figure_html(figure), [figure])


def _of_pair(found: SearchResult, complete: Sequence[Trial], a: int, b: int) -> dict[str, Any]:
    front = sorted(found.best, key=lambda t: t.values[a])
    on_it = {t.number for t in front}
    others = [t for t in complete if t.number not in on_it]
    traces = [
        _points(
            "other trials",
            6,
            [t.values[a] for t in others],
            [t.values[b] for t in others],
            [_told(found, t) for t in others],
        ),
        _points(
            "front",
            1,
            [t.values[a] for t in front],
            [t.values[b] for t in front],
            [_told(found, t) for t in front],
        ),
    ]
    traces[1] |= {"mode": "lines+markers", "line": {"color": series(1)[0], "width": 1, "dash": "dot"}}
    columns = ["", found.objectives[a].name, found.objectives[b].name]
    rows = [[f"trial {t.number}", t.values[a], t.values[b]] for t in front]
    shown = {"columns": columns, "rows": rows}
    return {
        "data": traces,
        "layout": _axes(found.objectives[a].name, found.objectives[b].name, 420),
        "table": shown,
    }


def _importance(found: SearchResult) -> PageSection:
    shares = sorted(found.importances.items(), key=lambda item: -item[1])[:40]
    names = [escape(name) for name, _ in shares]
    data = {
        "type": "bar", "orientation": "h", "name": "importance", "y": list(range(len(names))), "x": [s for _, s in shares],
        "marker": {"color": series(0)[0]}, "hovertext": [f"{n}<br>{percent(s)}" for n, (_, s) in zip(names, shares, strict=True)],
        "hoverinfo": "text",
    }  # fmt: skip
    layout = {
        "height": 26 * len(names) + 70,
        "bargap": 0.25,
        "xaxis": {
            "title": {"text": "share of the variation explained", "standoff": 8},
            "rangemode": "tozero",
            "nticks": 6,
        },
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "autorange": "reversed",
            "showgrid": False,
        },
    }
    figure = Figure(
        "importance-drawing",
        "Bars: how much of the objective each value explains",
        {"": {"data": [data], "layout": layout}},
    )
    words = [
        f"How much of the variation of {found.objectives[0].name} each value explains among the better trials (PED-ANOVA); all together 100 %."
    ]
    return PageSection("importance", "What mattered", words, figure_html(figure), [figure])


def _slices(found: SearchResult, complete: Sequence[Trial]) -> PageSection:
    order = sorted(found.dimensions, key=lambda n: -found.importances.get(n, 0.0))[:60]
    several = len(found.objectives) > 1
    views = {
        f"{i}|{j}" if several else f"{i}": _slice(found, complete, name, j)
        for i, name in enumerate(order)
        for j in range(len(found.objectives))
    }
    figure = Figure(
        "slices-drawing",
        "Points: the objective of each trial over one value",
        views,
        [("Value", order), *_choices(found)],
    )
    return PageSection(
        "slices",
        "Slices",
        ["Each trial's objective over one of the values searched."],
        figure_html(figure),
        [figure],
    )


def _slice(found: SearchResult, complete: Sequence[Trial], name: str, index: int) -> dict[str, Any]:
    x = [escape(v) if isinstance(v, str) else v for v in (t.point[name] for t in complete)]
    traces = [
        _points("complete", 0, x, [t.values[index] for t in complete], [_told(found, t) for t in complete])
    ]
    best = found.best[0] if found.best else None
    if best is not None:
        place = best.point[name]
        traces.append(
            _points(
                "best",
                1,
                [escape(place) if isinstance(place, str) else place],
                [best.values[index]],
                [_told(found, best)],
            )
        )
    rows = [[t.point[name], t.values[index]] for t in complete]
    return {
        "data": traces,
        "layout": _axes(name, found.objectives[index].name, 380),
        "table": {"columns": [name, found.objectives[index].name], "rows": rows},
    }


def _trials(found: SearchResult, complete: Sequence[Trial]) -> PageSection:
    goal = found.objectives[0].goal
    ranked = sorted(complete, key=lambda t: -t.values[0] if goal == "max" else t.values[0])
    ranked += [t for t in found.trials if t.state in ("pruned", "failed")]
    columns = [("trial", "number"), ("state", "text"), *((o.name, "number") for o in found.objectives)]
    columns += [(name, "number") for name in found.dimensions]
    rows = []
    for trial in ranked[:MOST_ROWS]:
        values = trial.values or (None,) * len(found.objectives)
        cells = "".join(cell(number(v), v) for v in values)
        for name in found.dimensions:
            value = trial.point.get(name, "")
            cells += cell(escape(_text(value)), float(value) if isinstance(value, (int, float)) else None)
        state = trial.state if not trial.reason else f"{trial.state}: {trial.reason}"
        rows.append(
            f"<tr>{cell(str(trial.number), float(trial.number))}<td>{escape(state[:200])}</td>{cells}</tr>\n"
        )
    words = [] if len(ranked) <= MOST_ROWS else [f"The best {MOST_ROWS}; all are in trials.csv."]
    return PageSection("trials", "Trials", words, table(columns, rows, anchor="trials-table", sortable=True))
