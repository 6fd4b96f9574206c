"""Defines facts: what a method must know about a whole tensor before it computes a parameter.

A fact is a frozen value, so two options with the same fact share the measurement. Facts may use earlier facts
as arguments of their scalar functions; together they form a graph that is measured level by level, one pass
each.

``Sum``, ``Count`` and ``KthLargest`` reduce a scalar function ``of(x, *arguments)`` of ONE model's value (a
task-vector entry in delta space) over the tensor, for each model separately: k numbers. With ``across`` it is
``of(x, values, *arguments)`` and sees the values of all models at that place. A ``KthLargest`` may also be
over the model: all tensors that are merged with the same fact of the same models, measured before the first
of them is merged. ``Largest``, and a ``Sum`` over rows, are k numbers for each row. ``Gram`` is the k x k
matrix of inner products, of whole tensors, of rows or of columns. ``Derived`` is a plain Python function of
measured facts and numbers. ``Noise`` and ``Bernoulli`` are not measured: they are drawn for each element and
model, and depend only on its place (and its rank). ``Side`` and ``Recorded`` are read from statistics that
the recipe names for each model.

A row is a run along the last dimension, a column one along the first; a tensor of one dimension is one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from alnico.errors import MethodError
from alnico.kernels.scalar_source import check_pure


def magnitude(x: float) -> float:
    """|x|"""
    return abs(x)


Extent = Literal["tensor", "row", "column"]
"""The elements reduced to one number: all, those of each row, or those of each column."""


@dataclass(frozen=True)
class Noise:
    """A uniform number in [0, 1) for each element and model."""


@dataclass(frozen=True)
class Bernoulli:
    """1.0 with probability ``chance`` (one number per model), else 0.0, for each element and model.

    With ``spread`` (one number per model) the probability depends on the rank of the magnitude in its row:
    from ``chance - spread`` for the smallest to ``chance + spread`` for the largest, in even steps; equal
    magnitudes share their mean rank, and a row of one element has ``chance``.
    """

    chance: tuple[float, ...]
    spread: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sum:
    """Sum of ``of(x, *arguments)`` over the tensor: k float64 numbers, in fixed lanes over fixed leaves.

    Over rows: a numpy array (k, n) of the sums of all n rows.
    """

    of: Callable[..., float]
    arguments: tuple[Argument, ...] = ()
    across: bool = False
    over: Literal["tensor", "row"] = "tensor"


@dataclass(frozen=True)
class Largest:
    """The largest ``of(x, *arguments)`` of each row: a numpy array (k, n) for n rows."""

    of: Callable[..., float]
    arguments: tuple[Argument, ...] = ()
    across: bool = False


@dataclass(frozen=True)
class Count:
    """Number of elements where ``of(x, *arguments)`` is not 0: k integers. With ``across`` they are one, of
    the first x."""

    of: Callable[..., float]
    arguments: tuple[Argument, ...] = ()
    across: bool = False


@dataclass(frozen=True)
class KthLargest:
    """The exact kth largest ``of(x, *arguments) >= 0``, with k = max(1, int(share x elements)): k numbers.

    Where a model's ``share`` is 1 the answer is 0 without measuring: all elements are at least that large.
    ``skip`` leaves out the largest first: ``min(int(skip x elements), elements - k)`` of them; the answer is
    then the kth of the others, or the first of them with ``end`` "first" (infinity where ``share`` is 1).
    ``among`` counts the share of as many elements as it says, not of all; a k of 0 then has the answer
    infinity. ``across`` with one ``share``: as for Count; with a share per model, k numbers. ``over`` "model"
    counts the elements of all tensors, and has neither ``arguments`` nor ``among`` nor ``across``.
    ``is_quantile``: the value that is at place ``int((1 - share) x (elements - 1))`` when all are sorted
    upwards, from 0.
    """

    share: tuple[float, ...]
    of: Callable[..., float] = magnitude
    arguments: tuple[Argument, ...] = ()
    skip: tuple[float, ...] = ()
    end: Literal["first", "last"] = "last"
    among: Count | None = None
    across: bool = False
    over: Literal["tensor", "model"] = "tensor"
    is_quantile: bool = False

    def place(self, model: int, elements: int, among: int | None = None) -> int:
        """The place of the value among the largest, counted from 1; 0 for none."""
        if among is not None:
            return int(self.share[model] * among)
        if self.is_quantile:
            return elements - int((1 - self.share[model]) * (elements - 1))
        count = max(1, int(self.share[model] * elements))
        skipped = min(int(self.skip[model] * elements), elements - count) if self.skip else 0
        return skipped + (1 if self.end == "first" else count)


@dataclass(frozen=True)
class Gram:
    """Inner products of all pairs of models in float64: a k x k matrix (tuple of rows).

    Over rows or columns: a numpy array (n, k, k) of the matrices of all n rows or columns.
    """

    over: Extent = "tensor"


@dataclass(frozen=True)
class Derived:
    """``function(*arguments)`` of measured facts and numbers, in float64: k numbers, or one if not
    ``per_model``.

    ``over`` rows or columns: the function gives a numpy array (k, n), the numbers of all n rows or columns.
    """

    function: Callable[..., Any]
    arguments: tuple[Argument, ...] = ()
    per_model: bool = True
    over: Extent = "tensor"


@dataclass(frozen=True)
class Side:
    """A number for each element and model: from the statistics that the option ``kind`` names for the model.

    For ``mix`` alone; facts are measured of the models.
    """

    kind: str


@dataclass(frozen=True)
class Recorded:
    """The entry ``key`` of the statistics of the option ``kind``, for a tensor or the whole model: one number
    per model.

    Known before anything is measured: the plan puts the numbers in its place.
    """

    kind: str
    key: str


MeasuredFact = Union[Sum, Largest, Count, KthLargest, Gram]
Fact = Union[MeasuredFact, Derived]
Argument = Union[float, tuple[float, ...], Fact, Noise, Bernoulli, Side, Recorded]
"""What a scalar function receives after the values: a number, a number per model, a fact, noise, or an entry
of statistics."""


def levels(arguments: tuple[Argument, ...]) -> list[list[MeasuredFact]]:
    """Return the measured facts behind ``arguments`` in the order of measuring; each list takes one pass.

    >>> total = Sum(magnitude)
    >>> limit = KthLargest((0.5,))
    >>> [len(level) for level in levels((limit, total, Sum(magnitude, (limit,))))]
    [2, 1]
    """
    depth: dict[MeasuredFact, int] = {}

    def visit(argument: Argument | None) -> int:
        if isinstance(argument, KthLargest) and argument.over == "model":
            return 0
        if isinstance(argument, (Sum, Largest, Count, KthLargest)):
            if argument not in depth:
                check_pure(argument.of)
                below = [visit(a) for a in argument.arguments]
                below.append(visit(argument.among) if isinstance(argument, KthLargest) else 0)
                depth[argument] = 1 + max(below)
            return depth[argument]
        if isinstance(argument, Gram):
            return depth.setdefault(argument, 1)
        if isinstance(argument, Derived):
            return max((visit(a) for a in argument.arguments), default=0)
        return 0

    for argument in arguments:
        visit(argument)
    by_level: list[list[MeasuredFact]] = [[] for _ in range(max(depth.values(), default=0))]
    for fact, level in depth.items():
        by_level[level - 1].append(fact)
    return by_level


def of_model(arguments: tuple[Argument, ...]) -> tuple[KthLargest, ...]:
    """Return the facts over the model behind ``arguments``, each once. Errors: MethodError for one that
    depends on others.

    >>> limit = KthLargest((0.2,), over="model")
    >>> of_model((limit, Sum(magnitude, (limit,)))) == (limit,)
    True
    """
    facts = tuple(
        dict.fromkeys(f for f in _behind(arguments) if isinstance(f, KthLargest) and f.over == "model")
    )
    for fact in facts:
        check_pure(fact.of)
        if fact.arguments or fact.among is not None or fact.across:
            raise MethodError(f"{fact} depends on more than a model's own values; over the model it cannot.")
    return facts


def _behind(arguments: tuple[Argument | None, ...]) -> Iterator[Argument]:
    """All arguments, and all those of the facts among them."""
    for argument in arguments:
        if argument is not None:
            yield argument
        if isinstance(argument, (Sum, Largest, Count, KthLargest, Derived)):
            yield from _behind(argument.arguments)
        if isinstance(argument, KthLargest):
            yield from _behind((argument.among,))


def resolve(argument: Argument, measured: Mapping[MeasuredFact, Any]) -> Any:
    """Return the number or numbers of an argument, in float64. Errors: MethodError if it is noise."""
    if isinstance(argument, Derived):
        return argument.function(*(resolve(a, measured) for a in argument.arguments))
    if isinstance(argument, (Sum, Largest, Count, KthLargest, Gram)):
        return measured[argument]
    if isinstance(argument, (Noise, Bernoulli, Side)):
        raise MethodError(
            f"{argument} has a value for each element; it cannot be an argument of a derived fact."
        )
    if isinstance(argument, Recorded):
        raise MethodError(f"{argument} is for mix alone; it cannot be an argument of a derived fact.")
    return argument
