"""Weights without a config are evaluated by functions of one's own, as soups and searches take them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import alnico
from alnico.errors import ModelError, NonFiniteError
from alnico.evaluation.perplexity import Perplexity
from alnico.evaluation.tasks import Score
from alnico.evaluation.user_function import UserFunction
from made import save_file, save_model

Run = Callable[..., tuple[int, str, str]]
VALUES = {"a": 1.0, "b": 2.0, "c": 4.0}
SCORER = """
from pathlib import Path
from safetensors.torch import load_file

def mean(path):
    return float(load_file(Path(path) / "model.safetensors")["w"].float().mean())
"""


def mean(path: str) -> float:
    return float(load_file(Path(path) / "model.safetensors")["w"].float().mean())


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A safetensors file, a pickled state dict and a folder without a config."""
    save_file(tmp_path / "a.safetensors", {"w": ("F32", np.full((3, 4), VALUES["a"]))})
    torch.save({"w": torch.full((3, 4), VALUES["b"], dtype=torch.bfloat16)}, tmp_path / "b.pt")
    save_model(tmp_path / "c", {"w": ("F16", np.full((3, 4), VALUES["c"]))}, shards=1)
    (tmp_path / "c" / "config.json").unlink(missing_ok=True)
    return [str(tmp_path / name) for name in ("a.safetensors", "b.pt", "c")]


def test_plain_files_are_scored_by_a_function_of_ones_own(models: list[str]) -> None:
    card = alnico.evaluate(models, [UserFunction("mean", mean)])
    assert {m.name: m.scores["mean"].value for m in card.models} == VALUES


def test_base_parents_and_merges_may_be_plain(models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    alnico.merge({"merge_method": "linear", "models": models[1:]}, out)
    card = alnico.evaluate(models[1:], [UserFunction("mean", mean)], base=models[0], merged=out)
    assert {m.name: m.scores["mean"].value for m in card.models} == {**VALUES, "merged": 3.0}
    assert [k.merged for k in card.kept["merged"]] == [3.0]


def test_the_command_takes_them_with_tasks_of_type_call(models: list[str], tmp_path: Path, run: Run) -> None:
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "tasks.yml").write_text('tasks:\n  - {name: mean, type: call, function: "scorer:mean"}\n')
    code, shown, _ = run(
        "evaluate", *models, "--tasks", str(tmp_path / "tasks.yml"), "--allow-code", "--json"
    )
    assert code == 0
    assert [m["scores"]["mean"]["value"] for m in json.loads(shown)["models"]] == [1.0, 2.0, 4.0]


def test_a_task_that_reads_tensors_gets_them_of_every_model(models: list[str], tmp_path: Path) -> None:
    class Sum:
        name, goal, weight, size = "sum", "max", 1.0, 0

        def evaluate(self, subject: Any, examples: Sequence[int] | None = None) -> Score:
            return Score(float(subject.state()["w"].double().sum()))

        def pooled(self, scores: Sequence[Score]) -> Score:
            return scores[0]

        def digests(self) -> frozenset[str]:
            return frozenset()

    with_config = save_model(tmp_path / "d", {"w": ("BF16", np.full((3, 4), 8.0))}, {"model_type": "bert"})
    card = alnico.evaluate([*models, with_config], [Sum()])
    assert [m.scores["sum"].value for m in card.models] == [12.0, 24.0, 48.0, 96.0]
    found = alnico.soup(models, [Sum()])
    assert found.alone == dict(zip(models, (12.0, 24.0, 48.0), strict=True))


def test_tasks_that_need_a_module_are_refused_with_advice(models: list[str]) -> None:
    for task, told in (
        (
            UserFunction("mine", lambda _: 1.0),
            r"has no config\.json, and the task needs an encoder; .* parameter called path or model_dir",
        ),
        (Perplexity("text", "a b c"), r"has no config\.json"),
    ):
        with pytest.raises(ModelError, match=told):
            alnico.evaluate(models[:1], [task])


def test_what_is_no_model_is_told_before_the_first_task(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    called: list[str] = []
    for wrong in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ModelError):
            alnico.evaluate([*models, wrong], [UserFunction("mine", lambda path: called.append(path) or 1.0)])
    assert not called


def test_a_nan_in_them_is_named(tmp_path: Path) -> None:
    held = np.ones((3, 4))
    held[1, 2] = np.nan
    save_file(tmp_path / "bad.safetensors", {"w": ("F32", held)})
    with pytest.raises(NonFiniteError, match=r"^w\[1, 2\]: .*bad\.safetensors has NaN"):
        alnico.evaluate([str(tmp_path / "bad.safetensors")], [UserFunction("mean", mean)])


def test_nothing_is_left_in_the_folder_of_temporary_files(models: list[str]) -> None:
    seen: list[Path] = []
    alnico.evaluate(models, [UserFunction("mine", lambda path: seen.append(Path(path)) or 1.0)])
    assert len(seen) == len(models)
    assert not any(path.exists() for path in seen)
