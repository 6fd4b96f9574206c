"""Task vectors as values: sums of differences between models, computed only when needed."""

from __future__ import annotations

import itertools
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from alnico.checkpoint.memory_model import is_torch_module, is_torch_tensor
from alnico.checkpoint.open_model import MODEL_TYPES
from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.engine.fetch import fetch_inputs
from alnico.engine.measure_plan import inner_products
from alnico.engine.relatedness import IN_PYTHON
from alnico.engine.run import MergeResult, run_plan
from alnico.errors import AlnicoError, ModelError, visible
from alnico.events import Watcher
from alnico.models.open_models import check_module, fill, merge_open_models, open_models, path_of
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import bytes_of
from alnico.recipe.from_options import dtype_name
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@dataclass(frozen=True, eq=False)
class Operand:
    """A model in a sum: equal paths lead to one ``place``, equal models in memory are one object.

    The id of an object is not stored for this: it is meaningless in a copy or in another process.
    """

    value: Any = field(repr=False)
    place: str | None
    """Where the path led when it was passed; None for a model in memory."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operand):
            return NotImplemented
        return self.value is other.value if self.place is None else self.place == other.place

    def __hash__(self) -> int:
        return hash(id(self.value) if self.place is None else self.place)

    @property
    def name(self) -> str:
        """The name in ``repr``: the path, or the type of the object."""
        return visible(str(path_of(self.value)) if self.place is not None else type(self.value).__name__)

    def path(self) -> str | None:
        """Return the path as it was passed, if it still leads to the same place; otherwise the place.

        None for a model in memory.
        """
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
    """Return a model as an operand. Errors: ModelError for a value that is not a model."""
    if not is_model(value):
        raise ModelError(
            f"{'the model' if _is_array(value) else repr(value)} is of type {type(value).__name__}; expected "
            "the path or hub id of a model, a dict of tensors or an nn.Module."
        )
    path = path_of(value)
    return Operand(value, None if path is None else _place(path))


class TaskVector:
    """What fine-tuning added: ``finetuned - base``, and sums of such differences.

    ``finetuned`` and ``base`` are paths, hub ids, results of :func:`alnico.open_model`, dicts of tensors or
    modules. Nothing is read: a task vector is a list of terms ``coefficient x (model - base)``, in which
    equal differences are combined. Task vectors can be added, subtracted, negated, and multiplied or divided
    by numbers. ``tau.on(model)`` puts a task vector on a model: the result is a :class:`LazyModel`.

    ``model + tau`` means the same where the model's class leaves ``+`` to its right side. ``nn.Sequential``
    and ``nn.ModuleList`` do not: their ``+`` joins lists of modules.

    >>> import numpy as np
    >>> base, tuned = {"w": np.float32([1, 2])}, {"w": np.float32([4, 6])}
    >>> tau = TaskVector(tuned, base)
    >>> tau.norm()
    5.0
    >>> (0.5 * tau).on(base).state_dict()
    {'w': array([2.5, 4. ], dtype=float32)}
    """

    __array_priority__ = (
        1000.0  # numpy leaves `array * tau` to this class, which takes a number and refuses more
    )

    def __init__(self, finetuned: Any, base: Any) -> None:
        self._terms: dict[tuple[Operand, Operand], float] = {(operand(finetuned), operand(base)): 1.0}

    @classmethod
    def _of(cls, terms: dict[tuple[Operand, Operand], float]) -> TaskVector:
        vector = cls.__new__(cls)
        vector._terms = terms
        return vector

    @property
    def terms(self) -> tuple[tuple[float, Operand, Operand], ...]:
        """The terms (coefficient, model, base), in the order in which they were added."""
        return tuple((c, model, base) for (model, base), c in self._terms.items())

    def on(self, model: Any) -> LazyModel:
        """Put the task vector on a model: ``model + tau``, for every kind of model.

        ``model`` is a path, a hub id, a result of :func:`alnico.open_model`, a dict of tensors, a module or a
        :class:`LazyModel`. Nothing is read.

        Errors: ModelError for a value that is not a model.
        """
        return model + self if isinstance(model, LazyModel) else LazyModel(model, self)

    @ieee_arithmetic()
    def __add__(self, other: Any) -> Any:
        if isinstance(other, TaskVector):
            terms = dict(self._terms)
            for pair, c in other._terms.items():
                terms[pair] = terms.get(pair, 0.0) + c
            if not all(map(math.isfinite, terms.values())):
                raise AlnicoError(
                    "the sum of two task vectors has a coefficient beyond float64; expected finite "
                    "coefficients. Multiply by smaller numbers."
                )
            return self._of(terms)
        if isinstance(other, numbers.Real) and other == 0:
            return self  # the start value of sum()
        return self.on(other) if is_model(other) or _is_array(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __iter__(self) -> NoReturn:
        """Refuse: ``nn.ModuleList + tau`` iterates over its right side."""
        raise TypeError(
            "a task vector is not a sequence; expected a list of modules, or of numbers. To put a task vector "
            "on a model, write tau.on(model)."
        )

    def __neg__(self) -> TaskVector:
        return self * -1.0

    @ieee_arithmetic()
    def __mul__(self, factor: Any) -> TaskVector:
        if not isinstance(factor, numbers.Real) and not _is_array(factor):
            return NotImplemented
        number = _as_float(factor)
        terms = {pair: c * number for pair, c in self._terms.items()}
        if not all(map(math.isfinite, terms.values())):
            raise AlnicoError(
                f"a task vector is multiplied by {number:g}; expected a finite factor and finite "
                "coefficients."
            )
        return self._of(terms)

    __rmul__ = __mul__

    @ieee_arithmetic()
    def __truediv__(self, divisor: Any) -> TaskVector:
        if not isinstance(divisor, numbers.Real) and not _is_array(divisor):
            return NotImplemented
        number = _as_float(divisor)
        if number == 0:
            raise AlnicoError("a task vector is divided by 0; expected another number.")
        return self * (1.0 / number)

    @ieee_arithmetic()
    def norm(self) -> float:
        """Return the length over all float tensors, from float64 sums.

        Errors: NonFiniteError with tensor and index of a NaN or an infinity; AlnicoError for a length beyond
        float64.
        """
        ((product,),), (exponent,) = _vector_products([self])
        try:
            return math.ldexp(math.sqrt(max(product, 0.0)), exponent)
        except OverflowError:
            raise AlnicoError(
                f"{self!r} is longer than float64 can hold; expected a finite length. Multiply it by a "
                "smaller number."
            ) from None

    @ieee_arithmetic()
    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle to another task vector, from float64 sums.

        Errors: AlnicoError if one of them is 0; NonFiniteError with tensor and index of a NaN or an infinity.
        """
        ((own, product), (_, others)), _ = _vector_products([self, other])
        if own <= 0 or others <= 0:
            raise AlnicoError(
                f"{self if own <= 0 else other!r} is 0 in every tensor; a cosine needs two directions."
            )
        return product / math.sqrt(own) / math.sqrt(others)

    def __repr__(self) -> str:
        return f"<task vector {_format_terms(self)}>"


