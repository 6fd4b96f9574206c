"""Names what numpy's arrays and torch's tensors do alike, so that one function computes with both.

A function gets arrays of one library, on one device, and stays there: :func:`library_of` is that library, and
``abs``, ``@``, ``.T``, ``.sum``, ``linalg.eigh`` and the like are the same in both. Here is what they spell differently.
With numpy's arrays each function does what numpy's function of that name does, to the last bit. torch is not imported:
whoever has a tensor has imported it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

AnyArray = Any
"""An array of numpy, or a tensor of torch on any device."""


def library_of(array: AnyArray) -> Any:
    """Return the library of an array: numpy, or torch."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def is_numpy(array: AnyArray) -> bool:
    """Is this an array of numpy?"""
    return isinstance(array, np.ndarray)


def to_numpy(array: AnyArray) -> np.ndarray:
    """Return the array itself, or the numbers of a tensor; of one on the processor, without a copy."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def to_torch(array: np.ndarray, device: str) -> AnyArray:
    """Return a tensor on a device with these numbers; it may share their memory. Only where torch is installed."""
    torch = importlib.import_module("torch")
    if (
        not array.flags.writeable or min(array.strides, default=0) < 0
    ):  # torch warns of the first, refuses the second
        array = array.copy(order="F" if array.flags.f_contiguous else "C")
    return torch.from_numpy(array).to(device)


def as_is(array: np.ndarray) -> AnyArray:
    """Return the array: what puts arrays where they are computed with, on the processor."""
    return array


def like(array: AnyArray, values: np.ndarray) -> AnyArray:
    """Return ``values`` in the library and on the device of an array, in their own dtype.

    >>> like(np.zeros(3), np.arange(2))
    array([0, 1])
    """
    return values if is_numpy(array) else to_torch(values, str(array.device))


def zeros(array: AnyArray, shape: Sequence[int]) -> AnyArray:
    """Return zeros of a shape with the library, the device and the dtype of an array.

    >>> zeros(np.ones(2), (1, 3))
    array([[0., 0., 0.]])
    """
    return np.zeros(shape, array.dtype) if is_numpy(array) else array.new_zeros(tuple(shape))


def copy_of(array: AnyArray) -> AnyArray:
    """Return a copy."""
    return array.copy() if is_numpy(array) else array.clone()


def concatenate(arrays: Sequence[AnyArray], axis: int = 0) -> AnyArray:
    """Join arrays of one library along an axis.

    >>> concatenate([np.ones(1), np.zeros(1)])
    array([1., 0.])
    """
    return library_of(arrays[0]).concatenate(list(arrays), axis)


def largest(array: AnyArray) -> float:
    """Return the largest magnitude; 0 if there are no entries.

    >>> largest(np.array([1.0, -2.0])), largest(np.zeros((0, 3)))
    (2.0, 0.0)
    """
    if is_numpy(array):
        return float(np.abs(array).max(initial=0.0))
    return float(abs(array).max()) if array.numel() else 0.0


def norm(array: AnyArray) -> float:
    """Return the root of the sum of squares of all entries.

    >>> norm(np.array([3.0, 4.0]))
    5.0
    """
    return float(library_of(array).linalg.norm(array))


def inner_product(one: AnyArray, other: AnyArray) -> float:
    """Return the sum of the products of two real arrays, entry by entry.

    >>> inner_product(np.ones((2, 2)), np.full((2, 2), 0.5))
    2.0
    """
    if is_numpy(one):
        return float(np.vdot(one, other))
    return float(one.reshape(-1) @ other.reshape(-1))


def are_equal(one: AnyArray, other: AnyArray) -> bool:
    """Have two arrays of one library the same shape and the same numbers?

    >>> are_equal(np.zeros(2), np.zeros(2)), are_equal(np.zeros(2), np.zeros(3))
    (True, False)
    """
    return np.array_equal(one, other) if is_numpy(one) else library_of(one).equal(one, other)


def reversed_columns(matrix: AnyArray) -> AnyArray:
    """Return the columns from the last to the first.

    >>> reversed_columns(np.array([[1, 2, 3]]))
    array([[3, 2, 1]])
    """
    return matrix[:, ::-1] if is_numpy(matrix) else matrix.flip(1)


def set_diagonal(matrix: AnyArray, values: AnyArray) -> None:
    """Replace the diagonal of a square matrix."""
    if is_numpy(matrix):
        matrix[np.diag_indices_from(matrix)] = values
    else:
        matrix.diagonal().copy_(values)


def dtype_of(array: AnyArray) -> np.dtype[Any]:
    """Return numpy's name of an array's dtype.

    >>> dtype_of(np.zeros(1, np.float32))
    dtype('float32')
    """
    return array.dtype if is_numpy(array) else np.dtype(str(array.dtype).removeprefix("torch."))


def in_dtype(array: AnyArray, dtype: np.dtype[Any] | type) -> AnyArray:
    """Return the array in a dtype that numpy names; itself if it has that dtype.

    >>> in_dtype(np.zeros(1), np.float32)
    array([0.], dtype=float32)
    """
    if is_numpy(array):
        return array.astype(dtype, copy=False)
    return array.to(getattr(library_of(array), np.dtype(dtype).name))


def empty(array: AnyArray, shape: Sequence[int], dtype: np.dtype[Any] | type) -> AnyArray:
    """Return an array of any content with the library and the device of another."""
    if is_numpy(array):
        return np.empty(shape, dtype)
    return array.new_empty(tuple(shape), dtype=getattr(library_of(array), np.dtype(dtype).name))


def lengths(matrix: AnyArray, axis: int) -> AnyArray:
    """Return the norm of each column (axis 0) or row (axis 1).

    >>> lengths(np.array([[3.0, 0.0], [4.0, 1.0]]), 0)
    array([5., 1.])
    """
    return library_of(matrix).linalg.norm(matrix, axis=axis) if is_numpy(matrix) else matrix.norm(dim=axis)
