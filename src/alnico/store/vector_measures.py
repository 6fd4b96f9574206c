"""Measures task vectors on their base by reading them: norms per tensor, cosines and sign conflicts of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from alnico.run_options import Access
from alnico.values.differences import Differences
from alnico.values.operands import operand


@dataclass(frozen=True)
class VectorMeasures:
    """Exact measures of task vectors, in the order in which they were given.

    ``norms`` has the length of each vector's tensors by name; a tensor that it does not change has 0. For positions
    ``i < j``, ``cosines`` is that of the two vectors, and ``sign_conflicts`` the share of entries whose signs differ,
    ``(1 - cosine of the signs) / 2``: an entry that only one of the two changes counts as a half. A vector of zeros has
    the cosine 0 to all others.
    """

    norms: tuple[dict[str, float], ...]
    cosines: dict[tuple[int, int], float]
    sign_conflicts: dict[tuple[int, int], float]


def measure_vectors(base: str, models: Sequence[str], *, offline: bool = False) -> VectorMeasures:
    """Measure the task vectors ``model - base`` in one reading of the models. Errors: those of reading; NonFiniteError."""
    start = operand(base, "base")
    vectors = [[(1.0, operand(model, "vectors"), start)] for model in models]
    pairs = list(combinations(range(len(models)), 2))
    norms: list[dict[str, float]] = [{} for _ in models]
    products = {pair: [0.0] for pair in pairs}
    agreement = dict.fromkeys(pairs, 0)
    changed = [0] * len(models)
    with Differences(vectors, "copy", access=Access(offline)) as differences:
        differences.fetch()
        for job in differences.stored:
            squares = [[0.0] for _ in models]
            for blocks in zip(*(differences.blocks(job, i) for i in range(len(models))), strict=True):
                values = [block for _, block in blocks]
                for i, block in enumerate(values):
                    squares[i].append(float(block @ block))
                signs = [np.sign(block).astype(np.int8) for block in values] if pairs else []
                for i, one in enumerate(signs):
                    changed[i] += int(np.count_nonzero(one))
                for i, j in pairs:
                    products[i, j].append(float(values[i] @ values[j]))
                    agreement[i, j] += int((signs[i] * signs[j]).sum(dtype=np.int64))
            for i, parts in enumerate(squares):
                norms[i][job.name] = math.sqrt(math.fsum(parts))
    lengths = [math.hypot(*of.values()) for of in norms]
    cosines, conflicts = {}, {}
    for i, j in pairs:
        size, entries = lengths[i] * lengths[j], math.sqrt(changed[i]) * math.sqrt(changed[j])
        cosines[i, j] = math.fsum(products[i, j]) / size if size else 0.0
        conflicts[i, j] = (1 - (agreement[i, j] / entries if entries else 0.0)) / 2
    return VectorMeasures(tuple(norms), cosines, conflicts)
