"""Clusters for tests: of threads, whose nodes are lost on purpose, and of three Ray nodes on this machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alnico.cluster.nodes import describe_node
from alnico.cluster.pool import NodeLost, NodeProcess, Pool, WorkerHost
from alnico.cluster.work import NodeInfo


class ThreadNode:
    """A node that is a thread. It is lost with its unit number ``dies_at``, before or after it has done it."""

    def __init__(self, info: NodeInfo, dies_at: int | None = None, *, after: bool = False) -> None:
        self.info = info
        self.done = 0
        self._dies_at, self._after = dies_at, after
        self._host = WorkerHost()
        self._pool = ThreadPoolExecutor(1)

    def begin(self, start: bytes) -> Future[Any]:
        return self._pool.submit(self._host.begin, start)

    def do(self, unit: bytes) -> Future[Any]:
        return self._pool.submit(self._do, unit)

    def _do(self, unit: bytes) -> Any:
        self.done += 1
        dies = self.done == self._dies_at
        if dies and not self._after:
            raise NodeLost("pulled out")
        result = self._host.do(unit)
        if dies:
            raise NodeLost("pulled out")
        return result

    def kill(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class ThreadCluster:
    """What :func:`alnico.cluster.connect.connect` gives in tests: ``nodes`` are made when a command connects."""

    infos: Sequence[Mapping[str, Any]] = ({}, {}, {})
    """What each node says of itself otherwise than this machine."""
    dies_at: Mapping[int, int] = field(default_factory=dict)
    """By the node's position: with which of its units it is lost."""
    after: bool = False
    """Are lost nodes lost after they have done the unit?"""
    nodes: list[ThreadNode] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    @contextmanager
    def connect(self, address: str, purpose: str = "--ray") -> Iterator[Pool]:
        from alnico.cluster.nodes import check_software

        self.addresses.append(address)
        here = describe_node("here", 1)
        self.nodes = [
            ThreadNode(
                dataclasses.replace(here, name=f"node{i}", **dict(info)),
                self.dies_at.get(i),
                after=self.after,
            )
            for i, info in enumerate(self.infos)
        ]
        nodes: list[NodeProcess] = [*self.nodes]
        pool = Pool(nodes)
        try:
            check_software(pool.nodes, here)
            yield pool
        finally:
            pool.close()


@pytest.fixture
def thread_cluster(monkeypatch: pytest.MonkeyPatch) -> ThreadCluster:
    """Commands with ``--ray`` run on three threads."""
    cluster = ThreadCluster()
    monkeypatch.setattr("alnico.cluster.connect.connect", cluster.connect)
    return cluster


class RayNodes:
    """A Ray cluster of three nodes on this machine, besides a head that does no work."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.add() for _ in range(3)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, **environment: str) -> Any:
        """Start a node, which finds alnico and what tests share; ``environment`` is added to that of its processes."""
        tests = Path(__file__).parent
        paths = {"PYTHONPATH": f"{tests.parent / 'src'}:{tests}"}
        return self._cluster.add_node(num_cpus=1, env_vars=paths | environment)

    def kill(self, node: Any) -> None:
        """End a node as a power cut does: its processes get SIGKILL."""
        self._cluster.remove_node(node, allow_graceful=False)
        if node in self.nodes:
            self.nodes.remove(node)

    def repair(self) -> None:
        """Have three nodes again."""
        while len(self.nodes) < 3:
            self.nodes.append(self.add())

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def _ray_nodes() -> Iterator[RayNodes]:
    nodes = RayNodes()
    yield nodes
    nodes.stop()


@pytest.fixture
def ray_nodes(_ray_nodes: RayNodes) -> RayNodes:
    """Three living Ray nodes. Starting them takes seconds: such tests are slow."""
    _ray_nodes.repair()
    return _ray_nodes


class Where:
    """A worker that says what its module path is."""

    def do(self, unit: int) -> tuple[int, list[str]]:
        return unit, sys.path

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class StartWhere:
    def __call__(self) -> Where:
        return Where()
