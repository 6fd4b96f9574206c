"""A merge compared with its parents on scores, next to the distances, against plain torch in float64."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import alnico
from alnico.errors import EvaluationError


class Models:
    """A base, two fine-tunes and their average, with data."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.base = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        self.parents = [copy.deepcopy(self.base) for _ in range(2)]
        with torch.no_grad():
            for value in (v for model in self.parents for v in model.parameters()):
                value += 0.3 * torch.randn_like(value)
        self.merged = alnico.merge_models(self.parents, "linear")
        self.data = torch.randn(50, 4).double(), torch.randint(0, 3, (50,))

    def accuracy(self, module: Any) -> float:
        assert not module.training
        x, y = self.data
        return float((module(x).argmax(1) == y).double().mean())

    def likelihood(self, module: Any) -> float:
        x, y = self.data
        with torch.no_grad():
            return float(-torch.nn.functional.cross_entropy(module(x), y))


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def test_an_analysis_of_a_merge_has_accuracies_and_distances(models: Models, tmp_path: Path) -> None:
    tasks = {"A": models.accuracy, "B": models.likelihood}
    found = alnico.compare(
        models.parents,
        models.merged,
        base=models.base,
        tasks=tasks,
        names=["one", "other"],
        out=tmp_path / "out",
    )
    by_hand = {
        "base": models.base,
        "one": models.parents[0],
        "other": models.parents[1],
        "merged": models.merged,
    }
    x, y = models.data
    with torch.no_grad():
        exact = {
            "A": {n: float((m(x).argmax(1) == y).double().mean()) for n, m in by_hand.items()},
            "B": {n: float(-torch.nn.functional.cross_entropy(m(x), y)) for n, m in by_hand.items()},
        }
    assert {task: dict(of) for task, of in found.by_model.items()} == {
        task: pytest.approx(of, abs=1e-12) for task, of in exact.items()
    }
    best = max(exact["A"]["one"], exact["A"]["other"])
    assert found.scores[0].kept == pytest.approx(exact["A"]["merged"] / best)
    one, merged = models.parents[0].state_dict(), models.merged.state_dict()
    distance = math.sqrt(sum(float(((merged[n] - v) ** 2).sum()) for n, v in one.items()))
    assert found.whole.parents[0].distance == pytest.approx(distance, rel=1e-6)  # type: ignore[union-attr]
    written = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert written["by_model"]["A"] == exact["A"]
    assert models.base.training


def test_scores_and_tasks_are_shown_together(models: Models) -> None:
    given = {"given": {"merged": 0.5, "parents[0]": 1.0}}
    found = alnico.compare(models.parents, models.merged, scores=given, tasks=models.accuracy)
    assert [score.task for score in found.scores] == ["given", "accuracy"]
    assert "base" not in found.by_model["accuracy"]
    with pytest.raises(
        EvaluationError, match=re.escape("given: is in scores and in tasks; expected it in one of them.")
    ):
        alnico.compare(models.parents, models.merged, scores=given, tasks={"given": models.accuracy})


def raises(_: Any) -> float:
    raise KeyError("data")


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (raises, "raises of base: the evaluation raised KeyError: 'data'; expected a score."),
        (lambda _: "good", "score of base: the evaluation returned a str; expected a finite number."),
        (lambda _: math.nan, "score of base: the evaluation returned nan; expected a finite number."),
    ],
)
def test_what_is_no_score_ends_with_the_model(models: Models, score: Any, what: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(what)):
        alnico.compare(models.parents, models.merged, base=models.base, tasks=score)


def test_a_task_where_lower_is_better_is_left_out(models: Models) -> None:
    class Loss:
        name, goal, weight, size = "loss", "min", 1.0, 0

        def evaluate(self, *_: Any) -> Any:
            raise AssertionError

    found = alnico.compare(models.parents, models.merged, base=models.base, tasks=[Loss(), models.accuracy])
    assert list(found.by_model) == ["accuracy"]
    assert found.notes[-1] == "loss: lower is better, so there is no share to keep; not scored."


def test_the_command_scores_models_on_a_tasks_file(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    modules = {"base": models.base, "one": models.parents[0], "other": models.parents[1]}
    for name, module in modules.items():
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
    alnico.merge({"merge_method": "linear", "base_model": "base", "models": ["one", "other"]}, "out")
    (tmp_path / "scoring.py").write_text(
        "from pathlib import Path\nfrom safetensors.numpy import load_file\n"
        "def first(path):\n    return float(load_file(next(Path(path).glob('*.safetensors')))['0.bias'][0]) + 10\n"
    )
    (tmp_path / "tasks.yml").write_text("tasks: [{name: first, type: call, function: 'scoring:first'}]\n")
    command = ("compare", "one", "other", "out", "--tasks", "tasks.yml", "--json")
    assert run(*command)[0] == 12
    code, out, _ = run(*command, "--allow-code")
    assert code == 0
    bias = {name: float(module.state_dict()["0.bias"][0]) + 10 for name, module in modules.items()}
    scores = json.loads(out)["by_model"]["first"]
    assert {Path(name).name: value for name, value in scores.items()} == pytest.approx(
        {**bias, "out": (bias["one"] + bias["other"]) / 2}
    )