class LazyModel:
    """A model plus task vectors, ``base + sum_j c_j (model_j - base_j)``, computed only when needed.

    ``task_arithmetic`` merges it in one pass, as ``base + sum_j c_j ((model_j - base) - (base_j - base))``;
    the difference of the base to itself is left out. So the bits are those of the recipe that :attr:`recipe`
    shows. The two differences of a pair round alike: where a model equals the base that it was tuned from,
    the pair adds exactly 0, and where all pairs do, the result has the base's bits.

    Computing each pair's difference directly would be closer to the float64 result, but needs a method that
    no recipe has. Mean distances, measured in float32, in units in the last place of the largest model: 0.25
    with one base, which is one rounding; 0.39 with a pair from an unrelated base, 0.27 from a related one
    (pair by pair 0.18 and 0.22; with a weighted sum of all models, ``linear`` without ``normalize``, 0.27 and
    0.30, and it does not keep the base's bits where nothing changes). With 16 bits, the rounding of the
    output hides all of this.

    Config, tokenizer and buffers come from the base. ``+`` and ``-`` accept more task vectors. Inputs are
    never changed. Computing refuses models that were not tuned from one base, unless it gets
    ``unrelated="allow"``.
    """

    __array_priority__ = 1000.0  # as of a task vector

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
        """The recipe of the model, with generated names for models in memory."""
        return self._recipe_and_models()[0]

    @property
    def models(self) -> tuple[Any, ...]:
        """The models that it is computed from, the base first."""
        return tuple(self._recipe_and_models()[1].values())

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

        Arguments are those of :func:`alnico.merge`; ``dtype`` is the output's, by default the promotion of
        the models' dtypes. An interrupted merge with models in memory starts again from the beginning.
        Errors: all of ``alnico.errors``.
        """
        run = RunOptions.of(memory=memory, threads=threads, watch=watch)
        recipe, models = self._recipe_and_models(dtype, unrelated)
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
            must_restart = restart or any(path_of(model) is None for model in models.values())
            return run_plan(
                plan, target, overwrite=may_replace, restart=must_restart, watch=watch, caller=IN_PYTHON
            )
        finally:
            opened.close()

    @ieee_arithmetic()
    def state_dict(
        self, *, dtype: Any = None, unrelated: str = "error", threads: int | None = None
    ) -> dict[str, Any]:
        """Return the tensors: numpy arrays if all models are dicts of them, otherwise torch tensors."""
        recipe, models = self._recipe_and_models(dtype, unrelated)
        return merge_open_models(open_models(models), recipe, RunOptions.of(threads=threads))

    @ieee_arithmetic()
    def apply(self, module: Any, *, unrelated: str = "error", threads: int | None = None) -> Any:
        """Put the tensors into a module, in place, and return it.

        Errors: AlnicoError for a module that is an input of the model; MismatchError if its names or shapes
        differ.
        """
        check_module(module, "the module to fill")
        if any(value is module for value in self._recipe_and_models()[1].values()):
            raise AlnicoError(
                "the module to fill is an input of the model, and inputs are never changed. Fill a copy."
            )
        fill(module, self.state_dict(unrelated=unrelated, threads=threads))
        return module

    def _recipe_and_models(
        self, dtype: Any = None, unrelated: str = "error"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the recipe, and the models by their references in it."""
        names, models = _name_models([self._base, *_operands([self._tau])])
        entries = []
        for coefficient, model, base in self._tau.terms:
            entries += [(model, coefficient), (base, -coefficient)]
        entries = [(model, weight) for model, weight in entries if model != self._base]
        recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": names[self._base]}
        recipe["models"] = [
            {"model": names[model], "parameters": {"weight": weight}} for model, weight in entries
        ]
        if not entries:
            recipe = {"merge_method": "passthrough", "models": [names[self._base]]}
        if unrelated != "error":
            recipe["unrelated"] = unrelated
        if dtype is not None:
            recipe["dtype"] = dtype_name(dtype)
        return recipe, models

    def __repr__(self) -> str:
        return f"<model {self._base.name} + {_format_terms(self._tau)}>"


