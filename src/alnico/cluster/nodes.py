"""Says what nodes compute with, and refuses nodes that would compute other bits."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence

from alnico._version import __version__
from alnico.cluster.work import NodeInfo
from alnico.errors import MismatchError
from alnico.kernels.constants import ARITHMETIC


def describe_node(name: str, processors: int | None = None) -> NodeInfo:
    """Describe the machine that this process runs on."""
    return NodeInfo(
        name,
        __version__,
        ARITHMETIC,
        platform.python_version(),
        _processor(),
        _blas(),
        processors or os.cpu_count() or 1,
    )


_own_processors: list[int] = []
"""The processors that Ray counts on the node of this process: in a container, fewer than the system does."""


def take_processors(count: int) -> None:
    """Let this process, which is a node's, use so many processors."""
    _own_processors[:] = [count]


def processors_here() -> int:
    """Return how many processors work in this process may use."""
    return _own_processors[0] if _own_processors else os.cpu_count() or 1


def check_software(nodes: Sequence[NodeInfo], driver: NodeInfo) -> None:
    """Refuse nodes with another alnico or another Python than the driver's: they may compute other bits, or plan otherwise.

    Errors: MismatchError, one line for each such node.
    """
    expected = _software(driver)
    lines = [
        f"node {node.name} has {_software(node)}; expected {expected}, as here. Install the same versions on all nodes."
        for node in nodes
        if _software(node) != expected
    ]
    if lines:
        raise MismatchError(*lines)


def check_numerics(nodes: Sequence[NodeInfo], methods: Sequence[str]) -> None:
    """Refuse work on whole matrices where nodes have several processor models or several BLAS: the last bits would depend on which
    node does what.

    Errors: MismatchError, with the nodes by what they have.
    """
    groups = group_by(nodes, lambda node: f"{node.processor}, {node.blas}")
    if len(groups) < 2:
        return
    found = "; ".join(f"{', '.join(names)}: {what}" for what, names in groups.items())
    raise MismatchError(
        f"{', '.join(methods)}: computes on whole matrices, and the nodes differ in what decides the last bits of that ({found}); "
        "expected one model of processor and one BLAS. Use nodes of one kind, or one machine without --ray."
    )


def group_by(nodes: Sequence[NodeInfo], what: Callable[[NodeInfo], str]) -> dict[str, list[str]]:
    """Return the names of nodes by what ``what`` says of them."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        groups.setdefault(what(node), []).append(node.name)
    return groups


def _software(node: NodeInfo) -> str:
    return f"alnico {node.alnico} (arithmetic {node.arithmetic}) on Python {node.python}"


def _processor() -> str:
    """The model of the processor: two machines with the same one run the same instructions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().partition("\n\n")[0]
    except OSError:
        first = ""
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    named = fields.get("model name") or " ".join(
        fields[key] for key in ("CPU implementer", "CPU part") if key in fields
    )
    return named or platform.processor() or platform.machine()


def _blas() -> str:
    import numpy  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    found = [one for one in threadpool_info() if one.get("user_api") == "blas"]
    return ", ".join(
        f"{one.get('internal_api')} {one.get('version')} {one.get('architecture', '')}".strip()
        for one in found
    )
