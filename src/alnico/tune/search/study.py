"""Stores trials in an optuna study, which survives crashes and can be shared by processes.

The study holds plain data: parameters, values, JSON. optuna's own tools can read it. Nothing in it is unpickled or run:
recipes are rebuilt from the parameters.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alnico.errors import AlnicoError, OutputError, RunError
from alnico.evaluation.tasks import Goal
from alnico.tune.search.fingerprint import ON_PROCESSOR, SCORED, Identity
from alnico.tune.search.samplers.optuna_study import directions, distributions, import_optuna, silent
from alnico.tune.search.samplers.request import Trial, TrialState
from alnico.tune.search.space import Dimension, PointValues

FINGERPRINT = "alnico"
"""The attribute of a study that identifies the search."""

SCORES, REASON, RECIPE, WORKER = "scores", "reason", "recipe", "worker"
"""The attributes of a trial."""

DIFFERENCES = {
    "space": "searches another recipe",
    "search": "has another sampler, seed, objective or halving",
    "tasks": "uses other tasks",
    "models": "uses models with other contents",
}

SQLITE_SECONDS = 60
"""How long a process waits for another to finish writing."""


class Study:
    """An open study. Several processes may open the same one."""

    def __init__(
        self,
        storage: str | None,
        name: str,
        dimensions: Sequence[Dimension],
        goals: Sequence[Goal],
        identity: Identity,
    ) -> None:
        """Open or create the study ``name``; without a ``storage`` it is in memory.

        Errors: RunError for a storage that cannot be opened; OutputError for a study of another search.
        """
        optuna = import_optuna()
        self.goals = tuple(goals)
        self.name = name
        self.storage = storage or "memory"
        self._dimensions = tuple(dimensions)
        self._distributions = distributions(dimensions)
        self._states = optuna.trial.TrialState
        self._storage = _opened(storage)
        try:
            with self._named_errors():
                self._id, is_new = self._open_or_create(directions(goals))
                self._check(identity.data(), is_new)
        except BaseException:
            self.close()
            raise

    def _open_or_create(self, ways: Sequence[str]) -> tuple[int, bool]:
        optuna = import_optuna()
        requested = [getattr(optuna.study.StudyDirection, way.upper()) for way in ways]
        try:
            return silent(lambda: self._storage.create_new_study(requested, self.name)), True
        except optuna.exceptions.DuplicatedStudyError:
            pass
        study_id = self._storage.get_study_id_from_name(self.name)
        if list(self._storage.get_study_directions(study_id)) != requested:
            raise self._of_another("has other objectives")
        return study_id, False

    def _check(self, identity: dict[str, str], is_new: bool) -> None:
        stored = self._storage.get_study_user_attrs(self._id).get(FINGERPRINT)
        if stored is None and (is_new or not self._storage.get_all_trials(self._id, deepcopy=False)):
            self._storage.set_study_user_attr(self._id, FINGERPRINT, identity)
            return
        if not isinstance(stored, dict):
            raise self._of_another("was not made by alnico")
        for part, how in DIFFERENCES.items():
            if stored.get(part) != identity.get(part):
                raise self._of_another(how)
        before, now = stored.get(SCORED, ON_PROCESSOR), identity[SCORED]
        if before != now:
            raise OutputError(
                f"{self.storage}: the study {self.name!r} was scored on {str(before)[:60]}, and this search scores on {now}, so "
                "its scores cannot be compared; expected one kind of device and one dtype. Give the device and the "
                "dtype of its first run, or give search.study another name."
            )

    def _of_another(self, how: str) -> OutputError:
        return OutputError(
            f"{self.storage}: the study {self.name!r} {how}, so its trials cannot be used by this search; "
            "expected a study of this file. Give search.study another name, or another storage."
        )

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn the exceptions of a storage into errors that name it."""
        try:
            yield
        except (AlnicoError, KeyboardInterrupt):
            raise
        except Exception as error:
            message = str(error).partition("\n")[0][:200]
            if isinstance(error, _INVALID_ROWS):
                raise self._odd(f"data that no search writes ({type(error).__name__}: {message})") from None
            if not _is_of_storage(error):
                raise
            raise RunError(
                f"{self.storage}: {message}. Check the storage; the same command resumes the search."
            ) from None

    def _odd(self, what: str) -> OutputError:
        return OutputError(
            f"{self.storage}: the study {self.name!r} contains {what}; expected the trials of an alnico "
            "search. Do not use it: choose another folder, or another storage."
        )

    def close(self) -> None:
        """Close the storage."""
        if self.storage != "memory":
            self._storage.remove_session()
            self._storage.engine.dispose()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trials(self) -> tuple[Trial, ...]:
        """All trials, by number."""
        with self._named_errors():
            return tuple(self._trial(t) for t in self._storage.get_all_trials(self._id, deepcopy=False))

    def _trial(self, frozen: Any) -> Trial:
        state: TrialState = {
            self._states.COMPLETE: "complete", self._states.PRUNED: "pruned", self._states.FAIL: "failed",
            self._states.RUNNING: "running", self._states.WAITING: "waiting",
        }[frozen.state]  # type: ignore[assignment]  # fmt: skip
        point = {d.name: frozen.params[d.name] for d in self._dimensions if d.name in frozen.params}
        for d in self._dimensions:
            if d.name in point and not _is_in(d, point[d.name]):
                raise self._odd(
                    f"{d.name} = {str(point[d.name])[:40]!r} in trial {frozen.number}, outside of the search "
                    "space"
                )
        if len(point) < len(self._dimensions):
            point = {}
        attributes = frozen.user_attrs
        scores = attributes.get(SCORES)
        rungs = [value for _, value in sorted(frozen.intermediate_values.items())]
        values = tuple(frozen.values) if state == "complete" else ()
        if (
            type(frozen.number) is not int
            or frozen.number < 0
            or not all(isinstance(v, int | float) for v in (*values, *rungs))
        ):
            raise self._odd(
                f"trial {str(frozen.number)[:40]} with {str((*values, *rungs))[:80]}, which are not numbers"
            )
        began, ended = frozen.datetime_start, frozen.datetime_complete
        return Trial(
            number=frozen.number,
            state=state if point or state != "complete" else "failed",
            point=point,
            values=values,
            rungs=tuple(r for r in rungs if math.isfinite(r)),
            scores=tuple((str(k), float(v)) for k, v in scores.items()) if isinstance(scores, dict) else (),
            reason=str(attributes.get(REASON, "")),
            # optuna stores times of day, which go backwards if the clock is set back.
            seconds=max(0.0, (ended - began).total_seconds())
            if began is not None and ended is not None
            else None,
        )

    def begin(self, trials: int) -> int | None:
        """Take the next trial and return its number; None when all are taken.

        Waiting trials come first, including those that a dead process left behind.
        """
        with self._named_errors():
            self._free_abandoned()
            for trial in self._storage.get_all_trials(
                self._id, deepcopy=False, states=(self._states.WAITING,)
            ):
                if trial.number < trials and self._storage.set_trial_state_values(
                    trial._trial_id, self._states.RUNNING
                ):
                    self._sign(trial._trial_id)
                    return int(trial.number)
            if self._storage.get_n_trials(self._id) >= trials:
                return None
            trial_id = self._storage.create_new_trial(self._id)
            number: int = self._storage.get_trial_number_from_id(trial_id)
            if number >= trials:  # another process took the last one in between
                self._storage.set_trial_state_values(trial_id, self._states.WAITING)
                return None
            self._sign(trial_id)
            return number

    def _sign(self, trial: int) -> None:
        self._storage.set_trial_user_attr(trial, WORKER, _me())

    def _free_abandoned(self) -> None:
        for trial in self._storage.get_all_trials(self._id, deepcopy=False, states=(self._states.RUNNING,)):
            if _is_gone(trial.user_attrs.get(WORKER)):
                self._storage.set_trial_state_values(trial._trial_id, self._states.WAITING)

    def set_point(self, number: int, point: PointValues) -> None:
        """Store the point of a trial."""
        with self._named_errors():
            trial = self._of(number)
            for name, distribution in self._distributions.items():
                self._storage.set_trial_param(
                    trial, name, distribution.to_internal_repr(point[name]), distribution
                )

    def set_recipe(self, number: int, text: str) -> None:
        """Store the recipe of a trial, for readers that use other tools."""
        with self._named_errors():
            self._storage.set_trial_user_attr(self._of(number), RECIPE, text)

    def report(self, number: int, rung: int, value: float) -> None:
        """Store the objective at a rung of the halving."""
        with self._named_errors():
            self._storage.set_trial_intermediate_value(self._of(number), rung, value)

    def complete(self, number: int, values: Sequence[float], scores: dict[str, float]) -> None:
        """Finish a trial with its objectives and the scores of its tasks."""
        self._finish(number, self._states.COMPLETE, SCORES, scores, values)

    def prune(self, number: int, scores: dict[str, float]) -> None:
        """Prune a trial."""
        self._finish(number, self._states.PRUNED, SCORES, scores)

    def fail(self, number: int, reason: str) -> None:
        """Mark a trial as failed, with the reason."""
        self._finish(number, self._states.FAIL, REASON, reason[:2_000])

    def wait(self, number: int) -> None:
        """Return an unfinished trial to the queue; it runs next."""
        with self._named_errors():
            trial = self._of(number)
            if not self._storage.get_trial(trial).state.is_finished():
                self._storage.set_trial_state_values(trial, self._states.WAITING)

    def _finish(
        self, number: int, state: Any, key: str, value: Any, values: Sequence[float] | None = None
    ) -> None:
        with self._named_errors():
            trial = self._of(number)
            if self._storage.get_trial(trial).state.is_finished():
                return  # another process assumed it was abandoned and finished it
            self._storage.set_trial_user_attr(trial, key, value)
            self._storage.set_trial_state_values(trial, state, values)

    def _of(self, number: int) -> int:
        trial_id: int = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return trial_id

    def importances(self) -> dict[str, float]:
        """How much of the objective's variation each dimension explains, summing to 1; empty if too few trials are complete.

        Source: PED-ANOVA, Watanabe et al. 2023, https://arxiv.org/abs/2304.10255, as optuna computes it.
        """
        optuna = import_optuna()
        complete = [t for t in self.trials() if t.state == "complete"]
        if len(complete) < 8 or len({t.values[0] for t in complete}) < 2:
            return {}
        with warnings.catch_warnings(), self._named_errors():
            warnings.simplefilter("ignore")
            study = optuna.load_study(study_name=self.name, storage=self._storage)
            importances = optuna.importance.get_param_importances(study, target=lambda t: t.values[0])
        return {str(name): float(share) for name, share in importances.items()}


