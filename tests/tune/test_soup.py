"""Soups: the paper's greedy order, every try scored, and a recipe that makes the model that was scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import alnico
from alnico.errors import EvaluationError, MismatchError, OutputError, RecipeError
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import EvaluatedModel, Goal, Score, Task
from alnico.tune.soup import soup
from made import save_model
from made_tasks import Made

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

VALUES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.6, 0.5), "d": (-2.0, -2.0)}
"""The one tensor of each model."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    root = tmp_path_factory.mktemp("points")
    return {n: str(save_model(root / n, {"w": ("F32", np.array(v, np.float32))})) for n, v in VALUES.items()}


class Near:
    """Scores a model by how near its point is to a target."""

    weight = 1.0
    size = 0

    def __init__(self, target: tuple[float, float], name: str = "near", goal: Goal = "max") -> None:
        self.name = name
        self.goal = goal
        self._target = np.array(target)
        self.asked: list[tuple[float, ...]] = []

    def evaluate(self, subject: EvaluatedModel, examples: range | None = None) -> Score:
        point = subject.state()["w"].numpy().astype(np.float64)  # type: ignore[attr-defined]
        self.asked.append(tuple(point))
        distance = float(np.linalg.norm(point - self._target))
        return Score(-distance if self.goal == "max" else distance)

    def pooled(self, scores: Sequence[Score]) -> Score:
        raise NotImplementedError

    def digests(self) -> frozenset[str]:
        return frozenset()


def greedy(score: Callable[[Sequence[str]], float], strict: bool = False) -> list[str]:
    """Algorithm 1 of the paper, over the mean of points."""
    ranked = sorted(VALUES, key=lambda name: -score([name]))
    kept = ranked[:1]
    for name in ranked[1:]:
        tried = score([*kept, name])
        if tried > score(kept) if strict else tried >= score(kept):
            kept.append(name)
    return kept


def distance_to(target: tuple[float, float]) -> Callable[[Sequence[str]], float]:
    return lambda names: -float(np.linalg.norm(np.mean([VALUES[n] for n in names], axis=0) - target))


@pytest.mark.parametrize("target", [(0.55, 0.45), (0.5, 0.6), (1.0, 0.1), (-0.3, -0.3)])
def test_the_greedy_soup_is_the_papers(models: Mapping[str, str], target: tuple[float, float]) -> None:
    found = soup(list(models.values()), [Near(target)])
    expected = greedy(distance_to(target))
    assert set(found.counts) == {models[n] for n in expected}
    assert [step.tried for step in found.steps] == [
        models[n] for n in sorted(VALUES, key=lambda n: -distance_to(target)([n]))
    ]
    assert [step.tried for step in found.steps if step.is_kept] == [models[n] for n in expected]
    assert found.score == pytest.approx(distance_to(target)(expected), abs=1e-6)
    assert found.uniform == pytest.approx(distance_to(target)(list(VALUES)), abs=1e-6)
    assert found.alone == pytest.approx({models[n]: distance_to(target)([n]) for n in VALUES}, abs=1e-6)


def test_trying_all_takes_the_best_average_of_each_round(models: Mapping[str, str]) -> None:
    target = (0.2, 0.7)
    score = distance_to(target)
    kept: list[str] = [max(VALUES, key=lambda n: score([n]))]
    while left := [n for n in VALUES if n not in kept]:
        best = max(left, key=lambda n: score([*kept, n]))
        if score([*kept, best]) < score(kept):
            break
        kept.append(best)
    found = soup(list(models.values()), [Near(target)], order="all")
    assert [models[n] for n in kept] == [step.tried for step in found.steps if step.is_kept]
    rounds = [
        sum(step.best == best for step in found.steps) for best in dict.fromkeys(s.best for s in found.steps)
    ]
    assert rounds == [1, 3, 2][: len(rounds)]


def test_with_replacement_models_are_weighed(models: Mapping[str, str]) -> None:
    target = (0.3, 0.7)
    found = soup([models["a"], models["b"]], [Near(target)], order="all", replace=True)
    assert found.counts == {models["a"]: 1, models["b"]: 2}
    assert found.score == pytest.approx(-np.sqrt(2) / 30, abs=1e-7)
    one = soup([models["a"], models["b"]], [Near(target)], order="all")
    assert one.counts == {models["a"]: 1, models["b"]: 1}


