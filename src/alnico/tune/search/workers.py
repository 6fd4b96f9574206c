"""Where trials are scored: in this process, in several of this machine, or on a cluster of Ray."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Literal, Protocol

from alnico.errors import AlnicoError, EvaluationError, RunError
from alnico.evaluation.extras import import_extra
from alnico.evaluation.tasks import Task
from alnico.tune.search.evaluator import CandidateFactory, TrialEvaluator
from alnico.tune.search.space import PointValues, SearchSpace

Engine = Literal["local", "ray"]
TrialScores = dict[str, float]

SAFE_PATH = "PYTHONSAFEPATH"


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to know to score trials of a search."""

    space: SearchSpace
    tasks: tuple[Task, ...] | str
    """The tasks, or the file that each worker reads them from."""
    shares: tuple[float, ...]
    held_out: float | None
    open_maker: Callable[[], CandidateFactory]
    allow_code: bool = False
    """May the file of the tasks name code?"""

    def trier(self) -> TrialEvaluator:
        return TrialEvaluator(self.space, self.opened_tasks(), self.shares, self.held_out, self.open_maker)

    def opened_tasks(self) -> tuple[Task, ...]:
        if not isinstance(self.tasks, str):
            return self.tasks
        from alnico.evaluation.task_file import read_tasks

        return read_tasks(self.tasks, allow_code=self.allow_code)


class Worker(Protocol):
    """Scores one trial at a time."""

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores]:
        """Begin to score a trial's point up to a rung."""
        ...

    def close(self) -> None: ...


class InProcessWorker:
    """This process: a score is there when it has been asked for."""

    def __init__(self, order: WorkerSpec) -> None:
        self.trier = order.trier()

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores]:
        found: Future[TrialScores] = Future()
        try:
            found.set_result(self.trier.scores(number, point, rung))
        except AlnicoError as error:
            found.set_exception(error)
        return found

    def close(self) -> None:
        self.trier.close()


class InProcess:
    """A process of this machine with models of its own."""

    def __init__(self, order: WorkerSpec, threads: int) -> None:
        given = (_pickled(order), threads, os.environ.get(SAFE_PATH))
        with _started_safely():
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=given
            )

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores]:
        with _started_safely():  # the first call starts the process
            return self._pool.submit(_scores, number, dict(point), rung)

    def close(self) -> None:
        for process in list(
            (getattr(self._pool, "_processes", None) or {}).values()
        ):  # a score may take hours
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _started_safely() -> Iterator[None]:
    """Python starts a worker with ``python -c``, which looks for modules in the working directory first: a file of a stranger there, called
    ``signal.py`` say, would be run. PYTHONSAFEPATH leaves the directory out. Modules of the caller's are found by the path that Python sends.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


_order: list[bytes] = []
_trier: list[TrialEvaluator] = []
"""Of a worker's process, which scores for one search all its life."""


def _begin(order: bytes, threads: int, safe_path: str | None) -> None:
    if safe_path is None:
        os.environ.pop(SAFE_PATH, None)  # for processes that a task starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search hears Ctrl-C, and ends its workers
    os.environ["OMP_NUM_THREADS"] = str(
        threads
    )  # before torch is imported, which would take all processors in every worker
    _order.append(order)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A search that is killed cannot end its workers, and they would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _scores(number: int, point: PointValues, rung: int) -> TrialScores:
    if not _trier:
        _trier.append(pickle.loads(_order[0]).trier())
    return _trier[0].scores(number, point, rung)


class OnRay:
    """An actor of Ray, on whichever node has room for it."""

    def __init__(self, order: WorkerSpec, threads: int) -> None:
        ray = import_extra("ray", "engine ray", "ray")
        self._actor = ray.remote(num_cpus=threads, max_restarts=0)(_Actor).remote(_pickled(order))

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores]:
        found: Future[TrialScores] = self._actor.scores.remote(number, dict(point), rung).future()
        return found

    def close(self) -> None:
        import_extra("ray", "engine ray", "ray").kill(self._actor)


class _Actor:
    def __init__(self, order: bytes) -> None:
        self._trier = pickle.loads(order).trier()

    def scores(
        self, number: int, point: PointValues, rung: int
    ) -> tuple[TrialScores | None, AlnicoError | None]:
        """The scores, or why there are none: errors of actors would come back wrapped in Ray's own."""
        try:
            return self._trier.scores(number, point, rung), None
        except AlnicoError as error:
            return None, error


@contextmanager
def start_workers(order: WorkerSpec, count: int, engine: Engine, threads: int) -> Iterator[list[Worker]]:
    """``count`` workers for a time. One local worker is this process itself. With Ray they go to the cluster that this process is
    connected to, to the one at RAY_ADDRESS, or to one made on this machine for the time.

    Errors: AlnicoError where Ray is not installed; EvaluationError for tasks that cannot be sent to another process.
    """
    began_ray = False
    if engine == "ray" and not import_extra("ray", "engine ray", "ray").is_initialized():
        _begin_ray()
        began_ray = True
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(
                OnRay(order, threads)
                if engine == "ray"
                else InProcess(order, threads)
                if count > 1
                else InProcessWorker(order)
            )
        yield workers
    finally:
        for worker in workers:
            worker.close()
        if began_ray:
            import_extra("ray", "engine ray", "ray").shutdown()


def _begin_ray() -> None:
    ray = import_extra("ray", "engine ray", "ray")
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise RunError(
            f"Ray cannot be reached ({said}). Check RAY_ADDRESS, or search without --ray."
        ) from None


def result_of(future: Future[Any]) -> TrialScores:
    """The scores of a worker that has ended. Errors: AlnicoError; RunError where the worker itself is gone."""
    try:
        found = future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker's process ended while it scored a trial (out of memory, perhaps). The same command goes on; with fewer workers."
        ) from None
    except AlnicoError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "ray":
            raise
        said = str(error).strip().splitlines()[0]
        raise RunError(f"a worker on the cluster was lost ({said}). The same command goes on.") from None
    if isinstance(found, tuple):
        scores, problem = found
        if problem is not None:
            raise problem
        return scores  # type: ignore[no-any-return]
    return found  # type: ignore[no-any-return]


def _pickled(order: WorkerSpec) -> bytes:
    try:
        return pickle.dumps(order)
    except Exception as error:
        raise EvaluationError(
            f"the tasks cannot be sent to another process ({error}); expected tasks of a file, or objects that pickle can write. "
            "Give a tasks file, or search with one worker."
        ) from None
