"""What an analysis should find, in numpy and float64, whole arrays at a time: from the definitions of ``alnico.analysis.results``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import alnico
from alnico.analysis.results import (
    GROUPS,
    LEVELS,
    AnalysedModel,
    Analysis,
    DeltaStatistics,
    Pair,
    ScopeStatistics,
    Skipped,
    Subspace,
    TensorScope,
)
from alnico.plan.families import group_of
from alnico.plan.layers import layer_position

Tensors = Mapping[str, np.ndarray]
"""Name to values. What is BF16 or float8 in a file is given as float32."""

RANK = 8
NEGLIGIBLE = 1e-6
SMALLER_SIDE = range(2, 513)
MOST_ELEMENTS = 1 << 22
"""Of the matrices whose leading singular vectors are compared."""


@dataclass(frozen=True)
class Part:
    """One tensor, flat: the base and the task vectors of the models that have it, by position; which of their entries are top."""

    base: np.ndarray
    deltas: Mapping[int, np.ndarray]
    top: Mapping[int, np.ndarray]
    subspaces: Mapping[tuple[int, int], Subspace]


def reference_analysis(base: Tensors, models: Mapping[str, Tensors], *, top_share: float = 0.2) -> Analysis:
    """Analyse models in memory: ``models`` by their names."""
    names = tuple(models)
    parts: dict[str, Part] = {}
    skipped = []
    for tensor, values in base.items():
        if not is_float(values):
            skipped.append(Skipped(tensor, None, values.size, "no numbers to compare"))
            continue
        fitting = {}
        for number, name in enumerate(names):
            found = models[name].get(tensor)
            if found is not None and is_float(values) and is_float(found) and found.shape == values.shape:
                fitting[number] = found
            else:
                skipped.append(
                    Skipped(tensor, name, values.size, "missing" if found is None else "does not fit")
                )
        if fitting:
            parts[tensor] = part(values, fitting, top_share)
    for name, tensors in models.items():
        skipped += [
            Skipped(t, name, v.size, "the base has none") for t, v in tensors.items() if t not in base
        ]

    def over(name: str, chosen: Sequence[str]) -> ScopeStatistics:
        return scope(name, [parts[t] for t in chosen], len(names))

    tensors = tuple(tensor_scope(over(t, [t]), base[t]) for t in parts)
    groups = {g: [t.name for t in tensors if t.group == g] for g in GROUPS}
    layers = {
        n: [t.name for t in tensors if t.layer == n]
        for n in sorted({t.layer for t in tensors if t.layer is not None})
    }
    return Analysis(
        version=alnico.__version__,
        base=AnalysedModel("base", "base"),
        models=tuple(AnalysedModel(n, n) for n in names),
        top_share=top_share,
        whole=over("whole", list(parts)),
        groups={g: over(g, chosen) for g, chosen in groups.items() if chosen},
        layers={n: over(str(n), chosen) for n, chosen in layers.items()},
        tensors=tensors,
        skipped=tuple(skipped),
        seconds=0.0,
    )


def is_float(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.floating)


def tensor_scope(found: ScopeStatistics, values: np.ndarray) -> TensorScope:
    place = layer_position(found.name)
    return TensorScope(
        **vars(found),
        dtype={8: "F64", 4: "F32", 2: "F16"}[values.dtype.itemsize],
        shape=values.shape,
        group=group_of(found.name),
        layer=place.layer if place else None,
        module=place.rest if place else found.name,
    )


def part(base: np.ndarray, models: Mapping[int, np.ndarray], top_share: float) -> Part:
    precise = any(v.dtype == np.float64 for v in (base, *models.values()))
    kind = np.float64 if precise else np.float32
    matrices = {i: v.astype(kind) - base.astype(kind) for i, v in models.items()}
    subspaces = {}
    for i, j in itertools.combinations(matrices, 2):
        if (
            base.ndim == 2
            and min(base.shape) in SMALLER_SIDE
            and base.size <= MOST_ELEMENTS
            and matrices[i].any()
            and matrices[j].any()
        ):
            subspaces[i, j] = subspace(matrices[i].astype(np.float64), matrices[j].astype(np.float64))
    return Part(
        base=base.astype(kind).astype(np.float64).reshape(-1),
        deltas={i: d.astype(np.float64).reshape(-1) for i, d in matrices.items()},
        top={i: top_entries(d.reshape(-1), top_share) for i, d in matrices.items()},
        subspaces=subspaces,
    )


def top_entries(delta: np.ndarray, top_share: float) -> np.ndarray:
    """Which entries are at least the kth largest magnitude, of whose float32 pattern the lower 16 bits count as 0."""
    if not delta.size:
        return np.zeros(0, bool)
    magnitudes = np.abs(delta).astype(np.float32)
    count = max(1, int(top_share * delta.size))
    kth = np.partition(magnitudes, -count)[-count]
    threshold = np.array([kth.view(np.uint32) >> 16 << 16], np.uint32).view(np.float32)[0]
    return (magnitudes >= threshold) & (delta != 0)


def subspace(one: np.ndarray, other: np.ndarray) -> Subspace:
    (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(d, full_matrices=False) for d in (one, other))
    rank = min(RANK, *(int(np.sum(s > NEGLIGIBLE * s[0])) for s in (s1, s2)))
    return Subspace(
        left=float(np.sum((u1[:, :rank].T @ u2[:, :rank]) ** 2)) / rank,
        right=float(np.sum((v1[:rank] @ v2[:rank].T) ** 2)) / rank,
        rank=rank,
        matrices=1,
    )


def scope(name: str, parts: Sequence[Part], models: int) -> ScopeStatistics:
    changes = []
    for i in range(models):
        having = [p for p in parts if i in p.deltas]
        joined = [
            np.concatenate(arrays)
            for arrays in ([p.deltas[i] for p in having], [p.base for p in having])
            if arrays
        ]
        changes.append(change(*joined) if joined else None)
    pairs = []
    for i, j in itertools.combinations(range(models), 2):
        both = [p for p in parts if i in p.deltas and j in p.deltas]
        if both:
            pairs.append(pair(i, j, both))
    stacks = [np.stack(list(p.deltas.values())) for p in parts if len(p.deltas) > 1]
    shared = sum(int(np.sum(np.count_nonzero(s, axis=0) > 1)) for s in stacks)
    opposed = sum(int(np.sum((s > 0).any(axis=0) & (s < 0).any(axis=0))) for s in stacks)
    added = sum(float(np.abs(s.sum(axis=0)).sum()) for s in stacks)
    apart = sum(float(np.abs(s).sum()) for s in stacks)
    return ScopeStatistics(
        name, tuple(changes), tuple(pairs), ratio(opposed, shared), 1 - added / apart if apart else None
    )


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def change(d: np.ndarray, base: np.ndarray) -> DeltaStatistics:
    if not d.size:
        return DeltaStatistics(
            0, 0.0, 0.0, None, None, 0.0, 0.0, 0.0, None, None, (0.0,) * len(LEVELS), 0.0, None
        )
    magnitudes = np.abs(d)
    l1, l2 = float(magnitudes.sum()), float(np.sqrt(np.sum(d * d)))
    is_constant = bool(d.min() == d.max())
    central = d - d.mean()
    squares = central * central
    m2, m3, m4 = (
        (0.0,) * 3
        if is_constant
        else (float(np.mean(powers)) for powers in (squares, squares * central, squares * squares))
    )
    return DeltaStatistics(
        elements=d.size,
        l1=l1,
        l2=l2,
        relative_l1=ratio(l1, float(np.abs(base).sum())),
        relative_l2=ratio(l2, float(np.sqrt(np.sum(base * base)))),
        max_abs=float(magnitudes.max()),
        mean=float(d.mean()),
        std=float(np.sqrt(m2)),
        skewness=None if is_constant else m3 / m2**1.5,
        excess_kurtosis=None if is_constant else m4 / m2**2 - 3,
        quantiles=tuple(float(q) for q in np.quantile(np.sort(d), LEVELS, method="linear")),
        unchanged=float(np.mean(d == 0)),
        effective_sparsity=1 - l1**2 / (d.size * l2**2) if l2 else None,
    )


def pair(i: int, j: int, parts: Sequence[Part]) -> Pair:
    """Over the elements that both models have."""
    one, other = (np.concatenate([p.deltas[n] for p in parts]) for n in (i, j))
    tops = [np.concatenate([p.top[n] for p in parts]) for n in (i, j)]
    found = [p.subspaces[i, j] for p in parts if (i, j) in p.subspaces]
    opposite = np.sign(one) * np.sign(other) < 0
    products = np.abs(one * other)
    common = tops[0] & tops[1]
    return Pair(
        models=(i, j),
        cosine=ratio(float(np.sum(one * other)), float(np.linalg.norm(one) * np.linalg.norm(other))),
        distance=float(np.linalg.norm(one - other)),
        sign_conflict=ratio(int(opposite.sum()), int(np.sum((one != 0) & (other != 0)))),
        weighted_sign_conflict=ratio(float(products[opposite].sum()), float(products.sum())),
        top_overlap=ratio(int(common.sum()), min(int(t.sum()) for t in tops)),
        top_sign_conflict=ratio(int((common & opposite).sum()), int(common.sum())),
        subspace=Subspace(
            left=sum(s.left for s in found) / len(found),
            right=sum(s.right for s in found) / len(found),
            rank=max(s.rank for s in found),
            matrices=len(found),
        )
        if found
        else None,
    )
