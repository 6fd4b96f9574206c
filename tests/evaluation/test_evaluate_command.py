"""``alnico evaluate`` and ``alnico.evaluate``: from models on disk to tables, JSON and a page."""

from __future__ import annotations

import json

import pytest

import alnico
from alnico.errors import OutputError
from alnico.evaluation.loaded_model import ModuleSubject, open_subject
from alnico.evaluation.task_file import read_tasks


@pytest.fixture(scope="session")
def merged(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "arithmetic"
    models = [{"model": path, "parameters": {"weight": 0.6}} for path in made.references]
    alnico.merge({"merge_method": "task_arithmetic", "base_model": str(made.base), "models": models}, out)
    return out


@pytest.fixture(scope="session")
def card(made, merged):
    return alnico.evaluate(made.references, made.test, base=made.base, merged=merged)


def test_the_merge_lies_between_base_and_specialists(card):
    base, merge = (card.models[i].mean.value for i in (0, -1))
    assert base < merge
    best = [card.models[i + 1].scores[task.name].value for i, task in enumerate(card.tasks)]
    assert merge < sum(best) / 3
    assert card.differences[0].mean.low > 0
    assert [kept.best for kept in card.kept["arithmetic"]] == ["tuned-pets", "tuned-food", "tuned-sky"]
    assert all(0.4 < kept.kept < 1 for kept in card.kept["arithmetic"])


def test_models_in_memory_score_as_on_disk(made, merged, card):
    subject = open_subject(merged)
    in_memory = ModuleSubject("in memory", subject.module("encoder"), subject.tokenizer())
    found = alnico.evaluate([in_memory], read_tasks(made.test))
    assert found.models[0].mean == card.models[-1].mean


def test_the_command_prints_a_table_and_writes_json_and_page(run, made, merged, card, tmp_path):
    words = [
        "evaluate",
        "--models",
        *made.references,
        "--base",
        str(made.base),
        "--merged",
        str(merged),
        "--tasks",
        str(made.test),
    ]
    code, out, err = run(*words, "--out", str(tmp_path / "scores.json"), "--report", str(tmp_path / "report"))
    assert code == 0
    assert err.splitlines()[0] == f"{made.base}  pets: accuracy {card.models[0].scores['pets'].value:.4g}"
    lines = out.splitlines()
    assert lines[0].split() == ["model", "mean", "pets", "food", "sky"]
    assert [line.split() for line in lines[1:4]] == [
        ["metric", *["accuracy"] * 4],
        ["better", *["higher"] * 4],
        ["examples", *["60"] * 3],
    ]
    assert lines[8].split()[:2] == ["arithmetic", f"{card.models[-1].mean.value:.3f}"]
    assert lines[11].startswith("arithmetic - base ")
    assert f"{card.differences[0].mean.value:+.3f}* [{card.differences[0].mean.low:+.3f}, " in lines[11]
    assert (
        lines[-1] == "[low, high]: 95 % interval for other examples of the same tasks, 2000 bootstrap draws"
    )
    assert card.data()["tasks"][0] == {
        "name": "pets", "goal": "max", "weight": 1.0, "examples": 60, "metric": "accuracy", "counted": "examples",
    }  # fmt: skip
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(card.data()))
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text()) == json.loads(
        json.dumps(card.data())
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(
        f'id="{anchor}"' in page
        for anchor in ("scores", "table", "differences", "kept", "score-bars", "score-radar")
    )
    assert "Accuracy, higher is better: pets (60 examples), food (60 examples), sky (60 examples)." in page
    assert "pets (accuracy)" in page
    code, out, _ = run(*words, "--json")
    printed = json.loads(out)
    assert printed.pop("compile_seconds") >= 0.0
    assert printed == json.loads(json.dumps(card.data()))


def test_compare_reads_what_evaluate_wrote(run, made, merged, card, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(card.data()))
    words = [
        "compare",
        *made.references,
        str(merged),
        "--base",
        str(made.base),
        "--scores",
        str(tmp_path / "scores.json"),
    ]
    code, out, _ = run(*words, "--out", str(tmp_path / "report"), "--json")
    assert code == 0
    assert [score["task"] for score in json.loads(out)["scores"]] == ["pets", "food", "sky"]
    assert 'id="score-bars"' in (tmp_path / "report" / "report.html").read_text()


def test_a_folder_of_other_things_is_left_alone(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError) as caught:
        alnico.evaluate(made.base, made.test, out=tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: contains files that are not from an evaluation. Choose a new folder, or empty it."
    )
    assert alnico.evaluate(made.base, made.test, out=tmp_path / "new").models[0].role == "model"
    assert alnico.evaluate(made.base, made.test, out=tmp_path / "new").models[0].role == "model"


def test_mistakes_are_told_in_one_message_with_the_errors_code(run, made, tmp_path):
    (tmp_path / "tasks.yml").write_text("tasks: []\n")
    code, out, err = run("evaluate", str(made.base), "--tasks", str(tmp_path / "tasks.yml"))
    assert (code, out) == (12, "")
    assert err.startswith(
        f"alnico: {tmp_path / 'tasks.yml'}:1: tasks is an empty list; expected a list under tasks"
    )
    code, out, err = run("evaluate", str(tmp_path / "nowhere"), "--tasks", str(made.test))
    assert (code, out) == (4, "")
    assert "no such directory or file" in err
    assert run("evaluate", "--tasks", str(made.test))[0] == 2
    file = tmp_path / "nowhere" / "scores.json"
    code, out, err = run("evaluate", str(made.base), "--tasks", str(made.test), "--out", str(file))
    assert (code, out) == (8, "")
    assert (
        err
        == f"alnico: {file}: cannot be written; expected a file in an existing folder. Choose another name.\n"
    )
