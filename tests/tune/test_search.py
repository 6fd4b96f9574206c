"""Searching real recipes: from the file to the best recipe, on disk and from the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import alnico
from alnico.cli.main import app
from alnico.errors import EvaluationError, ModelError, OutputError, RecipeError
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.splits import split
from alnico.evaluation.task_file import read_tasks
from made_tasks import Made


def recipe(made: Made, **search: Any) -> dict[str, Any]:
    """Weights of two specialists to search."""
    pets, food, _ = made.references
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": [
            {"model": pets, "parameters": {"weight": {"search": [0.0, 1.2]}}},
            {"model": food, "parameters": {"weight": {"search": [0.0, 1.2]}}},
        ],
        "search": {"tasks": str(made.valid), "trials": 6, "sampler": "random", **search},
    }


def test_the_best_recipe_makes_the_model_that_was_scored(made: Made, tmp_path: Path) -> None:
    found = alnico.search(recipe(made), out=tmp_path / "found")
    (best,) = found.best
    assert best.values[0] == max(t.values[0] for t in found.trials)
    assert best.values[0] > found.trials[0].values[0]
    alnico.merge(tmp_path / "found" / "best.yml", tmp_path / "merged")
    merged = open_subject(tmp_path / "merged")
    for task in read_tasks(made.valid):
        assert task.evaluate(merged).value == dict(best.scores)[task.name]


def test_a_search_leaves_its_recipe_its_trials_and_a_page(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "found"
    found = alnico.search(recipe(made), out=out)
    assert sorted(p.name for p in out.iterdir()) == [
        "best.yml",
        "search.html",
        "search.json",
        "study.db",
        "trials.csv",
    ]
    with (out / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [t.values[0] for t in found.trials]
    assert [float(row["tuned-pets.weight"]) for row in rows] == [
        t.point["tuned-pets.weight"] for t in found.trials
    ]
    data = json.loads((out / "search.json").read_text())
    assert data["best"][0]["trial"] == found.best[0].number
    assert data["counts"] == {"complete": 6}
    page = (out / "search.html").read_text()
    for anchor in ("best", "history", "slices", "trials"):
        assert f'<section id="{anchor}"' in page
    longer = alnico.search(recipe(made), out=out, trials=8)
    assert [t.values for t in longer.trials[:6]] == [t.values for t in found.trials]
    assert len(longer.trials) == 8


def test_paths_of_the_best_recipe_hold_from_its_folder(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name, path in {"base": made.base, "a": made.references[0], "b": made.references[1]}.items():
        (folder / name).symlink_to(path)
    written = recipe(made, trials=2)
    written["base_model"] = "base"
    for entry, name in zip(written["models"], "ab", strict=True):
        entry["model"] = name
    (folder / "mine.yml").write_text(yaml.safe_dump(written))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["search", "work/mine.yml", "--json"])
    assert shown.exit_code == 0
    best = yaml.safe_load((tmp_path / "mine-search" / "best.yml").read_text())
    assert best["base_model"] == os.path.join("..", "work", "base")
    monkeypatch.chdir(folder)
    assert alnico.plan(tmp_path / "mine-search" / "best.yml").jobs


def test_tasks_and_folders_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as missing:
        alnico.search({**recipe(made), "search": {}})
    assert str(missing.value) == (
        "recipe: search.tasks is missing; expected the tasks file to search on. Add it, or give --tasks."
    )
    with pytest.raises(EvaluationError) as shared:
        alnico.search(recipe(made), report=made.valid)
    assert str(shared.value).startswith("pets: ")
    assert "of its examples are also in pets, which is searched on, so its score would be too high" in str(
        shared.value
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="contains files that are not from a search"):
        alnico.search(recipe(made), out=tmp_path / "other")


@pytest.mark.nightly  # tests/tune/test_search_on_devices.py starts some, too
def test_several_processes_score_trials(made: Made) -> None:
    one = alnico.search(recipe(made, trials=4))
    two = alnico.search(recipe(made, trials=4), workers=2, threads=1)
    assert [t.values for t in two.trials] == [t.values for t in one.trials]
    assert np.isfinite([t.values[0] for t in two.trials]).all()


def test_the_report_is_of_other_examples_beside_what_the_recipe_must_beat(made: Made) -> None:
    found = alnico.search(recipe(made, report=str(made.test)))
    card = found.report
    assert card is not None
    assert [m.name for m in card.models] == [
        "base",
        "tuned-pets",
        "tuned-food",
        "uniform",
        "default",
        "random",
        "best",
    ]
    assert [(d.model, d.other) for d in card.differences] == [
        ("best", other) for other in ("base", "tuned-pets", "tuned-food", "uniform", "default", "random")
    ]
    by_name = {m.name: m for m in card.models}
    for task in read_tasks(made.test):
        for name, path in (("base", made.base), ("tuned-pets", made.tuned["pets"])):
            assert by_name[name].scores[task.name].value == task.evaluate(open_subject(path)).value
    mean = by_name["best"].mean
    assert mean is not None
    assert mean.low is not None
    assert mean.high is not None
    assert mean.low < mean.value < mean.high
    # At weights of 1/2 and the scale 1, task arithmetic is the mean of the two.
    assert by_name["uniform"].scores == by_name["default"].scores
    assert not found.notes


def test_held_out_examples_are_those_that_no_trial_has_scored(made: Made) -> None:
    found = alnico.search(recipe(made, trials=2, held_out=0.3))
    assert found.report is not None
    for task, measured in zip(read_tasks(made.valid), found.report.tasks, strict=True):
        searched, held = split(task, 0.3)
        assert sorted(searched + held) == list(range(task.size))
        assert measured.examples == len(held)
        keys = task.known_by()  # type: ignore[attr-defined]
        assert not {keys[i] for i in searched} & {keys[i] for i in held}


def test_a_search_says_when_its_scores_flatter(made: Made) -> None:
    assert "so the best recipe's score is too high" in alnico.search(recipe(made, trials=1)).notes[0]
    asked = alnico.search(recipe(made, trials=1, report="same"))
    assert asked.report is not None
    assert "as requested (report: same)" in asked.notes[0]


def test_layer_stacks_are_searched_too(made: Made) -> None:
    pets, food, _ = made.references
    stack = {"models": [pets, food], "layers": 2, "repeat": 2}
    found = alnico.search(
        {"stack": stack, "search": {"tasks": str(made.valid), "trials": 4, "sampler": "random"}}
    )
    assert {t.state for t in found.trials} == {"complete"}
    assert found.recipe.merge_method == "passthrough"
    assert len({len(t.point) for t in found.trials}) == 1


def test_a_model_that_is_not_there_ends_the_search_at_once(made: Made) -> None:
    asked = recipe(made)
    asked["models"][0]["model"] = "not/there/at/all"
    with pytest.raises(ModelError, match="not/there/at/all"):
        alnico.search(asked)


def test_a_study_of_models_that_were_trained_anew_is_refused(made: Made, tmp_path: Path) -> None:
    asked = recipe(made, trials=1)
    own = tmp_path / "mine"
    shutil.copytree(made.references[0], own)
    asked["models"][0]["model"] = str(own)
    alnico.search(asked, out=tmp_path / "out")
    os.utime(own / "model.safetensors")
    alnico.search(asked, out=tmp_path / "out")
    weights = load_file(own / "model.safetensors")
    save_file(
        {name: 1.001 * tensor for name, tensor in weights.items()},
        own / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(OutputError, match="uses models with other contents"):
        alnico.search(asked, out=tmp_path / "out")


def test_the_command_prints_the_recipe_and_the_report(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text(yaml.safe_dump(recipe(made)))
    out = tmp_path / "out"
    shown = CliRunner().invoke(
        app, ["search", str(file), "--out", str(out), "--trials", "2", "--report", str(made.test), "-q"]
    )
    assert shown.exit_code == 0, shown.output
    for said in (
        "2 trials: 2 complete",
        "merge_method: task_arithmetic",
        "best - uniform",
        f"written: {out}",
    ):
        assert said in shown.output


def test_long_numbers_of_a_recipe_are_shown_with_four_digits_and_names_stay() -> None:
    from alnico.cli.commands.search import rounded

    lines = {
        "- model: run-0.123456789": "- model: run-0.123456789",
        "  parameters: {weight: 0.43718610975120001}": "  parameters: {weight: 0.4372}",
        "  weight: [0.1234567, 1.5, -0.98765432]": "  weight: [0.1235, 1.5, -0.9877]",
        "    - 1.23456789e-05": "    - 1.235e-05",
        "density: 0.5": "density: 0.5",
    }
    assert {line: rounded(line) for line in lines} == lines
