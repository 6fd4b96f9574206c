"""Builds search.html, a self-contained page with the trials and results of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from alnico.analysis.page import (
    CIVIDIS,
    Figure,
    PageSection,
    cell,
    copyable,
    escape,
    figure_html,
    format_count,
    number,
    page,
    percent,
    ramp,
    scatter_view,
    select_box,
    series,
    shorten,
    table,
)
from alnico.evaluation.scorecard_page import scorecard_sections
from alnico.numerics.sizes import count_of
from alnico.tune.search.objective import is_better
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial
from alnico.tune.search.settings import SAME
from alnico.tune.search.windows import WindowScores, window_scores

MOST_RECIPES = 20
"""Largest number of recipes on the page."""

MOST_ROWS = 1_000
"""Largest number of trials in the page's table, the best first; trials.csv has all of them."""


def search_page(result: SearchResult) -> str:
    """Return the page as HTML. Errors: AlnicoError without plotly."""
    complete = [t for t in result.trials if t.state == "complete"]
    sections = [_best(result)]
    if result.report is not None:
        first, *others = scorecard_sections(result.report)
        which = (
            "On the examples searched on."
            if result.settings.report == SAME
            else "On held-out examples, which no trial was scored on."
        )
        sections += [replace(first, words=[which, *first.words]), *others]
    if (windows := _windows(result)) is not None:
        sections.append(windows)
    if complete:
        sections.append(_history(result, complete))
    if len(result.objectives) > 1 and complete:
        sections.append(_front(result, complete))
    if result.importances:
        sections.append(_importance(result))
    if complete:
        sections.append(_slices(result, complete))
    sections.append(_trials(result, complete))
    counts = result.counts
    facts = [
        ("Sampler", result.settings.sampler),
        (
            "Scored on",
            f"{result.device}, in {'the dtype of each merge' if result.dtype == 'own' else result.dtype}",
        ),
        ("Seed", str(result.settings.seed)),
        ("Trials", format_count(len(result.trials))),
        *(
            (state.capitalize(), format_count(counts[state]))
            for state in ("complete", "pruned", "failed")
            if counts.get(state)
        ),
        ("Values searched", str(len(result.dimensions))),
    ]
    return page(
        result.name,
        "alnico search",
        facts,
        sections,
        "alnico search: except in the report, all scores on this page are on the examples searched on.",
    )


def _best(result: SearchResult) -> PageSection:
    names = ", ".join(o.name for o in result.objectives)
    words = [f"The best of {count_of(len(result.trials), 'trial')} by {names}, on the examples searched on."]
    if len(result.best) > 1:
        words = [
            f"The {len(result.best)} trials on the Pareto front of {names}, on the examples searched on."
        ]
    shown = list(zip(result.best[:MOST_RECIPES], result.recipes, strict=False))
    files = (
        "The same recipe is best.yml next to this page"
        if len(result.best) == 1
        else f"The same recipes are best-1.yml to best-{len(result.best)}.yml next to this page"
    )
    words.append(
        f"{files}. Paths of models on this page are relative to the folder of the recipe that was searched."
    )
    if len(result.best) > MOST_RECIPES:
        words.append(f"The first {MOST_RECIPES} are shown here.")
    headings = [f"Trial {trial.number}: {_values(result, trial)}" for trial, _ in shown]
    recipes = "".join(
        f"<div><h3>{escape(heading)}</h3>\n{copyable(recipe.text, heading)}</div>\n"
        for heading, (_, recipe) in zip(headings, shown, strict=True)
    )
    choice = select_box("Recipe", "recipes", headings) if len(shown) > 1 else ""
    body = f'{choice}<div id="recipes">\n{recipes}</div>\n'
    return PageSection(
        "best", "The recipe" if len(result.best) == 1 else "The recipes", [*words, *result.notes], body
    )


def _values(result: SearchResult, trial: Trial) -> str:
    return ", ".join(f"{o.name} {number(v)}" for o, v in zip(result.objectives, trial.values, strict=True))