_INVALID_ROWS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RuntimeError,
    AssertionError,
)
"""Exceptions that optuna and SQLAlchemy raise for rows they did not write."""

_MASTER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
"""The end of a journal for a transaction over several databases. SQLite deletes the file that such a journal names."""


def _is_in(dimension: Dimension, value: Any) -> bool:
    """Check whether a value belongs to a dimension."""
    if dimension.kind == "choice":
        return value in dimension.choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    slack = 1e-9 * max(1.0, abs(dimension.low), abs(dimension.high))
    return dimension.low - slack <= value <= dimension.high + slack


def _check_file(storage: str) -> None:
    """Refuse an SQLite file with anything but tables: its triggers and views would be run, possibly forever.

    Errors: OutputError.
    """
    address = storage.partition("?")[0]
    path = Path(address.removeprefix("sqlite:///"))
    if not address.startswith("sqlite:///") or not os.path.lexists(path):
        return
    if not path.is_file():
        raise OutputError(
            f"{path}: is a folder, a pipe or a device; expected a study. Choose another folder."
        )
    journal = Path(f"{path}-journal")
    if os.path.lexists(journal):
        ending = b""
        if journal.is_file():
            with journal.open("rb") as file:
                file.seek(max(journal.stat().st_size - 8, 0))
                ending = file.read(8)
        if not journal.is_file() or ending == _MASTER_JOURNAL:
            raise OutputError(
                f"{journal}: is not from an alnico search; expected no such file. Do not use this study: "
                "choose another folder."
            )
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=SQLITE_SECONDS)
        ) as database:
            odd = database.execute(
                "SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE "
                "'CREATE VIRTUAL%' OR (type = 'index' AND sql LIKE '%(%(%') LIMIT 1"
            ).fetchone()
    except sqlite3.Error as error:
        raise OutputError(
            f"{path}: is not a study ({str(error)[:120]}); expected a database of optuna. Choose another "
            "folder."
        ) from None
    if odd is not None:
        raise OutputError(
            f"{path}: has the {str(odd[0])[:20]} {str(odd[1])[:60]!r}, which would be run; expected only the "
            "tables of a study. Do not use it: choose another folder."
        )


