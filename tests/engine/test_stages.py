"""Several merges of one file: taken up where they stopped, checked before they begin, told in card and lock."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import alnico
from alnico.errors import OutputError, ResourceError, RunError
from alnico.events import Event, Started, TensorDone
from made import family, model_bytes, read_model
from made_tokenizers import save_family

CHAIN = """\
name: first
merge_method: linear
models: [tuned-0, tuned-1]
---
name: second
merge_method: task_arithmetic
base_model: base
models: [tuned-2]
parameters: {weight: 0.3}
---
merge_method: slerp
base_model: first
models: [first, second]
parameters: {t: 0.4}
"""
PAIR = """\
name: mean
merge_method: linear
models: [tuned-0, tuned-1]
---
merge_method: linear
models: [tuned-1, tuned-2]
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 3, layers=1)


def stopping(stage: int, tensors: int, begun: list[str]) -> Callable[[Event], None]:
    """A watcher that interrupts at the given tensor of the given merge, and notes the methods of those that begin."""

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            begun.append(event.plan.recipe.merge_method)
            watch.left = tensors  # type: ignore[attr-defined]
        elif isinstance(event, TensorDone) and len(begun) == stage:
            watch.left -= 1  # type: ignore[attr-defined]
            if watch.left == 0:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_that_are_interrupted_are_taken_up_where_they_stopped(stage: int) -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "whole")
    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents("r.yml", "out", threads=1, watch=stopping(stage, 3, []))
    assert not Path("out").exists()
    begun: list[str] = []
    (result,) = alnico.merge_documents("r.yml", "out", watch=stopping(0, 0, begun))
    assert begun == ["linear", "task_arithmetic", "slerp"][stage - 1 :]
    assert (result.resumed > 0) == (stage == 3)
    assert model_bytes(Path("out")) == model_bytes(Path("whole"))
    assert not list(Path().glob(".*"))


def test_several_outputs_are_taken_up_and_finished_ones_stay() -> None:
    Path("r.yml").write_text(PAIR)
    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents("r.yml", "out", threads=1, watch=stopping(2, 1, []))
    finished = Path("out/mean/model.safetensors").stat().st_mtime_ns
    (result,) = alnico.merge_documents("r.yml", "out")
    assert str(result.path) == "out/2-linear"
    assert Path("out/mean/model.safetensors").stat().st_mtime_ns == finished
    assert sorted(p.name for p in Path("out").iterdir()) == ["2-linear", "mean"]


def test_a_place_that_holds_something_else_is_refused_also_when_a_merge_is_taken_up() -> None:
    Path("r.yml").write_text(PAIR)
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"^out: exists and is not empty"):
        alnico.merge_documents("r.yml", "out")
    Path("out/mine.txt").unlink()
    with pytest.raises(KeyboardInterrupt):
        alnico.merge_documents("r.yml", "out", threads=1, watch=stopping(2, 1, []))
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"^out: exists and is not empty"):
        alnico.merge_documents("r.yml", "out")
    assert Path("out/mine.txt").read_text() == "mine"


def test_card_and_lock_name_the_models_and_methods_of_all_stages() -> None:
    Path("r.yml").write_text(CHAIN)
    alnico.merge_documents("r.yml", "out")
    card = Path("out/README.md").read_text()
    assert "# A merge of tuned-0, tuned-1, tuned-2, base\n" in card
    assert [line.split("`")[1] for line in card.splitlines() if line.startswith("- `")] == [
        "linear",
        "task_arithmetic",
        "slerp",
    ]
    parts = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[2]
        for line in card.splitlines()
        if "not from the hub" in line
    }
    assert parts == {
        "tuned-0": "merged; config, tokenizer",
        "tuned-1": "merged",
        "tuned-2": "merged",
        "base": "base",
    }
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert [i["model"] for i in lock["inputs"]] == ["first", "second"]
    stages = [i["lock"] for i in lock["inputs"]]
    assert [[i["model"] for i in s["inputs"]] for s in stages] == [
        ["tuned-0", "tuned-1"],
        ["tuned-2", "base"],
    ]
    for stage, given in zip(stages, lock["inputs"], strict=True):
        assert {n: t["digest"] for n, t in stage["output"].items()} == given["tensors"]


