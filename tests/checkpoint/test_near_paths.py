"""A misspelt path is answered with the one that is there, in every place that takes a path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.near_paths import is_misspelling, near_path
from alnico.checkpoint.reference import may_hold_model
from alnico.errors import AlnicoError
from alnico.evaluation.task_file import read_tasks
from made import save_file, save_model

ONE = {"w": ("F32", np.ones((4, 2), np.float32))}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "sre", "tuned-1"):
        save_model(Path("models", name), ONE, {"model_type": "x"})
    save_file(Path("adapter/adapter_model.safetensors"), ONE)
    Path("adapter/adapter_config.json").write_text("{}")
    for name in ("linear.yml", "tasks.yml", "data/news.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("a: b\n")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("models/sree", "models/sre"),
        ("modles/sre", "models/sre"),
        ("modles/srre", "models/sre"),
        ("Models/SRE", "models/sre"),
        ("models/tuned_1", "models/tuned-1"),
        ("models/tuned-2", "models/tuned-1"),
        ("./models/sree", "models/sre"),
        ("models\\sre", "models/sre"),
        ("models\\sree", "models/sre"),
        ("sre", "models/sre"),
        ("linear", "linear.yml"),
        ("linear.yaml", "linear.yml"),
        ("linaer.yml", "linear.yml"),
        ("data/newz.jsonl", "data/news.jsonl"),
        ("models/sre", None),
        ("models/unheard-of", None),
        ("nowhere.yml", None),
        ("org/name", None),
        ("", None),
        ("x" * 400, None),
        ("~nobody-of-this-name/models", None),
    ],
)
def test_the_most_similar_path_is_found(written: str, meant: str | None) -> None:
    assert near_path(written) == meant


def test_an_absolute_path_is_answered_with_an_absolute_one(tmp_path: Path) -> None:
    meant = str(tmp_path / "models" / "sre")
    assert near_path(tmp_path / "modles" / "sre") == meant
    assert near_path(meant.removeprefix("/")) == meant


def test_only_what_is_looked_for_is_suggested() -> None:
    Path("models/sre.txt").touch()
    assert near_path("models/sre.md", accepts=may_hold_model) == "models/sre"
    assert near_path("linaer", accepts=may_hold_model) is None


def test_names_that_differ_in_a_number_are_no_misspellings() -> None:
    assert is_misspelling("models/tuned_1", "models/tuned-1")
    assert not is_misspelling("models/tuned-2", "models/tuned-1")
    assert not is_misspelling("sre", "models/sre")
    assert not is_misspelling("a/b", "a/c")


def recipe(*models: str, **keys: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": list(models), **keys}


def from_a_folder(model: str) -> object:
    Path("recipes").mkdir()
    Path("recipes/r.yml").write_text(f"merge_method: linear\nmodels: [{model}, ../models/base]\n")
    return alnico.plan("recipes/r.yml")


def encoder_from_a_folder(model: str) -> object:
    Path("tasks").mkdir()
    task = {
        "name": "a",
        "type": "classification",
        "data": "../data/news.jsonl",
        "head": "names",
        "labels": ["a", "b"],
    }
    return read_tasks({"tasks": [{**task, "encoder": model}]}, folder="tasks")


SREE = "model 'models/sree': no such directory or file; models/sre is there. Did you mean models/sre?"
MISSPELT: dict[str, tuple[Callable[[], object], str]] = {
    "a model": (lambda: alnico.open_model("models/sree"), SREE),
    "a model of a recipe": (lambda: alnico.plan(recipe("models/sree", "models/base")), SREE),
    "a base": (lambda: alnico.plan({**recipe("models/base"), "merge_method": "ties", "base_model": "models/sree"}), SREE),
    "a base of an adapter": (lambda: alnico.open_model("models/sree+adapter"), SREE),
    "a model to inspect": (lambda: alnico.inspect("models/sree"), SREE),
    "a model to compare": (lambda: alnico.diff("models/base", "models/sree"), SREE),
    "a model to analyze": (lambda: alnico.analyze(["models/base"], base="models/sree"), SREE),
    "an adapter to fold": (lambda: alnico.lora.fold("models/base", ["models/sree"], "out"), SREE),
    "an adapter to combine": (lambda: alnico.lora.combine(["models/sree", "adapter"], "out"), SREE),
    "a fine-tune": (lambda: alnico.lora.extract("models/base", "models/sree", "out", rank=1), SREE),
    "an adapter without a folder": (lambda: alnico.open_model("models/base+adaptr"), "'adaptr' is not there. Did you mean adapter?"),
    "a model without its folder": (lambda: alnico.open_model("sre"), "no such directory or file; expected a directory with safetensors files, one such file, or a model on the hub as owner/name or owner/name@revision. Did you mean models/sre?"),
    "a model seen from the recipe": (lambda: from_a_folder("../models/sree"), "model '../models/sree': no such directory or file; ../models/sre is there (seen from recipes). Did you mean ../models/sre?"),
    "an adapter seen from the recipe": (lambda: from_a_folder("../models/base+0.5*../adaptr"), "model '../adaptr': no such directory or file; ../adapter is there (seen from recipes)."),
    "an analysis": (lambda: alnico.read_analysis("modles"), "modles: no such file or folder; expected an analysis by `alnico analyze`. Did you mean models?"),
    "a file of an adapter": (lambda: alnico.open_model("models/base+adapter/adapter_model.safetensors"), "expected that of a LoRA adapter, with adapter_config.json and adapter_model.safetensors, or a file of LoRA factors. Give the folder: adapter."),
    "a recipe": (lambda: alnico.load_recipe("linaer.yml"), "linaer.yml: cannot be read (No such file or directory). Did you mean linear.yml?"),
    "a file of tasks": (lambda: read_tasks("tsks.yml"), "tsks.yml: cannot be read (No such file or directory). Did you mean tasks.yml?"),
    "an encoder of a task": (lambda: encoder_from_a_folder("../models/sree"), "tasks[0].encoder: model '../models/sree': no such directory or file; ../models/sre is there (seen from tasks)."),
    "data of a task": (lambda: read_tasks({"tasks": [{"name": "a", "type": "classification", "data": "data/newz.jsonl", "text": "t"}]}), "data/newz.jsonl: cannot be read (No such file or directory). Did you mean data/news.jsonl?"),
    "an output to verify": (lambda: alnico.verify("modles/sre"), "modles/sre: no such directory; expected the output of `alnico merge`. Did you mean models/sre?"),
    "an output to push": (lambda: alnico.push("modles/sre", "me/name"), "modles/sre: no such directory; expected the output of `alnico merge`. Did you mean models/sre?"),
    "statistics": (lambda: alnico.plan({"merge_method": "fisher", "models": [{"model": f"models/{n}", "parameters": {"fisher": "adaptr"}} for n in ("sre", "base")]}), "statistics 'adaptr': does not exist; expected a directory written by `alnico statistics`. Did you mean adapter?"),
}  # fmt: skip


@pytest.mark.parametrize("where", MISSPELT)
def test_a_misspelt_path_is_answered_with_the_nearest(where: str) -> None:
    call, expected = MISSPELT[where]
    with pytest.raises(AlnicoError) as caught:
        call()
    assert expected in str(caught.value)
