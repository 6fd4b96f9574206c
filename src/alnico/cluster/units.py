"""Groups what is to be done into units of work of about equal size."""

from __future__ import annotations

from collections.abc import Sequence

UNITS_A_NODE = 16
"""Units per node: the last one to end leaves the others idle for 1/16 of the time, if all nodes are equally fast."""


def group_by_bytes(
    read: Sequence[int], nodes: int, results: Sequence[int] = (), most: int = 0
) -> list[tuple[int, ...]]:
    """Group neighbours, given by the bytes that they read, into units; return their positions, the largest unit first.

    A unit reads at most a share of the whole, by :data:`UNITS_A_NODE` and the number of nodes, or is a single one. With ``results``,
    the bytes of the results, those of a unit are also at most ``most`` bytes.

    >>> group_by_bytes([1, 1, 1, 9, 1, 1], 1), group_by_bytes([1] * 64, 2)[0]
    ([(3,), (0,), (1,), (2,), (4,), (5,)], (0, 1))
    """
    limit = max(sum(read) // (UNITS_A_NODE * max(nodes, 1)), 1)
    units: list[list[int]] = []
    reading = returned = 0
    for position, size in enumerate(read):
        result = results[position] if results else 0
        if not units or reading + size > limit or returned + result > most > 0:
            units.append([])
            reading = returned = 0
        units[-1].append(position)
        reading, returned = reading + size, returned + result
    return sorted(map(tuple, units), key=lambda unit: -sum(read[i] for i in unit))
