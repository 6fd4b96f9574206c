"""Computes the values of stored task vectors from the stored parts, by blocks. See docs/task-vector-format.md.

Parts are arrays of the bytes as they are stored: BF16 as uint16, F8 as uint8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint.source import Tensor, TensorSpec
from alnico.checkpoint.task_vectors.manifest import EXACT, GROUP, PARTS, TensorEntry
from alnico.errors import ModelError
from alnico.kernels.choice import kernel_for
from alnico.kernels.constants import CODES
from alnico.kernels.four_bit_kernel import FourBitKernel
from alnico.kernels.low_rank_kernel import FoldKernel
from alnico.numerics import dtypes

CHUNK = 1 << 16
"""Elements decoded at a time: their bytes and values fit the second-level cache."""

FLOATS = ("F32", "F64", "BF16", "F16")
"""Dtypes in which differences and factors are stored."""

INDICES = ("I32", "I64")
WIDE_INDICES = 1 << 31
"""Elements from which on indices do not fit I32."""


class Parts(Protocol):
    """The stored parts of one tensor."""

    def read(self, part: str, first: int, count: int) -> np.ndarray:
        """Return elements of a part, as stored. The array is valid until this thread reads the part again."""
        ...

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return the positions, in the list of indices, of those from ``first`` to ``last``."""
        ...

    def factors(self, real: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``left`` (stack, rows, r) and ``right`` (stack, r, columns) as numbers."""
        ...

    def dtype(self, part: str) -> str:
        """Return the dtype of a part, by its name in headers."""
        ...

    def size(self, part: str) -> int:
        """Return the number of elements of a part."""
        ...


def decode_tensor(entry: TensorEntry, parts: Mapping[str, np.ndarray], base: np.ndarray | None) -> np.ndarray:
    """Decode a whole tensor: the new values for exact encodings, the difference in float64 for others.

    ``parts`` are the stored arrays; ``base`` is the tensor of the base, which ``absent`` and ``sparse`` need. Arrays have
    the dtypes in which numpy holds the stored bytes: BF16 is uint16, F8 is uint8. The new values have the dtype of
    the fine-tune in the same form. Errors: ModelError for parts that do not fit the entry, and for ``adapter``.
    """
    arrays = ArrayParts(entry, parts)
    described = {p: TensorSpec(arrays.dtype(p), a.shape, arrays.dtype(p)) for p, a in parts.items()}
    if problem := part_problem(entry, described):
        raise ModelError(f"the parts of a tensor of {entry.encoding}: {problem}. Get the task vector again.")
    if "indices" in parts and (problem := index_problem(parts["indices"], -1, entry.elements)):
        raise ModelError(
            f"the indices: {problem}; expected places in {entry.shape}. Get the task vector again."
        )
    if entry.encoding in EXACT:
        return _new_values(entry, arrays, base)
    if entry.encoding == "adapter":
        raise ModelError("a tensor of an adapter has no parts; expected a difference. Open it on its base.")
    difference = np.zeros(entry.elements)
    for first in range(0, entry.elements, CHUNK):
        decode_difference(entry, arrays, entry.scale, first, difference[first : first + CHUNK])
    return difference.reshape(entry.shape)


def _new_values(entry: TensorEntry, arrays: ArrayParts, base: np.ndarray | None) -> np.ndarray:
    if entry.encoding == "whole":
        return arrays.read("values", 0, entry.elements).reshape(entry.shape)
    if base is None or base.shape != entry.shape or base.dtype != storage(entry.dtype):
        found = "none" if base is None else f"{base.dtype} {base.shape}"
        raise ModelError(
            f"the base's tensor: is {found}; expected {storage(entry.dtype)} {entry.shape} for {entry.encoding}. "
            "Give the tensor of the base."
        )
    values = base.copy()
    if entry.encoding == "sparse":
        values.reshape(-1)[arrays.read("indices", 0, arrays.count)] = arrays.read("values", 0, arrays.count)
    return values


class ArrayParts:
    """Parts in memory."""

    def __init__(self, entry: TensorEntry, parts: Mapping[str, np.ndarray]) -> None:
        self._parts = {name: array.reshape(-1) for name, array in parts.items()}
        self._shapes = {name: array.shape for name, array in parts.items()}
        self._exact = entry.dtype if entry.encoding in EXACT else None
        indices = self._parts.get("indices")
        self.count = 0 if indices is None else indices.size

    def read(self, part: str, first: int, count: int) -> np.ndarray:
        return self._parts[part][first : first + count]

    def within(self, first: int, last: int) -> tuple[int, int]:
        indices = self._parts["indices"]
        begin, end = np.searchsorted(indices, np.array([first, last], indices.dtype))
        return int(begin), int(end)

    def factors(self, real: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        left, right = self._parts["left"], self._parts["right"]
        return as_factors(
            numbers(left, self.dtype("left")).astype(real),
            numbers(right, self.dtype("right")).astype(real),
            self._shapes["left"],
        )

    def size(self, part: str) -> int:
        return int(self._parts[part].size)

    def dtype(self, part: str) -> str:
        if part == "values" and self._exact and self._parts[part].dtype == storage(self._exact):
            return self._exact
        return _NAMES.get(self._parts[part].dtype.str.lstrip("<|=").lower(), "")


_NAMES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "u2": "BF16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
}
"""The dtype of a stored part by that of its array."""


def storage(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype that holds the bytes of a dtype.

    >>> storage("BF16")
    dtype('uint16')
    """
    return np.dtype(dtypes.DTYPES[dtype].storage or "u1")


def numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored values of a dtype of floats as float32, or float64 for F64."""
    return dtypes.decode(np.ascontiguousarray(stored).view(np.uint8).reshape(-1), dtype)


def as_factors(
    left: np.ndarray, right: np.ndarray, left_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return two flat factors as (stack, rows, r) and (stack, r, columns). ``left_shape`` has its leading 1 left out, or not."""
    stack = left_shape[0] if len(left_shape) == 3 else 1
    rows, rank = left_shape[-2:]
    columns = right.size // (stack * rank) if stack * rank else 0
    return left.reshape(stack, rows, rank), right.reshape(stack, rank, columns)


def decode_difference(entry: TensorEntry, parts: Parts, factor: float, first: int, out: np.ndarray) -> None:
    """Fill ``out``, float32 or float64, with ``factor`` times what is stored, from element ``first`` of the tensor on.

    ``factor`` is the entry's scale, times a coefficient. What overflows becomes an
    infinity. Errors: ModelError for an encoding that is no difference.
    """
    with np.errstate(all="ignore"):
        if entry.encoding == "difference":
            _decode(parts.read("values", first, out.size), parts.dtype("values"), out)
            if factor != 1:
                out *= out.dtype.type(factor)
        elif entry.encoding == "low_rank":
            _low_rank(parts, factor, first, out)
        elif entry.encoding == "top_k":
            _top_k(parts, factor, first, out)
        elif entry.encoding == "sign":
            _sign(entry, parts, factor, first, out)
        elif entry.encoding == "int4":
            _int4(entry, parts, factor, first, out)
        else:
            raise ModelError(
                f"a tensor of the encoding {entry.encoding}: is no difference; expected difference, low_rank, top_k, sign or "
                "int4. Read its new values."
            )


def _decode(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Decode stored values into ``out``."""
    raw = stored.view(np.uint8)
    if out.dtype == np.float32:
        dtypes.decode_into(raw, dtype, out)
    else:
        out[:] = dtypes.decode(raw, dtype)


def _low_rank(parts: Parts, factor: float, first: int, out: np.ndarray) -> None:
    left, right = parts.factors(out.dtype)
    size = left.shape[1] * right.shape[2]
    kernel = kernel_for(
        FoldKernel("float64" if out.dtype == np.float64 else "float32"), out.size * left.shape[2]
    )
    at = 0
    zeros = np.zeros(out.nbytes, np.uint8)
    code = "F64" if out.dtype == np.float64 else "F32"
    while at < out.size:
        matrix, begin = divmod(first + at, size)
        count = min(size - begin, out.size - at)
        kernel(
            zeros[: count * out.itemsize],
            CODES[code],
            left[matrix],
            right[matrix],
            factor,
            begin,
            out[at : at + count],
        )
        at += count


def _top_k(parts: Parts, factor: float, first: int, out: np.ndarray) -> None:
    out[:] = 0
    begin, end = parts.within(first, first + out.size)
    if begin < end:
        values = numbers(parts.read("values", begin, end - begin), parts.dtype("values")).astype(out.dtype)
        values *= out.dtype.type(factor)
        out[parts.read("indices", begin, end - begin) - first] = values


def _sign(entry: TensorEntry, parts: Parts, factor: float, first: int, out: np.ndarray) -> None:
    begin, skipped = divmod(first, 8)
    octets = -(-(skipped + out.size) // 8)
    bits = parts.read("bits", begin, octets)
    table = _sign_table(out.dtype.str)
    if skipped or out.size % 8:
        out[:] = table[bits].reshape(-1)[skipped : skipped + out.size]
    else:
        np.take(table, bits, axis=0, out=out.reshape(-1, 8), mode="clip")
    rows = entry.shape[0] if entry.shape else 1
    width = entry.elements // rows
    if parts.size("scales") == 1:
        out *= out.dtype.type(parts.read("scales", 0, 1)[0]) * out.dtype.type(factor)
        return
    for row, count, at, length in _row_runs(first, out.size, width):
        scales = parts.read("scales", row, count).astype(out.dtype) * out.dtype.type(factor)
        part = out[at : at + count * length].reshape(count, length)
        part *= scales[:, None]


def _row_runs(first: int, count: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Split elements of rows of ``width`` into (first row, rows, position, elements of each row): the rest of a row, whole
    rows, the start of a row."""
    at = 0
    while at < count:
        row, column = divmod(first + at, width)
        whole = (count - at) // width if column == 0 else 0
        length = width if whole else min(width - column, count - at)
        yield row, max(whole, 1), at, length
        at += max(whole, 1) * length


def _int4(entry: TensorEntry, parts: Parts, factor: float, first: int, out: np.ndarray) -> None:
    begin = first // GROUP
    start, stop = begin * GROUP, min(-(-(first + out.size) // GROUP) * GROUP, entry.elements)
    groups = -(-(stop - start) // GROUP)
    codes = parts.read("codes", start // 2, -(-(stop - start) // 2))
    by = out.dtype.type(factor)
    scales = parts.read("scales", begin, groups).astype(out.dtype) * by
    minimums = parts.read("minimums", begin, groups).astype(out.dtype) * by
    is_whole = start == first and stop == first + out.size and out.size == 2 * codes.size
    values = out if is_whole else np.empty(2 * codes.size, out.dtype)
    ahead = 0 if first else entry.elements  # tensors are read from their start, and to their end
    kernel = kernel_for(FourBitKernel("float64" if out.dtype == np.float64 else "float32"), ahead)
    kernel(codes, scales, minimums, values)
    if not is_whole:
        out[:] = values[first - start : first - start + out.size]


@functools.cache
def _sign_table(dtype: str) -> np.ndarray:
    """The eight signs of each byte, (256, 8)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (2.0 * bits - 1.0).astype(np.dtype(dtype))


def index_problem(indices: np.ndarray, previous: int, elements: int) -> str:
    """Say what is wrong in indices that follow on ``previous``; empty if nothing is."""
    if not indices.size:
        return ""
    if not bool((np.diff(indices) > 0).all()) or int(indices[0]) <= previous:
        return "they are not ascending and distinct"
    if int(indices[0]) < 0 or int(indices[-1]) >= elements:
        return f"they reach {int(indices[-1])}; expected 0 to {elements - 1}"
    return ""


def part_problem(entry: TensorEntry, parts: Mapping[str, Tensor]) -> str:
    """Say which part does not fit the entry, by dtypes and shapes; empty if all do.

    >>> entry = TensorEntry("whole", "F32", (2, 3))
    >>> part_problem(entry, {"values": TensorSpec("F16", (6,), "F16")})
    'values is F16 [6]; expected F32 [2, 3]'
    """
    for name in PARTS[entry.encoding]:
        if name not in parts:
            return f"{name} is missing; expected {', '.join(PARTS[entry.encoding])}"
    kinds, shapes = _expected(entry, parts)
    for name in PARTS[entry.encoding]:
        part = parts[name]
        if part.dtype not in kinds[name] or part.shape not in shapes[name]:
            expected = f"{' or '.join(kinds[name])} {' or '.join(str(list(s)) for s in shapes[name][:3])}"
            return f"{name} is {part.dtype} {list(part.shape)}; expected {expected}"
    return ""


Shapes = list[tuple[int, ...]]


def _expected(
    entry: TensorEntry, parts: Mapping[str, Tensor]
) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, Shapes]]:
    """Return the dtypes and the shapes that the parts of an entry may have."""
    elements = entry.elements
    kinds: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, Shapes] = {}
    if entry.encoding == "whole":
        kinds, shapes = {"values": (entry.dtype,)}, {"values": [entry.shape]}
    elif entry.encoding == "difference":
        kinds, shapes = {"values": FLOATS}, {"values": [entry.shape]}
    elif entry.encoding in ("sparse", "top_k"):
        count = min(parts["indices"].elements, elements)
        kinds["indices"] = INDICES if elements < WIDE_INDICES else INDICES[1:]
        kinds["values"] = (entry.dtype,) if entry.encoding == "sparse" else FLOATS
        shapes = {"indices": [(count,)], "values": [(count,)]}
    elif entry.encoding == "sign":
        kinds = {"bits": ("U8",), "scales": ("F32",)}
        shapes = {"bits": [(-(-elements // 8),)], "scales": [(1,), *((n,) for n in entry.shape[:1])]}
    elif entry.encoding == "int4":
        kinds = {"codes": ("U8",), "scales": ("F32",), "minimums": ("F32",)}
        groups = -(-elements // GROUP)
        shapes = {"codes": [(-(-elements // 2),)], "scales": [(groups,)], "minimums": [(groups,)]}
    elif entry.encoding == "low_rank":
        kinds = {"left": FLOATS, "right": FLOATS}
        shapes["left"], shapes["right"] = _factor_shapes(entry.shape, parts["left"].shape)
    return kinds, shapes


def _factor_shapes(shape: tuple[int, ...], left: tuple[int, ...]) -> tuple[Shapes, Shapes]:
    """Return the shapes of both factors: those of one matrix, or of a stack of matrices, as which the tensor is read.

    ``left`` is the shape of the left factor; its last dimension is the rank.
    """
    rank = left[-1] if left else 1
    lefts: Shapes = []
    rights: Shapes = []
    for i in range(
        1, len(shape)
    ):  # the dimensions before i are rows, or a stack and rows; the others are columns
        columns = math.prod(shape[i:])
        lefts += [(math.prod(shape[:i]), rank), (1, math.prod(shape[:i]), rank)]
        rights += [(rank, columns), (1, rank, columns)]
        if i == 1 and len(shape) > 2:
            lefts, rights = [*lefts, (shape[0], rank)], [*rights, (rank, *shape[1:])]
        for j in range(1, i):
            lefts.append((math.prod(shape[:j]), math.prod(shape[j:i]), rank))
            rights.append((math.prod(shape[:j]), rank, columns))
    fitting = [r for a, r in zip(lefts, rights, strict=True) if a == left]
    return list(dict.fromkeys(lefts)), list(dict.fromkeys(fitting or rights))
