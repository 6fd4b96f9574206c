"""Writes vectors as sparse combinations of given ones: orthogonal matching pursuit, many targets at a time.

Each step chooses the atom with the largest cosine to the residual, ``argmax |<r, a>| / |a|``, and projects the target onto the span of
all that were chosen (Pati, Rezaiifar and Krishnaprasad 1993; Tropp 2004). Cosines of all atoms are products in float32, whose rounding
has a bound; atoms that are within it of the largest are compared in float64. Everything else is float64. So the choice does not depend
on how a library orders its sums, nor on which targets are in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

BLOCK_ATOMS = 4096
"""Atoms that are compared with all targets by one product."""

LEAST = 1e-9
"""A target counts as reached when this share of its length is left; an atom counts as a combination of those chosen before when this
share of it is orthogonal to them."""

SMALLEST = 1e-30
"""Atoms of this length and shorter are never chosen: their cosines cannot be computed in float32."""

COMPARED = 8192
"""Atoms that are compared in float64 at a time."""


class Atoms(Protocol):
    """The vectors that combinations are made of."""

    @property
    def lengths(self) -> np.ndarray:
        """The Euclidean norm of each, (atoms,) float64."""
        ...

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all atoms in order, at most :data:`BLOCK_ATOMS` at a time: the first one's number, and (atoms, d) float32 or float64."""
        ...

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the atoms of these numbers, (numbers, d) float64."""
        ...


def pursue(
    targets: np.ndarray, atoms: Atoms, count: int, excluded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each target the numbers of up to ``count`` atoms, and their weights: ``target ~ sum of weight * atom``.

    ``excluded`` is the number of an atom that a target may not use, -1 for none. Where fewer atoms suffice, or no further one helps,
    the other numbers are 0 and have the weight 0.

    Shapes: targets (n, d); returns (n, count) int64 and (n, count) float64; excluded (n,). Memory: :func:`pursuit_bytes`.
    Edge cases: a target of zeros has no atoms; atoms of zeros are never chosen.
    """
    values = np.asarray(targets, np.float64)
    targets_count, width = values.shape
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values))
    residual = values / np.where(lengths > 0, lengths, 1.0)[:, None]
    basis = np.zeros((targets_count, count, width))
    triangle = np.zeros((targets_count, count, count))
    triangle[:, np.arange(count), np.arange(count)] = 1.0
    along = np.zeros((targets_count, count))
    chosen = np.full((targets_count, count), -1, np.int64)
    barred = np.full(targets_count, -1, np.int64) if excluded is None else excluded
    active = lengths > 0
    for step in range(count):
        left = np.sqrt(np.einsum("nd,nd->n", residual, residual))
        active = active & (left > LEAST)
        if not active.any():
            break
        here = np.flatnonzero(active)
        taken = np.concatenate([chosen[here, :step], barred[here, None]], axis=1)
        best = _nearest(residual[here] / left[here, None], atoms, taken)
        here, best = here[best >= 0], best[best >= 0]
        spanned = basis[here, :step] if len(here) < targets_count else basis[:, :step]
        atom = atoms.rows(best) / atoms.lengths[best, None]
        inside = np.zeros((len(here), step))
        for _ in range(2):  # the second time removes what rounding left
            share = np.einsum("nkd,nd->nk", spanned, atom)
            atom -= np.einsum("nk,nkd->nd", share, spanned)
            inside += share
        height = np.sqrt(np.einsum("nd,nd->n", atom, atom))
        helps = height > LEAST
        active = np.zeros(targets_count, bool)
        active[here[helps]] = True
        here, best, height = here[helps], best[helps], height[helps]
        atom = atom[helps] / height[:, None]
        chosen[here, step] = best
        triangle[here, :step, step] = inside[helps]
        triangle[here, step, step] = height
        basis[here, step] = atom
        part = np.einsum("nd,nd->n", residual[here], atom)
        along[here, step] = part
        residual[here] -= part[:, None] * atom
    weights = _solved(triangle, along)
    used = chosen >= 0
    numbers = np.where(used, chosen, 0)
    weights = np.where(used, weights * lengths[:, None] / np.maximum(atoms.lengths[numbers], SMALLEST), 0.0)
    return numbers, weights


def pursuit_bytes(targets: int, width: int, count: int) -> int:
    """Return the memory that :func:`pursue` needs for so many targets, besides the atoms."""
    each = 8 * count * (2 * width + count) + 16 * BLOCK_ATOMS + 64 * width
    return targets * each + 8 * width * (BLOCK_ATOMS + COMPARED)


def _nearest(directions: np.ndarray, atoms: Atoms, taken: np.ndarray) -> np.ndarray:
    """Return for each direction, of length 1, the atom with the largest cosine, of equal ones the first; -1 if none is left.

    ``taken`` are numbers of atoms that a direction may not have, -1 for none.
    """
    count, width = directions.shape
    single = directions.astype(np.float32)
    # Of a product of two vectors of length 1, whatever the order of its sums, and of the rounding of both and of the norm.
    bound = np.float32((width + 8) * 2.0**-24)
    inverse = np.where(atoms.lengths > SMALLEST, 1.0 / np.maximum(atoms.lengths, SMALLEST), 0.0)
    highest = np.zeros(count, np.float32)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first, rows in atoms.blocks():
        cosines: Any = single @ rows.astype(np.float32, copy=False).T
        cosines *= inverse[first : first + len(rows)].astype(np.float32)
        np.abs(cosines, out=cosines)
        who, where = np.nonzero((taken >= first) & (taken < first + len(rows)))
        cosines[who, taken[who, where] - first] = -1
        np.maximum(highest, cosines.max(axis=1), out=highest)
        who, where = np.nonzero(cosines >= (highest - 2 * bound)[:, None])
        found.append((who, where + first, cosines[who, where]))
    who, which, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True))
    near = (cosine >= highest[who] - 2 * bound) & (cosine > 0)
    who, which = who[near], which[near]
    exact = np.empty(len(who))
    for at in range(0, len(who), COMPARED):
        part = slice(at, at + COMPARED)
        products = np.einsum("nd,nd->n", atoms.rows(which[part]), directions[who[part]])
        exact[part] = np.abs(products) / atoms.lengths[which[part]]
    order = np.lexsort((which, -exact, who))
    firsts = np.ones(len(order), bool)
    firsts[1:] = who[order][1:] != who[order][:-1]
    best = np.full(count, -1, np.int64)
    best[who[order][firsts]] = which[order][firsts]
    return best


def _solved(triangle: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Solve ``R c = y`` for upper triangular matrices, (n, k, k) and (n, k)."""
    solution = np.zeros_like(values)
    for i in range(values.shape[1] - 1, -1, -1):
        rest = np.einsum("nk,nk->n", triangle[:, i, i + 1 :], solution[:, i + 1 :])
        solution[:, i] = (values[:, i] - rest) / triangle[:, i, i]
    return solution
