"""Encodes a matrix, or a stack of matrices, by two factors of its leading singular vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.low_rank import Decomposed
from alnico.store.encoders.encoded import EncodedTensor, PartWriter, rounded
from alnico.store.spool import Spool
from alnico.store.tensor_change import BLOCK, TensorChange


@dataclass(frozen=True)
class Decomposition:
    """The leading singular vectors of each matrix of a tensor, and the squares of each matrix."""

    matrices: Sequence[Decomposed]
    squares: Sequence[float]

    def rank_for(self, error: float) -> int | None:
        """Return the least rank at which the relative error is at most ``error``; None if more vectors are needed."""
        most = max((one.rank for one in self.matrices), default=0)
        left = np.full(most + 1, 0.0)
        for one, squares in zip(self.matrices, self.squares, strict=True):
            kept = np.concatenate([[0.0], np.cumsum(one.values**2)])
            kept = np.concatenate([kept, np.full(most + 1 - len(kept), kept[-1])])
            left += np.maximum(squares - kept, 0.0)
        enough = np.flatnonzero(left <= error**2 * math.fsum(self.squares))
        return max(int(enough[0]), 1) if len(enough) else None

    def lost_at(self, rank: int) -> float:
        """Return what a rank loses, before the factors are rounded."""
        kept = [float((one.values[:rank] ** 2).sum()) for one in self.matrices]
        return math.sqrt(max(math.fsum(self.squares) - math.fsum(kept), 0.0))


def factor_dtype(change: TensorChange) -> str:
    """The dtype of factors: BF16 where base and fine-tune have 16 bits or fewer, else F32."""
    names = {change.finetuned.dtype, change.base.dtype if change.base is not None else "F32"}
    return "F32" if names & {"F32", "F64"} or not change.has_bits else "BF16"


def decompose(change: TensorChange, most: int, check: Callable[[], None] | None = None) -> Decomposition:
    """Decompose each matrix of a change into at most ``most`` singular vectors."""
    assert change.stack is not None
    count, rows, columns = change.stack
    size = rows * columns
    found, squares = [], []
    for index in range(count):
        if check is not None:
            check()
        matrix = np.empty(size)
        for first in range(0, size, BLOCK):
            last = min(first + BLOCK, size)
            matrix[first:last] = change.difference(index * size + first, index * size + last)
        found.append(leading_vectors(matrix.reshape(rows, columns), most))
        squares.append(float((matrix * matrix).sum()))
    return Decomposition(found, squares)


def encode_low_rank(
    change: TensorChange, spool: Spool, found: Decomposition, rank: int, *, is_peft: bool, label: str = ""
) -> EncodedTensor:
    """Encode ``D ~ L R`` with ``L = U sqrt(S)`` and ``R = sqrt(S) V^T`` for the leading ``rank`` singular vectors.

    With ``is_peft`` the factors are matrices (rows, r) and (r, columns), else stacks of them. Source: TSV-C of Gargiulo et al.
    2025, https://arxiv.org/abs/2412.00081, section 3.2.
    """
    assert change.stack is not None
    count, rows, columns = change.stack
    dtype = factor_dtype(change)
    rank = max(min(rank, max(one.rank for one in found.matrices)), 1)
    stack = () if is_peft else (count,)
    left = PartWriter(spool, dtype, (*stack, rows, rank))
    right = PartWriter(spool, dtype, (*stack, rank, columns))
    squares = 0.0
    for index, one in enumerate(found.matrices):
        kept = min(one.rank, rank)
        root = np.sqrt(one.values[:kept])
        tall, wide = np.zeros((rows, rank)), np.zeros((rank, columns))
        tall[:, :kept] = one.left[:, :kept] * root
        wide[:kept] = root[:, None] * one.right[:kept]
        sides = []
        for part, numbers in ((left, tall), (right, wide)):
            raw, decoded = rounded(numbers.reshape(-1), dtype, change.name)
            part.write(raw)
            sides.append(decoded.reshape(numbers.shape))
        height = max(BLOCK // columns, 1)
        for row in range(0, rows, height):
            end = min(row + height, rows)
            first = (index * rows + row) * columns
            gone = change.difference(first, first + (end - row) * columns)
            gone -= (sides[0][row:end] @ sides[1]).reshape(-1)
            squares += float((gone * gone).sum())
    parts = {"left": left.done(), "right": right.done()}
    return EncodedTensor(
        "low_rank", label or f"low_rank:{rank}", parts, lost=math.sqrt(squares), is_peft=is_peft
    )


def factor_bytes(change: TensorChange, rank: int) -> int:
    """The size of the factors of a rank."""
    assert change.stack is not None
    count, rows, columns = change.stack
    return count * rank * (rows + columns) * (4 if factor_dtype(change) == "F32" else 2)
