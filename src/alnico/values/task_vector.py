"""Task vectors as values: sums of differences between models, computed only when they are asked for."""

from __future__ import annotations

import itertools
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.memory_model import is_torch_module
from alnico.checkpoint.open_model import MODEL_TYPES
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.engine.fetch import fetch_inputs
from alnico.engine.measure_plan import inner_products
from alnico.engine.relatedness import IN_PYTHON
from alnico.engine.run import MergeResult, run_plan
from alnico.errors import AlnicoError, ModelError, visible
from alnico.events import Watcher
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import bytes_of
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.values.merge import dtype_name
from alnico.values.models import check_module, fill, merged, open_models, path_of


@dataclass(frozen=True, eq=False)
class Operand:
    """A model in a sum. Two paths are equal if they lead to one ``place``, two models in memory if they are one object.

    Equality is not kept as a number: of what was copied or came from another process, ids mean nothing.
    """

    value: Any = field(repr=False)
    place: str | None
    """Where a path led when it was given; None for a model in memory."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operand):
            return NotImplemented
        return self.value is other.value if self.place is None else self.place == other.place

    def __hash__(self) -> int:
        return hash(id(self.value) if self.place is None else self.place)

    @property
    def name(self) -> str:
        """What it is called in ``repr``: the path, or what kind of thing it is."""
        return visible(str(path_of(self.value)) if self.place is not None else type(self.value).__name__)

    def path(self) -> str | None:
        """The path as it was given, if it still leads to the same place; else the place. None for a model in memory."""
        if self.place is None:
            return None
        path = str(path_of(self.value))
        return path if isinstance(self.value, MODEL_TYPES) or _place(path) == self.place else self.place


def _place(path: str) -> str:
    there = Path(os.path.expanduser(path))
    return os.path.realpath(there) if there.exists() else path


def is_model(value: object) -> bool:
    return isinstance(value, (str, os.PathLike, Mapping, *MODEL_TYPES)) or is_torch_module(value)


def operand(value: Any) -> Operand:
    """Errors: ModelError for what stands for no model."""
    if not is_model(value):
        raise ModelError(
            f"{value!r} is of type {type(value).__name__}; expected the path or hub id of a model, a dict of tensors or an nn.Module."
        )
    path = path_of(value)
    return Operand(value, None if path is None else _place(path))


class TaskVector:
    """What fine-tuning added: ``finetuned - base``, and sums of such differences.

    ``finetuned`` and ``base`` are paths, hub ids, what :func:`alnico.open_model` gives, dicts of tensors, or modules. Nothing is
    read: a task vector is a list of terms ``coefficient x (model - base)``, in which equal differences are one. Task vectors
    are added, subtracted, negated, multiplied and divided by numbers; a model plus a task vector is a :class:`LazyModel`.

    >>> import numpy as np
    >>> base, tuned = {"w": np.float32([1, 2])}, {"w": np.float32([4, 6])}
    >>> tau = TaskVector(tuned, base)
    >>> tau.norm()
    5.0
    >>> (base + 0.5 * tau).state_dict()
    {'w': array([2.5, 4. ], dtype=float32)}
    """

    def __init__(self, finetuned: Any, base: Any) -> None:
        self._terms: dict[tuple[Operand, Operand], float] = {(operand(finetuned), operand(base)): 1.0}

    @classmethod
    def _of(cls, terms: dict[tuple[Operand, Operand], float]) -> TaskVector:
        made = cls.__new__(cls)
        made._terms = terms
        return made

    @property
    def terms(self) -> tuple[tuple[float, Operand, Operand], ...]:
        """The terms (coefficient, model, base) in the order in which they came."""
        return tuple((c, model, base) for (model, base), c in self._terms.items())

    @ieee_arithmetic()
    def __add__(self, other: Any) -> Any:
        if isinstance(other, TaskVector):
            terms = dict(self._terms)
            for pair, c in other._terms.items():
                terms[pair] = terms.get(pair, 0.0) + c
            if not all(map(math.isfinite, terms.values())):
                raise AlnicoError(
                    "the sum of two task vectors has a coefficient beyond float64; expected finite ones. Multiply by smaller numbers."
                )
            return self._of(terms)
        if isinstance(other, numbers.Real) and other == 0:
            return self  # where sum() begins
        return LazyModel(other, self) if is_model(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __neg__(self) -> TaskVector:
        return self * -1.0

    @ieee_arithmetic()
    def __mul__(self, factor: Any) -> TaskVector:
        if not isinstance(factor, numbers.Real):
            return NotImplemented
        found = {pair: c * _as_float(factor) for pair, c in self._terms.items()}
        if not all(map(math.isfinite, found.values())):
            raise AlnicoError(
                f"a task vector times {_as_float(factor):g}; expected a finite number, and finite coefficients."
            )
        return self._of(found)

    __rmul__ = __mul__

    @ieee_arithmetic()
    def __truediv__(self, divisor: Any) -> TaskVector:
        if not isinstance(divisor, numbers.Real):
            return NotImplemented
        if divisor == 0:
            raise AlnicoError("a task vector divided by 0; expected another number.")
        return self * (1.0 / _as_float(divisor))

    @ieee_arithmetic()
    def norm(self) -> float:
        """Return the length over all float tensors, from float64 sums. Errors: NonFiniteError naming tensor and index of a NaN or infinity."""
        ((product,),), (exponent,) = _products([self])
        try:
            return math.ldexp(math.sqrt(max(product, 0.0)), exponent)
        except OverflowError:
            raise AlnicoError(
                f"{self!r} is longer than float64 holds; expected a finite length. Multiply it by less."
            ) from None

    @ieee_arithmetic()
    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle to another task vector, from float64 sums.

        Errors: AlnicoError if one is 0; NonFiniteError naming tensor and index of a NaN or an infinity.
        """
        ((one, both), (_, two)), _ = _products([self, other])
        if one <= 0 or two <= 0:
            raise AlnicoError(
                f"{self if one <= 0 else other!r} is 0 in every tensor; a cosine needs two directions."
            )
        return both / math.sqrt(one) / math.sqrt(two)

    def __repr__(self) -> str:
        return f"<task vector {_written(self)}>"