def _is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) or is_torch_tensor(value)


def _as_float(number: Any) -> float:
    """Return a real number, or an array of one, as float; infinity for a whole number beyond float64.

    Errors: AlnicoError for an array of several numbers or of other values, and for a tensor that needs its
    gradient.
    """
    if _is_array(number):
        kind = type(number).__name__
        if tuple(number.shape) != ():
            raise AlnicoError(
                f"a task vector is multiplied or divided by a value of type {kind} and shape {tuple(number.shape)}; "
                "expected one number. Multiply each task vector by its number, and add them up with sum()."
            )
        if getattr(number, "requires_grad", False):
            raise AlnicoError(
                f"a task vector is multiplied or divided by a {kind} that needs its gradient, which does not pass "
                "through a merge; expected a number. Pass its .item(), or learn coefficients with "
                "alnico.adamerge."
            )
        number = number.item()
        if not isinstance(number, numbers.Real):
            raise AlnicoError(
                f"a task vector is multiplied or divided by {number!r} of type {type(number).__name__}; expected a real "
                "number."
            )
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _operands(vectors: Sequence[TaskVector]) -> list[Operand]:
    return [side for vector in vectors for _, model, base in vector.terms for side in (model, base)]


def _name_models(operands: Sequence[Operand]) -> tuple[dict[Operand, str], dict[str, Any]]:
    """Return the references for a recipe, and the models by reference.

    Paths are their own reference; each model in memory gets a generated one.
    """
    distinct = list(dict.fromkeys(operands))
    names = {model: path for model in distinct if (path := model.path()) is not None}
    used, numbers = set(names.values()), itertools.count(1)
    for model in distinct:
        if model not in names:
            # A path may have this name, too.
            names[model] = next(
                name for name in (f"{model.name} {number}" for number in numbers) if name not in used
            )
    names = {model: names[model] for model in distinct}
    return names, {
        name: name if isinstance(model.value, (str, os.PathLike)) else model.value
        for model, name in names.items()
    }


def _vector_products(vectors: Sequence[TaskVector]) -> tuple[list[list[float]], list[int]]:
    """Return inner products of task vectors, divided by powers of 2, and the exponents of each one's power.

    The powers keep products of very large and very small coefficients from overflowing or vanishing, and
    change no bits of others. The coefficients of the models in a task vector sum to 0, so the differences may
    be taken from any one model: here from the first base. One pass gives the float64 inner products of these
    differences, and those of the task vectors are computed from them.
    """
    origin = vectors[0].terms[0][2]
    names, models = _name_models([origin, *_operands(vectors)])
    others = [model for model in names if model != origin]
    if not others:
        return [[0.0] * len(vectors) for _ in vectors], [0] * len(vectors)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": names[origin],
        "models": [{"model": names[model], "parameters": {"weight": 0.5}} for model in others],
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
            for side, sign in ((model, 1.0), (base, -1.0)):
                if side in row:
                    row[side] += sign * coefficient
        largest = max(map(abs, row.values()))
        if not math.isfinite(largest):
            raise AlnicoError(
                f"{vector!r}: its coefficients add up to more than float64 can hold; expected finite sums. "
                "Multiply by smaller numbers."
            )
        exponents.append(math.frexp(largest)[1])
        rows.append(np.ldexp(list(row.values()), -exponents[-1]))
    return [[float(a @ products @ b) for b in rows] for a in rows], exponents


def _format_terms(vector: TaskVector) -> str:
    parts = []
    for i, (coefficient, model, base) in enumerate(vector.terms):
        sign = ("-" if coefficient < 0 else "") if i == 0 else (" - " if coefficient < 0 else " + ")
        size = abs(coefficient)
        parts.append(f"{sign}{'' if size == 1 else f'{size:g} x '}({model.name} - {base.name})")
    return "".join(parts)