def _history(result: SearchResult, complete: Sequence[Trial]) -> PageSection:
    views = {str(i): _progress(result, complete, i) for i in range(len(result.objectives))}
    label = "Points: the value of each trial, and the best so far as a line"
    figure = Figure("history-drawing", label, views if len(views) > 1 else {"": views["0"]}, _choices(result))
    return PageSection(
        "history",
        "How the search went",
        ["Each point is a trial; the line is the best so far."],
        figure_html(figure),
        [figure],
    )


def _choices(result: SearchResult) -> list[tuple[str, list[str]]]:
    return [("Objective", [o.name for o in result.objectives])] if len(result.objectives) > 1 else []


def _progress(result: SearchResult, complete: Sequence[Trial], index: int) -> dict[str, Any]:
    objective = result.objectives[index]
    best, line = None, []
    for trial in complete:
        value = trial.values[index]
        best = value if best is None or is_better(value, best, objective.goal) else best
        line.append(best)
    numbers = [t.number for t in complete]
    traces = [
        _points("complete", 0, numbers, [t.values[index] for t in complete], [_hover(result, t) for t in complete]),
        {
            "type": "scatter", "mode": "lines", "name": "best so far", "x": numbers, "y": line, "hoverinfo": "skip",
            "line": {"color": series(1)[0], "width": 2, "shape": "hv"}, "marker": {"color": series(1)[0]},
        },
    ]  # fmt: skip
    pruned = [t for t in result.trials if t.state == "pruned" and t.rungs]
    if pruned and len(result.objectives) == 1:
        traces.append(
            _points(
                "pruned",
                6,
                [t.number for t in pruned],
                [t.rungs[-1] for t in pruned],
                [_hover(result, t) for t in pruned],
            )
        )
    rows = [[f"trial {t.number}", t.values[index], so_far] for t, so_far in zip(complete, line, strict=True)]
    shown = {"columns": ["", objective.name, "best so far"], "rows": rows}
    return scatter_view(traces, "trial", objective.name, shown, height=380)


def _points(
    label: str, index: int, x: Sequence[Any], y: Sequence[float], hover: Sequence[str]
) -> dict[str, Any]:
    ground, mark = series(index)
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": list(x), "y": list(y),
        "marker": {"color": ground, "symbol": mark, "size": 8, "line": {"width": 0}},
        "hovertext": list(hover), "hoverinfo": "text",
    }  # fmt: skip


def _hover(result: SearchResult, trial: Trial) -> str:
    lines = [f"trial {trial.number}"]
    lines += [f"{o.name} {number(v)}" for o, v in zip(result.objectives, trial.values, strict=False)]
    lines += [f"{name}: {_text(value)}" for name, value in list(trial.point.items())[:12]]
    return "<br>".join(map(escape, lines))


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _front(result: SearchResult, complete: Sequence[Trial]) -> PageSection:
    pairs = list(combinations(range(len(result.objectives)), 2))
    views = {str(i): _pair(result, complete, *pair) for i, pair in enumerate(pairs)}
    names = [f"{result.objectives[a].name} and {result.objectives[b].name}" for a, b in pairs]
    choices = [("Objectives", names)] if len(pairs) > 1 else []
    figure = Figure(
        "front-drawing",
        "Points: two objectives of each trial, with the Pareto front marked",
        views if len(pairs) > 1 else {"": views["0"]},
        choices,
    )
    words = [
        "The front has the trials that no other trial equals in all objectives and beats in one. Each has "
        "its own recipe."
    ]
    return PageSection("front", "Pareto front", words, figure_html(figure), [figure])