def test_less_is_better_of_a_task_that_says_so(models: Mapping[str, str]) -> None:
    most, least = (soup(list(models.values()), [Near((0.55, 0.45), goal=goal)]) for goal in ("max", "min"))
    assert most.counts == least.counts
    assert most.score == -least.score
    assert most.best == least.best


def test_strict_and_least_gain_decide_what_is_kept(models: Mapping[str, str], tmp_path: Path) -> None:
    twin = str(save_model(tmp_path / "twin", {"w": ("F32", np.array(VALUES["a"], np.float32))}))
    pair = [models["a"], twin]
    assert soup(pair, [Near((1.0, 0.1))]).counts == {models["a"]: 1, twin: 1}
    assert soup(pair, [Near((1.0, 0.1))], strict=True).counts == {models["a"]: 1}
    three = [models[n] for n in "abc"]
    gain = distance_to((0.5, 0.6))(["c", "b"]) - distance_to((0.5, 0.6))(["c"])
    for least, expected in ((gain - 1e-3, 2), (gain + 1e-3, 1)):
        assert len(soup(three[1:], [Near((0.5, 0.6))], least_gain=least).counts) == expected


def test_no_average_is_scored_twice(models: Mapping[str, str]) -> None:
    task = Near((0.3, 0.7))
    found = soup([models["a"], models["b"]], [task], order="all", replace=True)
    assert len(task.asked) == len(set(task.asked)) < len(found.steps) + 3


def test_the_objective_is_one_task_or_the_weighted_mean(models: Mapping[str, str]) -> None:
    left, right = Near((1.0, 0.0), "left"), Near((0.0, 1.0), "right")
    right.weight = 3.0
    names = [models["a"], models["b"]]
    assert soup(names, [left, right], objective="left").best == models["a"]
    assert left.asked
    assert not right.asked
    found = soup(names, [left, right])
    assert found.best == models["b"]
    assert found.alone[models["a"]] == pytest.approx(3 * -np.sqrt(2) / 4)


