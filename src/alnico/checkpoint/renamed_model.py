"""Reads a model under the names and shapes of another, by a layout (see ``layouts``)."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from alnico.checkpoint.layouts import Layout, Piece, find_layout, shapes_of
from alnico.checkpoint.source import Source, SourceWrapper, Tensor, TensorSpec
from alnico.errors import MismatchError
from alnico.numerics import dtypes

MIN_COSINE_GAP = 0.1
"""Smallest difference of two cosines that distinguishes the gate projection from the up projection."""

MAX_PAIRS = 8
"""Most pairs of matrices whose halves are compared, spread over the model."""

MAX_ELEMENTS = 1 << 16
"""Most elements of a matrix that are compared."""


class RenamedModel(SourceWrapper):
    """A source under other names. Made by :func:`with_names_of`; closing it closes the model.

    Tensors that the other model does not have get its spelling, if the layout knows it, and else keep their own names.
    """

    def __init__(self, source: Source, layout: Layout, like: Mapping[str, Tensor]) -> None:
        self.wrapped = source
        self.layout = layout
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        tensors: dict[str, Tensor] = {}
        for name, pieces in layout.stored.items():
            codes = {source.tensors[p.name].dtype for p in pieces}
            if len(codes) > 1:
                raise MismatchError(
                    f"{source.label}: {name} is made of {len(pieces)} tensors of different dtypes "
                    f"({', '.join(sorted(codes))}); expected one. Convert the model to one dtype."
                )
            whole = layout.whole(name)
            first = source.tensors[pieces[0].name]
            if whole is not None and source.tensors[whole].shape == like[name].shape:
                tensors[name] = source.tensors[whole]
            else:
                tensors[name] = TensorSpec(first.dtype, like[name].shape, first.nominal)
            self._pieces[name] = pieces
        spelled = {layout.respelled.get(name, name): name for name in layout.unused}
        if len(spelled) < len(layout.unused) or spelled.keys() & tensors.keys():
            spelled = {name: name for name in layout.unused}
        for name, own in spelled.items():
            if name in tensors:
                raise MismatchError(
                    f"{source.label}: has a tensor {name!r} and another that has this name in the other "
                    f"model ({layout.title}); expected one. Rename the tensors of one model."
                )
            tensors[name] = source.tensors[own]
            self._pieces[name] = (Piece(own, 0, source.tensors[own].elements),)
        order = {name: i for i, name in enumerate(source.tensors)}
        names = sorted(tensors, key=lambda n: (order[self._pieces[n][0].name], self._pieces[n][0].first))
        self.tensors: Mapping[str, Tensor] = {name: tensors[name] for name in names}
        self.notes = [
            *getattr(source, "notes", ()),
            f"{source.label}: its tensors have different names than the output's ({layout.title}); it is "
            "read under the output's names.",
        ]

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The wrapped model's tensors that a tensor consists of."""
        return tuple(dict.fromkeys(p.name for p in self._pieces[name]))

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The pieces of the wrapped model's tensors that a tensor consists of."""
        return self._pieces[name]

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.wrapped.absent(
            [stored for name in tensors for stored in self.stored_names(name)], side_files
        )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        pieces = self._pieces[name]
        bits = dtypes.DTYPES[self.tensors[name].dtype].bits
        if len(pieces) == 1:
            self.wrapped.read_into(pieces[0].name, pieces[0].first * bits // 8 + offset, buffer)
            return
        ends = list(accumulate(p.elements * bits // 8 for p in pieces))
        position, stop = offset, offset + len(buffer)
        for i in range(bisect.bisect_right(ends, offset), len(pieces)):
            if position >= stop:
                break
            begin = ends[i - 1] if i else 0
            last = min(stop, ends[i])
            first_byte = pieces[i].first * bits // 8 + position - begin
            self.wrapped.read_into(pieces[i].name, first_byte, buffer[position - offset : last - offset])
            position = last

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"layout": self.layout.title}]


def with_names_of(source: Source, like: Source) -> Source:
    """Read a model under the names of another, if one spelling makes them agree; return it unchanged if they
    agree already.

    The values decide the order of gate and up in packed experts. Errors: MismatchError where two spellings
    fit and differ, or where the values do not decide.
    """
    mine, others = source.tensors.keys(), like.tensors.keys()
    if mine <= others or mine >= others:
        return source
    layout = find_layout(shapes_of(source.tensors), shapes_of(like.tensors))
    if layout.is_identity:
        return source
    if layout.halves and _is_swapped(source, layout, like):
        layout = find_layout(shapes_of(source.tensors), shapes_of(like.tensors), swapped=True)
    return RenamedModel(source, layout, like.tensors)


def _is_swapped(source: Source, layout: Layout, like: Source) -> bool:
    """Is the up projection the first half of packed experts? Chooses the order whose values are closer to the
    other model's."""
    straight: list[float] = []
    crossed: list[float] = []
    for own, others in _half_pairs(source, layout, like):
        straight += [_cosine(own[0], others[0]), _cosine(own[1], others[1])]
        crossed += [_cosine(own[0], others[1]), _cosine(own[1], others[0])]
    in_order, turned = float(np.mean(straight)), float(np.mean(crossed))
    if not abs(in_order - turned) >= MIN_COSINE_GAP:
        raise MismatchError(
            f"{layout.halves[0]}: the gate and up projections of {source.label} cannot be told apart by "
            f"their values (cosines with those of {like.label}: {in_order:.2f} in one order, {turned:.2f} in "
            f"the other); expected a difference of at least {MIN_COSINE_GAP}. Store the experts of both "
            "models in one form."
        )
    return turned > in_order


def _half_pairs(
    source: Source, layout: Layout, like: Source
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Values of the two halves of some experts, (first, second), of the other model and of this one."""
    pairs: list[tuple[list[Piece], list[Piece]]] = []
    singles: list[tuple[Piece, str]] = []
    for name in layout.halves:
        shape = like.tensors[name].shape
        if len(shape) == 3:
            half = shape[1] // 2 * shape[2]
            own = [Piece(name, i * half, half) for i in range(2)]
            others = [_piece_at(layout.stored[name], i * half) for i in range(2)]
            pairs.append((own, others))
        else:
            singles.append((layout.stored[name][0], name))
    singles.sort(key=lambda half: (half[0].name, half[0].first))
    for (first, first_name), (second, second_name) in zip(singles[::2], singles[1::2], strict=False):
        if first.name == second.name:
            pairs.append(([Piece(n, 0, first.elements) for n in (first_name, second_name)], [first, second]))
    step = max(len(pairs) // MAX_PAIRS, 1)
    for own, others in pairs[::step][:MAX_PAIRS]:
        yield [_values(like, p) for p in own], [_values(source, p) for p in others]


def _piece_at(pieces: Sequence[Piece], first: int) -> Piece:
    """The piece that begins at element ``first`` of the tensor that ``pieces`` make up."""
    begins = accumulate((p.elements for p in pieces), initial=0)
    return next(piece for piece, begin in zip(pieces, begins, strict=False) if begin == first)


def _values(source: Source, piece: Piece) -> np.ndarray:
    """The first values of a piece, in float64."""
    source.fetch(source.absent([piece.name], False))
    code = source.tensors[piece.name].dtype
    if code not in dtypes.MERGEABLE:
        return np.zeros(0)
    width = dtypes.DTYPES[code].bytes
    raw = np.empty(min(piece.elements, MAX_ELEMENTS) * width, np.uint8)
    source.read_into(piece.name, piece.first * width, memoryview(raw))
    return dtypes.decode(raw, code).astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0