def test_the_carried_recipe_of_stages_makes_the_same_merge_with_the_seed_of_the_command_line() -> None:
    Path("r.yml").write_text(
        CHAIN.replace("task_arithmetic", "dare_linear").replace("{weight: 0.3}", "{density: 0.5}")
    )
    (first,) = alnico.merge_documents("r.yml", "out", seed=5)
    (again,) = alnico.merge_documents("out/mergekit_config.yml", "again")
    assert again.digests == first.digests
    (other,) = alnico.merge_documents("r.yml", "other")
    assert other.digests != first.digests


def test_the_card_of_rules_and_slices_names_their_methods_only() -> None:
    slices = [
        {
            "sources": [
                {"model": "tuned-0", "layer_range": [0, 1]},
                {"model": "tuned-1", "layer_range": [0, 1]},
            ]
        },
        {"sources": [{"model": "tuned-2", "layer_range": [0, 1]}], "merge_method": "passthrough"},
    ]
    alnico.merge({"merge_method": "linear", "slices": slices}, "stack")
    card = Path("stack/README.md").read_text()
    assert "by 2 methods, as the recipe below says:\n\n- `linear`: " in card
    assert "\n- `passthrough`: " in card
    rules = [{"filter": "norm", "merge_method": "passthrough", "model": "base"}]
    alnico.merge(
        {"merge_method": "linear", "models": ["tuned-0", "tuned-1"], "base_model": "base", "methods": rules},
        "ruled",
    )
    assert "| base | not from the hub | base; config, tokenizer |" in Path("ruled/README.md").read_text()
    alnico.merge({"merge_method": "linear", "models": ["tuned-0", "tuned-1"], "base_model": "base"}, "plain")
    card = Path("plain/README.md").read_text()
    assert "| base | not from the hub | config, tokenizer |" in card
    assert "by `linear`: Average" in card
    assert read_model(Path("plain")).keys() == read_model(Path("ruled")).keys()


def test_outputs_that_do_not_fit_the_disk_together_are_refused_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("chain.yml").write_text(CHAIN)
    one = alnico.plan_documents("chain.yml")[0].bytes_to_write
    free = 2 * one + (16 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(
        ResourceError, match=r": the outputs of all 3 merges need .*, .* are free\. Make room"
    ):
        alnico.merge_documents("chain.yml", "out")
    assert not Path("out").exists()


def unions() -> str:
    models = save_family(Path("models"))
    Path("unions.yml").write_text(
        f"name: first\nmerge_method: linear\nmodels: [{models['base']}, {models['other']}]\ntokenizer_source: union\n---\n"
        f"merge_method: linear\nmodels: [first, {models['chat']}]\ntokenizer_source: union\nunrelated: allow\n"
    )
    return "unions.yml"


def test_without_a_temporary_folder_a_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_usable(**_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", none_is_usable)
    with pytest.raises(
        RunError,
        match=r"temporary folder: cannot be written to \(No usable .*\); .* set TMPDIR to a folder",
    ):
        alnico.plan_documents(unions())


def test_a_stage_is_planned_with_the_vocabulary_that_an_earlier_one_makes() -> None:
    unions()
    first, second = alnico.plan_documents("unions.yml")
    (made,) = alnico.merge_documents("unions.yml", "out")
    shapes = {j.name: j.shape for j in second.jobs}
    assert shapes == {j.name: j.shape for j in made.plan.jobs}
    assert (
        shapes["model.embed_tokens.weight"][0]
        > {j.name: j.shape for j in first.jobs}["model.embed_tokens.weight"][0]
    )
    assert second.files == made.plan.files