class LazyModel:
    """A model plus task vectors, ``base + sum_j c_j (model_j - base_j)``, computed by :meth:`save` or :meth:`state_dict`.

    It is merged by ``task_arithmetic`` in one pass, from the base to which is added: ``base + sum_j c_j ((model_j - base) -
    (base_j - base))``, where a difference from the base to itself is left out. So the bits are those of the recipe that
    :attr:`recipe` shows. Both sides of a pair lose the same in their differences from the base: where a model equals the
    base that it was tuned from, the pair adds exactly 0, and where all pairs do, the base's bits are kept.

    Differences taken pair by pair would lie nearer to the float64 result, but need a method that no recipe names. Measured
    in float32, mean distances in units in the last place of the largest model: with one base 0.25, which is one rounding;
    with a pair from an unrelated base 0.39, from a related one 0.27 (pair by pair 0.18 and 0.22; a weighted sum of all
    models, ``linear`` without ``normalize``, 0.27 and 0.30, and it keeps no bits where nothing changes). In 16 bits the
    output's rounding hides all of it.

    Config, tokenizer and buffers come from the base. ``+`` and ``-`` take more task vectors. Inputs are never changed.
    Models that were not tuned from one base are refused when it is computed, unless ``unrelated="allow"`` is passed there.
    """

    def __init__(self, base: Any, tau: TaskVector) -> None:
        self._base = operand(base)
        self._tau = tau

    def __add__(self, tau: Any) -> Any:
        return LazyModel(self._base.value, self._tau + tau) if isinstance(tau, TaskVector) else NotImplemented

    __radd__ = __add__

    def __sub__(self, tau: Any) -> Any:
        return self + -tau if isinstance(tau, TaskVector) else NotImplemented

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that makes the model; models in memory have a made-up name in it."""
        return self._made()[0]

    @ieee_arithmetic()
    def save(
        self,
        out: str | os.PathLike[str],
        *,
        dtype: Any = None,
        unrelated: str = "error",
        memory: Size = DEFAULT_BUDGET_BYTES,
        threads: int | None = None,
        max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
        overwrite: bool = False,
        overwrite_anything: bool = False,
        restart: bool = False,
        watch: Watcher | None = None,
    ) -> MergeResult:
        """Write the model into a directory, or into one file if the name ends in ``.safetensors``.

        Arguments as for :func:`alnico.merge`; ``dtype`` is the output's, by default the promotion of the models'. With models
        in memory an interrupted merge begins anew. Errors: all of ``alnico.errors``.
        """
        run = RunOptions.of(memory=memory, threads=threads, watch=watch)
        recipe, models = self._made(dtype, unrelated)
        target = Path(out)
        check_publishable(target)
        may_replace = replace_mode(overwrite, overwrite_anything)
        opened = open_models(models)
        try:
            plan = opened.plan(
                recipe,
                run=run,
                max_shard_bytes=bytes_of(max_shard_size),
                single_file=target.name if target.suffix == ".safetensors" else None,
            )
            fetch_inputs(plan, target, overwrite=may_replace, watch=watch)
            anew = restart or any(path_of(model) is None for model in models.values())
            return run_plan(plan, target, overwrite=may_replace, restart=anew, watch=watch, caller=IN_PYTHON)
        finally:
            opened.close()

    @ieee_arithmetic()
    def state_dict(
        self, *, dtype: Any = None, unrelated: str = "error", threads: int | None = None
    ) -> dict[str, Any]:
        """Return the tensors: numpy arrays if all models are dicts of them, else torch tensors on the CPU."""
        recipe, models = self._made(dtype, unrelated)
        return merged(open_models(models), recipe, RunOptions.of(threads=threads))

    @ieee_arithmetic()
    def apply(self, module: Any, *, unrelated: str = "error", threads: int | None = None) -> Any:
        """Put the tensors into a module, in place, and return it.

        Errors: AlnicoError for a module that the model is computed from; MismatchError if its names or shapes differ.
        """
        check_module(module, "the module to fill")
        if any(value is module for value in self._made()[1].values()):
            raise AlnicoError(
                "the module to fill is one that the model is computed from, and those are never changed. Fill a copy."
            )
        fill(module, self.state_dict(unrelated=unrelated, threads=threads))
        return module

    def _made(self, dtype: Any = None, unrelated: str = "error") -> tuple[dict[str, Any], dict[str, Any]]:
        """The recipe, and the models by the references in it."""
        names, models = _named([self._base, *_operands([self._tau])])
        entries = []
        for coefficient, model, base in self._tau.terms:
            entries += [(model, coefficient), (base, -coefficient)]
        entries = [(one, weight) for one, weight in entries if one != self._base]
        recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": names[self._base]}
        recipe["models"] = [
            {"model": names[one], "parameters": {"weight": weight}} for one, weight in entries
        ]
        if not entries:
            recipe = {"merge_method": "passthrough", "models": [names[self._base]]}
        if unrelated != "error":
            recipe["unrelated"] = unrelated
        if dtype is not None:
            recipe["dtype"] = dtype_name(dtype)
        return recipe, models

    def __repr__(self) -> str:
        return f"<model {self._base.name} + {_written(self._tau)}>"


def _as_float(number: Any) -> float:
    """A real number as float: infinite where it is a whole number of hundreds of digits."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _operands(vectors: Sequence[TaskVector]) -> list[Operand]:
    return [one for vector in vectors for _, model, base in vector.terms for one in (model, base)]


