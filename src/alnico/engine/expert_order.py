"""Finds experts that have another order in one model than in another, by a sample, before they are merged.

Merging pairs the experts of mixtures by number. The order of experts has no meaning, so a model that was converted or trained
apart may have the same experts under other numbers; merged, each would be the mean of different experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alnico.checkpoint.source import Source
from alnico.numerics.dtypes import DTYPES, MERGEABLE, decode
from alnico.plan.job import Plan

LAYERS = 3
"""Most layers whose experts are compared, spread over the model."""

SAMPLE = 2_048
"""Elements that are read of each expert: the cosine of independent experts is then 0.02 on average."""

LEAST = 256
"""Fewest elements of an expert that is compared."""

GAIN = 0.2
"""By how much the mean cosine of the experts that the best matching moves must exceed that of the same experts in place.
Experts that are copies of one another, as in a fresh mixture, gain nothing."""

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


class Reordered(NamedTuple):
    """Experts of ``model`` that are those of ``other`` in another order, in one layer."""

    model: str
    other: str
    place: str
    order: tuple[int, ...]
    """For each expert of ``other``, the expert of ``model`` that matches it best."""
    in_place: float
    """The mean cosine of the moved experts under the same numbers."""
    matched: float
    """The mean cosine of the moved experts after matching."""


def best_matching(cosines: np.ndarray) -> tuple[int, ...]:
    """Return a column for each row of a square matrix: the largest entry decides first, then the largest of what is left.

    >>> best_matching(np.array([[0.1, 0.9], [0.8, 0.2]]))
    (1, 0)
    """
    left = cosines.astype(np.float64)
    order = [0] * len(left)
    for _ in order:
        row, column = np.unravel_index(int(np.argmax(left)), left.shape)
        order[int(row)] = int(column)
        left[row, :] = left[:, column] = -np.inf
    return tuple(order)


def compare_order(other: np.ndarray, model: np.ndarray) -> tuple[tuple[int, ...], float, float] | None:
    """Match experts, rows of (experts, elements), by cosine; None unless the numbers are clearly not the best matching.

    Returns the order, and the mean cosines of the experts that it moves, in place and matched.
    """
    lengths = [np.sqrt(np.einsum("ij,ij->i", x, x)) for x in (other, model)]
    if not all(np.isfinite(x).all() and (x > 0).all() for x in lengths):
        return None
    cosines = np.einsum("ik,jk->ij", other / lengths[0][:, None], model / lengths[1][:, None])
    order = best_matching(cosines)
    moved = [i for i, j in enumerate(order) if i != j]
    if not moved:
        return None
    in_place = float(np.mean([cosines[i, i] for i in moved]))
    matched = float(np.mean([cosines[i, order[i]] for i in moved]))
    return (order, in_place, matched) if matched - in_place >= GAIN else None


def find_reordered(plan: Plan) -> list[Reordered]:
    """Compare the order of experts of all models that a plan merges with that of the base, or else of the first model.

    Reads :data:`SAMPLE` elements of each expert in :data:`LAYERS` layers.
    """
    layers: dict[str, dict[int, tuple[str, int, int]]] = {}
    models: dict[str, tuple[int, ...]] = {}
    for job in plan.jobs:
        read = job.merged if job.base is None else (job.base, *job.inputs)
        used = tuple(dict.fromkeys(i.model for i in read))
        if not job.is_computed or len(used) < 2 or any(i.name != read[0].name for i in read):
            continue
        if any(i.dtype not in MERGEABLE for i in read):
            continue
        match, shape = _EXPERT.fullmatch(read[0].name), job.shape
        if match is not None and len(shape) == 2:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), (read[0].name, 0, job.elements))
            models.setdefault(match[1], used)
        elif len(shape) == 3 and ".experts." in read[0].name and 1 < shape[0] <= 4_096:
            size = job.elements // shape[0]
            place = read[0].name.partition(".experts.")[0] + ".experts"
            if place not in layers:
                layers[place] = {i: (read[0].name, i * size, size) for i in range(shape[0])}
                models[place] = used
    whole = [
        place
        for place, experts in layers.items()
        if len(experts) > 1
        and sorted(experts) == list(range(len(experts)))
        and min(size for _, _, size in experts.values()) >= LEAST
    ]
    count = min(LAYERS, len(whole))
    chosen = dict.fromkeys(whole[i * (len(whole) - 1) // max(count - 1, 1)] for i in range(count))
    found = []
    for place in chosen:
        first, *others = models[place]
        sample = _read_experts(plan.sources[first], layers[place])
        for model in others:
            compared = compare_order(sample, _read_experts(plan.sources[model], layers[place]))
            if compared is not None:
                found.append(
                    Reordered(plan.sources[model].label, plan.sources[first].label, place, *compared)
                )
    return found


def _read_experts(source: Source, experts: Mapping[int, tuple[str, int, int]]) -> np.ndarray:
    """Read a sample of each expert: (experts, elements), from the middle of each."""
    count = min(SAMPLE, *(size for _, _, size in experts.values()))
    rows = np.empty((len(experts), count), np.float32)
    for i in range(len(experts)):
        name, begin, size = experts[i]
        dtype = source.tensors[name].dtype
        width = DTYPES[dtype].bytes
        raw = np.empty(count * width, np.uint8)
        source.read_into(name, (begin + (size - count) // 2) * width, memoryview(raw))
        rows[i] = decode(raw, dtype)
    return rows


def order_notes(found: Sequence[Reordered]) -> list[str]:
    """Return a line for each model whose experts have another order."""
    lines = []
    for model, other in dict.fromkeys((x.model, x.other) for x in found):
        places = [x for x in found if (x.model, x.other) == (model, other)]
        one = places[0]
        moved = next(i for i, j in enumerate(one.order) if i != j)
        more = f", and in {len(places) - 1} more of the sampled layers" if len(places) > 1 else ""
        count = sum(i != j for i, j in enumerate(one.order))
        lines.append(
            f"{model}: {count} of {len(one.order)} experts of {one.place} are in another order than in {other}{more}: expert {moved} of "
            f"{other} is expert {one.order[moved]} of {model} (mean cosine {one.matched:.2f}, under the same numbers {one.in_place:.2f}). "
            f"Merged, they would mix different experts. Reorder the experts of {model} and the rows of its routers, or leave it out."
        )
    return lines
