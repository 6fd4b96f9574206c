"""Says how task vectors that are equipped together interfere: cosines and sign conflicts of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from alnico.checkpoint.task_vectors.manifest import Manifest
from alnico.store.chosen_vectors import ChosenVector
from alnico.store.sketch import interference


@dataclass(frozen=True)
class PairInterference:
    """How two task vectors relate: ``a`` and ``b`` are their labels.

    ``cosine`` is that of the vectors without their weights, and ``sign_conflict`` the share of entries whose signs differ; an
    entry that only one of the two changes counts as a half. Estimates from sketches have ``cosine_error``, the standard error of the cosine; it is 0
    for exact values.
    """

    a: str
    b: str
    cosine: float
    sign_conflict: float
    cosine_error: float = 0.0

    def data(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return asdict(self)


def has_sketch(manifest: Manifest | None) -> bool:
    """Has a vector sketches, and one in each tensor that it is known to change?"""
    if manifest is None:
        return False
    tensors = manifest.tensors.values()
    return any(t.sketch for t in tensors) and all(t.sketch for t in tensors if t.norm > 0)


def interference_of(
    base: str, vectors: Sequence[ChosenVector], *, offline: bool = False
) -> tuple[PairInterference, ...]:
    """Return the interference of each pair: from their sketches, or exactly, by reading them, where one has none.

    Errors: as for :func:`alnico.store.vector_measures.measure_vectors`.
    """
    found: dict[tuple[int, int], PairInterference] = {}
    pairs = list(combinations(range(len(vectors)), 2))
    for i, j in pairs:
        one, other = vectors[i].manifest, vectors[j].manifest
        if one is not None and other is not None and has_sketch(one) and has_sketch(other):
            estimate = interference(one, other)
            found[i, j] = PairInterference(
                vectors[i].label,
                vectors[j].label,
                estimate.cosine,
                estimate.sign_conflict,
                estimate.cosine_error,
            )
    read = sorted({i for pair in pairs if pair not in found for i in pair})
    if read:
        from alnico.store.vector_measures import measure_vectors  # with what reads models

        measured = measure_vectors(base, [f"{base}+{vectors[i].reference}" for i in read], offline=offline)
        for i, j in pairs:
            if (i, j) not in found:
                at = (read.index(i), read.index(j))
                found[i, j] = PairInterference(
                    vectors[i].label, vectors[j].label, measured.cosines[at], measured.sign_conflicts[at]
                )
    return tuple(found[pair] for pair in pairs)