def _pair(result: SearchResult, complete: Sequence[Trial], a: int, b: int) -> dict[str, Any]:
    front = sorted(result.best, key=lambda t: t.values[a])
    on_it = {t.number for t in front}
    others = [t for t in complete if t.number not in on_it]
    traces = [
        _points(
            "other trials",
            6,
            [t.values[a] for t in others],
            [t.values[b] for t in others],
            [_hover(result, t) for t in others],
        ),
        _points(
            "front",
            1,
            [t.values[a] for t in front],
            [t.values[b] for t in front],
            [_hover(result, t) for t in front],
        ),
    ]
    if len(result.objectives) == 2:  # of more, two do not show a front
        traces[1] |= {"mode": "lines+markers", "line": {"color": series(1)[0], "width": 1, "dash": "dot"}}
    columns = ["", result.objectives[a].name, result.objectives[b].name]
    rows = [[f"trial {t.number}", t.values[a], t.values[b]] for t in front]
    shown = {"columns": columns, "rows": rows}
    return scatter_view(traces, result.objectives[a].name, result.objectives[b].name, shown, height=420)


def _windows(result: SearchResult) -> PageSection | None:
    """The heat map of all windows, if a window of layers was searched."""
    found = [window_scores(result, index) for index in range(len(result.objectives))]
    views = {str(i): _heat_map(result, i, scores) for i, scores in enumerate(found) if scores is not None}
    if not views:
        return None
    figure = Figure(
        "windows-map",
        "Heat map: the objective of each window of layers that was repeated, by first layer and length",
        views if len(views) > 1 else {"": views["0"]},
        _choices(result),
    )
    words = [
        "Each field is a window of layers that is repeated, by its first layer and its length. Fields without colour were not "
        "tried. If a window was tried several times, its best value is shown."
    ]
    bar = ramp(CIVIDIS, "worst", "best")
    return PageSection("windows", "All windows", words, bar + figure_html(figure), [figure])


def _heat_map(result: SearchResult, index: int, scores: WindowScores) -> dict[str, Any]:
    objective = result.objectives[index]
    least, most = min(scores.found), max(scores.found)
    colours = CIVIDIS if objective.goal == "max" else tuple(reversed(CIVIDIS))
    gap = 2 if len(scores.firsts) <= 48 else 0
    trace = {
        "type": "heatmap",
        "name": escape(objective.name),
        "x": scores.firsts,
        "y": scores.lengths,
        "z": scores.values,
        "hovertemplate": "from layer %{x}, %{y} layers<br>%{z:.4g}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [[i / (len(colours) - 1), c] for i, c in enumerate(colours)],
        "zmin": least,
        "zmax": most if most > least else least + 1,
        "showscale": False,
        "xgap": gap,
        "ygap": gap,
    }
    layout = {
        "height": max(22 * len(scores.lengths) + 90, 200),
        "xaxis": {"title": {"text": "first layer", "standoff": 6}, "tickformat": "d", "nticks": 16, "showgrid": False, "zeroline": False},
        "yaxis": {"title": {"text": "length", "standoff": 8}, "tickformat": "d", "nticks": 12, "showgrid": False, "zeroline": False},
    }  # fmt: skip
    behind = {
        "columns": [f"{objective.name}, by first layer", *map(str, scores.firsts)],
        "rows": [
            [f"length {length}", *row] for length, row in zip(scores.lengths, scores.values, strict=True)
        ],
    }
    return {"data": [trace], "layout": layout, "narrow": {"xaxis": {"nticks": 6}}, "table": behind}


