"""search.html: what stands in it, without a browser."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from made_search import Formula, searched, settings_of

from alnico.evaluation.scorecard import scorecard
from alnico.evaluation.tasks import Score
from alnico.tune.search.objective import best_of, objectives_of
from alnico.tune.search.page import search_page
from alnico.tune.search.result import SearchResult

HOSTILE = "<script>alert(1)</script>&\"'"


def result(keys: str, tasks: list[Any]) -> SearchResult:
    recipe = """
merge_method: {choice: [task_arithmetic, ties]}
base_model: base
models:
  - {model: code, parameters: {weight: {search: [0.0, 1.5]}}}
  - {model: "<b>math</b>", parameters: {weight: {search: [0.0, 1.5]}}}
"""
    space, settings = settings_of(keys, recipe)
    trials = searched(keys, tasks, recipe=recipe)
    objectives = objectives_of(settings.objective, tasks)
    best = best_of(trials, [o.goal for o in objectives])
    draws = {label: {t.name: Score(0.5, np.arange(8) % 2.0) for t in tasks} for label in ("base", "best")}
    card = scorecard(draws, tasks, base="base", merged=["best"])
    names = tuple(d.name for d in space.dimensions)
    recipes = tuple(space.instantiate(t.point) for t in best)
    return SearchResult(
        HOSTILE, recipes, best, trials, objectives, names, settings, dict.fromkeys(names, 1 / 3), card
    )


@pytest.mark.parametrize(
    ("keys", "tasks", "anchors"),
    [
        ("trials: 12, halving: true", ["a"], ["best", "scores", "history", "importance", "slices", "trials"]),
        (
            f"trials: 12, objective: [a, '{HOSTILE.replace(chr(39), chr(39) * 2)}', c]",
            ["a", HOSTILE, "c"],
            ["front", "history", "slices"],
        ),
    ],
)
def test_the_page_has_a_view_for_every_choice_and_runs_nothing_that_was_named(
    keys: str, tasks: list[str], anchors: list[str]
) -> None:
    made = [
        Formula(name, lambda m, sign=sign: sign * m.weights[0])
        for name, sign in zip(tasks, (1.0, -1.0, 0.5), strict=False)
    ]
    page = search_page(result(keys, made))
    for anchor in anchors:
        assert f'<section id="{anchor}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page.partition("<footer>")[0])
    assert len(ids) == len(set(ids))
    assert "<script>alert" not in page
    assert "<b>math" not in page
    drawn = re.findall(r'data-figure="([^"]+)"', page)
    assert len(drawn) >= 4
    for name in drawn:
        found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
        assert found is not None
        figure = json.loads(found[1])
        keys_ = {
            "|".join(map(str, chosen))
            for chosen in itertools.product(*(range(len(c["options"])) for c in figure["choices"]))
        }
        assert set(figure["views"]) == keys_
        for view in figure["views"].values():
            assert view["layout"]["height"] > 0
            assert all(
                "marker" in trace and "color" in trace["marker"]
                for trace in view["data"]
                if name.endswith("-drawing")
            )
