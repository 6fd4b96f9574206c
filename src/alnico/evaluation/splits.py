"""Splits a task's examples: held-out examples for the report, and growing parts for halving."""

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
    """Return the examples to search on and the held-out ones, each ordered by the hash of its content.

    An example is held out if its hash is in the lowest ``held_out`` share: an example is on the same side in every file
    and at every position. Examples without content hashes are split by the hash of their position. Errors:
    EvaluationError if a side has no examples.
    """
    hashes = _hashes(task)
    order = [int(i) for i in np.argsort(hashes, kind="stable")]
    if held_out is None:
        return order, []
    reserved = [i for i in order if hashes[i] / _WHOLE < held_out]
    searched = order[len(reserved) :]
    if not reserved or not searched:
        raise EvaluationError(
            f"{task.name}: {task.size} examples with the share {held_out:g} held out leave {len(searched)} to search on and "
            f"{len(reserved)} to report on; expected some of both. Give a separate report file, or more examples."
        )
    return searched, reserved


def _hashes(task: Task) -> np.ndarray:
    """Return a 64-bit hash per example, (n,) uint64; equal examples have equal hashes."""
    known_by = getattr(task, "known_by", None)
    keys: Sequence[str] = (
        known_by() if known_by is not None else [f"{task.name}/{i}" for i in range(task.size)]
    )
    return np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)


def steps(count: int, shares: Sequence[float]) -> list[range]:
    """Return the positions of the examples that each share adds to the previous one.

    >>> steps(10, (0.25, 0.5, 1.0))
    [range(0, 3), range(3, 5), range(5, 10)]
    """
    ends = [0, *(min(math.ceil(share * count - 1e-9), count) for share in shares)]
    return [range(begin, end) for begin, end in pairwise(ends)]
