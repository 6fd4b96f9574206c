"""A window of layers as two values of a search: the planted window is found, and the heat map shows every window."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_search import Formula, searched, settings_of

import alnico
from alnico.cli.commands.search import search_text
from alnico.errors import AlnicoError, RecipeError
from alnico.evaluation.tasks import EvaluatedModel, Score
from alnico.recipe.schema import Recipe
from alnico.tune.search.objective import best_of, objectives_of
from alnico.tune.search.page import search_page
from alnico.tune.search.result import SearchResult
from alnico.tune.search.settings import read_search
from made import llama_config, llama_shapes, save_model

RECIPE = "stack: {models: [a], layers: 20, window: {from: [3, 12], length: [2, 8]}}\n"
PLANTED = [*range(7 + 5), *range(7, 20)]
"""Layers 7 to 11 run twice."""


def layers_of(recipe: Recipe) -> list[int]:
    """The layers of a stack, one by one."""
    ranges = [s.models[0].layers for s in recipe.slices]
    return [layer for r in ranges if r is not None for layer in range(*r)]


def likeness(made: Any) -> float:
    """Minus the layers that differ from the planted stack, at each depth."""
    found = layers_of(made.recipe)
    length = max(len(found), len(PLANTED))
    padded = [(*layers, *[-1] * (length - len(layers))) for layers in (found, PLANTED)]
    return -float(sum(a != b for a, b in zip(*padded, strict=True)))


def of_search(keys: str, goal: str = "max", recipe: str = RECIPE, tasks: Sequence[Any] = ()) -> SearchResult:
    sign = 1.0 if goal == "max" else -1.0
    given = tasks or [Formula("likeness", lambda m: sign * likeness(m), goal)]  # type: ignore[arg-type]
    space, settings = settings_of(keys, recipe)
    trials = searched(keys, given, recipe=recipe)
    objectives = objectives_of(settings.objective, given)
    best = best_of(trials, [o.goal for o in objectives])
    recipes = tuple(space.instantiate(t.point) for t in best)
    return SearchResult(
        "windows", recipes, best, trials, objectives, tuple(d.name for d in space.dimensions), settings
    )


def test_the_grid_tries_every_window_once_and_finds_the_planted_one() -> None:
    found = of_search("sampler: grid, trials: 1000")
    tried = [(t.point["stack.window.from"], t.point["stack.window.length"]) for t in found.trials]
    assert sorted(tried) == [(first, length) for first in range(3, 13) for length in range(2, 9)]
    assert found.best[0].point == {"stack.window.from": 7, "stack.window.length": 5}
    assert layers_of(found.recipe) == PLANTED
    assert found.recipe.merge_method == "passthrough"


def test_tpe_finds_the_planted_window_with_fewer_trials() -> None:
    recipe = RECIPE.replace("from: [3, 12], length: [2, 8]", "from: [0, 11], length: [1, 9]")
    found = of_search("sampler: tpe, trials: 60", recipe=recipe)
    assert found.trials[0].point == {"stack.window.from": 5, "stack.window.length": 5}  # the middle
    assert layers_of(found.recipe) == PLANTED


def test_a_window_may_run_more_often_and_reach_both_ends() -> None:
    space, _ = read_search(
        "stack: {models: [a], layers: 4, window: {from: [0, 2], length: 2, times: [2, 3]}}\n"
    )
    assert [(d.name, d.kind, d.ends) for d in space.dimensions] == [
        ("stack.window.from", "whole", (0, 2)),
        ("stack.window.times", "whole", (2, 3)),
    ]
    assert layers_of(space.instantiate({"stack.window.from": 0, "stack.window.times": 3})) == [
        0,
        1,
        0,
        1,
        0,
        1,
        2,
        3,
    ]
    assert layers_of(space.instantiate({"stack.window.from": 2, "stack.window.times": 2})) == [
        0,
        1,
        2,
        3,
        2,
        3,
    ]
    assert space.references == ("a",)


@pytest.mark.parametrize(
    ("window", "told"),
    [
        ("{from: [8, 24], length: [3, 9]}", "stack.window reaches beyond the layers: from 24 with length 9 needs 33 layers, and stack.layers is 30; expected greatest from + greatest length to be at most 30. Lower one of them."),
        ("{from: [8, 30], length: [3, 9]}", "stack.window.from is [8, 30]; expected [least, greatest], or one whole number, from 0 to 29."),
        ("{from: [8, 5], length: [3, 9]}", "stack.window.from is [8, 5]; expected [least, greatest]"),
        ("{from: [1, 5], length: 0}", "stack.window.length is 0; expected [least, greatest], or one whole number, from 1 to 30."),
        ("{from: [1, 5], length: [1, 2, 3]}", "stack.window.length is [1, 2, 3]; expected"),
        ("{from: [1, 5], length: 31}", "stack.window.length is 31; expected"),
        ("{from: [1, 5], length: [1, 2.5]}", "stack.window.length is [1, 2.5]; expected"),
        ("{from: [1, 5], length: 2, times: 1}", "stack.window.times is 1; expected [least, greatest], or one whole number, from 2 to 100."),
        ("{from: [1, 5]}", "stack.window.length is missing; expected [least, greatest]. Add it."),
        ("{length: 3}", "stack.window.from is missing; expected"),
        ("{from: [1, 5], lenght: 3}", "Did you mean length?"),
        ("3", "stack.window is 3; expected a mapping with from and length"),
        ("{from: 3, length: 3}", "nothing to search; expected"),
        ("{from: [1, 5], length: 3}, block: 2", "stack.block and stack.window are both given; expected one of them. Remove one."),
        ("{from: [1, 5], length: 3}, repeat: 2", "stack.repeat and stack.window are both given"),
        ("{from: [1, 5], length: 3}, places: 2", "stack.places and stack.window are both given"),
    ],
)  # fmt: skip
def test_windows_that_are_none_are_refused(window: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_search(f"stack: {{models: [a], layers: 30, window: {window}}}\n")
    assert told in "\n".join(caught.value.args)


def test_a_window_is_of_one_model() -> None:
    with pytest.raises(RecipeError) as caught:
        read_search("stack: {models: [a, b], layers: 9, window: {from: [1, 5], length: 3}}\n")
    assert str(caught.value) == (
        "recipe:1: stack.models has 2 models, and a window is repeated in one; expected one model. Remove the others, or leave "
        "out window."
    )


@pytest.mark.parametrize("goal", ["max", "min"])
def test_the_page_the_picture_and_the_command_show_all_windows(goal: str) -> None:
    found = of_search("sampler: grid, trials: 1000", goal)
    page = search_page(found)
    assert '<section id="windows"' in page
    drawn = re.search(r'<script type="application/json" id="windows-map">(.*?)</script>', page)
    assert drawn is not None
    (trace,) = json.loads(drawn[1])["views"][""]["data"]
    assert (trace["type"], trace["x"], trace["y"]) == ("heatmap", [*range(3, 13)], [*range(2, 9)])
    values = {
        (t.point["stack.window.from"], t.point["stack.window.length"]): t.values[0] for t in found.trials
    }
    assert trace["z"] == [[values[first, length] for first in range(3, 13)] for length in range(2, 9)]
    low, high = (sum(bytes.fromhex(trace["colorscale"][end][1][1:])) for end in (0, -1))
    assert (low < high) == (goal == "max")  # the best is bright
    figure = found.plot("windows")
    assert np.asarray(figure.axes[0].images[0].get_array()).tolist() == trace["z"]
    lines = str(search_text(found, None)).split("\n")
    at = lines.index("mean of the best windows of layers")
    assert lines[at + 1].split() == [*f"{values[7, 5]:.4g}".split(), "layers", "7", "to", "11"]


def test_windows_that_were_not_tried_have_no_value_and_the_best_of_several_is_shown() -> None:
    recipe = RECIPE.replace("length: [2, 8]", "length: [2, 8], times: [2, 4]")
    found = of_search("sampler: random, trials: 40", recipe=recipe)
    drawn = re.search(r'id="windows-map">(.*?)</script>', search_page(found))
    assert drawn is not None
    (trace,) = json.loads(drawn[1])["views"][""]["data"]
    expected: dict[tuple[Any, Any], float] = {}
    for t in found.trials:
        place = t.point["stack.window.from"], t.point["stack.window.length"]
        expected[place] = max(expected.get(place, -99.0), t.values[0])
    shown = {
        (first, length): value
        for length, row in zip(trace["y"], trace["z"], strict=True)
        for first, value in zip(trace["x"], row, strict=True)
        if value is not None
    }
    assert shown == expected
    assert any(value is None for row in trace["z"] for value in row)


def test_a_search_without_a_window_has_no_map() -> None:
    recipe = "stack: {models: [a], layers: 4, repeat: 2}\n"
    found = of_search("sampler: random, trials: 3", recipe=recipe)
    assert '<section id="windows"' not in search_page(found)
    with pytest.raises(
        AlnicoError, match=r"^plot: 'windows' needs a search of the first layer and the length"
    ):
        found.plot("windows")


class OrderOfLayers:
    """Scores how like a stack of numbered layers is to the planted one: layers 1 and 2 twice."""

    name, goal, weight, size = "order", "max", 1.0, 0

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        state = subject.state()  # type: ignore[attr-defined]
        norms = {
            int(n.split(".")[2]): float(v[0])
            for n, v in state.items()
            if n.endswith("input_layernorm.weight")
        }
        return Score(float([norms[i] for i in sorted(norms)] == [0, 1, 2, 1, 2, 3]))

    def pooled(self, scores: Sequence[Score]) -> Score:
        raise NotImplementedError

    def digests(self) -> frozenset[str]:
        return frozenset()


def test_a_window_of_a_model_on_disk_is_found_and_merged(tmp_path: Path) -> None:
    shape = {"layers": 4, "hidden": 8}
    tensors = {
        n: ("F32", np.full(s, float(n.split(".")[2]) if "layers." in n else 0.5, np.float32))
        for n, s in llama_shapes(**shape).items()
    }
    model = save_model(tmp_path / "model", tensors, llama_config(**shape))
    recipe = {
        "stack": {"models": [str(model)], "layers": 4, "window": {"from": [0, 2], "length": [1, 2]}},
        "search": {"sampler": "grid", "trials": 6, "report": "same"},
    }
    found = alnico.search(recipe, tasks=[OrderOfLayers()], out=tmp_path / "found")
    assert {t.state for t in found.trials} == {"complete"}
    assert found.best[0].point == {"stack.window.from": 1, "stack.window.length": 2}
    assert found.report is not None
    assert [
        (m.name, m.scores["order"].value) for m in found.report.models if m.name in ("model", "best")
    ] == [
        ("model", 0.0),
        ("best", 1.0),
    ]
    alnico.merge(tmp_path / "found" / "best.yml", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6


def test_the_command_names_a_window_beyond_the_layers(tmp_path: Path) -> None:
    (tmp_path / "search.yml").write_text(
        "stack:\n  models: [a]\n  layers: 10\n  window: {from: [0, 8], length: [1, 3]}\nsearch: {tasks: t.yml}\n"
    )
    from alnico.cli.main import app

    shown = CliRunner().invoke(app, ["search", str(tmp_path / "search.yml")])
    assert isinstance(shown.exception, RecipeError)
    assert (
        "search.yml:4: stack.window reaches beyond the layers: from 8 with length 3 needs 11 layers"
        in str(shown.exception)
    )
