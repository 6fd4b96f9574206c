"""The continual scene of the testbed on the made tasks: what is merged into the running model, and a run that is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Task
from made_tasks import Made
from quality.continual import MANNERS, Manner, arrive
from quality.tables import continual_table

CHOSEN = Manner("chosen", "task_arithmetic", lambda _: [(1.0, 0.1), (1.0, 0.6)])


class Bench:
    """What the scene asks of the testbed."""

    fingerprint = "0123456789"

    def __init__(self, made: Made, work: Path) -> None:
        self.made = made
        self.work = work
        self.tasks = tuple(made.tuned)
        (work / "base").symlink_to(made.base)
        self._read = {"validation": read_tasks(made.valid), "test": read_tasks(made.test)}

    def specialist(self, task: str) -> str:
        return str(self.made.tuned[task])

    def read_tasks(self, part: str) -> tuple[Task, ...]:
        return self._read[part]


@pytest.fixture
def bench(made: Made, tmp_path: Path) -> Any:
    return Bench(made, tmp_path)


def right_of(bench: Any, recipe: dict[str, Any], out: Path) -> dict[str, str]:
    alnico.merge(recipe, out)
    subject = open_subject(out)
    scores = {task.name: task.evaluate(subject).examples for task in bench.read_tasks("test")}
    return {name: "".join(str(int(v)) for v in examples) for name, examples in scores.items()}


def test_one_by_one_comes_to_the_sum_and_the_average_of_all(bench: Any, tmp_path: Path) -> None:
    found = {manner["name"]: manner["arrivals"] for manner in arrive(bench, MANNERS[:2])}
    references = [bench.specialist(task) for task in bench.tasks]
    average = right_of(bench, {"merge_method": "linear", "models": references}, tmp_path / "average")
    assert found["running average"][-1]["right"] == average
    summed = {
        "merge_method": "task_arithmetic",
        "base_model": str(bench.made.base),
        "models": references,
        "parameters": {"lambda": 0.3},
    }
    assert found["sum, each at 0.3"][-1]["right"] == right_of(bench, summed, tmp_path / "sum")
    assert [list(a["right"]) for a in found["running average"]] == [
        ["pets"],
        ["pets", "food"],
        ["pets", "food", "sky"],
    ]
    assert [path.suffix for path in (tmp_path / "continual").glob("*/*")] == [".json"] * 6


def test_a_scene_that_was_cut_off_goes_on_with_the_running_model(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, merged = alnico.merge, list[Any]()

    def until(limit: int) -> None:
        def counted(recipe: Any, out: Any, **rest: Any) -> Any:
            if len(merged) == limit:
                raise KeyboardInterrupt
            merged.append([m["model"].rpartition("/")[2] for m in recipe["models"]])
            return merge(recipe, out, **rest)

        monkeypatch.setattr(alnico, "merge", counted)

    until(2)
    with pytest.raises(KeyboardInterrupt):
        arrive(bench, MANNERS[:1])
    until(3)
    found = arrive(bench, MANNERS[:1])
    assert merged == [["tuned-pets"], ["running-1", "tuned-food"], ["running-2", "tuned-sky"]]
    assert arrive(bench, MANNERS[:1]) == found


def test_of_several_weights_the_best_on_validation_is_taken(bench: Any) -> None:
    [found] = arrive(bench, [CHOSEN])
    for count, arrival in enumerate(found["arrivals"], 1):
        assert arrival["weights"][0] == 1.0
        assert arrival["weights"][1] in [pair[1] for pair in CHOSEN.weights(count)]
    first = {w: validated(bench, w) for _, w in CHOSEN.weights(1)}
    assert first[found["arrivals"][0]["weights"][1]] == max(first.values())


def validated(bench: Any, weight: float) -> float:
    out = bench.work / f"by-hand-{weight}"
    recipe = Manner("one", "task_arithmetic", lambda _: []).recipe(
        str(bench.made.base), "", bench.specialist("pets"), 1, (1.0, weight)
    )
    alnico.merge(recipe, out)
    value: float = bench.read_tasks("validation")[0].evaluate(open_subject(out)).value
    return value


def test_the_table_has_means_over_the_tasks_so_far_and_what_they_lost() -> None:
    arrivals = [
        {"arrived": "a", "right": {"a": "1110"}},
        {"arrived": "b", "right": {"a": "1000", "b": "1111"}},
    ]
    results = {
        "rows": [{"right": {"a": "1111", "b": "1100"}}],
        "continual": [{"name": "sum", "arrivals": arrivals}],
    }
    header, _, specialists, summed = continual_table(results).splitlines()
    assert header == "| order | 1: a | 2: b | lost since arrival |"
    assert specialists == "| specialists | 100.0 | 75.0 |  |"
    assert summed.startswith("| sum | 75.0 | 62.5 [")
    assert summed.endswith("] | 25.0 |")
