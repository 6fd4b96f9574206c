"""Units are done by all nodes, again where a node is lost, and errors name the nodes."""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import pytest

from alnico.cluster.nodes import check_numerics, check_software, describe_node
from alnico.cluster.pool import NodeLost, Pool, UnitResult
from alnico.errors import AlnicoError, MismatchError, ModelError, NonFiniteError, RunError
from made_cluster import ThreadCluster, ThreadNode

HERE = describe_node("here", 2)


class Squares:
    def do(self, unit: int) -> int:
        if unit < 0:
            raise NonFiniteError(f"{unit} is negative.")
        return unit * unit

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Start:
    fault: str = ""

    def __call__(self) -> Squares:
        if self.fault:
            raise ModelError(self.fault)
        return Squares()


def run(cluster: ThreadCluster, units: list[int]) -> Counter[int]:
    """The results of units by their number of times."""
    answers: Counter[int] = Counter()

    def done(number: int, value: int) -> None:
        assert value == units[number] ** 2
        answers[number] += 1

    with cluster.connect("") as pool:
        pool.run(Start(), units, done)
    return answers


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies_at", [{}, {0: 1}, {1: 3, 2: 1}])
def test_each_unit_has_one_answer_whatever_nodes_are_lost(dies_at: dict[int, int], after: bool) -> None:
    cluster = ThreadCluster(dies_at=dies_at, after=after)
    assert run(cluster, list(range(40))) == Counter(range(40))
    assert all(cluster.nodes[node].done == units for node, units in dies_at.items())


def test_without_a_node_the_error_says_why_they_were_lost() -> None:
    with pytest.raises(RunError) as caught:
        run(ThreadCluster(infos=({}, {}), dies_at={0: 2, 1: 2}), list(range(9)))
    assert str(caught.value) in {
        f"the cluster has no node left ({a}: pulled out; {b}: pulled out). Check the nodes and their memory; the same command resumes "
        "the work."
        for a, b in [("node0", "node1"), ("node1", "node0")]
    }


def test_a_unit_that_ends_three_nodes_ends_the_work() -> None:
    with pytest.raises(RunError, match="was lost with 3 nodes in turn, at last with node"):
        run(ThreadCluster(infos=({},) * 4, dies_at=dict.fromkeys(range(4), 1)), [1])


def test_an_error_of_a_unit_is_raised_as_it_is() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(ThreadCluster(), [1, 2, -3])
    assert str(caught.value) == "-3 is negative."


class Failing(ThreadNode):
    """A node whose worker cannot start."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(replace(HERE, name=name))
        self._fault = fault

    def begin(self, start: bytes) -> Future[Any]:
        return super().begin(pickle.dumps(Start(self._fault)))


def test_nodes_whose_workers_cannot_start_are_named_together() -> None:
    pool = Pool(
        [Failing("b", "/models/x: is not there."), ThreadNode(HERE), Failing("a", "/models/x: is not there.")]
    )
    with pytest.raises(ModelError) as caught:
        pool.run(Start(), [1, 2, 3], lambda *_: None)
    assert str(caught.value) == "nodes a, b: /models/x: is not there."


def test_a_worker_is_kept_for_an_equal_start() -> None:
    began: list[bytes] = []

    class Counting(ThreadNode):
        def begin(self, start: bytes) -> Future[Any]:
            began.append(start)
            return super().begin(start)

    pool = Pool([Counting(HERE)])
    for _ in range(3):
        pool.run(Start(), [1], lambda *_: None)
    pool.close()
    assert len(began) == 1


class Stuck(ThreadNode):
    """A node that never answers."""

    def __init__(self) -> None:
        super().__init__(replace(HERE, name="stuck"))
        self.is_killed = False

    def do(self, unit: bytes) -> Future[Any]:
        return Future()

    def kill(self) -> None:
        self.is_killed = True
        super().kill()


def test_a_late_unit_is_given_to_an_idle_node_too() -> None:
    ticks = iter(range(0, 10**6, 20))
    stuck = Stuck()
    pool = Pool([stuck, ThreadNode(HERE)], clock=lambda: float(next(ticks)))
    answers: list[int] = []
    pool.run(Start(), list(range(6)), lambda number, _: answers.append(number))
    assert sorted(answers) == list(range(6))
    assert stuck.is_killed
    assert pool.lost == {"stuck": "was late"}
    pool.close()


class Waiting(Stuck):
    """A node that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Future[Any] = Future()

    def do(self, unit: bytes) -> Future[Any]:
        self.unit = pickle.loads(unit)
        return self.answer

    def finish(self) -> None:
        if not self.answer.done():
            self.answer.set_result(UnitResult(self.unit**2))


def test_the_second_answer_of_a_late_unit_does_not_count() -> None:
    late, other = Waiting(), Waiting()
    answers: list[int] = []
    after: list[float] = []

    def clock() -> float:
        if answers:
            late.finish()
            after.append(0)
        if len(after) > 9:
            other.finish()
        return float(next(ticks))

    ticks = iter(range(0, 10**7, 20))
    pool = Pool([late, other, ThreadNode(HERE)], clock=clock)
    pool.run(Start(), [5, 6, 7], lambda number, _: answers.append(number))
    assert sorted(answers) == [0, 1, 2]
    pool.close()


def test_nodes_with_other_versions_are_named() -> None:
    nodes = [
        replace(HERE, name="a"),
        replace(HERE, name="b", alnico="0.0.1"),
        replace(HERE, name="c", python="3.13.1"),
    ]
    with pytest.raises(MismatchError) as caught:
        check_software(nodes, HERE)
    expected = f"alnico {HERE.alnico} (arithmetic {HERE.arithmetic}) on Python {HERE.python}"
    assert str(caught.value).splitlines() == [
        f"node b has alnico 0.0.1 (arithmetic {HERE.arithmetic}) on Python {HERE.python}; expected {expected}, as here. Install the "
        "same versions on all nodes.",
        f"node c has alnico {HERE.alnico} (arithmetic {HERE.arithmetic}) on Python 3.13.1; expected {expected}, as here. Install the "
        "same versions on all nodes.",
    ]


def test_whole_matrices_are_refused_where_processors_or_blas_differ() -> None:
    nodes = [
        replace(HERE, name=n, processor=p, blas="openblas 1 X")
        for n, p in [("a", "P"), ("b", "Q"), ("c", "P")]
    ]
    check_numerics(nodes[::2], ["tsv"])
    with pytest.raises(MismatchError) as caught:
        check_numerics(nodes, ["tsv"])
    assert "(a, c: P, openblas 1 X; b: Q, openblas 1 X)" in str(caught.value)


def test_an_unexpected_error_is_a_mistake_of_ours() -> None:
    class Wrong(ThreadNode):
        def do(self, unit: bytes) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(ZeroDivisionError())
            return future

    with pytest.raises(ZeroDivisionError):
        Pool([Wrong(HERE)]).run(Start(), [1], lambda *_: None)
    assert not issubclass(NodeLost, AlnicoError)