def _opened(storage: str | None) -> Any:
    optuna = import_optuna()
    if storage is None:
        return optuna.storages.InMemoryStorage()
    _check_file(storage)
    arguments = {"connect_args": {"timeout": SQLITE_SECONDS}} if storage.startswith("sqlite") else {}
    last = ""
    # Two processes that start together both create the tables; the second succeeds on its next attempt.
    for attempt in range(5):
        try:
            opened = optuna.storages.RDBStorage(storage, engine_kwargs=arguments)
            if storage.startswith("sqlite"):
                _write_without_syncing(opened.engine)
            return opened
        except Exception as error:
            if not _is_of_storage(error) and not isinstance(error, _INVALID_ROWS):
                raise
            last = str(error).partition("\n")[0]
        time.sleep(0.02 * 2**attempt)
    raise RunError(
        f"{storage}: cannot be opened as the storage of a study ({last}). Give an address such as "
        "sqlite:///study.db in an existing folder."
    )


def _write_without_syncing(engine: Any) -> None:
    """Let SQLite write its log without syncing every value: a trial writes 20 values, at 10 ms each.

    A killed process loses nothing. A power cut loses the last trials, but the file stays valid.
    """
    from sqlalchemy import event

    def begin(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA trusted_schema=OFF")

    event.listen(engine, "connect", begin)
    engine.dispose()


def _is_of_storage(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in (
        "optuna",
        "sqlalchemy",
        "sqlite3",
        "alembic",
    ) or isinstance(error, (ImportError, OSError))


def _me() -> str:
    """Return an identifier of this process, so that others can check whether it is alive."""
    return f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}"


def _is_gone(worker: Any) -> bool:
    """Check whether the process with this identifier has ended; one on another machine counts as alive."""
    parts = worker.split(" ") if isinstance(worker, str) else []
    if len(parts) != 3 or parts[0] != socket.gethostname() or not re.fullmatch(r"[1-9][0-9]{0,9}", parts[1]):
        return False
    number = int(parts[1])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _birth(number) != parts[2]


def _birth(process: int) -> str:
    """Return the start time of a process, if the system provides it: process numbers are reused."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return "?"
