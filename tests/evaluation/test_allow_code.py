"""Files of tasks and of searches run code and open databases only when the caller says so, whatever the file says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

import alnico
from alnico.errors import EvaluationError, RecipeError
from alnico.evaluation.harness import Harness
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.user_function import UserFunction
from made_tasks import Made

OPTION = "use --allow-code (in Python allow_code=True)"

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")

def score(path):
    return 1.0
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the code beside the tasks writes when it runs."""
    (tmp_path / "stranger").mkdir()
    found = tmp_path / "mark"
    (tmp_path / "stranger" / "evil.py").write_text(CODE.format(mark=str(found)))
    return found


def tasks_of(mark: Path, **keys: Any) -> Path:
    path = mark.parent / "stranger" / "tasks.yml"
    path.write_text(yaml.safe_dump({"tasks": [{"name": "mine", **keys}]}, sort_keys=False))
    return path


CALL = {"type": "call", "function": "evil:score"}
HARNESS = {"type": "lm_eval", "metric": "acc"}


def commands(made: Made, tasks: Path, out: Path) -> dict[str, list[str]]:
    base, (first, second, _) = str(made.base), made.references
    return {
        "evaluate": ["evaluate", base, "--tasks", str(tasks)],
        "soup": ["soup", first, second, "--tasks", str(tasks)],
        "soup --report": ["soup", first, second, "--tasks", str(made.valid), "--report", str(tasks)],
        "adamerge": ["adamerge", first, "--base", base, "--tasks", str(tasks)],
        "statistics fisher": ["statistics", "fisher", first, "--tasks", str(tasks), "--out", str(out)],
        "statistics gram": ["statistics", "gram", first, "--tasks", str(tasks), "--out", str(out)],
        "statistics routers": ["statistics", "routers", first, "--tasks", str(tasks), "--out", str(out)],
        "search": ["search", str(search_file(made, out.parent)), "--tasks", str(tasks), "--out", str(out)],
        "search --report": [
            "search",
            str(search_file(made, out.parent)),
            "--report",
            str(tasks),
            "--out",
            str(out),
        ],
    }


def search_file(made: Made, folder: Path, **settings: Any) -> Path:
    models = [{"model": made.references[0], "parameters": {"weight": {"search": [0.0, 1.0]}}}]
    keys = {"tasks": str(made.valid), "trials": 1, "sampler": "random", **settings}
    path = folder / "search.yml"
    text = {"merge_method": "task_arithmetic", "base_model": str(made.base), "models": models, "search": keys}
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    return path


def test_no_command_runs_a_function_that_its_tasks_name(run, made: Made, mark: Path, tmp_path: Path) -> None:
    tasks = tasks_of(mark, **CALL)
    for name, words in commands(made, tasks, tmp_path / "out").items():
        code, _, err = run(*words)
        assert code == 12, (name, err)
        assert f"{tasks}:4: tasks[0].function is 'evil:score'" in err, name
        assert OPTION in err, name
    assert not mark.exists()
    assert not list((tmp_path / "out").glob("*"))


def test_with_the_option_the_function_is_run(run, made: Made, mark: Path, tmp_path: Path) -> None:
    tasks = tasks_of(mark, **CALL)
    code, out, err = run("evaluate", str(made.base), "--tasks", str(tasks), "--allow-code")
    assert code == 0, err
    assert mark.exists()
    assert "1.000" in out
    found = alnico.soup(made.references[:2], tasks, allow_code=True)
    assert found.score == 1.0
    searched = alnico.search(search_file(made, tmp_path), tasks=tasks, report="same", allow_code=True)
    assert searched.best[0].values == (1.0,)


@pytest.mark.parametrize("form", ["file", "mapping"])
@pytest.mark.parametrize(
    ("task", "told"),
    [
        (CALL, "tasks[0].function is 'evil:score', a Python function that would be run"),
        (
            CALL | {"function": "os:getcwd"},
            "tasks[0].function is 'os:getcwd', a Python function that would be run",
        ),
        (
            HARNESS | {"tasks": ["mine"], "include_path": "."},
            "tasks[0].include_path is '.', a folder of harness tasks, which may contain Python code and templates that run code",
        ),
        (
            HARNESS | {"tasks": ["stranger/task.yaml"]},
            "tasks[0].tasks is a list, with the file of a harness task",
        ),
        (
            HARNESS | {"tasks": ["arc_easy", "~/task"]},
            "tasks[0].tasks is a list, with the file of a harness task",
        ),
    ],
)
def test_what_would_run_code_is_refused_with_the_key_and_the_option(
    mark: Path, task: dict[str, Any], told: str, form: str
) -> None:
    path = tasks_of(mark, **task)
    given = path if form == "file" else yaml.safe_load(path.read_text())
    with pytest.raises(EvaluationError) as caught:
        read_tasks(given, mark.parent / "stranger")
    assert told in str(caught.value)
    assert OPTION in str(caught.value)
    assert not mark.exists()


