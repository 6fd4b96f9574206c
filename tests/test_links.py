"""What is written into the folder of a report replaces what stands under its names: a link there is not followed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.statistics import write_statistics
from alnico.errors import OutputError
from alnico.evaluation.user_function import UserFunction
from made import family


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base, tuned = family(tmp_path_factory.mktemp("models"), 2, dtype="F32")
    return [base, *tuned]


def counted(path: str) -> float:
    return float(len(os.listdir(path)))


def analyzed(models: list[Path], out: Path) -> None:
    alnico.analyze(models[1], base=models[0], out=out)


def compared(models: list[Path], out: Path) -> None:
    alnico.compare(models[2], models[1], base=models[0], out=out)


def evaluated(models: list[Path], out: Path) -> None:
    alnico.evaluate([models[0]], [UserFunction("counted", counted)], out=out)


def searched(models: list[Path], out: Path) -> None:
    pytest.importorskip("optuna")
    tuned = [{"model": str(m), "parameters": {"weight": {"search": [0.0, 1.0]}}} for m in models[1:]]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models[0]), "models": tuned}
    alnico.search(
        {**recipe, "search": {"trials": 1, "sampler": "random"}},
        tasks=[UserFunction("counted", counted)],
        report="same",
        out=out,
    )


def measured(models: list[Path], out: Path) -> None:
    with open_model(models[0]) as model:
        write_statistics(out, "fisher", model, {"x": np.ones(3)}, {}, {}, overwrite=True)


def curved(models: list[Path], out: Path) -> None:
    alnico.curve(models[0], models[1:], counted, scale=[0, 1], out=out)


TOLD_BY = ("study.db", "points.jsonl", "search.json", "evaluation.json", "statistics.json")
"""Files by which such a folder is known; where one is a link, the folder is refused."""
REPORTS = {f.__name__: f for f in (analyzed, compared, evaluated, searched, measured, curved)}


@pytest.mark.parametrize(
    "report", [pytest.param(name, marks=pytest.mark.slow) if name == "searched" else name for name in REPORTS]
)
def test_a_link_in_the_folder_of_a_report_is_replaced_and_not_followed(
    report: str, models: list[Path], tmp_path: Path
) -> None:
    write: Callable[[list[Path], Path], Any] = REPORTS[report]
    out, victims = tmp_path / "out", tmp_path / "victims"
    victims.mkdir()
    write(models, out)
    files = {
        p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in TOLD_BY
    }
    for number, (name, data) in enumerate(files.items()):
        (victims / str(number)).write_bytes(data)
        (out / name).unlink()
        (out / name).symlink_to(victims / str(number))
    write(models, out)
    assert [p for p in out.rglob("*") if p.is_symlink()] == []
    assert {
        p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name not in TOLD_BY
    } == files.keys()
    assert [(victims / str(number)).read_bytes() for number in range(len(files))] == list(files.values())


def test_the_folder_of_a_model_in_a_report_is_no_link(models: list[Path], tmp_path: Path) -> None:
    analyzed(models, tmp_path / "out")
    (tmp_path / "victim").mkdir()
    own = tmp_path / "out" / models[1].name
    for path in own.iterdir():
        path.unlink()
    own.rmdir()
    own.symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="is a link; the tables of tuned-0 go into a folder of that name"):
        analyzed(models, tmp_path / "out")
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.slow
def test_a_study_that_is_a_link_is_refused(models: list[Path], tmp_path: Path) -> None:
    searched(models, tmp_path / "out")
    (tmp_path / "out" / "study.db").rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    (tmp_path / "out" / "study.db").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"study\.db: is a link; expected the study of a search"):
        searched(models, tmp_path / "out")
    assert (tmp_path / "victim").read_bytes() == before


@pytest.mark.parametrize("plant", ["link", "pipe"])
def test_a_folder_whose_study_is_no_file_is_no_search(plant: str, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if plant == "pipe":
        os.mkfifo(tmp_path / "out" / "study.db")
    else:
        (tmp_path / "out" / "study.db").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"study\.db|contains files that are not from a search"):
        searched(models, tmp_path / "out")
    assert not (tmp_path / "victim").exists()


def test_an_older_summary_of_a_stranger_leads_to_no_folder_elsewhere(
    models: list[Path], tmp_path: Path
) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "summary.json").write_text("precious")
    out.mkdir()
    (out / "summary.json").write_text(
        '{"quantile_error": 0, "models": [{"name": "x"}, {"name": ""}, {"name": "../victim"}]}'
    )
    (out / "x").symlink_to(victim)
    alnico.analyze([models[1]], base=models[0], out=out)
    assert (victim / "summary.json").read_text() == "precious"
    assert (out / "x").is_symlink()


def test_points_that_are_a_link_are_refused(models: list[Path], tmp_path: Path) -> None:
    curved(models, tmp_path / "out")
    (tmp_path / "out" / "points.jsonl").rename(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    (tmp_path / "out" / "points.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="contains files that are not from a curve"):
        curved(models, tmp_path / "out")
    assert (tmp_path / "victim").read_bytes() == before