def _importance(result: SearchResult) -> PageSection:
    shares = sorted(result.importances.items(), key=lambda item: -item[1])[:40]
    names = [name for name, _ in shares]
    data = {
        "type": "bar", "orientation": "h", "name": "importance", "y": list(range(len(names))), "x": [s for _, s in shares],
        "marker": {"color": series(0)[0]}, "hovertext": [f"{escape(n)}<br>{percent(s)}" for n, s in shares],
        "hoverinfo": "text",
    }  # fmt: skip
    layout = {
        "height": 26 * len(names) + 80,
        "bargap": 0.25,
        "xaxis": {
            "title": {"text": "share of the variation explained", "standoff": 8},
            "rangemode": "tozero",
            "nticks": 6,
        },
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [escape(shorten(n, 40)) for n in names],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
    }
    narrow = {
        "xaxis": {"title": {"text": "share explained", "standoff": 8}, "nticks": 4},
        "yaxis": {"ticktext": [escape(shorten(n, 20)) for n in names]},
    }
    behind = {"columns": ["value", "importance"], "rows": [[n, percent(s)] for n, s in shares]}
    figure = Figure(
        "importance-drawing",
        "Bars: how much of the objective each value explains",
        {"": {"data": [data], "layout": layout, "narrow": narrow, "table": behind}},
    )
    words = [
        f"How much of the variation of {result.objectives[0].name} each value explains among the better "
        "trials (PED-ANOVA). They add up to 100 %."
    ]
    return PageSection("importance", "What mattered", words, figure_html(figure), [figure])


def _slices(result: SearchResult, complete: Sequence[Trial]) -> PageSection:
    order = sorted(result.dimensions, key=lambda n: -result.importances.get(n, 0.0))[:60]
    several = len(result.objectives) > 1
    views = {
        f"{i}|{j}" if several else f"{i}": _slice(result, complete, name, j)
        for i, name in enumerate(order)
        for j in range(len(result.objectives))
    }
    figure = Figure(
        "slices-drawing",
        "Points: the objective of each trial against one value",
        views,
        [("Value", order), *_choices(result)],
    )
    return PageSection(
        "slices",
        "Value by value",
        ["The objective of each trial against one of the values searched."],
        figure_html(figure),
        [figure],
    )


def _slice(result: SearchResult, complete: Sequence[Trial], name: str, index: int) -> dict[str, Any]:
    x = [escape(v) if isinstance(v, str) else v for v in (t.point[name] for t in complete)]
    traces = [
        _points("complete", 0, x, [t.values[index] for t in complete], [_hover(result, t) for t in complete])
    ]
    best = result.best[0] if result.best else None
    if best is not None:
        place = best.point[name]
        traces.append(
            _points(
                "best",
                1,
                [escape(place) if isinstance(place, str) else place],
                [best.values[index]],
                [_hover(result, best)],
            )
        )
    rows = [[t.point[name], t.values[index]] for t in complete]
    shown = {"columns": [name, result.objectives[index].name], "rows": rows}
    return scatter_view(traces, name, result.objectives[index].name, shown, height=380)


def _trials(result: SearchResult, complete: Sequence[Trial]) -> PageSection:
    goal = result.objectives[0].goal
    ranked = sorted(complete, key=lambda t: -t.values[0] if goal == "max" else t.values[0])
    ranked += [t for t in result.trials if t.state in ("pruned", "failed")]
    columns = [("trial", "number"), ("state", "text"), *((o.name, "number") for o in result.objectives)]
    texts = {n for n in result.dimensions if any(isinstance(t.point.get(n), str) for t in ranked)}
    columns += [(name, "text" if name in texts else "number") for name in result.dimensions]
    rows = []
    for trial in ranked[:MOST_ROWS]:
        values = trial.values or (None,) * len(result.objectives)
        cells = "".join(cell(number(v), v) for v in values)
        for name in result.dimensions:
            value = trial.point.get(name, "")
            cells += (
                f"<td>{escape(_text(value))}</td>"
                if name in texts
                else cell(escape(_text(value)), float(value) if isinstance(value, (int, float)) else None)
            )
        state = trial.state if not trial.reason else f"{trial.state}: {trial.reason}"
        rows.append(
            f"<tr>{cell(str(trial.number), float(trial.number))}<td>{escape(state[:200])}</td>{cells}</tr>\n"
        )
    words = [] if len(ranked) <= MOST_ROWS else [f"The best {MOST_ROWS} trials; trials.csv has all of them."]
    return PageSection(
        "trials",
        "All trials",
        words,
        table(columns, rows, label="All trials", anchor="trials-table", sortable=True),
    )
