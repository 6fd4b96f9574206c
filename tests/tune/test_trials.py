"""Running trials: failures, halving, timeouts, interrupts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_search import Formula, Made, near, searched

from alnico.errors import EvaluationError
from alnico.evaluation.splits import split
from alnico.tune.search.objective import best_of, objectives_of


def failing(at: set[int], how: Any) -> Any:
    """A score that fails at some calls."""
    calls = iter(range(1_000_000))

    def score(made: Made) -> Any:
        if next(calls) in at:
            if isinstance(how, BaseException):
                raise how
            return how
        return near(made)

    return score


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (ValueError("out of luck"), "trial 2: ValueError: out of luck"),
        (EvaluationError("near: no score."), "near: no score."),
        (math.nan, "near: returned nan; expected a finite number. Correct the task."),
        (math.inf, "near: returned inf; expected a finite number. Correct the task."),
        ("0.5", "near: returned '0.5'; expected a finite number. Correct the task."),
        (None, "near: returned None; expected a finite number. Correct the task."),
    ],
)
def test_a_trial_that_fails_is_marked_with_the_reason_and_the_search_goes_on(how: Any, reason: str) -> None:
    trials = searched("trials: 6", [Formula(score=failing({2}, how))])
    assert [t.state for t in trials] == ["complete", "complete", "failed", "complete", "complete", "complete"]
    assert trials[2].reason == reason
    assert len(trials[2].point) == 3


def test_a_search_stops_after_so_many_failures_in_a_row() -> None:
    told: list[Any] = []
    with pytest.raises(EvaluationError) as error:
        searched(
            "trials: 30, failures: 3",
            [Formula(score=failing({1, 2, *range(4, 30)}, ValueError("broken")))],
            watch=told.append,
        )
    assert [event.trial.state for event in told] == [
        "complete",
        "failed",
        "failed",
        "complete",
        "failed",
        "failed",
        "failed",
    ]
    assert str(error.value) == (
        "3 trials in a row have failed; expected scores. The last, trial 6: trial 6: ValueError: broken\n"
        "Correct the cause and run the same command, which resumes; or allow more failures with search.failures."
    )


def test_an_interrupted_trial_waits_to_run_again(tmp_path: Any) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(KeyboardInterrupt):
        searched("trials: 8", [Formula(score=failing({4}, KeyboardInterrupt()))], storage)
    assert [t.values for t in searched("trials: 8", [Formula()], storage)] == [
        t.values for t in searched("trials: 8", [Formula()])
    ]


def test_halving_scores_growing_parts_and_gives_up_what_is_behind() -> None:
    task = Formula(size=8)
    trials = searched("sampler: random, trials: 24, halving: {fraction: 0.25, keep: 0.5}", [task])
    complete = [t for t in trials if t.state == "complete"]
    pruned = [t for t in trials if t.state == "pruned"]
    assert trials[0].state == "complete"
    assert len(complete) + len(pruned) == 24
    assert len(pruned) >= 10
    assert {len(t.rungs) for t in complete} == {2}
    assert best_of(trials, ["max"])[0].values[0] == max(t.rungs[0] for t in trials)
    # Eight examples: two, two more, and the other four; each once.
    first = task.asked[:3]
    assert [len(part) for part in first] == [2, 2, 4]
    assert sorted(i for part in first for i in part) == list(range(8))
    for trial in pruned:
        rung = len(trial.rungs) - 1
        others = [t.rungs[rung] for t in trials[: trial.number] if len(t.rungs) > rung]
        assert sum(o > trial.rungs[rung] for o in others) >= math.ceil(0.5 * (len(others) + 1))


def test_the_score_of_a_complete_trial_is_of_all_examples() -> None:
    whole = searched("sampler: random, trials: 3", [Formula(size=8, spread=1.0)])
    parts = searched(
        "sampler: random, trials: 3, halving: {fraction: 0.125, keep: 0.9}", [Formula(size=8, spread=1.0)]
    )
    assert next(t.values for t in parts if t.state == "complete") == pytest.approx(whole[0].values)


def test_no_trial_begins_after_the_time() -> None:
    assert searched("trials: 10, timeout: 1.0e-9") == ()


def test_a_grid_ends_by_itself() -> None:
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [a, b, c]\nparameters: {lambda: {search: [0.5, 1.0], step: 0.25}}\n"
    assert (
        len(searched("sampler: grid, trials: 50", [Formula(score=lambda made: -made.scale)], recipe=recipe))
        == 3
    )


def test_several_objectives_give_the_pareto_front() -> None:
    low = Formula("low", lambda made: made.scale, goal="min")
    high = Formula("high", lambda made: made.scale + made.weights[0])
    trials = searched("objective: [low, high], sampler: nsga2, population: 6, trials: 30", [low, high])
    front = best_of(trials, ["min", "max"])
    for trial in front:
        assert not any(
            t.values[0] <= trial.values[0] and t.values[1] >= trial.values[1] and t.values != trial.values
            for t in trials
        )
    for trial in trials:
        if trial not in front:
            assert any(t.values[0] <= trial.values[0] and t.values[1] >= trial.values[1] for t in front)
    assert [t.values[0] for t in front] == sorted(t.values[0] for t in front)


def test_objectives_must_be_tasks_that_can_be_added() -> None:
    tasks = [Formula("up"), Formula("down", goal="min")]
    for asked, told in (
        (
            ["mean"],
            "search.objective is mean, but lower is better for down; expected scores that can be averaged. Name the tasks: objective: [up, down].",
        ),
        (["upp"], "search.objective names 'upp', which is not a task; expected mean or up, down."),
    ):
        with pytest.raises(EvaluationError) as error:
            objectives_of(asked, tasks)  # type: ignore[arg-type]
        assert str(error.value) == told
    tasks[0].weight = 3.0
    (mean,) = objectives_of(["mean"], [tasks[0], Formula("other")])  # type: ignore[arg-type]
    assert mean.value({"up": 1.0, "other": 0.0}) == 0.75


def test_tasks_without_parts_are_refused_where_parts_are_asked() -> None:
    for keys in ("trials: 2, halving: true", "trials: 2, held_out: 0.5"):
        with pytest.raises(EvaluationError, match="cannot be scored on a part of its examples"):
            searched(keys, [Formula(size=0)])


def test_held_out_examples_are_never_scored() -> None:
    task = Formula(size=200)
    searched("trials: 2, held_out: 0.25", [task])
    assert len(task.asked) == 2
    assert task.asked[0] == task.asked[1]
    assert 100 < len(set(task.asked[0])) < 180


def test_equal_examples_are_on_one_side_of_the_split() -> None:
    task = Formula(size=300)
    task.known_by = lambda: [f"text {i % 100}" for i in range(300)]  # type: ignore[attr-defined]
    searched_, held = split(task, 0.3)  # type: ignore[arg-type]
    assert sorted(searched_ + held) == list(range(300))
    assert not {i % 100 for i in searched_} & {i % 100 for i in held}
    assert 45 < len(held) < 135