@pytest.mark.slow
def test_a_task_of_the_harness_that_is_a_file_of_this_folder_is_refused(
    mark: Path, monkeypatch: pytest.MonkeyPatch, causal_free: Any
) -> None:
    folder = mark.parent / "stranger"
    (folder / "task").write_text(
        "task: strange\ndoc_to_text: !function evil.score\noutput_type: loglikelihood\n"
    )
    monkeypatch.chdir(folder)
    (task,) = read_tasks(tasks_of(mark, **HARNESS, tasks=["task"]))
    with pytest.raises(EvaluationError, match=r"mine: the harness has no task 'task'; expected names"):
        task.evaluate(causal_free)
    assert not mark.exists()


def metric_of_this_folder(mark: Path) -> Path:
    """A folder with the name of a metric that tasks of the harness load by ``evaluate.load``."""
    folder = mark.parent / "stranger" / "code_eval"
    folder.mkdir()
    (folder / "code_eval.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n")
    return folder.parent


def test_no_metric_of_the_working_directory_is_run(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.chdir(metric_of_this_folder(mark))
    with (
        Harness("mine", ["humaneval"], "acc", is_packaged=True)._without_code() as refused,
        pytest.raises(
            EvaluationError, match=r"mine: a task of the harness loads the metric 'code_eval' .* --allow-code"
        ),
    ):
        evaluate.load("code_eval")
    assert len(refused) == 1
    assert not mark.exists()
    with Harness("mine", ["humaneval"], "acc")._without_code(), contextlib.suppress(Exception):
        evaluate.load("code_eval")
    assert mark.exists()


@pytest.mark.slow
def test_a_task_of_the_harness_itself_loads_no_metric(
    mark: Path, monkeypatch: pytest.MonkeyPatch, causal_free: Any
) -> None:
    monkeypatch.chdir(metric_of_this_folder(mark))
    (task,) = read_tasks(tasks_of(mark, **HARNESS, tasks=["humaneval"]))
    with pytest.raises(EvaluationError, match=r"mine: a task of the harness loads the metric 'code_eval'"):
        task.evaluate(causal_free)
    assert not mark.exists()


@pytest.fixture
def causal_free() -> Any:
    """A subject that is never asked for more than it has: its module stands for any."""

    class Free:
        label = "free"

        def module(self, kind: str) -> Any:
            import torch
            from transformers import GPT2Config, GPT2LMHeadModel

            with torch.device("meta"):
                return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8))

        def tokenizer(self) -> Any:
            from tokenizers import Tokenizer, models
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a"
            )

    return Free()


def test_functions_and_tasks_given_in_python_need_no_option(made: Made) -> None:
    assert (
        alnico.evaluate([made.base], [UserFunction("mine", lambda path: float(bool(path)))])
        .models[0]
        .scores["mine"]
        .value
        == 1.0
    )
    assert Harness("mine", ["mine"], "acc", include_path=".").name == "mine"


@pytest.mark.parametrize(
    "storage", ["sqlite:///{}/stranger.db", "sqlite://", "postgresql://example.org/x", "nonsense"]
)
def test_a_search_opens_no_storage_that_its_file_names(run, made: Made, tmp_path: Path, storage: str) -> None:
    address = storage.format(tmp_path)
    path = search_file(made, tmp_path, storage=address)
    code, _, err = run("search", str(path), "--out", str(tmp_path / "found"))
    assert code == 3
    assert f"search.storage is {address!r}, a database that would be opened or created" in err
    assert OPTION in err
    assert "search.yml:" in err
    assert not (tmp_path / "stranger.db").exists()
    with pytest.raises(RecipeError, match="allow_code=True"):
        alnico.search(yaml.safe_load(path.read_text()))


def test_with_the_option_a_search_keeps_its_trials_where_the_file_says(
    run, made: Made, tmp_path: Path
) -> None:
    path = search_file(made, tmp_path, storage=f"sqlite:///{tmp_path}/mine.db")
    code, _, err = run("search", str(path), "--out", str(tmp_path / "found"), "--allow-code")
    assert code == 0, err
    assert (tmp_path / "mine.db").exists()


def test_tasks_of_the_harness_itself_need_no_option(made: Made, mark: Path) -> None:
    (task,) = read_tasks(tasks_of(mark, **HARNESS, tasks=["arc_easy"]))
    assert task.name == "mine"
    assert open_subject(made.base).label == str(made.base)
