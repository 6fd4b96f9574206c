"""Computes a map of models: the plane of two task vectors, or of the main directions of more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alnico.analysis.results import Analysis, TensorScope

MapKind = Literal["plane", "directions", "line"]
MapRole = Literal["model", "merged"]

RESOLUTION = 1e-6
"""Smallest distance from the plane, relative to a task vector's length, that differs from 0: inner products in float64
have about 16 digits, and the distance is the root of a difference of them."""


@dataclass(frozen=True)
class MapPoint:
    """A model on a map: its place (``x``, ``y``), and its distance ``outside`` from the plane.

    ``index`` is the model's position among all models of the analysis, which gives it its number and colour.
    ``length`` is its distance from the origin: ``length**2 == x**2 + y**2 + outside**2``.
    """

    name: str
    index: int
    role: MapRole
    x: float
    y: float
    outside: float
    length: float


@dataclass(frozen=True)
class ModelMap:
    """Models as points in a plane, with the base (``origin``) at (0, 0).

    ``kind`` is ``plane`` for the plane of two task vectors: the first is along x, and distances and angles among
    the base and the two are exact. It is ``directions`` for more models: x and y are along the two orthogonal
    directions that show most of the squared length of their task vectors, and ``share`` is how much. It is
    ``line`` for a single task vector, or several along one line. A merged model does not choose the plane unless there
    is only one other model. ``spanned_by`` has the names of the models that chose it.

    Only tensors that all these models have count: ``tensors`` of ``all_tensors``. ``left_out`` are models that share
    none. ``has_base`` is False if the base is unknown; the merged model is then the origin.
    """

    origin: str
    kind: MapKind
    points: tuple[MapPoint, ...]
    spanned_by: tuple[str, ...]
    share: float | None
    tensors: int
    all_tensors: int
    left_out: tuple[str, ...] = ()
    has_base: bool = True


def map_models(
    analysis: Analysis,
    models: Sequence[int] | None = None,
    *,
    merged: int | None = None,
    has_base: bool = True,
) -> ModelMap:
    """Compute the map of an analysis from the inner products that it measured; no tensor is read again.

    ``models`` are positions, by default all; ``merged`` is the position of a merge of the others.
    """
    chosen = list(range(len(analysis.models)) if models is None else models)
    members = [m for m in chosen if any(t.changes[m] is not None for t in analysis.tensors)]
    common = [t for t in analysis.tensors if all(t.changes[m] is not None for m in members)]
    gram = gram_matrix(common, members)
    lengths = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    moved = [i for i, m in enumerate(members) if lengths[i] > 0 and m != merged]
    if len(moved) < 2 and merged in members and lengths[members.index(merged)] > 0:
        moved.append(members.index(merged))
    places, kind = _place(gram, moved)
    share = None
    if kind == "directions":
        total = math.fsum(gram[i, i] for i in moved)
        share = min(1.0, float((places[moved] ** 2).sum()) / total)
    points = []
    for i, m in enumerate(members):
        x, y = places[i].tolist()
        outside = math.sqrt(max(0.0, float(gram[i, i]) - x * x - y * y))
        is_in = kind == "plane" and i in moved
        points.append(
            MapPoint(
                analysis.models[m].name,
                m,
                "merged" if m == merged else "model",
                x,
                y,
                0.0 if is_in or outside <= RESOLUTION * lengths[i] else outside,
                float(lengths[i]),
            )
        )
    return ModelMap(
        analysis.base.name,
        kind,
        tuple(points),
        tuple(analysis.models[members[i]].name for i in moved),
        share,
        len(common),
        len(analysis.tensors),
        tuple(analysis.models[m].name for m in chosen if m not in members),
        has_base,
    )


def gram_matrix(tensors: Sequence[TensorScope], models: Sequence[int]) -> np.ndarray:
    """Return the inner products (models, models) of task vectors, summed exactly over tensors that all of them have."""
    row_of = {model: row for row, model in enumerate(models)}
    terms: dict[tuple[int, int], list[float]] = {(r, r): [] for r in range(len(models))}
    for tensor in tensors:
        lengths = [0.0 if c is None else c.l2 for c in tensor.changes]
        for model, row in row_of.items():
            terms[row, row].append(lengths[model] ** 2)
        for pair in tensor.pairs:
            one, other = pair.models
            if pair.cosine is not None and one in row_of and other in row_of:
                product = lengths[one] * lengths[other] * pair.cosine
                terms.setdefault((row_of[one], row_of[other]), []).append(product)
    gram = np.zeros((len(models), len(models)))
    for (row, column), products in terms.items():
        gram[row, column] = gram[column, row] = math.fsum(products)
    return gram


def _place(gram: np.ndarray, moved: Sequence[int]) -> tuple[np.ndarray, MapKind]:
    """Return the coordinates (models, 2) of all, in the plane that the models ``moved`` span."""
    places = np.zeros((len(gram), 2))
    if not moved:
        return places, "line"
    if len(moved) <= 2:
        first = moved[0]
        places[:, 0] = gram[:, first] / math.sqrt(gram[first, first])
        if len(moved) == 1:
            return places, "line"
        # Gram-Schmidt: what of the second task vector is orthogonal to the first.
        second = moved[1]
        rest = float(gram[second, second]) - float(places[second, 0]) ** 2
        if rest <= RESOLUTION**2 * gram[second, second]:
            return places, "line"
        places[:, 1] = (gram[:, second] - places[:, 0] * places[second, 0]) / math.sqrt(rest)
        places[first, 1] = 0.0
        return places, "plane"
    values, vectors = np.linalg.eigh(gram[np.ix_(moved, moved)])
    for axis, which in enumerate((-1, -2)):
        if values[which] <= RESOLUTION**2 * values[-1]:
            return places, "line"
        along = gram[:, moved] @ vectors[:, which] / math.sqrt(values[which])
        # A direction has no sign of its own: most of the models are to the right, and above.
        total = float(along[moved].sum())
        largest = float(along[moved[int(np.argmax(np.abs(along[moved])))]])
        side = total if abs(total) > RESOLUTION * abs(largest) else largest
        places[:, axis] = along if side >= 0 else -along
    return places, "directions"
