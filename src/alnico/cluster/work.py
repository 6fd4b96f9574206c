"""Defines work that nodes of a cluster do: a worker on each node, and units that workers take in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class NodeInfo:
    """What a node says of itself."""

    name: str
    alnico: str
    """The version of alnico."""
    arithmetic: int
    python: str
    processor: str
    """The model of the processor."""
    blas: str
    """Name, version and architecture of the BLAS that numpy uses."""
    processors: int


class NodeWorker(Protocol):
    """Does units of work on one node, one at a time."""

    def do(self, unit: Any) -> Any:
        """Return the result of a unit. Unit and result are pickled."""
        ...

    def close(self) -> None: ...


class Cluster(Protocol):
    """The nodes that a command uses. :func:`alnico.cluster.connect.connect` gives one."""

    @property
    def nodes(self) -> Sequence[NodeInfo]: ...

    def begin(self, start: Callable[[], NodeWorker]) -> None:
        """Let every node start a worker, and wait for all of them, so that what is wrong with any node is known before the work.

        Errors: the AlnicoError of the workers that cannot start, with the names of their nodes; RunError if no node is left.
        """
        ...

    def run(
        self, start: Callable[[], NodeWorker], units: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """Let every node start a worker, and give the workers all units.

        ``start`` is pickled and called on each node. ``done`` gets the number and the result of each unit, in any order, in the
        calling thread. A unit of a node that is lost is given to another one. Workers are kept for later calls with an equal
        ``start``. Errors: AlnicoError that a worker raises; RunError if a unit was lost with three nodes in turn, or if no node is left.
        """
        ...
