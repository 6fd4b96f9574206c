"""Facts: what a merge method must know of a whole tensor before it can compute one parameter.

A fact is a frozen value, so two options that ask the same share the measurement. Facts may use earlier facts as
arguments of their scalar functions; together they form a graph that is measured level by level, one pass each.

``Sum``, ``Count`` and ``KthLargest`` reduce a scalar function ``of(x, *arguments)`` of ONE model's value (a task-vector
entry in delta space) over the tensor, for each model by itself: k numbers. ``Gram`` is the k x k matrix of inner
products. ``Derived`` is a plain Python function of measured facts and numbers. ``Noise`` and ``Bernoulli`` are not
measured: they are drawn for each element and model from its place alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

from alnico.errors import MethodError
from alnico.kernels.source import check_pure


def magnitude(x: float) -> float:
    """|x|"""
    return abs(x)


@dataclass(frozen=True)
class Noise:
    """A uniform number in [0, 1) for each element and model."""


@dataclass(frozen=True)
class Bernoulli:
    """1.0 with probability ``chance`` (a number a model), else 0.0, for each element and model."""

    chance: tuple[float, ...]


@dataclass(frozen=True)
class Sum:
    """Sum of ``of(x, *arguments)`` over the tensor: k float64 numbers, in fixed lanes over fixed leaves."""

    of: Callable[..., float]
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Count:
    """Number of elements where ``of(x, *arguments)`` is not 0: k integers."""

    of: Callable[..., float]
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class KthLargest:
    """The exact kth largest ``of(x, *arguments) >= 0``, with k = max(1, int(share x elements)): k numbers.

    Where a model's ``share`` is 1 the answer is 0 without measuring: all elements are at least that large.
    """

    share: tuple[float, ...]
    of: Callable[..., float] = magnitude
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Gram:
    """Inner products of all pairs of models in float64: a k x k matrix (tuple of rows)."""


@dataclass(frozen=True)
class Derived:
    """``function(*arguments)`` of measured facts and numbers, in float64: k numbers, or one if not ``per_model``."""

    function: Callable[..., Any]
    arguments: tuple[Argument, ...] = ()
    per_model: bool = True


Measured = Union[Sum, Count, KthLargest, Gram]
Fact = Union[Measured, Derived]
Argument = Union[float, tuple[float, ...], Fact, Noise, Bernoulli]
"""What a scalar function receives after the values: a number, a number a model, a fact, or noise."""


def levels(arguments: tuple[Argument, ...]) -> list[list[Measured]]:
    """Return the measured facts behind ``arguments`` in the order of measuring; each list takes one pass.

    >>> total = Sum(magnitude)
    >>> limit = KthLargest((0.5,))
    >>> [len(level) for level in levels((limit, total, Sum(magnitude, (limit,))))]
    [2, 1]
    """
    depth: dict[Measured, int] = {}

    def visit(argument: Argument) -> int:
        if isinstance(argument, (Sum, Count, KthLargest)):
            if argument not in depth:
                check_pure(argument.of)
                depth[argument] = 1 + max((visit(a) for a in argument.arguments), default=0)
            return depth[argument]
        if isinstance(argument, Gram):
            return depth.setdefault(argument, 1)
        if isinstance(argument, Derived):
            return max((visit(a) for a in argument.arguments), default=0)
        return 0

    for argument in arguments:
        visit(argument)
    found: list[list[Measured]] = [[] for _ in range(max(depth.values(), default=0))]
    for fact, level in depth.items():
        found[level - 1].append(fact)
    return found


def resolve(argument: Argument, known: dict[Measured, Any]) -> Any:
    """Return the number or numbers an argument stands for, in float64. Errors: MethodError if it is noise."""
    if isinstance(argument, Derived):
        return argument.function(*(resolve(a, known) for a in argument.arguments))
    if isinstance(argument, (Sum, Count, KthLargest, Gram)):
        return known[argument]
    if isinstance(argument, (Noise, Bernoulli)):
        raise MethodError(f"{argument} has a value for each element; it cannot be an argument of a derived fact.")
    return argument
