"""Parts of a task's examples: those held out for the report, and growing ones for the halving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import xxhash

from alnico.errors import EvaluationError
from alnico.evaluation.tasks import Task

_WHOLE = float(1 << 64)


def split(task: Task, held_out: float | None) -> tuple[list[int], list[int]]:
    """The examples to search on and those held out, each in an order that follows from their content.

    An example is held out if the hash of its content is among the lowest share: the same example is on the same side in every file
    and at every place. A task that does not tell its examples apart is split by the hash of their places. Errors: EvaluationError
    where a side is left without examples.
    """
    hashes = _hashes(task)
    order = [int(i) for i in np.argsort(hashes, kind="stable")]
    if held_out is None:
        return order, []
    held = [i for i in order if hashes[i] / _WHOLE < held_out]
    searched = order[len(held) :]
    if not held or not searched:
        raise EvaluationError(
            f"{task.name}: {task.size} examples with the share {held_out:g} held out leave {len(searched)} to search on and "
            f"{len(held)} to report on; expected some of both. Give report a file of its own, or more examples."
        )
    return searched, held


def _hashes(task: Task) -> np.ndarray:
    """A number of 64 bits for each example, equal for equal ones. Returns (n,) uint64."""
    known_by = getattr(task, "known_by", None)
    keys: Sequence[str] = (
        known_by() if known_by is not None else [f"{task.name}/{i}" for i in range(task.size)]
    )
    return np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)


def steps(count: int, shares: Sequence[float]) -> list[range]:
    """The places of the examples that each share adds to the one before.

    >>> steps(10, (0.25, 0.5, 1.0))
    [range(0, 3), range(3, 5), range(5, 10)]
    """
    ends = [0, *(min(math.ceil(share * count - 1e-9), count) for share in shares)]
    return [range(begin, end) for begin, end in pairwise(ends)]