def test_the_recipe_makes_the_model_that_was_scored(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.base.parent)
    tasks = read_tasks(made.valid)
    found = soup(
        ["tuned-pets", "tuned-food", "tuned-sky"], tasks, base="base", strict=True, order="all", replace=True
    )
    (made.base.parent / "recipes").mkdir(exist_ok=True)
    file = made.base.parent / "recipes" / "soup.yml"
    file.write_text(found.recipe("recipes"))
    monkeypatch.chdir(tmp_path)
    alnico.merge(file, tmp_path / "out")
    on_disk = open_subject(tmp_path / "out")
    assert float(np.mean([task.evaluate(on_disk).value for task in tasks])) == found.score
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    inputs = {str(p): load_file(p / "model.safetensors") for p in made.tuned.values()}
    shares = {str(made.base.parent / r): n / sum(found.counts.values()) for r, n in found.counts.items()}
    for name, value in tensors.items():
        mean = sum(share * inputs[r][name].double() for r, share in shares.items())
        assert float((value - mean).abs().max()) <= 3 * 2**-24 * float(mean.abs().max())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": ["a"]}, "models: there are 1; expected at least two for a soup. Give more models."),
        (
            {"models": ["a", "b", "a"]},
            "a: appears twice in the models; expected different models. Remove one, or use order all with replace.",
        ),
        ({"order": "best"}, "order is 'best'; expected sorted, all, grid or uniform. Choose one."),
        (
            {"replace": True},
            "replace is set, but order is sorted; expected order all. Remove replace, or choose order all.",
        ),
        (
            {"order": "all", "replace": True, "least_gain": -1.0},
            "least_gain is -1; expected 0 or more with replace. Choose such a number.",
        ),
        ({"least_gain": float("nan")}, "least_gain is nan; expected a finite number. Choose such a number."),
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        soup(**{"models": ["a", "b"], "tasks": [Near((0.0, 0.0))], **wrong})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tasks", "objective", "message"),
    [
        (
            [],
            "mean",
            "tasks: there are none; expected at least one to choose by. Add tasks to the tasks file, or pass a function.",
        ),
        (
            [Near((0, 0))],
            "far",
            "objective is 'far', which is not a task; expected mean or near. Name one of them.",
        ),
        (
            [Near((0, 0)), Near((0, 0), "loss", "min")],
            "mean",
            "objective is mean, but lower is better for loss; expected tasks whose scores can be averaged. "
            "Name one task as the objective.",
        ),
    ],
)
def test_an_objective_that_is_none_is_refused(tasks: list[Task], objective: str, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        soup(["a", "b"], tasks, objective=objective)
    assert str(caught.value) == message


def test_the_command_prints_steps_and_writes_the_recipe(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alnico.cli.main import app

    monkeypatch.chdir(made.base.parent)
    names = ["tuned-pets", "tuned-food", "tuned-sky"]
    asked = [
        "soup",
        "--models",
        *names,
        "--tasks",
        "valid.yml",
        "--base",
        "base",
        "--out",
        str(tmp_path / "soup.yml"),
    ]
    app(asked, standalone_mode=False)
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "soup.yml")
    steps = [line for line in printed.err.splitlines() if line[:2] in ("+ ", "  ") and ": " in line]
    assert len(steps) == 3
    assert steps[0].startswith("+ tuned-")
    assert "These are scores on the tasks that chose the soup, so its own is too good." in printed.err
    alnico.merge(tmp_path / "soup.yml", tmp_path / "out")
    found = alnico.soup(names, "valid.yml", base="base")
    assert [s.tried for s in found.steps] == [
        line.split()[1 if line[0] == "+" else 0].rstrip(":") for line in steps
    ]
    alnico.merge(alnico.load_recipe(found.recipe()), tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    app([*asked[:-2], "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    assert data["models"] == found.counts
    assert data["recipe"] == found.recipe()
    with pytest.raises(OutputError, match="already exists; expected a new file"):
        app(asked, standalone_mode=False)


def test_the_report_scores_soup_models_and_base_on_held_out_examples(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.base.parent)
    names = ["tuned-pets", "tuned-food", "tuned-sky"]
    found = alnico.soup(names, "valid.yml", base="base", report="test.yml")
    assert found.report is not None
    tasks = read_tasks("test.yml")
    expected = {n: {t.name: t.evaluate(open_subject(n)).value for t in tasks} for n in ("base", *names)}
    scores = {m.reference: {task: e.value for task, e in m.scores.items()} for m in found.report.models}
    assert list(scores) == ["base", *names, "soup", "uniform soup"]
    assert {n: scores[n] for n in expected} == expected
    assert {m.reference: m.role for m in found.report.models}["soup"] == "merged"
    assert {d.other for d in found.report.differences} == {"base", *names}
    assert found.data()["report"] == found.report.data()
    with pytest.raises(EvaluationError) as caught:
        alnico.soup(names, "valid.yml", report="valid.yml")
    assert str(caught.value) == (
        f"pets: {len(tasks[0].digests())} of its examples are also in pets, which chose the models, so its "
        "score would be too high; expected other examples. Give held-out data, or accept shared examples "
        "(shared=True, --shared)."
    )
    same = alnico.soup(names, "valid.yml", report="valid.yml", shared=True)
    assert same.report is not None
    assert next(
        m.mean.value for m in same.report.models if m.reference == "soup" and m.mean
    ) == pytest.approx(same.score)


def test_unrelated_models_are_refused_in_the_words_of_python_and_of_the_command_line(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = [
        str(save_model(tmp_path / n, {f"w{i}": ("F32", random.standard_normal((64, 64))) for i in range(4)}))
        for n in ("a", "b")
    ]

    class Same(Near):
        def evaluate(self, subject: EvaluatedModel, examples: range | None = None) -> Score:
            return Score(1.0)

    with pytest.raises(
        MismatchError, match=r'or pass unrelated="allow" \(--unrelated allow on the command line\)\.$'
    ):
        alnico.soup(names, [Same((0, 0))])
    found = alnico.soup(names, [Same((0, 0))], unrelated="allow")
    (tmp_path / "r.yml").write_text(found.recipe(tmp_path))
    alnico.merge(tmp_path / "r.yml", tmp_path / "out")
