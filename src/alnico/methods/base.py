"""Defines what a merge method is, registers methods and derives their options from signatures.

A method is a factory: options in, a :class:`Merge` out. A ``Merge`` is the equation of one parameter
(``mix``) and what ``mix`` receives after the values. The engine does everything else: a method knows no file,
dtype, device or name.

>>> @method(space="weight", models=(2, 2), source="an example")
... def midpoint() -> Merge:
...     '''Take the middle of two models.'''
...     def mix(value):
...         return (value[0] + value[1]) / 2
...     return Merge(mix, fixes_equal_inputs=True)
>>> midpoint.name, midpoint.bind({}, 2).fixes_equal_inputs
('midpoint', True)
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from alnico.errors import MethodError
from alnico.kernels.facts import (
    Argument,
    Bernoulli,
    Derived,
    Gram,
    KthLargest,
    MeasuredFact,
    Recorded,
    Side,
    levels,
    of_model,
)
from alnico.kernels.scalar_source import check_pure
from alnico.kernels.template import Real
from alnico.methods.shared.other_words import METHOD_SYNONYMS
from alnico.notebook import ResultTable, names_text, never_fails, result_html, result_line
from alnico.numerics.arrays import AnyArray
from alnico.numerics.low_rank import Decomposed
from alnico.numerics.numbers import quote_value

T = TypeVar("T")


class PerModel(tuple[T, ...]):
    """An option with one value for each model that is merged; see :func:`each` for its default."""


def each(value: T) -> PerModel[T]:
    """The default of a per-model option: ``value`` for every model."""
    return PerModel((value,))


@dataclass(frozen=True)
class Between:
    """The range of a number, with ``low`` and ``high``; ``without_low`` excludes ``low``.

    ``low_in_places``: an excluded ``low`` is allowed for some of the tensors, in a gradient or under a
    filter.
    """

    low: float = -float("inf")
    high: float = float("inf")
    without_low: bool = False
    low_in_places: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.without_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if self.low == -float("inf") and self.high == float("inf"):
            return "any number"
        return f"{'(' if self.without_low else '['}{self.low:g}, {self.high:g}]"


Proportion = Annotated[float, Between(0, 1)]
"""A share of a whole, in [0, 1]."""

Share = Annotated[float, Between(0, 1, without_low=True)]
"""A share of a whole, in (0, 1]."""

KeptShare = Annotated[float, Between(0, 1, without_low=True, low_in_places=True)]
"""The share of a tensor's entries that is kept, in (0, 1]. 0 is allowed for some tensors, which then keep no
entry."""

Statistics = NewType("Statistics", str)
"""The path of statistics that `alnico statistics` wrote. The option has the name of their kind, and one value
per model."""

MethodSpace = Literal["weight", "delta"]
BaseUse = Literal["required", "optional", "unused", "first"]
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option of a method, derived from its signature."""

    name: str
    kind: Literal["number", "bool", "choice", "statistics"]
    per_model: bool
    default: Any
    range: Between = Between()
    choices: tuple[str, ...] = ()
    meaning: str = ""
    """The first clause of its text in the docstring."""
    is_whole: bool = False
    """Whether only whole numbers are allowed."""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def problem(self, value: object, *, in_places: bool = False) -> str | None:
        """Return what is wrong with one value, as ``is X; expected Y``, or None.

        ``in_places``: the value applies to some of the tensors only.
        """
        if self.kind == "bool":
            is_truth = isinstance(value, (bool, int, float)) and value in (0, 1)
            return None if is_truth else f"is {value!r}; expected true or false"
        if self.kind == "statistics":
            is_path = isinstance(value, str) and bool(value.strip())
            return (
                None
                if is_path
                else f"is {value!r}; expected the directory that `alnico statistics {self.name}` wrote"
            )
        if self.kind == "choice":
            return (
                None if value in self.choices else f"is {value!r}; expected one of {', '.join(self.choices)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"is {quote_value(value)}; expected a number"
        try:
            value = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            value = math.inf if value > 0 else -math.inf
        if self.is_whole and not value.is_integer():
            return f"is {value:g}; expected a whole number in {self.range}"
        if math.isfinite(value) and (
            value in self.range or (in_places and self.range.low_in_places and value == self.range.low)
        ):
            return None
        if self.meaning:
            return f"is {value:g}; {self.name} is {self.meaning}"
        return f"is {value:g}; expected {self.range}"

    def describe(self) -> str:
        """The option's values and default, for lists of options."""
        number = f"a whole number in {self.range}" if self.is_whole else str(self.range)
        values = {
            "bool": "true or false",
            "choice": " | ".join(self.choices),
            "number": number,
            "statistics": "a path",
        }[self.kind]
        default = (
            "required"
            if self.required
            else f"default {_yaml(self.default[0] if self.per_model else self.default)}"
        )
        return f"{values}; {'one per model; ' if self.per_model else ''}{default}"


def _yaml(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


@dataclass(frozen=True)
class Merge:
    """How to compute one output tensor, with the options bound.

    ``mix(values, *arguments)`` is the equation of ONE parameter. ``values`` holds one number per model (the
    task-vector entries in delta space); ``arguments`` are numbers, numbers per model, facts, or noise. In
    delta space ``mix`` returns the number added to the base; where it is exactly 0 the base's bits are
    written.

    ``copies`` is the position of the model whose bytes are the result, "base" for the base's, or None.
    ``fixes_equal_inputs`` declares that an element on which all models agree keeps that value (weight space).
    ``sums_to_one`` returns, from the resolved arguments, whether the coefficients of this tensor sum to 1:
    then equal inputs are kept too, though the method does not promise it for every tensor. ``is_wide``
    computes in float64 for inputs of any dtype: for equations that float32 cannot resolve. ``otherwise``
    merges tensors that are missing in the statistics among the arguments.
    """

    mix: Callable[..., float]
    arguments: tuple[Argument, ...] = ()
    copies: int | Literal["base"] | None = None
    fixes_equal_inputs: bool = False
    sums_to_one: Callable[..., bool] | None = None
    is_wide: bool = False
    otherwise: Merge | None = None

    def __post_init__(self) -> None:
        check_pure(self.mix)
        parameters = len(inspect.signature(self.mix).parameters)
        if parameters != 1 + len(self.arguments):
            raise MethodError(
                f"{self.mix.__module__}: mix takes {parameters - 1} arguments after the values, "
                f"the Merge passes {len(self.arguments)}; they must match one to one."
            )

    def levels(self) -> list[list[MeasuredFact]]:
        """The facts of one tensor to measure, in order; each list takes one pass over its inputs."""
        return self._levels

    @functools.cached_property
    def _levels(self) -> list[list[MeasuredFact]]:
        # Needed for every tensor, and the same for all tensors that share the Merge.
        return levels(self.arguments)

    @functools.cached_property
    def of_model(self) -> tuple[KthLargest, ...]:
        """The facts that are measured over all tensors, before the first of them is merged."""
        return of_model(self.arguments)

    def check_numbers(self, real: Real) -> None:
        """Refuse numbers that the arithmetic of a tensor cannot hold, or whose sum it cannot hold.

        They would become infinity or 0. Errors: MethodError.
        """
        limits = np.finfo(real)
        least, most = float(limits.smallest_normal), float(limits.max)
        for argument in self.arguments:
            numbers = (argument,) if isinstance(argument, (int, float)) else argument
            if not isinstance(numbers, tuple):
                continue  # measured, or drawn
            wrong = next((v for v in numbers if v and not least <= abs(v) <= most), None)
            if wrong is None and sum(map(abs, numbers)) > most:
                wrong = sum(numbers)
            if wrong is not None:
                raise MethodError(
                    f"is computed in {real} with {wrong:g}; expected 0, or a magnitude from {least:.1e} to {most:.1e}, "
                    f"also for the sum of all weights. Choose {'a smaller' if abs(wrong) > 1 else 'a larger'} weight or scale."
                )

    @functools.cached_property
    def uses_ranks(self) -> bool:
        """Whether noise depends on the rank of an element in its row."""
        arguments = [
            *self.arguments,
            *(a for level in self._levels for f in level if not isinstance(f, Gram) for a in f.arguments),
        ]
        return any(isinstance(a, Bernoulli) and bool(a.spread) for a in arguments)


class MatrixReader(Protocol):
    """Reads the matrices of one output tensor, again, as new float64 arrays, on every call.

    They are numpy's, or torch's on a GPU for a method that ``runs_on_gpu``: see :mod:`alnico.numerics.arrays`."""

    models: int

    def value(self, model: int) -> AnyArray:
        """A model's matrix (rows, columns); in delta space its task vector."""
        ...

    def side(self, kind: str, model: int) -> AnyArray:
        """The entry for its matrix in the statistics that the option ``kind`` names for a model."""
        ...


class Matrices(MatrixReader, Protocol):
    """The matrices of one output tensor, and what is known of them."""

    shape: tuple[int, int]
    """Rows and columns of each matrix."""
    whole: tuple[int, int]
    """Rows and columns of what each stands for: ``shape``, or those of an adapter's update, if it is given in a basis."""
    is_transposed: bool
    """Whether the matrix is stored (inputs, outputs), as in GPT-2; else it is (outputs, inputs)."""

    def leading(self, model: int, count: int) -> Decomposed:
        """The leading singular vectors of :meth:`value`, at most ``count``, kept for later merges."""
        ...

    def kept(
        self, name: Hashable, models: Sequence[int], make: Callable[[], tuple[AnyArray, ...]]
    ) -> tuple[AnyArray, ...]:
        """Return what ``make`` computes from the matrices of ``models``, in their order, and nothing else.

        It is kept under ``name`` for later merges of the same matrices, such as other trials of a search. Nobody may change
        the arrays. On a GPU those of two dimensions are tensors there, and all others come back as numpy's.
        """
        ...

    def note(self, text: str, *values: int | float) -> None:
        """Say something about this matrix to the user: a clause without a name and a full stop.

        ``text`` has a ``{}`` for each of ``values``: models (int, by position), whose labels take its place, and numbers
        (float, as in ``{:.2f}``). Equal texts about the same models are one line for the user.
        """
        ...


@dataclass(frozen=True)
class MatrixMethod:
    """How to compute one output matrix, with the options bound, from whole matrices.

    ``make(matrices, *arguments)`` returns (rows, columns) float64; in delta space the matrix added to the
    base. It runs in one thread, and BLAS too. ``arguments`` are numbers, choices, numbers per model, and entries of
    statistics; ``sides`` are the kinds of statistics that it reads, each of which must have the tensor.
    ``numbers(rows, columns, models, *arguments)`` is the most float64 numbers it holds at once, including
    those it has read and its result; ``operations`` of the same arguments is its number of floating-point operations,
    to foretell the time. ``fixes_equal_inputs`` declares that equal matrices in all models give
    that matrix, and its bits are kept. ``otherwise`` merges tensors that are not matrices, or that the
    statistics lack. ``takes_tables``: tables of embeddings and token heads are matrices, too. ``takes_stacks``: so are
    convolution kernels, as (outputs, inputs x kernel), and stacks of matrices, one by one.
    ``parts(matrices, *arguments)``, if the result is a sum over models, returns each model's part of it.
    ``runs_on_gpu``: the functions compute with torch's tensors as with numpy's arrays, by what :mod:`alnico.numerics.arrays`
    says both have in common. Other methods get numpy's arrays on the processor, wherever the merge runs.
    ``vectors`` merges tensors of one dimension that the statistics of all models have; without it ``otherwise`` does.
    """

    make: Callable[..., AnyArray]
    numbers: Callable[..., int]
    otherwise: Merge
    arguments: tuple[Any, ...] = ()
    sides: tuple[str, ...] = ()
    fixes_equal_inputs: bool = False
    operations: Callable[..., float] | None = None
    takes_tables: bool = True
    takes_stacks: bool = False
    parts: Callable[..., list[AnyArray]] | None = None
    runs_on_gpu: bool = False
    vectors: Merge | None = None


@dataclass(frozen=True)
class Method:
    """A registered merge method."""

    name: str
    factory: Callable[..., Merge | MatrixMethod]
    space: MethodSpace
    base: BaseUse
    models: tuple[int, int | None]
    source: str
    options: Mapping[str, Option] = field(hash=False)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Values of options under a name; a per-model option has one value for all models, or one per model."""

    @property
    def is_own(self) -> bool:
        """Is the method one of alnico's?"""
        return (self.factory.__module__ or "").startswith(f"{__package__}.")

    @functools.cached_property
    def statistics(self) -> tuple[str, ...]:
        """The options that name statistics."""
        return tuple(o.name for o in self.options.values() if o.kind == "statistics")

    @property
    def summary(self) -> str:
        return self.documentation.partition("\n")[0]

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.factory) or ""

    def __repr__(self) -> str:
        return result_line(f"merge method {self.name}", self.summary)

    @never_fails
    def _repr_html_(self) -> str:
        least, most = self.models
        rows = [
            [
                o.name,
                "needed"
                if o.required
                else names_text(o.default)
                if isinstance(o.default, tuple)
                else o.default,
                o.per_model,
                o.describe(),
            ]
            for o in self.options.values()
        ]
        return result_html(
            f"Merge method {self.name}",
            self.summary,
            *([ResultTable(("option", "default", "per model", "values"), rows)] if rows else []),
            facts=[
                ("base", self.base),
                (
                    "models",
                    f"{least} or more" if most is None else least if most == least else f"{least} to {most}",
                ),
            ],
        )

    def bind(
        self, options: Mapping[str, Any], models: int, *, in_places: bool = False
    ) -> Merge | MatrixMethod:
        """Build the ``Merge`` for ``models`` values (non-base models in delta space).

        ``in_places``: the options apply to some of the tensors only.

        A per-model option takes one value, or a sequence with one per model. Errors: MethodError, naming the
        option, for unknown and missing options, values outside their range, or a wrong number of them.
        """
        self.check_models(models)
        for name in options:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise MethodError(
                    f"{self.name} has no option {name!r}; it has {', '.join(self.options) or 'none'}.{hint}"
                )
        bound: dict[str, Any] = {}
        for name, option in self.options.items():
            value = options.get(name, option.default)
            if value is REQUIRED:
                raise MethodError(f"{self.name} needs the option {name} ({option.describe()}).")
            if not option.per_model:
                values: tuple[Any, ...] = (value,)
            else:
                values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
                values *= models if len(values) == 1 else 1
                if len(values) != models:
                    raise MethodError(
                        f"{self.name}.{name} has {len(values)} values for {models} models; expected one for each."
                    )
            for item in values:
                if (problem := option.problem(item, in_places=in_places)) is not None:
                    raise MethodError(f"{self.name}.{name} {problem}.")
            if option.kind in ("number", "bool"):
                values = tuple((float if option.kind == "number" else bool)(item) for item in values)
            bound[name] = PerModel(values) if option.per_model else values[0]
        return self.factory(**bound)

    def known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``options`` that this method has, so that one set of options serves a loop over methods.

        ``weights``, as Python's functions call the option ``weight``, is returned if the method has that.

        >>> import alnico
        >>> alnico.methods()["slerp"].known({"t": 0.5, "density": 0.2, "weights": [1, 2]})
        {'t': 0.5}
        """
        return {n: v for n, v in options.items() if {"weights": "weight"}.get(n, n) in self.options}

    def check_models(self, models: int) -> None:
        """Refuse a number of models that the method does not take. Errors: MethodError."""
        low, high = self.models
        if models < low or (high is not None and models > high):
            expected = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            besides = " besides the base" if self.space == "delta" else ""
            raise MethodError(
                f"{self.name} merges {expected} model{'' if expected == '1' else 's'}{besides}; found {models}."
            )


def method(
    *,
    space: MethodSpace,
    source: str,
    base: BaseUse | None = None,
    models: tuple[int, int | None] = (1, None),
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., Merge | MatrixMethod]], Method]:
    """Register a factory as a merge method under its function's name.

    ``space`` "delta" gives ``mix`` task-vector entries (model - base), "weight" the parameters themselves.
    ``base``: "required", "optional" (delta space; without a base the values are the parameters themselves),
    "unused", or "first" (the base is the first of the values; weight space). ``models`` is the least and the
    greatest number of values (None: no limit). ``presets`` are named values of options, such as the paper's.
    A method that is made in a running process, such as a cell of a notebook, is known there by its name; a
    later method of this name takes its place.
    Errors: MethodError for a signature that is not a schema, a preset that does not fit it, or the name of a
    method of alnico.
    """

    def register(factory: Callable[..., Merge | MatrixMethod]) -> Method:
        options = {p.name: _option(p, factory) for p in inspect.signature(factory).parameters.values()}
        for preset, values in (presets or {}).items():
            _check_preset(f"{factory.__name__}: preset {preset}", values, options)
        role = base or ("required" if space == "delta" else "unused")
        made = Method(factory.__name__, factory, space, role, models, source, options, presets or {})
        if not made.is_own:
            _remember(made)
        return made

    return register


MADE_HERE: dict[str, Method] = {}
"""Methods by name that this process has made outside of this package. The only state that :func:`method` changes."""


def _remember(made: Method) -> None:
    """Make a method known by its name. Errors: MethodError for a name that recipes cannot hold, or that is taken."""
    if not made.name.isidentifier():
        raise MethodError(
            f"{made.name}: is no name for a merge method; expected a function written with def. Write one."
        )
    own = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    if made.name in own or made.name in METHOD_SYNONYMS:
        raise MethodError(
            f"{made.name} is the name of a method of alnico; expected another name, so that recipes keep their "
            "meaning. Rename the function."
        )
    MADE_HERE[made.name] = made


def _option(parameter: inspect.Parameter, factory: Callable[..., Merge | MatrixMethod]) -> Option:
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        raise MethodError(f"{factory.__name__}: option {parameter.name} must be keyword-only.")
    annotation = get_type_hints(factory, include_extras=True)[parameter.name]
    default = parameter.default
    per_model = get_origin(annotation) is PerModel
    if per_model:
        annotation = get_args(annotation)[0]
        if default is not REQUIRED and not isinstance(default, tuple):
            default = each(default)
    limits = Between()
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        limits = next((e for e in extras if isinstance(e, Between)), limits)
    meaning = _meaning(parameter.name, inspect.getdoc(factory) or "")
    if annotation is Statistics:
        if not per_model or default is not REQUIRED:
            raise MethodError(
                f"{factory.__name__}: option {parameter.name} names statistics; expected one per model, without a default."
            )
        return Option(parameter.name, "statistics", True, default, meaning=meaning)
    if annotation is bool:
        return Option(parameter.name, "bool", per_model, default, meaning=meaning)
    if get_origin(annotation) is Literal:
        return Option(
            parameter.name, "choice", per_model, default, choices=get_args(annotation), meaning=meaning
        )
    if annotation in (float, int):
        return Option(
            parameter.name, "number", per_model, default, limits, meaning=meaning, is_whole=annotation is int
        )
    raise MethodError(
        f"{factory.__name__}: option {parameter.name} has the type {annotation}; expected float, bool, Literal or Statistics."
    )


def _check_preset(where: str, values: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    for name, value in values.items():
        if name not in options:
            raise MethodError(
                f"{where} sets {name!r}; expected an option of the method ({', '.join(options) or 'none'})."
            )
        each_value = value if isinstance(value, tuple) and options[name].per_model else (value,)
        for item in each_value:
            if (problem := options[name].problem(item)) is not None:
                raise MethodError(f"{where}: {name} {problem}.")


def _meaning(name: str, documentation: str) -> str:
    """The first clause of an option's text in a docstring; "" without one."""
    text = re.search(rf"^    {name}: (.+(?:\n {{8}}.+)*)", documentation, re.MULTILINE)
    clause = re.match(r"(.+?)(?:[;.:]\s|[;.]?$)", " ".join(text[1].split())) if text else None
    return clause[1] if clause else ""


def combine(coefficients: Argument, **declarations: Any) -> Merge:
    """Sum ``coefficient[i] * value[i]`` in the order of the models: the ``Merge`` of the linear class."""

    def mix(value, coefficient):
        total = 0.0
        for i in range(len(value)):
            total += coefficient[i] * value[i]
        return total

    return Merge(mix, (coefficients,), sums_to_one=_sums_to_one, **declarations)


def _sums_to_one(coefficients: Any) -> bool:
    return bool(np.all(np.abs(np.sum(coefficients, axis=0) - 1.0) < 1e-9))


def total_weight(weight: Sequence[float], of: str = "", instead: str = "") -> float:
    """Sum the weights. Errors: MethodError if it is 0, or beyond float64; ``instead`` ends the advice."""
    total = sum(weight)
    if not math.isfinite(sum(map(abs, weight))):
        raise MethodError(
            f"the weights{of} ({', '.join(f'{w:g}' for w in weight)}) add up to more than float64 holds; expected a finite sum. "
            "Divide all of them by one number."
        )
    if abs(total) <= 1e-12 * sum(map(abs, weight)):
        raise MethodError(
            f"the weights{of} sum to 0 ({', '.join(f'{w:g}' for w in weight)}), so they cannot be normalised; "
            f"expected a sum other than 0. Change a weight{instead}."
        )
    return total


FARTHEST = 1e6
"""The largest distance of a place beyond the ends of an arc: farther out, its sines and the straight line are
rounding."""


def place_on_arc(t: float) -> float:
    """Return a place on an arc. Errors: MethodError for one too far out to compute."""
    if not abs(t) <= FARTHEST:
        raise MethodError(
            f"the place on the arc (t) is {t:g}; expected at most {FARTHEST:g} in size, as 0 and 1 are its ends."
        )
    return t


__all__ = [
    "Argument",
    "Between",
    "Derived",
    "KeptShare",
    "Matrices",
    "MatrixMethod",
    "MatrixReader",
    "Merge",
    "Method",
    "Option",
    "PerModel",
    "Recorded",
    "Share",
    "Side",
    "Statistics",
    "combine",
    "each",
    "method",
    "place_on_arc",
    "total_weight",
]  # fmt: skip
