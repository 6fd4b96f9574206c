"""Runs the trials of a search: in this process, in several local processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any, Protocol

from alnico.cluster.connect import ray_connection
from alnico.devices import Device, made_gpus
from alnico.errors import AlnicoError, EvaluationError, ResourceError, RunError
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import Task
from alnico.kernels.clock import CLOCK
from alnico.methods import registry
from alnico.methods.base import MADE_HERE
from alnico.numerics.sizes import count_of
from alnico.tune.search.evaluator import CandidateFactory, TrialEvaluator
from alnico.tune.search.space import PointValues, SearchSpace

TrialScores = dict[str, float]

SAFE_PATH = "PYTHONSAFEPATH"


def devices_of_worker(devices: tuple[Device, ...], number: int, count: int) -> tuple[Device, ...]:
    """Return the devices of one of ``count`` workers: they take them in turn, so fewer workers have several each.

    >>> [[d.name for d in devices_of_worker((Device("cuda:0"), Device("cuda:1")), i, 3)] for i in range(3)]
    [['cuda:0'], ['cuda:1'], ['cuda:0']]
    """
    return devices[number::count] or (devices[number % len(devices)],)


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to score the trials of a search."""

    space: SearchSpace
    tasks: tuple[Task, ...] | str
    """The tasks, or the path of the file that each worker reads."""
    shares: tuple[float, ...]
    held_out: float | None
    open_factory: Callable[[ModulePlacement], CandidateFactory]
    allow_code: bool = False
    """Whether the tasks file may name code."""
    placement: ModulePlacement = ON_THE_PROCESSOR
    """Where a worker has its modules. It carries devices, not the option, so that a worker lists none again."""
    made: tuple[Device, ...] = ()
    """The GPUs of :func:`alnico.devices.made_gpus`, which other processes do not know."""

    def evaluator(self) -> TrialEvaluator:
        return TrialEvaluator(
            self.space,
            self.open_tasks(),
            self.shares,
            self.held_out,
            lambda: self.open_factory(self.placement),
        )

    def of_worker(self, number: int, count: int) -> WorkerSpec:
        """Return what one of ``count`` workers needs."""
        own = devices_of_worker(self.placement.devices, number, count)
        return replace(self, placement=replace(self.placement, devices=own))

    def open_tasks(self) -> tuple[Task, ...]:
        from alnico.evaluation.task_file import as_tasks

        return tuple(as_tasks(self.tasks, allow_code=self.allow_code))


@dataclass(frozen=True)
class WorkerResult:
    """What another process sends back: the scores of a trial, or the error, and the seconds that it compiled kernels."""

    scores: TrialScores | None
    problem: AlnicoError | None
    compile_seconds: float


def _result(
    evaluator: Callable[[], TrialEvaluator], number: int, point: PointValues, rung: int
) -> WorkerResult:
    begin = CLOCK.seconds
    scores, problem = None, None
    try:
        scores = evaluator().scores(number, point, rung)
    except AlnicoError as error:  # Ray would wrap it in an exception of its own
        problem = error
    return WorkerResult(scores, problem, CLOCK.seconds - begin)


class Worker(Protocol):
    """Scores one trial at a time."""

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores | WorkerResult]:
        """Start scoring a trial's point up to a rung."""
        ...

    def close(self) -> None: ...


class InProcessWorker:
    """Scores in this process, at once."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.evaluator = spec.evaluator()

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores | WorkerResult]:
        future: Future[TrialScores | WorkerResult] = Future()
        try:
            future.set_result(self.evaluator.scores(number, point, rung))
        except AlnicoError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        self.evaluator.close()


class LocalProcess:
    """A local process with its own models."""

    def __init__(self, spec: WorkerSpec, threads: int) -> None:
        arguments = (_pickled(spec), threads, os.environ.get(SAFE_PATH))
        with _started_safely():
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=arguments
            )

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores | WorkerResult]:
        with _started_safely():  # the first call starts the process
            return self._pool.submit(_scores, number, dict(point), rung)

    def close(self) -> None:
        # Terminated, because a score may take hours.
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _started_safely() -> Iterator[None]:
    """Start a worker without the working directory on its module path.

    Python starts workers with ``python -c``, which looks for modules in the working directory first: a file there named
    ``signal.py`` would be run. PYTHONSAFEPATH excludes the directory. The caller's modules are found through the path
    that Python passes on.
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


_specs: list[bytes] = []
_evaluators: list[TrialEvaluator] = []
_made = ExitStack()
"""State of a worker process, which serves one search."""


def _unpickled(data: bytes) -> WorkerSpec:
    spec: WorkerSpec = pickle.loads(data)
    if spec.made:
        _made.enter_context(made_gpus(spec.made))
    return spec


