"""Files that commands write beside models: refused before the work where they cannot be written, never written over what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint.output_path import check_new_file, write_new_file
from alnico.errors import OutputError

Run = Callable[..., tuple[int, str, str]]

COMMANDS = {
    "suggest": ["suggest", "nowhere", "--base", "none", "--out"],
    "soup": ["soup", "nowhere", "none", "--tasks", "none.yml", "--out"],
    "adamerge": ["adamerge", "nowhere", "--base", "none", "--tasks", "none.yml", "--out"],
    "evaluate": ["evaluate", "nowhere", "--tasks", "none.yml", "--out"],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(kind: str) -> str:
    path = Path("out.yml")
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to("elsewhere")
    elif kind == "socket's folder":
        return "/proc/out.yml"
    elif kind == "no folder":
        return "deep/out.yml"
    elif kind == "below a file":
        Path("file").write_text("mine")
        return "file/out.yml"
    elif kind == "long":
        return "x" * 256
    return str(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing", "no folder", "below a file", "long"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_new_is_refused_before_models_are_looked_at(
    command: str, kind: str, run: Run
) -> None:
    out = put(kind)
    before = sorted(os.listdir())
    code, stdout, stderr = run(*COMMANDS[command], out)
    assert (code, stdout) == (8, ""), stderr
    assert stderr.startswith(f"alnico: {out}")
    assert sorted(os.listdir()) == before


def test_the_course_of_a_learned_recipe_is_not_written_over(run: Run) -> None:
    Path("out.course.json").write_text("mine")
    assert run(*COMMANDS["adamerge"], "out.yml")[0] == 8


def test_a_file_that_came_to_be_meanwhile_is_not_written_over() -> None:
    check_new_file(Path("out.yml"))
    Path("out.yml").symlink_to("elsewhere")
    with pytest.raises(OutputError, match=r"out\.yml: cannot be written \(File exists\)"):
        write_new_file(Path("out.yml"), "ours")
    assert sorted(os.listdir()) == ["out.yml"]
    Path("out.yml").unlink()
    write_new_file(Path("out.yml"), "ours")
    assert Path("out.yml").read_text() == "ours"


def test_an_evaluation_replaces_an_evaluation_alone(run: Run) -> None:
    Path("out.yml").write_text(json.dumps({"models": [], "tasks": []}))
    assert run(*COMMANDS["evaluate"], "out.yml")[0] == 12  # the tasks file is not there
    for text in ("{}", "[]", "mine", ""):
        Path("out.yml").write_text(text)
        assert run(*COMMANDS["evaluate"], "out.yml")[0] == 8


@pytest.mark.parametrize(
    "words", [["evaluate", "x", "--tasks", "none.yml", "--report"], ["analyze", "x", "--base", "y", "--out"]]
)
@pytest.mark.parametrize("name", ["evaluation.json", "summary.json", "report.html", "study.db"])
def test_a_folder_with_a_file_of_a_reports_name_is_left_alone(words: list[str], name: str, run: Run) -> None:
    Path("folder").mkdir()
    Path("folder", name).write_text('{"mine": 1}')
    Path("none.yml").write_text("tasks:\n- {name: a, type: call, call: x:y}\n")
    code, _, stderr = run(*words, "folder", *(["--allow-code"] if words[0] == "evaluate" else []))
    assert code in (8, 12), stderr
    assert Path("folder", name).read_text() == '{"mine": 1}'


def test_a_search_leaves_files_alone_that_are_not_its_own(tmp_path: Path) -> None:
    from alnico.tune.search.files import search_folder

    for name in ("search.json", "study.db"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        with pytest.raises(OutputError, match="contains files that are not from a search"):
            search_folder(folder)


def test_statistics_are_written_over_statistics_alone() -> None:
    from alnico.checkpoint.statistics import check_statistics_folder

    Path("out").mkdir()
    check_statistics_folder(Path("out"), False)
    Path("out/statistics.safetensors.unfinished").touch()
    check_statistics_folder(Path("out"), False)  # a measurement was killed there: the same command goes on
    Path("out/statistics.json").write_text('{"mine": 1}')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists and is not empty"):
            check_statistics_folder(Path("out"), overwrite)
    check_statistics_folder(Path("out"), "anything")
    with pytest.raises(OutputError, match="is one of the inputs or contains it"):
        check_statistics_folder(Path("out"), "anything", [Path("out/statistics.json")])
    Path("out/statistics.json").write_text('{"kind": "gram", "tensors": {}}')
    check_statistics_folder(Path("out"), True)
    Path("file").touch()
    for place in ("file", "file/out", "/dev/null"):
        with pytest.raises(OutputError):
            check_statistics_folder(Path(place), "anything")


def test_a_second_merge_inside_the_first_is_refused(run: Run) -> None:
    import numpy as np

    from made import save_model

    for name in ("a", "b"):
        save_model(Path(name), {"w": ("F32", np.ones((4, 2), np.float32))})
    alnico.merge({"merge_method": "linear", "models": ["a", "b"]}, "out")
    code, _, stderr = run("reproduce", "out", "out/again")
    assert (code, "is inside out, with which it is compared" in stderr) == (8, True)
    for new in ("a/../out/./x", "."):
        assert run("reproduce", "out", new)[0] == 8
    os.chdir("out")
    before = sorted(os.listdir())
    assert run("reproduce", ".", "--input", "a=../a", "--input", "b=../b")[0] == 0
    assert sorted(os.listdir()) == before
    assert sorted(os.listdir("..")) == ["a", "b", "out"]


def test_a_signature_is_not_written_through_a_link() -> None:
    from alnico.checkpoint.signatures import sign

    Path("out").mkdir()
    Path("elsewhere").write_text("mine")
    Path("out/model.sig").symlink_to("../elsewhere")
    with pytest.raises(OutputError, match="is a link or not a regular file"):
        sign(Path("out"), Path("key"))


def test_statistics_of_a_model_given_by_its_path_stay_in_their_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reached(Exception):
        pass

    folders: list[Path] = []

    def check(out: Path, *_: object) -> None:
        folders.append(out)
        if len(folders) == 2:
            raise Reached

    monkeypatch.setattr("alnico.tune.statistics.gram.check_statistics_folder", check)
    Path("here/a").mkdir(parents=True)
    os.chdir("here/a")
    with pytest.raises(Reached):
        alnico.gram_statistics(["..", "."], "out", tasks={"tasks": []})
    assert folders == [Path("out/here"), Path("out/a")]
    with pytest.raises(OutputError, match="two models have the same name"):
        alnico.gram_statistics(["x/Model", "y/model"], "out", tasks={"tasks": []})
