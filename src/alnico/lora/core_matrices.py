"""Gives methods over whole matrices the small matrices of adapters in their core space."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from alnico.lora.core_space import CoreSpace
from alnico.methods.base import MatrixMethod, Merge
from alnico.numerics.arrays import AnyArray, copy_of, is_numpy, like, to_numpy, zeros
from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.low_rank import Decomposed

Note = Callable[[str, tuple[int | float, ...]], None]


class CoreMatrices:
    """The core matrices of one update, one per adapter, as :class:`alnico.methods.base.Matrices`.

    Core space has orthonormal bases, so singular values, polar factors and inner products are those of the whole matrices.
    """

    is_transposed = False

    def __init__(self, space: CoreSpace, note: Note) -> None:
        self.models = len(space.values)
        self.shape = len(space.left.T), len(space.right)
        self.whole = len(space.left), space.right.shape[1]
        self._values = space.values
        self._note = note

    def value(self, model: int) -> AnyArray:
        return copy_of(self._values[model])

    def side(self, kind: str, model: int) -> AnyArray:
        raise NotImplementedError(f"adapters have no statistics ({kind}, {model})")

    def leading(self, model: int, count: int) -> Decomposed:
        return leading_vectors(self._values[model], count)

    def kept(
        self, name: Hashable, models: Sequence[int], make: Callable[[], tuple[AnyArray, ...]]
    ) -> tuple[AnyArray, ...]:
        del name, models
        return tuple(array if array.ndim == 2 else to_numpy(array) for array in make())

    def note(self, text: str, *values: int | float) -> None:
        self._note(text, values)


def merge_cores(space: CoreSpace, bound: Merge | MatrixMethod, note: Note) -> AnyArray:
    """Return the merged core matrix. A ``Merge`` is the sum that a method comes to with its options."""
    if isinstance(bound, MatrixMethod):
        made = bound.make(CoreMatrices(space, note), *bound.arguments)
        return like(space.left, made) if is_numpy(made) else made  # zeros where all weights cancel
    total = zeros(space.left, (space.left.shape[1], len(space.right)))
    for coefficient, value in zip(coefficients_of(bound, len(space.values)), space.values, strict=True):
        total += coefficient * value
    return total


def coefficients_of(bound: Merge, models: int) -> tuple[float, ...]:
    """The coefficient of each model in a weighted sum."""
    units = [tuple(float(i == j) for j in range(models)) for i in range(models)]
    return tuple(float(bound.mix(unit, *bound.arguments)) for unit in units)
