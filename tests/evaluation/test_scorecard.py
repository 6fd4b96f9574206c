"""Scores with their uncertainty: intervals held against the formulas of means of independent examples, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import EvaluationError
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.scorecard import interval, paired, score_models, scorecard
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Score, pool


@dataclass
class Told:
    """A task whose scores are given."""

    name: str
    goal: Any = "max"
    weight: float = 1.0
    size: int = 0


def score(examples, link="mean"):
    examples = np.asarray(examples, np.float64)
    return Score(math.exp(examples.mean()) if link == "exp" else float(examples.mean()), examples, link)


def coins(count, share, seed):
    return np.random.default_rng(seed).permutation(np.arange(count) < share * count).astype(np.float64)


def error_of(examples):
    """The standard error of a mean."""
    return np.std(examples) / math.sqrt(len(examples))


def test_an_interval_is_that_of_a_mean():
    examples = coins(400, 0.7, 0)
    found = interval(score(examples), "news")
    assert found.value == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx(
        (0.7 - 1.96 * error_of(examples), 0.7 + 1.96 * error_of(examples)), abs=0.006
    )
    assert interval(score(examples), "news") == found  # the same seed, the same draws
    assert interval(score(examples), "news", seed=1) != found
    assert interval(Score(0.5)) == type(found)(0.5)


def test_an_interval_of_a_perplexity_is_exp_of_that_of_the_mean():
    examples = np.random.default_rng(0).normal(2, 0.5, 300)
    found = interval(score(examples, "exp"))
    low, high = (2 * 0 + examples.mean() + z * error_of(examples) for z in (-1.96, 1.96))
    assert found.value == pytest.approx(math.exp(examples.mean()))
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((low, high), abs=0.008)


def test_differences_are_paired():
    one = coins(500, 0.6, 0)
    other = one.copy()
    other[:20] = 1 - other[:20]
    found = paired({"a": score(one)}, {"a": score(other)}, [Told("a")]).scores["a"]
    width = found.high - found.low
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert width == pytest.approx(2 * 1.96 * error_of(one - other), rel=0.06)
    assert width < 0.4 * 2 * 1.96 * math.hypot(error_of(one), error_of(other))


def test_the_mean_adds_the_errors_of_its_tasks_by_weight_and_leaves_out_where_less_is_better():
    tasks = [Told("a", weight=3.0), Told("b"), Told("wiki", "min")]
    one = {
        "a": score(coins(400, 0.7, 0)),
        "b": score(coins(100, 0.5, 1)),
        "wiki": score(np.full(4, 2.0), "exp"),
    }
    other = {
        "a": score(coins(400, 0.6, 2)),
        "b": score(coins(100, 0.5, 3)),
        "wiki": score(np.full(4, 3.0), "exp"),
    }
    mean = scorecard({"m": one}, tasks).models[0].mean
    assert mean.value == pytest.approx(0.75 * 0.7 + 0.25 * 0.5)
    found = paired(one, other, tasks).mean
    errors = [error_of(one[t].examples - other[t].examples) for t in "ab"]
    half = 1.96 * math.hypot(0.75 * errors[0], 0.25 * errors[1])
    assert found.value == pytest.approx(0.75 * 0.1)
    assert (found.low, found.high) == pytest.approx((0.075 - half, 0.075 + half), abs=0.006)
    assert scorecard({"m": one}, tasks[2:]).models[0].mean is None
    assert paired(one, other, tasks[2:]).mean is None
    assert paired(one, other, tasks[2:]).scores["wiki"].value == pytest.approx(math.e**2 - math.e**3)


def test_a_task_that_tells_no_examples_has_no_interval_nor_has_the_mean():
    tasks = [Told("a"), Told("b")]
    card = scorecard({"m": {"a": score(coins(9, 0.5, 0)), "b": Score(0.25)}}, tasks)
    assert card.models[0].scores["a"].low is not None
    assert (card.models[0].scores["b"].low, card.models[0].mean.low) == (None, None)
    assert card.models[0].mean.value == pytest.approx((5 / 9 + 0.25) / 2)
    assert [task.examples for task in card.tasks] == [9, 0]


def test_a_scorecard_says_what_a_merge_kept_of_the_best_parent():
    tasks = [Told("a"), Told("b"), Told("wiki", "min")]
    values = {
        "in/base": (0.4, 0.2, 9.0),
        "in/x": (0.9, 0.2, 9.0),
        "in/y": (0.4, 0.7, 9.0),
        "out/x": (0.8, 0.6, 9.0),
    }
    card = scorecard(
        {label: {t.name: Score(v) for t, v in zip(tasks, row, strict=True)} for label, row in values.items()},
        tasks,
        base="in/base",
        merged=["out/x"],
    )
    assert [(m.name, m.role) for m in card.models] == [
        ("base", "base"),
        ("x", "model"),
        ("y", "model"),
        ("x-2", "merged"),
    ]
    assert [(d.model, d.other) for d in card.differences] == [("x-2", "base"), ("x-2", "x"), ("x-2", "y")]
    assert card.differences[1].scores["a"].value == pytest.approx(-0.1)
    assert [(k.task, k.best) for k in card.kept["x-2"]] == [("a", "x"), ("b", "y")]
    assert [(k.kept, k.gain_kept) for k in card.kept["x-2"]] == [
        pytest.approx((8 / 9, 4 / 5)),
        pytest.approx((6 / 7, 4 / 5)),
    ]
    without = scorecard(
        {label: {"a": Score(row[0])} for label, row in values.items()}, tasks[:1], base="in/base"
    )
    assert [(d.model, d.other) for d in without.differences] == [
        ("x", "base"),
        ("y", "base"),
        ("x-2", "base"),
    ]
    assert without.kept == {}


def test_tables_say_what_a_score_is_which_direction_is_better_and_on_how_many_examples():
    from alnico.cli.commands.evaluate import scorecard_text

    news, wiki, mine = Told("news"), Told("wiki", "min"), Told("mine")
    news.metric, wiki.metric, wiki.counted = "accuracy", "perplexity", "windows"
    scores = {
        "news": score(coins(40, 0.5, 0)),
        "wiki": score(np.full(12, 2.0), "exp"),
        "mine": Score(3.0),
    }
    card = scorecard({"m": scores}, [news, wiki, mine])
    lines = scorecard_text(card, 0).split("\n")
    assert [line.split() for line in lines[:4]] == [
        ["model", "mean", "news", "wiki", "mine"],
        ["metric", "score", "accuracy", "perplexity", "score"],
        ["better", "higher", "higher", "lower", "higher"],
        ["examples", "40", "12", "windows", "unknown"],
    ]
    told = [(task["metric"], task["counted"], task["examples"]) for task in card.data()["tasks"]]
    assert told == [("accuracy", "examples", 40), ("perplexity", "windows", 12), ("score", "examples", 0)]
    assert card.data()["bootstrap"]["level"] == 0.95


def test_a_merge_of_a_parent_that_is_worse_than_the_base_kept_no_share_of_a_gain():
    from alnico.cli.commands.evaluate import scorecard_text
    from alnico.evaluation.scorecard_page import scorecard_sections

    values = {"base": 0.8, "x": 0.7, "out": 0.6}
    card = scorecard(
        {label: {"a": Score(value)} for label, value in values.items()},
        [Told("a")],
        base="base",
        merged=["out"],
    )
    (kept,) = card.kept["out"]
    assert (kept.gain_kept, kept.gain, kept.has_no_gain) == (None, pytest.approx(-0.1), True)
    assert card.data()["kept"]["out"][0]["gain_kept"] is None
    lines = scorecard_text(card, 0).split("\n")
    assert "no gain  x" in next(line for line in lines if line.startswith("a "))
    means = "no gain: the best parent is not better than the base on the task, so there is no gain to keep."
    assert means in lines
    section = scorecard_sections(card)[-1]
    assert "no gain" in section.body
    assert "200" not in section.body
    assert means.capitalize() in section.words


def test_models_are_scored_one_after_the_other(made):
    tasks = read_tasks(made.valid)
    seen = []
    references = [made.base, *made.tuned.values()]
    card = score_models(
        (open_subject(path) for path in references),
        tasks,
        base=str(made.base),
        watch=seen.append,
    )
    assert [(event.model, event.task) for event in seen] == [
        (str(path), task.name) for path in references for task in tasks
    ]
    assert card.models[1].scores["pets"].value == tasks[0].evaluate(open_subject(made.tuned["pets"])).value
    assert card.differences[0].mean.low > 0  # a specialist is better than the base on the mean of all tasks


def test_pooled_scores_need_their_examples():
    assert pool([score([1.0, 2.0], "exp"), score([6.0], "exp")]).value == pytest.approx(math.exp(3.0))
    with pytest.raises(
        EvaluationError,
        match=r"^scores without examples cannot be pooled; expected the contribution of each example\.",
    ):
        pool([Score(0.5)])


def test_scores_that_cannot_be_compared_are_told():
    for call, message in [
        (
            lambda: scorecard({}, [Told("a")]),
            "there are no models to score; expected at least one. Give some.",
        ),
        (lambda: scorecard({"m": {}}, []), "there are no tasks to score; expected at least one. Give some."),
        (
            lambda: scorecard({"m": {"a": Score(1.0)}}, [Told("a")], base="b"),
            "b: has no scores; expected one of m. Score it too.",
        ),
        (
            lambda: scorecard({"m": {"a": Score(1.0)}}, [Told("a")], base="m", merged=["m"]),
            "m: is given as the base and as a merge; expected one of them. Remove it from one.",
        ),
        (
            lambda: scorecard({"m": {"a": score([1.0])}, "n": {"a": score([1.0, 0.0])}}, [Told("a")]),
            "a: models have 1 and 2 examples; expected the same examples for all. Score all on the same data.",
        ),
    ]:
        with pytest.raises(EvaluationError) as caught:
            call()
        assert str(caught.value) == message


def test_a_model_given_twice_is_told(made):
    with pytest.raises(EvaluationError) as caught:
        score_models([open_subject(made.base)] * 2, read_tasks(made.valid)[:1])
    assert str(caught.value) == f"{made.base}: is given twice; expected different models. Remove one."


def test_a_base_that_stands_among_the_models_is_scored_once(made):
    told = []
    found = alnico.evaluate(
        [made.base, made.tuned["pets"]],
        made.valid,
        base=made.base,
        watch=lambda event: told.append((event.model, event.task)),
    )
    assert len(told) == len(set(told)) == 2 * len(found.tasks)


def test_a_model_given_twice_is_told_before_any_is_scored(made):
    told = []
    with pytest.raises(EvaluationError, match="is given twice"):
        alnico.evaluate([made.base, made.base], made.valid, watch=told.append)
    assert not told
