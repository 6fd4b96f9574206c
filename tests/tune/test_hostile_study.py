"""A study that a stranger left in the folder of a search: tables are read, nothing in them is run, and odd values are errors."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from made_search import searched

from alnico.errors import AlnicoError, OutputError


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.db"
    searched("trials: 3", storage=f"sqlite:///{path}")
    with sqlite3.connect(path) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return path


@pytest.fixture
def study(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(kept, tmp_path / "study.db"))


def change(path: Path, *commands: str | tuple[str, tuple[str, ...]]) -> None:
    with sqlite3.connect(path) as database:
        for one in commands:
            database.execute(*((one,) if isinstance(one, str) else one))
    database.close()


FOREVER = "with recursive a(x) as (select 1 union all select x + 1 from a) select"


@pytest.mark.parametrize(
    ("commands", "told"),
    [
        ([f"create trigger t after insert on trial_params begin insert into trial_params(trial_id) {FOREVER} x from a; end"],
         "has the trigger 't', which would be run"),
        (["alter table trials rename to others", f"create view trials as {FOREVER} x as trial_id, x as number, 1 as study_id, 'COMPLETE' as state from a"],
         "has the view 'trials', which would be run"),
        (["create index i on trials (abs(number))"], "has the index 'i', which would be run"),
    ],
)  # fmt: skip
def test_what_a_study_would_run_is_refused(study: Path, commands: list[str], told: str) -> None:
    change(study, *commands)
    with pytest.raises(OutputError) as caught:
        searched("trials: 4", storage=f"sqlite:///{study}")
    assert told in str(caught.value)


ODD: list[tuple[str, tuple[str, ...]]] = [
    ("update trial_values set value = 'abc'", ()),
    ("update trial_values set value = null", ()),
    ("update trial_params set param_value = 9e999", ()),
    ("update trial_params set param_value = 1e300", ()),
    ("update trial_params set param_value = 'abc'", ()),
    ("update trial_params set distribution_json = ?", ("{}",)),
    ("update trial_params set distribution_json = ?", ("[" * 100_000,)),
    ("update trial_params set distribution_json = ?", ('{"name": "CategoricalDistribution", "attributes": {"choices": [{"a": 1}, null]}}',)),
    ("update study_user_attributes set value_json = ?", ("[" * 100_000,)),
    ("update study_user_attributes set value_json = ?", ("[]",)),
    ("update trial_user_attributes set value_json = ?", ("junk",)),
    ("update trial_user_attributes set value_json = ? where key = 'scores'", ('{"a": "x", "b": null}',)),
    ("update trials set state = 'X'", ()),
    ("update trials set datetime_start = 'x'", ()),
    ("update trials set number = null", ()),
    ("update trials set number = -1 where trial_id = 3", ()),
    ("update study_directions set direction = 'X'", ()),
    ("update alembic_version set version_num = 'zzz'", ()),
    ("drop table trial_params", ()),
    ("delete from study_user_attributes", ()),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ODD)
def test_odd_values_in_a_study_are_errors_of_alnico(
    study: Path, command: tuple[str, tuple[str, ...]]
) -> None:
    change(study, command)
    try:
        trials = searched("trials: 4", storage=f"sqlite:///{study}")
    except AlnicoError as error:
        assert str(study) in str(error)  # noqa: PT017
    else:  # what no search looks at, such as a value that optuna replaces
        assert all(
            0 <= v <= 2
            for t in trials
            for v in t.point.values()
            if t.state == "complete" and isinstance(v, float)
        )


def test_values_outside_of_what_is_searched_are_told(study: Path) -> None:
    change(study, "update trial_params set param_value = 7 where param_name = 'code.weight'")
    with pytest.raises(
        OutputError,
        match=r"code\.weight = '7\.0' in trial 0, outside of the search space|data that no search writes",
    ):
        searched("trials: 4", storage=f"sqlite:///{study}")


@pytest.mark.parametrize("number", ["9" * 30, "²", "-1", "0"])
def test_a_worker_of_an_odd_number_counts_as_living(study: Path, number: str) -> None:
    value = json.dumps(f"{socket.gethostname()} {number} 1")
    change(study, "update trials set state = 'RUNNING' where trial_id = 3", ("update trial_user_attributes set value_json = ? where key = 'worker'", (value,)))  # fmt: skip
    assert searched("trials: 4", storage=f"sqlite:///{study}")[2].state == "running"


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def foreign(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("make", [damaged, foreign, pipe, folder])
def test_what_is_no_database_is_refused(study: Path, make: Callable[[Path], None]) -> None:
    make(study)
    with pytest.raises(AlnicoError, match=r"study\.db"):
        searched("trials: 4", storage=f"sqlite:///{study}")


def test_a_journal_that_names_another_file_is_refused(study: Path, tmp_path: Path) -> None:
    """SQLite removes the file that a journal of several databases names, once it has played the journal back."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = os.fsencode(victim)
    ending = (
        len(name).to_bytes(4, "big")
        + (sum(name) & (2**32 - 1)).to_bytes(4, "big")
        + bytes.fromhex("d9d505f920a163d7")
    )
    page = study.read_bytes()[:4096]
    header = (
        bytes.fromhex("d9d505f920a163d7")
        + (0).to_bytes(4, "big")
        + bytes(4)
        + (1).to_bytes(4, "big")
        + (512).to_bytes(4, "big")
    )
    header += (4096).to_bytes(4, "big")
    Path(f"{study}-journal").write_bytes(
        header.ljust(512, b"\0") + page + (1).to_bytes(4, "big") + name + ending
    )
    with pytest.raises(OutputError, match=r"study\.db-journal: is not from an alnico search"):
        searched("trials: 4", storage=f"sqlite:///{study}")
    assert victim.read_text() == "mine"
