"""Gives units of work to the processes of nodes, one by one, and again to others where a node is lost."""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from alnico.cluster.work import NodeInfo, NodeWorker
from alnico.errors import AlnicoError, RunError, first_line
from alnico.numerics.sizes import count_of

POLL_SECONDS = 0.2
"""How often an interrupt is looked for."""

MOST_LOSSES = 3
"""With so many lost nodes in turn, a unit is the reason why they are lost."""

START_SECONDS = 300.0
"""How long a worker may take to start; a node whose file system does not answer is left out."""

LATE = 3.0
"""A unit that takes so many times as long as the longest before it is also given to an idle node."""

LATE_SECONDS = 30.0
"""The least time after which a unit is late."""


class NodeLost(Exception):
    """A node, or its process, ended before it answered."""


class NodeProcess(Protocol):
    """The process of a node that does units. Futures end with :class:`NodeLost` if it ends before it answers."""

    @property
    def info(self) -> NodeInfo: ...

    def begin(self, start: bytes) -> Future[AlnicoError | None]:
        """Let the process start the pickled worker, and close the one before. Returns why it could not."""
        ...

    def do(self, unit: bytes) -> Future[UnitResult]: ...

    def kill(self) -> None:
        """End the process, whatever it does."""
        ...


@dataclass(frozen=True)
class UnitResult:
    """What a worker returned for a unit, or the error that it raised."""

    value: Any = None
    problem: AlnicoError | None = None
    cause: OSError | None = None
    """What the system said, if that is why."""


class WorkerHost:
    """The worker inside the process of a node."""

    def __init__(self) -> None:
        self._worker: NodeWorker | None = None

    def begin(self, start: bytes) -> AlnicoError | None:
        self.close()
        try:
            self._worker = pickle.loads(start)()
        except AlnicoError as error:
            return error
        return None

    def do(self, unit: bytes) -> UnitResult:
        assert self._worker is not None
        try:
            return UnitResult(self._worker.do(pickle.loads(unit)))
        except AlnicoError as error:
            return UnitResult(
                problem=error, cause=error.__context__ if isinstance(error.__context__, OSError) else None
            )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@dataclass
class _Member:
    """A node of the pool: ``started`` is the worker that it has, ``begun`` tells when that is ready."""

    process: NodeProcess
    started: bytes = b""
    begun: Future[AlnicoError | None] | None = None
    unit: int | None = None
    answer: Future[UnitResult] | None = None
    since: float = 0.0

    @property
    def name(self) -> str:
        return self.process.info.name

    @property
    def awaited(self) -> Future[Any] | None:
        return self.begun if self.begun is not None else self.answer


