"""Reads a model under the names and shapes of another, by a layout (see ``layouts``)."""

from __future__ import annotations

import bisect
import threading
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
        self._turned = threading.local()
        """The matrix that a thread turned last: blocks follow one another."""
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        tensors: dict[str, Tensor] = {}
        for name, pieces in layout.stored.items():
            codes = {source.tensors[stored].dtype for p in pieces for stored in p.names}
            if len(codes) > 1:
                raise MismatchError(
                    f"{source.label}: {name} is made of {len(pieces)} tensors of different dtypes "
                    f"({', '.join(sorted(codes))}); expected one. Convert the model to one dtype."
                )
            if any(p.of for p in pieces) and dtypes.DTYPES[source.tensors[pieces[0].name].dtype].bits % 8:
                raise MismatchError(
                    f"{source.label}: {name} is {source.tensors[pieces[0].name].dtype}, of less than a byte for a number, and "
                    "would have to be turned; expected a wider dtype. Convert the model to one."
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
        turned = [
            (p.matrix_elements, tensors[n].dtype)
            for n, pieces in self._pieces.items()
            for p in pieces
            if p.of
        ]
        self._turned_bytes = max((count * dtypes.DTYPES[code].bytes for count, code in turned), default=0)
        self.notes = [
            *getattr(source, "notes", ()),
            f"{source.label}: its tensors have different names than the output's ({layout.title}); it is "
            "read under the output's names.",
        ]

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The wrapped model's tensors that a tensor consists of."""
        return tuple(dict.fromkeys(stored for p in self._pieces[name] for stored in p.names))

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The pieces of the wrapped model's tensors that a tensor consists of."""
        return self._pieces[name]

    @property
    def is_turned(self) -> bool:
        """Are some of its tensors transposes of stored ones, so that their bytes are in another order?"""
        return self._turned_bytes > 0

    @property
    def reading_bytes(self) -> int:
        """The same, and room to turn the largest matrix, which is kept while its blocks are read."""
        return self.wrapped.reading_bytes + 2 * self._turned_bytes

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return self.wrapped.absent(
            [stored for name in tensors for stored in self.stored_names(name)], side_files
        )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        pieces = self._pieces[name]
        bits = dtypes.DTYPES[self.tensors[name].dtype].bits
        if len(pieces) == 1:
            self._read_piece(pieces[0], bits, offset, buffer)
            return
        ends = list(accumulate(p.elements * bits // 8 for p in pieces))
        position, stop = offset, offset + len(buffer)
        for i in range(bisect.bisect_right(ends, offset), len(pieces)):
            if position >= stop:
                break
            begin = ends[i - 1] if i else 0
            last = min(stop, ends[i])
            self._read_piece(pieces[i], bits, position - begin, buffer[position - offset : last - offset])
            position = last

    def _read_piece(self, piece: Piece, bits: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a piece, from its byte ``offset`` on."""
        first = piece.first * bits // 8 + offset
        if not piece.of:
            self.wrapped.read_into(piece.name, first, buffer)
            return
        held = getattr(self._turned, "matrix", None)
        if held is None or held[0] != (piece.of, piece.columns):
            self._turned.matrix = None  # two of them at once need no room
            held = self._turned.matrix = (piece.of, piece.columns), _turned(self.wrapped, piece, bits // 8)
        buffer[:] = memoryview(held[1])[first : first + len(buffer)]

    def identity(self) -> list[dict[str, Any]]:
        return [*self.wrapped.identity(), {"layout": self.layout.title}]


def with_names_of(source: Source, like: Source) -> Source:
    """Read a model under the names of another, if one spelling makes them agree; return it unchanged if they
    agree already.

    The values decide the order of gate and up in packed experts. Errors: MismatchError where two spellings
    fit and differ, or where the values do not decide.
    """
    mine, others = source.tensors.keys(), like.tensors.keys()
    if (mine <= others or mine >= others) and not _has_turned(source, like):
        return source
    layout = find_layout(shapes_of(source.tensors), shapes_of(like.tensors))
    if layout.is_identity:
        return source
    if layout.halves and _is_swapped(source, layout, like):
        layout = find_layout(shapes_of(source.tensors), shapes_of(like.tensors), swapped=True)
    return RenamedModel(source, layout, like.tensors)


def _has_turned(source: Source, like: Source) -> bool:
    """Has a stack of matrices its two last dimensions exchanged in another model?"""
    return any(
        len(shape := tensor.shape) == 3
        and shape[1] != shape[2]
        and (other := like.tensors.get(name)) is not None
        and other.shape == (shape[0], shape[2], shape[1])
        for name, tensor in source.tensors.items()
    )


def _turned(source: Source, piece: Piece, width: int) -> np.ndarray:
    """Read the matrix of a piece and return the bytes of its transpose, ``width`` to an element."""
    raw = np.empty(piece.matrix_elements * width, np.uint8)
    at = 0
    for run in piece.of:
        end = at + run.elements * width
        source.read_into(run.name, run.first * width, memoryview(raw)[at:end])
        at = end
    return np.ascontiguousarray(raw.reshape(-1, piece.columns, width).swapaxes(0, 1)).reshape(-1)


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
            half = shape[1] * shape[2] // 2
            own = [Piece(name, i * half, half) for i in range(2)]
            stored = layout.stored[name]
            if stored[0].of:  # the halves of the turned stack are columns of its matrices
                block = (Piece(name, 0, 2 * half),)
                own = [Piece(name, i * half, half, block, shape[2]) for i in range(2)]
                others = list(stored[0].of)
            else:
                others = [_piece_at(stored, i * half) for i in range(2)]
            pairs.append((own, others))
        else:
            singles.append((layout.stored[name][0], name))
    singles.sort(key=lambda half: (half[0].name, half[0].of[0].first if half[0].of else 0, half[0].first))
    for (first, first_name), (second, second_name) in zip(singles[::2], singles[1::2], strict=False):
        if first.name == second.name and first.of == second.of:
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
    source.fetch(source.absent(list(piece.names), False))
    code = source.tensors[piece.name].dtype
    if code not in dtypes.MERGEABLE:
        return np.zeros(0)
    width = dtypes.DTYPES[code].bytes
    if piece.of:
        whole = _turned(source, piece, width)[piece.first * width :]
        return dtypes.decode(whole[: min(piece.elements, MAX_ELEMENTS) * width], code).astype(np.float64)
    raw = np.empty(min(piece.elements, MAX_ELEMENTS) * width, np.uint8)
    source.read_into(piece.name, piece.first * width, memoryview(raw))
    return dtypes.decode(raw, code).astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0
