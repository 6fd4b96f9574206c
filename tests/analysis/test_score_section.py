"""Scores on the page, and as an evaluation's file brings them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_analyses import made_analysis
from test_report import HOSTILE, written

from alnico.analysis.score_section import score_section
from alnico.analysis.scores import Estimate, read_estimates, read_scores
from alnico.errors import ModelError

SCORES = {
    "news": {"in/base": Estimate(0.25, 0.125, 0.5), "in/a": Estimate(0.75, 0.5, 0.875)},
    HOSTILE: {"in/base": Estimate(0.5), "in/a": Estimate(0.25), HOSTILE: Estimate(0.125)},
    "spam": {"in/base": Estimate(0.5, 0.25, 0.75), HOSTILE: Estimate(1.0, 0.875, 1.0)},
}


def test_bars_and_radar_hold_the_scores_and_their_intervals(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure as Known

    _, page = written(made_analysis(2, 2), tmp_path, sections=[score_section(SCORES)])
    bars, radar = (json.loads(page.data[name]) for name in ("score-bars", "score-radar"))
    for figure in (bars, radar):
        for view in figure["views"].values():
            Known(data=view["data"], layout=view["layout"])
    of_base, of_a, _ = bars["views"][""]["data"]
    assert (of_base["name"], of_base["x"], of_a["x"]) == ("1 base", [0.25, 0.5, 0.5], [0.75, 0.25, None])
    assert (of_base["error_x"]["array"], of_base["error_x"]["arrayminus"]) == (
        [0.25, None, 0.25],
        [0.125, None, 0.25],
    )
    shape, share = (radar["views"][view]["data"] for view in "01")
    assert [trace["r"] for trace in shape] == [
        [0.25, 0.5, 0.5, 0.25],
        [0.75, 0.25, None, 0.75],
        [None, 0.125, 1, None],
    ]
    assert share[0]["r"] == pytest.approx([0.333333, 1, 0.5, 0.333333])
    assert bars["views"][""]["table"]["rows"][0] == [
        "news",
        "0.250 [0.125, 0.500]",
        "0.750 [0.500, 0.875]",
        "–",  # noqa: RUF001
    ]


def test_two_tasks_are_no_radar() -> None:
    assert [f.name for f in score_section({task: SCORES[task] for task in ("news", "spam")}).figures] == [
        "score-bars"
    ]


def test_an_evaluations_file_gives_scores_with_their_intervals(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    scores = {
        "news": {"value": 0.5, "low": 0.25, "high": 0.75},
        "spam": {"value": 1.0, "low": None, "high": None},
    }
    wiki = {"wiki": {"value": 9.0, "low": None, "high": None}}
    tasks = [
        {"name": "news", "goal": "max"},
        {"name": "spam", "goal": "max"},
        {"name": "wiki", "goal": "min"},
    ]
    path.write_text(
        json.dumps({"tasks": tasks, "models": [{"name": "a", "reference": "in/a", "scores": scores | wiki}]})
    )
    assert read_estimates([path]) == {
        "news": {"in/a": Estimate(0.5, 0.25, 0.75)},
        "spam": {"in/a": Estimate(1.0)},
    }
    assert read_scores([path, "spam:in/b=2"]) == {"news": {"in/a": 0.5}, "spam": {"in/a": 1.0, "in/b": 2.0}}
    path.write_text('{"models": [3]}')
    with pytest.raises(ModelError) as caught:
        read_scores([path])
    assert str(caught.value) == (
        f"{path}: is not a file of scores; expected the output of `alnico evaluate --json`. Write it again."
    )