class Pool:
    """Nodes that take units in turn. It is the :class:`alnico.cluster.work.Cluster` of the processes of ``nodes``."""

    def __init__(self, nodes: Sequence[NodeProcess], clock: Callable[[], float] = time.monotonic) -> None:
        self.nodes = tuple(node.info for node in nodes)
        self._members = [_Member(node) for node in nodes]
        self._clock = clock
        self.lost: dict[str, str] = {}
        """Why nodes were lost, by their names."""

    def begin(self, start: Callable[[], NodeWorker]) -> None:
        """See :meth:`alnico.cluster.work.Cluster.begin`."""
        self._do(_Round(self, pickle.dumps(start), (), lambda *_: None).begin)

    def run(
        self, start: Callable[[], NodeWorker], units: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """See :meth:`alnico.cluster.work.Cluster.run`. A unit that is late is also given to an idle node; the first answer counts."""
        if units:
            self._do(_Round(self, pickle.dumps(start), [pickle.dumps(unit) for unit in units], done).all)

    def _do(self, call: Callable[[], None]) -> None:
        """Make a call; if it fails, nodes may be in the middle of units, so their processes end."""
        try:
            call()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.process.kill()
        self._members.clear()

    def remove(self, member: _Member, reason: str) -> None:
        """Give a node no more units."""
        self.lost[member.name] = reason
        self._members.remove(member)
        member.process.kill()

    @property
    def members(self) -> list[_Member]:
        return list(self._members)

    def now(self) -> float:
        return self._clock()


class _Round:
    """The units of one call."""

    def __init__(
        self, pool: Pool, start: bytes, units: Sequence[bytes], done: Callable[[int, Any], None]
    ) -> None:
        self._pool = pool
        self._start = start
        self._units = units
        self._done = done
        self._waiting = deque(range(len(units)))
        self._finished: set[int] = set()
        self._losses: Counter[int] = Counter()
        self._longest = 0.0

    def begin(self) -> None:
        """Start the workers, and wait until all have started."""
        self._start_workers()
        deadline = self._pool.now() + START_SECONDS
        while waiting := [m for m in self._pool.members if m.begun is not None]:
            self._take()
            if self._pool.now() > deadline:
                for member in waiting:
                    self._pool.remove(member, f"did not begin in {START_SECONDS:.0f} s")
        self._check_left()

    def _start_workers(self) -> None:
        for member in self._pool.members:
            if member.started != self._start:
                member.started = self._start
                member.begun = member.process.begin(self._start)

    def all(self) -> None:
        self._start_workers()
        while len(self._finished) < len(self._units):
            self._give()
            self._take()
        for member in self._pool.members:
            if member.answer is not None:  # somebody else was faster: nobody waits for it
                self._pool.remove(member, "was late")

    def _check_left(self) -> None:
        if not self._pool.members:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._pool.lost.items())
            raise RunError(
                f"the cluster has no node left ({reasons}). Check the nodes and their memory; the same command resumes the work."
            )

    def _give(self) -> None:
        self._check_left()
        for member in self._pool.members:
            if member.awaited is None and (number := self._next()) is not None:
                member.unit, member.since = number, self._pool.now()
                member.answer = member.process.do(self._units[number])

    def _next(self) -> int | None:
        """The unit that an idle node does: one that nobody does, else one that is late with one node."""
        if self._waiting:
            return self._waiting.popleft()
        if not self._finished:
            return None
        busy = [m for m in self._pool.members if m.answer is not None and m.unit is not None]
        runners = Counter(m.unit for m in busy)
        limit = max(LATE * self._longest, LATE_SECONDS)
        late = [m for m in busy if runners[m.unit] == 1 and self._pool.now() - m.since > limit]
        return min(late, key=lambda m: m.since).unit if late else None

    def _take(self) -> None:
        awaited = {m.awaited: m for m in self._pool.members if m.awaited is not None}
        ready, _ = wait(awaited, POLL_SECONDS, FIRST_COMPLETED)
        refused: list[tuple[_Member, AlnicoError]] = []
        for future in ready:
            member = awaited[future]
            try:
                answer = future.result()
            except NodeLost as error:
                self._lose(member, first_line(error))
                continue
            if member.begun is future:
                member.begun = None
                if answer is not None:
                    refused.append((member, answer))
            else:
                self._finish(member, answer)
        if refused:
            self._refuse(refused)

    def _finish(self, member: _Member, answer: UnitResult) -> None:
        number, member.unit, member.answer = member.unit, None, None
        if answer.problem is not None:
            answer.problem.__context__ = answer.cause
            raise answer.problem
        assert number is not None
        self._longest = max(self._longest, self._pool.now() - member.since)
        if number not in self._finished:
            self._finished.add(number)
            self._done(number, answer.value)

    def _lose(self, member: _Member, reason: str) -> None:
        self._pool.remove(member, reason)
        number = member.unit
        if number is None or number in self._finished:
            return
        self._losses[number] += 1
        if self._losses[number] >= MOST_LOSSES:
            raise RunError(
                f"a part of the work was lost with {count_of(MOST_LOSSES, 'node')} in turn, at last with {member.name} ({reason}). "
                "Check the memory of the nodes; the same command resumes the work."
            )
        if all(other.unit != number for other in self._pool.members):
            self._waiting.appendleft(number)

    def _refuse(self, refused: list[tuple[_Member, AlnicoError]]) -> None:
        """Raise why workers cannot start, with the nodes. Errors: that of the first one, with the lines of all of its class."""
        others = [m for m in self._pool.members if m.begun is not None]
        ready, _ = wait([m.begun for m in others if m.begun is not None], 5.0)
        for member in others:
            if member.begun in ready and member.begun.exception() is None:
                problem = member.begun.result()
                refused += [(member, problem)] if problem is not None else []
        kind = type(refused[0][1])
        by_text: dict[tuple[Any, ...], list[str]] = {}
        for member, problem in refused:
            if type(problem) is kind:
                by_text.setdefault(problem.args, []).append(member.name)
        raise kind(
            *(
                f"{'node' if len(names) == 1 else 'nodes'} {', '.join(sorted(names))}: {line}"
                for lines, names in by_text.items()
                for line in lines
            )
        )
