"""Chooses how each tensor of a task vector is stored: which encodings reach a target, and which are smallest."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from alnico.methods.shared.singular_vectors import rank_of_each
from alnico.store.encoders.difference import encode_difference, plain_bytes, plain_dtype
from alnico.store.encoders.encoded import EncodedTensor
from alnico.store.encoders.exact import encode_exact, encode_sparse, encode_whole
from alnico.store.encoders.int4 import encode_int4
from alnico.store.encoders.low_rank import decompose, encode_low_rank, factor_bytes
from alnico.store.encoders.sign import encode_sign
from alnico.store.encoders.top_k import encode_top_k
from alnico.store.spool import Spool
from alnico.store.target import DEFAULT_ERROR, Target
from alnico.store.tensor_change import TensorChange

TOP_SHARES = (0.2, 0.05, 0.01)
"""Shares of entries that are tried for a size."""
RANK_SHARES = (0.25, 0.125, 1 / 32)
"""Shares of singular directions that are tried for a size."""
INT4_ERROR = 0.03
"""An error that 4 bits hardly ever reach: codes of normal numbers in groups of 128 lose about a tenth."""
SPREAD = 4.0
"""A matrix whose squares are spread over r directions needs some times r for a small error: it is decomposed only if the factors of
so many times r are smaller than what else would be stored."""
SMALL_SIDE = 256
"""Matrices up to this smaller side are always decomposed: it takes milliseconds."""


@dataclass(frozen=True)
class EncodingTask:
    """Encodes tensors for one target into one spool. ``is_peft`` says which names PEFT can hold; ``may_decompose`` which matrices fit
    the memory. ``check`` ends a call when the run ends."""

    target: Target
    spool: Spool
    is_peft: Callable[[str], bool]
    may_decompose: Callable[[TensorChange], bool]
    check: Callable[[], None]
    is_adapter: bool = False

    def encode(self, change: TensorChange) -> list[EncodedTensor]:
        """Encode a measured change in every way that the target may choose. The last step is :func:`choose`."""
        target, spool = self.target, self.spool
        if self.is_adapter:
            return [EncodedTensor("adapter", "adapter")]
        if change.is_comparable and change.facts.is_equal:
            return [EncodedTensor("absent", "absent")]
        if not change.has_difference:
            return [encode_exact(change, spool)]
        if not change.facts.norm and not change.has_bits:
            return [EncodedTensor("absent", "absent")]
        if target.exact:
            return [encode_exact(change, spool)]
        if (
            not change.facts.norm and change.has_bits
        ):  # equal numbers in another dtype, or zeros of another sign
            return [encode_exact(change, spool)]
        if target.size is not None:
            return self._for_size(change)
        if target.tsv is not None:
            return [self._low_rank(change, target.tsv, f"tsv:{target.tsv:g}")]
        if target.encoding is not None:
            return [self._forced(change)]
        error = DEFAULT_ERROR if target.error is None else target.error
        exact = [encode_exact(change, spool)] if change.has_bits else []
        return [*exact, *self._for_error(change, error, min((e.byte_size for e in exact), default=1 << 62))]

    def rest(self, change: TensorChange) -> EncodedTensor:
        """Encode what an encoding of matrices does not touch: the difference, in F32 or, for 16-bit models, in F16."""
        return encode_difference(change, self.spool, plain_dtype(change))

    def _low_rank(self, change: TensorChange, option: float, label: str) -> EncodedTensor:
        """Encode a matrix by factors if they are smaller than the matrix; ``option`` is a rank or a share of all."""
        if change.stack is None:
            return self.rest(change)
        _, rows, columns = change.stack
        rank = option if isinstance(option, int) else rank_of_each(option, rows, columns, 1)
        if factor_bytes(change, rank) >= plain_bytes(change):
            return self.rest(change)
        found = decompose(change, rank, self.check)
        return encode_low_rank(
            change, self.spool, found, rank, is_peft=self.is_peft(change.name), label=label
        )

    def _forced(self, change: TensorChange) -> EncodedTensor:
        name, option = self.target.forced
        spool = self.spool
        if name in ("exact", "whole", "sparse") and not change.has_bits:
            return self.rest(change)
        if name == "exact":
            return encode_exact(change, spool)
        if name == "whole" or (name == "sparse" and not change.is_comparable):
            return encode_whole(change, spool)
        if name == "sparse":
            return encode_sparse(change, spool)
        if name == "difference":
            return encode_difference(change, spool, "F64" if change.is_wide and option == "F32" else option)
        if len(change.finetuned.shape) < 2:
            return self.rest(change)
        if name == "low_rank":
            return self._low_rank(change, option, self.target.encoding or "")
        if name == "top_k":
            return encode_top_k(change, spool, option)
        return encode_sign(change, spool) if name == "sign" else encode_int4(change, spool)

    def _for_error(self, change: TensorChange, error: float, smallest: int) -> list[EncodedTensor]:
        """Encode in the ways that may reach an error and are smaller than ``smallest`` bytes; each that does is returned."""
        allowed, spool, elements = error * change.facts.norm, self.spool, change.elements
        found: list[EncodedTensor] = []

        def consider(size: int, encode: Callable[[], EncodedTensor]) -> None:
            best = min((e.byte_size for e in found), default=smallest)
            if size < best and (one := encode()).lost <= allowed and one.byte_size < best:
                found.append(one)

        if _sign_lost(change) <= allowed:
            consider(elements // 8 + 4, lambda: encode_sign(change, spool))
        if error >= INT4_ERROR:
            consider(elements // 2 + elements // 16 + 8, lambda: encode_int4(change, spool))
        consider(2 * elements, lambda: encode_difference(change, spool, "F16"))
        consider(4 * elements, lambda: encode_difference(change, spool, "F32"))
        if not found and smallest >= 1 << 62:
            found.append(encode_difference(change, spool, "F64"))
        self._consider_low_rank(change, error, consider, min((e.byte_size for e in found), default=smallest))
        if error >= INT4_ERROR:
            for share in sorted(TOP_SHARES):
                consider(int(6 * share * elements), lambda share=share: encode_top_k(change, spool, share))  # type: ignore[misc]
        return found

    def _consider_low_rank(
        self,
        change: TensorChange,
        error: float,
        consider: Callable[[int, Callable[[], EncodedTensor]], None],
        best: int,
    ) -> None:
        if change.stack is None or change.facts.rank is None or not self.may_decompose(change):
            return
        most = (best - 1) // max(factor_bytes(change, 1), 1)
        is_small = min(change.stack[1:]) <= SMALL_SIDE
        if most < 1 or (SPREAD * change.facts.rank > most and not is_small):
            return
        decomposed = decompose(change, min(most, *change.stack[1:]), self.check)
        rank = decomposed.rank_for(error * 0.99)  # the factors are rounded after it
        if rank is not None:
            consider(
                factor_bytes(change, rank),
                lambda: encode_low_rank(
                    change, self.spool, decomposed, rank, is_peft=self.is_peft(change.name)
                ),
            )

    def _for_size(self, change: TensorChange) -> list[EncodedTensor]:
        """Encode in all ways; those that lose more than a smaller one are left out."""
        spool = self.spool
        ways = [encode_exact(change, spool)] if change.has_bits else []
        ways += [
            encode_difference(change, spool, d)
            for d in ("F32", "F16")
            if d == "F16" or plain_dtype(change) != "F16"
        ]
        ways += [encode_int4(change, spool), encode_sign(change, spool)]
        ways += [encode_top_k(change, spool, share) for share in (*TOP_SHARES, 0.0)]
        if change.stack is not None and self.may_decompose(change):
            _, rows, columns = change.stack
            ranks = sorted({rank_of_each(share, rows, columns, 1) for share in RANK_SHARES}, reverse=True)
            ranks = [r for r in ranks if factor_bytes(change, r) < plain_bytes(change)]
            if ranks:
                found = decompose(change, ranks[0], self.check)
                peft = self.is_peft(change.name)
                ways += [encode_low_rank(change, spool, found, rank, is_peft=peft) for rank in ranks]
        return lower_hull(ways)


def _sign_lost(change: TensorChange) -> float:
    """What one bit per entry loses at least: ``|D|^2 - sum of n s^2`` over rows, with the mean magnitude s of each."""
    means = change.facts.means
    assert means is not None
    return math.sqrt(max(change.facts.norm**2 - change.row * float((means * means).sum()), 0.0))


def lower_hull(ways: Sequence[EncodedTensor]) -> list[EncodedTensor]:
    """Return the encodings on the lower convex hull of size and squared loss, the smallest first."""
    hull: list[EncodedTensor] = []
    for one in sorted(ways, key=lambda e: (e.byte_size, e.lost)):
        if hull and one.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _gain(a: EncodedTensor, b: EncodedTensor) -> float:
    """The squared loss that a byte saves, from one encoding to a larger one."""
    return (a.lost**2 - b.lost**2) / max(b.byte_size - a.byte_size, 1)


def choose(options: Mapping[str, Sequence[EncodedTensor]]) -> dict[str, EncodedTensor]:
    """Choose the smallest encoding of each tensor; of equal ones, the one that loses least."""
    return {name: min(ways, key=lambda e: (e.byte_size, e.lost)) for name, ways in options.items()}


def choose_exact(options: Mapping[str, Sequence[EncodedTensor]]) -> dict[str, EncodedTensor]:
    """Choose the exact encoding of each tensor, where it has one."""
    return {
        name: min(ways, key=lambda e: (not e.is_exact, e.byte_size, e.lost)) for name, ways in options.items()
    }


def choose_for_size(options: Mapping[str, Sequence[EncodedTensor]], size: int) -> dict[str, EncodedTensor]:
    """Choose encodings of least total loss within ``size`` bytes of data: from the smallest ones, always the step that saves most
    per byte. On the hulls of :func:`lower_hull` this is the optimum of Lagrange's method. Where even the smallest ones are too
    large, they are returned."""
    chosen = dict.fromkeys(options, 0)
    left = size - sum(ways[0].byte_size for ways in options.values())
    steps: list[tuple[float, str]] = []

    def push(name: str) -> None:
        ways, at = options[name], chosen[name]
        if at + 1 < len(ways):
            heapq.heappush(steps, (-_gain(ways[at], ways[at + 1]), name))

    for name in options:
        push(name)
    while steps:
        _, name = heapq.heappop(steps)
        ways, at = options[name], chosen[name]
        cost = ways[at + 1].byte_size - ways[at].byte_size
        if cost <= left:
            left -= cost
            chosen[name] += 1
            push(name)
    return {name: options[name][at] for name, at in chosen.items()}
