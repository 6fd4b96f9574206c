"""Measures how well a way of making rows rebuilds rows that a model has: each without itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alnico.checkpoint.source import Source
from alnico.vocabulary.remapped_model import RemappedModel

SAMPLED = 256
"""The most known rows of a tensor that are rebuilt, spread evenly over the output's tokens."""


@dataclass(frozen=True)
class RebuiltRows:
    """How the rows of a tensor came about, and how well known ones would have been made.

    ``known`` rows are the model's own, ``made`` ones are made of others. Of the ``sampled`` known rows, ``cosine`` is the mean cosine of
    the row and what would have been made in its place, and ``error`` the mean of the length of their difference by that of the row.
    """

    model: str
    tensor: str
    known: int
    made: int
    sampled: int
    cosine: float
    error: float

    @property
    def note(self) -> str:
        return (
            f"{self.tensor} of {self.model}: {self.sampled} of its {self.known:,} known rows, made as if they were unknown, have a mean "
            f"cosine of {self.cosine:.3f} to the rows themselves, and a mean relative error of {self.error:.3f}."
        )

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        return {**asdict(self), "cosine": round(self.cosine, 4), "error": round(self.error, 4)}


def measure_rebuilding(sources: Sequence[Source]) -> tuple[RebuiltRows, ...]:
    """Rebuild a sample of the known rows of each matrix of which other rows were made. Sources must be open."""
    measured = []
    for source in sources:
        inner: Source | None = source
        while inner is not None:
            if isinstance(inner, RemappedModel):
                measured += [
                    rows for name, made in inner.made_tensors.items() if (rows := _rebuilt(inner, name, made))
                ]
            inner = getattr(inner, "wrapped", None)
    return tuple(measured)


def _rebuilt(model: RemappedModel, name: str, made: int) -> RebuiltRows | None:
    known = model.known(name)
    if not len(known):
        return None
    ids = known[np.unique(np.linspace(0, len(known) - 1, SAMPLED).round().astype(np.int64))]
    own, rebuilt = model.rebuilt(name, ids)
    if own.shape[1] < 2:  # the numbers of a bias have no direction
        return None
    lengths, others = np.sqrt((own**2).sum(axis=1)), np.sqrt((rebuilt**2).sum(axis=1))
    used = lengths > 0
    if not used.any():
        return None
    cosines = (own * rebuilt).sum(axis=1)[used] / np.maximum(lengths * others, np.finfo(np.float64).tiny)[
        used
    ]
    errors = np.sqrt(((own - rebuilt) ** 2).sum(axis=1))[used] / lengths[used]
    return RebuiltRows(
        model.label, name, len(known), made, int(used.sum()), float(cosines.mean()), float(errors.mean())
    )