def _begin(spec: bytes, threads: int, safe_path: str | None) -> None:
    if safe_path is None:
        os.environ.pop(SAFE_PATH, None)  # for processes that a task starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search handles Ctrl-C and ends its workers
    # Set before torch is imported, which would use all processors in every worker.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _specs.append(spec)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: a killed search cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _scores(number: int, point: PointValues, rung: int) -> WorkerResult:
    return _result(_evaluator, number, point, rung)


def _evaluator() -> TrialEvaluator:
    if not _evaluators:
        _evaluators.append(_unpickled(_specs[0]).evaluator())
    return _evaluators[0]


class RayWorker:
    """A Ray actor, on any node with free capacity. If the search is on GPUs, Ray gives it one."""

    def __init__(self, ray: Any, spec: WorkerSpec, threads: int) -> None:
        self._ray = ray
        gpus = int(spec.placement.device.is_gpu)
        self._actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_TrialActor).remote(
            _pickled(spec)
        )

    def scores(self, number: int, point: PointValues, rung: int) -> Future[TrialScores | WorkerResult]:
        future: Future[TrialScores | WorkerResult] = self._actor.scores.remote(
            number, dict(point), rung
        ).future()
        return future

    def close(self) -> None:
        with suppress(Exception):  # it has ended, or the cluster has
            self._ray.kill(self._actor)


class _TrialActor:
    def __init__(self, spec: bytes) -> None:
        self._spec = _unpickled(spec)
        self._evaluator: TrialEvaluator | None = None

    def scores(self, number: int, point: PointValues, rung: int) -> WorkerResult:
        return _result(self._opened, number, point, rung)

    def _opened(self) -> TrialEvaluator:
        """Return the evaluator on the GPU that Ray gave this actor: CUDA shows no other one here."""
        if self._evaluator is None:
            spec, placement = self._spec, self._spec.placement
            if placement.device.is_gpu:
                spec = replace(spec, placement=ModulePlacement.of("cuda", placement.dtype))
            self._evaluator = spec.evaluator()
        return self._evaluator


@contextmanager
def start_workers(spec: WorkerSpec, count: int, address: str | None, threads: int) -> Iterator[list[Worker]]:
    """Start ``count`` workers and close them at the end. A single local worker is this process.

    Local workers take the devices of ``spec`` in turn. With the ``address`` of a Ray cluster, as of
    :func:`alnico.cluster.connect.connect`, they run there, and Ray gives each a GPU if the devices are GPUs.
    Errors: AlnicoError if Ray is not installed; RunError if the cluster cannot be reached; EvaluationError for tasks that cannot be
    pickled; ResourceError for a cluster with fewer GPUs than workers.
    """
    workers: list[Worker] = []
    with ExitStack() as stack:
        ray = None if address is None else stack.enter_context(ray_connection(address))
        stack.callback(_close, workers)
        if ray is not None and spec.placement.device.is_gpu:
            _check_gpus(ray, count)
        for number in range(count):
            workers.append(
                RayWorker(ray, spec, threads)
                if ray is not None
                else LocalProcess(spec.of_worker(number, count), threads)
                if count > 1
                else InProcessWorker(spec)
            )
        yield workers


def _close(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.close()


def _check_gpus(ray: Any, workers: int) -> None:
    """Refuse workers that Ray would let wait forever. Errors: ResourceError."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus < workers:
        raise ResourceError(
            f"the Ray cluster has {count_of(gpus, 'GPU')}, and {count_of(workers, 'worker')} "
            f"{'needs' if workers == 1 else 'need'} one each; expected a GPU for every worker. Use fewer workers, or "
            "the device cpu."
        )


def result_of(future: Future[Any]) -> TrialScores:
    """Return the scores of a finished trial. Errors: AlnicoError; RunError if the worker was lost."""
    try:
        result = future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process ended while it scored a trial (possibly out of memory). The same command "
            "resumes the search; use fewer workers."
        ) from None
    except AlnicoError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "ray":
            raise
        message = str(error).strip().splitlines()[0]
        raise RunError(
            f"a worker on the cluster was lost ({message}). The same command resumes the search."
        ) from None
    if isinstance(result, WorkerResult):
        CLOCK.add(result.compile_seconds)
        if result.scores is None:
            assert result.problem is not None
            raise result.problem
        return result.scores
    return result  # type: ignore[no-any-return]


def _pickled(spec: WorkerSpec) -> bytes:
    """Return what another process needs. Errors: EvaluationError for tasks and methods that only this one has."""
    only_here = [name for name in spec.space.methods if name in MADE_HERE and name not in registry()]
    if only_here:
        raise EvaluationError(
            f"the merge method {only_here[0]} was made in this process, and workers are other processes; expected a "
            "method that they can import. Search with one worker, or put the method into a package with the entry "
            "point alnico.methods."
        )
    try:
        return pickle.dumps(spec)
    except Exception as error:
        raise EvaluationError(
            f"the tasks cannot be sent to another process ({error}); expected tasks from a file, or objects "
            "that can be pickled. Give a tasks file, or search with one worker."
        ) from None