def _named(operands: Sequence[Operand]) -> tuple[dict[Operand, str], dict[str, Any]]:
    """References for a recipe: paths as they are, a made-up name for each model in memory; and the models by reference."""
    distinct = list(dict.fromkeys(operands))
    names = {one: path for one in distinct if (path := one.path()) is not None}
    taken, numbers = set(names.values()), itertools.count(1)
    for one in distinct:
        if one not in names:
            # A path may be called like this, too.
            names[one] = next(
                name for name in (f"{one.name} {number}" for number in numbers) if name not in taken
            )
    names = {one: names[one] for one in distinct}
    return names, {
        name: name if isinstance(one.value, (str, os.PathLike)) else one.value for one, name in names.items()
    }


def _products(vectors: Sequence[TaskVector]) -> tuple[list[list[float]], list[int]]:
    """Inner products in float64 of task vectors, each divided by a power of 2, and the exponents of these.

    So the products of very large and very small coefficients neither overflow nor vanish, and all others keep their bits.

    The coefficients of the models in a task vector sum to 0, so it is the same sum over differences from any one model; the
    first base serves. One pass gives the products of these differences, and those of the task vectors follow.
    """
    origin = vectors[0].terms[0][2]
    names, models = _named([origin, *_operands(vectors)])
    others = [one for one in names if one != origin]
    if not others:
        return [[0.0] * len(vectors) for _ in vectors], [0] * len(vectors)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": names[origin],
        "models": [{"model": names[one], "parameters": {"weight": 0.5}} for one in others],
        "dtype": "float64",
    }
    opened = open_models(models)
    try:
        products = inner_products(opened.plan(recipe))
    finally:
        opened.close()
    rows, exponents = [], []
    for vector in vectors:
        row = dict.fromkeys(others, 0.0)
        for coefficient, model, base in vector.terms:
            for one, sign in ((model, 1.0), (base, -1.0)):
                if one in row:
                    row[one] += sign * coefficient
        largest = max(map(abs, row.values()))
        if not math.isfinite(largest):
            raise AlnicoError(
                f"{vector!r}: its coefficients add up to more than float64 holds; expected finite sums. Multiply by less."
            )
        exponents.append(math.frexp(largest)[1])
        rows.append(np.ldexp(list(row.values()), -exponents[-1]))
    return [[float(a @ products @ b) for b in rows] for a in rows], exponents


def _written(vector: TaskVector) -> str:
    parts = []
    for i, (coefficient, model, base) in enumerate(vector.terms):
        sign = ("-" if coefficient < 0 else "") if i == 0 else (" - " if coefficient < 0 else " + ")
        size = abs(coefficient)
        parts.append(f"{sign}{'' if size == 1 else f'{size:g} x '}({model.name} - {base.name})")
    return "".join(parts)
