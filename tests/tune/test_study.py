"""Studies: trials that survive a kill, and that several processes share."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_search import Formula, opened, searched, settings_of

from alnico.errors import OutputError, RunError
from alnico.tune.search.objective import best_of
from alnico.tune.search.samplers.request import Trial

HERE = Path(__file__).parent


def told(trials: tuple[Trial, ...]) -> list[tuple[Any, ...]]:
    """What of trials must be the same however often a search is interrupted."""
    return [(t.number, t.state, t.point, t.values, t.rungs, t.scores) for t in trials]


CHILD = """
import sys, os, time
sys.path.insert(0, {here!r})
from made_search import Formula, near, searched
count = 0
def score(made):
    global count
    count += 1
    if count == {at}:
        print("now", flush=True)
        time.sleep(60)
    return near(made)
searched({keys!r}, [Formula(score=score, spread=0.5)], {storage!r})
print("done", flush=True)
"""


def child(keys: str, storage: str, at: int = 0) -> subprocess.Popen[str]:
    code = CHILD.format(here=str(HERE), at=at, keys=keys, storage=storage)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_killed_study_goes_on_to_the_same_end(tmp_path: Path, sampler: str) -> None:
    keys = f"sampler: {sampler}, trials: 18, halving: {{fraction: 0.5, keep: 0.5}}"
    whole = searched(keys, [Formula(spread=0.5)])
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    running = child(keys, storage, at=20)
    assert running.stdout is not None
    assert running.stdout.readline() == "now\n"
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    with opened(*settings_of(keys), [Formula(spread=0.5)], storage) as study:
        left = study.trials()
    assert [t.state for t in left].count("running") == 1
    assert 0 < len(left) < 18
    assert told(searched(keys, [Formula(spread=0.5)], storage)) == told(whole)


def test_a_clock_that_was_set_back_makes_no_negative_duration(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    searched("trials: 2", storage=storage)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE trials SET datetime_start = '2099-01-01 00:00:00.000000'")
    database.close()
    with opened(*settings_of("trials: 2"), [Formula(spread=0.5)], storage) as study:
        assert [t.seconds for t in study.trials()] == [0.0, 0.0]


def test_two_processes_on_one_study_lose_no_trial(tmp_path: Path) -> None:
    keys = "sampler: random, trials: 30"
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    both = [child(keys, storage) for _ in range(2)]
    for one in both:
        assert one.communicate()[0] == "done\n"
        assert one.returncode == 0
    with opened(*settings_of(keys), [Formula(spread=0.5)], storage) as study:
        trials = [t for t in study.trials() if t.number < 30]
    assert [t.number for t in trials] == list(range(30))
    assert {t.state for t in trials} == {"complete"}
    assert told(tuple(trials)) == told(searched(keys, [Formula(spread=0.5)]))


def test_the_shorter_search_is_the_beginning_of_the_longer(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    searched("trials: 12", storage=storage)
    assert told(searched("trials: 20", storage=storage)) == told(searched("trials: 20"))


def test_nothing_of_a_study_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, mark = tmp_path / "study.db", tmp_path / "mark"
    keys = "sampler: cmaes, trials: 14"
    searched("sampler: cmaes, trials: 10", storage=f"sqlite:///{file}")

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    bomb = pickle.dumps(Bomb())
    with sqlite3.connect(file) as database:
        trials = [row[0] for row in database.execute("select trial_id from trials")]
        for table in ("trial_system_attributes", "trial_user_attributes"):
            for trial in trials:
                for key in ("cma:optimizer", "cma:optimizer:0", "cma:0", "cma:generation"):
                    database.execute(
                        f"insert into {table} (trial_id, key, value_json) values (?, ?, ?)",
                        (trial, key, f'"{bomb.hex()}"'),
                    )
        for table in ("study_system_attributes", "study_user_attributes"):
            database.execute(
                f"insert into {table} (study_id, key, value_json) values (1, 'cma:optimizer', ?)",
                (f'"{bomb.hex()}"',),
            )

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    assert len(searched(keys, storage=f"sqlite:///{file}")) == 14
    assert not mark.exists()


def test_of_two_processes_that_take_the_last_trial_one_leaves_it_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    space, settings = settings_of("trials: 1")
    with (
        opened(space, settings, [Formula()], storage) as one,
        opened(space, settings, [Formula()], storage) as other,
    ):
        assert one.begin(1) == 0
        monkeypatch.setattr(other._storage, "get_n_trials", lambda _: 0)  # as it was a moment ago
        assert other.begin(1) is None
        assert [t.state for t in one.trials()] == ["running", "waiting"]
        assert other.begin(2) == 1


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    searched("trials: 2", storage=storage)
    for keys, tasks, told_ in (
        ("trials: 2, seed: 1", None, "has another sampler, seed, objective or halving"),
        ("trials: 2", [Formula("other")], "uses other tasks"),
        ("trials: 2", [Formula(goal="min")], "has other objectives"),
    ):
        with pytest.raises(OutputError) as error:
            searched(keys, tasks, storage)
        assert str(error.value) == (
            f"{storage}: the study 'search' {told_}, so its trials cannot be used by this search; "
            "expected a study of this file. Give search.study another name, or another storage."
        )
    with pytest.raises(OutputError, match="searches another recipe"):
        searched(
            "trials: 2",
            storage=storage,
            recipe="merge_method: linear\nmodels: [a, {model: b, parameters: {weight: {search: [0, 1]}}}]\n",
        )
    searched("trials: 2, study: another, seed: 1", storage=storage)


def test_a_storage_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be opened as the storage of a study"):
        searched("trials: 2", storage=f"sqlite:///{tmp_path}/not/there.db")
    with pytest.raises(RunError, match="cannot be opened as the storage of a study"):
        searched("trials: 2", storage="nonsense")


def test_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    trials = searched("trials: 12, study: mine", storage=storage)
    study = optuna.load_study(study_name="mine", storage=storage)
    assert [t.params for t in study.trials] == [t.point for t in trials]
    (best,) = best_of(trials, ["max"])
    assert study.best_trial.number == best.number
    assert study.best_trial.user_attrs["scores"] == {"near": best.values[0]}
    assert "merge_method: task_arithmetic" in study.best_trial.user_attrs["recipe"]
