"""Task vectors as values: sums of differences between models, computed only when needed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import numpy as np

from alnico.checkpoint.output_path import check_publishable, replace_mode
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES
from alnico.devices import DEFAULT_DEVICE
from alnico.engine.fetch import fetch_inputs
from alnico.engine.measure_plan import inner_products
from alnico.engine.relatedness import IN_PYTHON
from alnico.engine.run import MergeResult, run_plan
from alnico.errors import AlnicoError, RecipeError
from alnico.events import Watcher
from alnico.models.open_models import check_module, fill, merge_open_models, open_models, path_of
from alnico.notebook import ResultTable, never_fails, result_html
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.numbers import finite_number
from alnico.numerics.sizes import bytes_of
from alnico.plan.job import Job
from alnico.recipe.from_options import dtype_name
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size
from alnico.values.compression import Compression, Kept, StoredTables, compress_task_vector
from alnico.values.differences import Differences, layer_of, open_operands
from alnico.values.operands import (
    NOTHING,
    Operand,
    as_float,
    is_array,
    is_model,
    name_models,
    operand,
    stored_operand,
)
from alnico.values.task_vector_output import write_task_vector
from alnico.values.words import in_words_of_python

NormPer = Literal["layer", "tensor"]
MISSING = ("error", "copy", "drop")


class TaskVector:
    """What fine-tuning added: ``finetuned - base``, and sums of such differences.

    ``finetuned`` and ``base`` are paths, hub ids, results of :func:`alnico.open_model`, dicts of tensors,
    modules or lazy models. Nothing is read: a task vector is a list of terms ``coefficient x (model - base)``, in which
    equal differences are combined. Task vectors can be added, subtracted, negated, and multiplied or divided
    by numbers. ``tau.on(model)`` puts a task vector on a model: the result is a :class:`LazyModel`.

    The tensors of a task vector are computed when they are asked for: ``tau["fc1.weight"]``,
    ``tau.state_dict()``, ``dict(tau)``; ``for name in tau`` gives their names. They are float32, or float64
    where a model is, each summed in float64 and rounded once. ``tau.save(path)`` writes them, and
    ``TaskVector.load(path)`` reads them back; ``tau.compress(path, rank=0.125)`` writes less. Tensors of integers are not part of a task vector. A task
    vector is no model, although it has ``state_dict()``: a function that takes models needs ``tau.on(base)``.

    Options:
        missing: What to do with tensors that some models lack: error, copy (they have no difference, and a
            model keeps its own) or drop (the result lacks them, too).

    ``model + tau`` means the same where the model's class leaves ``+`` to its right side. ``nn.Sequential``
    and ``nn.ModuleList`` do not: their ``+`` joins lists of modules.

    >>> import numpy as np
    >>> base, tuned = {"w": np.float32([1, 2])}, {"w": np.float32([4, 6])}
    >>> tau = TaskVector(tuned, base)
    >>> tau.norm()
    5.0
    >>> (0.5 * tau).on(base).state_dict()
    {'w': array([2.5, 4. ], dtype=float32)}
    >>> tau["w"], list(tau)
    (array([3., 4.], dtype=float32), ['w'])
    """

    # numpy leaves `array * tau` to this class, which takes a number and refuses more
    __array_priority__ = 1000.0
    __array_ufunc__ = None

    def __init__(self, finetuned: Any, base: Any, *, missing: str | None = None) -> None:
        if isinstance(finetuned, TaskVector):
            finetuned = finetuned.on(base)  # as everywhere a task vector is passed for a model
        model, added = _split(finetuned, "finetuned")
        origin, added_to_base = _split(base, "base")
        terms = {} if model == origin and (added or added_to_base) else {(model, origin): 1.0}
        whole = self._of(terms, checked_missing(missing))
        for vector in (*added, *(-vector for vector in added_to_base)):
            whole = whole + vector
        self._terms: dict[tuple[Operand, Operand], float] = whole._terms
        self._missing: str | None = whole._missing

    @staticmethod
    def _of(terms: dict[tuple[Operand, Operand], float], missing: str | None) -> TaskVector:
        vector = TaskVector.__new__(TaskVector)  # sums and multiples of a stored vector are plain ones
        vector._terms = terms
        vector._missing = missing
        return vector

    @classmethod
    def load(cls, tensors: Any, *, missing: str | None = None) -> TaskVector:
        """Return the task vector in what :meth:`save` wrote, or in a dict of tensors, which are differences.

        ``tensors`` is a path, or a dict of numpy arrays or torch tensors by the names of a model. Headers are
        read now, tensors later. On a model, the sum is computed in float64 and rounded once.

        Errors: ModelError for a file that is not a task vector.
        """
        return cls._of({(stored_operand(tensors), NOTHING): 1.0}, checked_missing(missing))

    @property
    def terms(self) -> tuple[tuple[float, Operand, Operand], ...]:
        """The terms (coefficient, model, base), in the order in which they were added."""
        return tuple((c, model, base) for (model, base), c in self._terms.items())

    def on(self, model: Any, *, missing: str | None = None) -> LazyModel:
        """Put the task vector on a model: ``model + tau``, for every kind of model.

        ``model`` is a path, a hub id, a result of :func:`alnico.open_model`, a dict of tensors, a module or a
        :class:`LazyModel`. Nothing is read. ``missing`` replaces that of the task vector.

        Errors: ModelError for a value that is not a model.
        """
        whole = model + self if isinstance(model, LazyModel) else LazyModel(model, self)
        return (
            whole
            if missing is None
            else LazyModel(whole._base, self._of(whole._tau._terms, checked_missing(missing)))
        )

    def _differences(self, missing: str | None = None, *others: TaskVector) -> Differences:
        """Open the models; only headers are read."""
        chosen = checked_missing(missing) or _common_missing(self, *others) or "error"
        return Differences([vector.terms for vector in (self, *others)], chosen)

    @ieee_arithmetic()
    def keys(self) -> list[str]:
        """Return the names of the tensors, from headers alone."""
        with self._differences() as differences:
            return differences.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True  # it need not open its models to be there

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    @ieee_arithmetic()
    def __getitem__(self, name: str) -> Any:
        """Compute one tensor. Errors: ModelError (also a KeyError) for an unknown name, with the nearest."""
        with self._differences() as differences:
            differences.job(name)
            differences.fetch()
            return differences.tensor(name)

    def items(self) -> list[tuple[str, Any]]:
        """Return the names with their tensors."""
        return list(self.state_dict().items())

    def values(self) -> list[Any]:
        """Return the tensors."""
        return list(self.state_dict().values())

    @ieee_arithmetic()
    def state_dict(self, *, missing: str | None = None) -> dict[str, Any]:
        """Return the differences: numpy arrays if all models are dicts of them, otherwise torch tensors.

        They are those of a model only on a base: ``tau.on(base).state_dict()``.

        Errors: NonFiniteError with tensor and index of a NaN or an infinity; those of reading.
        """
        with self._differences(missing) as differences:
            differences.fetch()
            return differences.tensors()

    @ieee_arithmetic()
    def save(
        self,
        out: str | os.PathLike[str],
        *,
        missing: str | None = None,
        max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
        overwrite: bool = False,
        overwrite_anything: bool = False,
    ) -> Path:
        """Write the tensors as safetensors: into one file if the name ends so, otherwise into a directory.

        The bytes are those of :meth:`state_dict`: float32, or float64 where a model is. The metadata of each
        file say that it is a task vector, and of which models; functions that take models refuse it.
        :meth:`load` reads it. If the call fails, it leaves nothing behind. Returns the path.

        Errors: OutputError, RunError; NonFiniteError with tensor and index; those of reading.
        """
        target = Path(out)
        check_publishable(target)
        may_replace = replace_mode(overwrite, overwrite_anything)
        with self._differences(missing) as differences:
            write_task_vector(differences, self.terms, target, bytes_of(max_shard_size), may_replace)
        return target

    @ieee_arithmetic()
    def compress(
        self,
        out: str | os.PathLike[str],
        *,
        rank: float | None = None,
        energy: float | None = None,
        embeddings: StoredTables = "whole",
        missing: str | None = None,
        memory: Size = DEFAULT_BUDGET_BYTES,
        threads: int | None = None,
        max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
        overwrite: bool = False,
        overwrite_anything: bool = False,
        device: Any = DEFAULT_DEVICE,
        watch: Watcher | None = None,
    ) -> Compression:
        """Write the leading singular vectors of each matrix in place of the matrix (TSV-C): ``D ~ L R``.

        For ``D = U S V^T``, ``L = U_k sqrt(S_k)`` and ``R = sqrt(S_k) V_k^T``, in the dtype of :meth:`save`. What is a matrix
        is what it is for the merge method ``tsv``: also a convolution kernel, and each matrix of a stack of experts. All other
        tensors are stored as :meth:`save` writes them, and so is a matrix whose factors would be no smaller. A table that did
        not change takes no room.
        :meth:`load` reads the result as any task vector: it can be put on a base, added, compared and merged. Names of
        files and errors are as in :meth:`save`.

        Options:
            rank: The share of all min(rows, columns) singular vectors of a matrix that is kept, in (0, 1]; at least one
                is. A matrix of n x n gets smaller below 1/2.
            energy: The share of a matrix's squares that is kept, in (0, 1], by as few singular vectors as possible.
            embeddings: ``whole`` stores tables of tokens and positions, and token heads, as they are; ``matrix`` in factors.
        Returns what was kept of each tensor, the sizes, and the exact error of the values as they are stored.
        Errors: RecipeError for options; ResourceError for a matrix that does not fit the memory; those of :meth:`save`.
        Differs from the source: the number of singular vectors is chosen; in the paper it is min(rows, columns) / N for
            N tasks.
        Source: Gargiulo et al. 2025, Task singular vectors, https://arxiv.org/abs/2412.00081, section 3.2 (TSV-C).
        """
        kept = Kept.of(rank, energy, embeddings)
        run = RunOptions.of(memory=memory, threads=threads, watch=watch, device=device)
        target = Path(out)
        check_publishable(target)
        may_replace = replace_mode(overwrite, overwrite_anything)
        with self._differences(missing) as differences:
            return compress_task_vector(
                differences,
                self.terms,
                target,
                kept,
                run=run,
                max_shard_bytes=bytes_of(max_shard_size),
                overwrite=may_replace,
                watch=watch,
            )

    @ieee_arithmetic()
    def equals(self, other: TaskVector, *, atol: float = 0.0, missing: str | None = None) -> bool:
        """Compare the tensors with those of another task vector: same names and shapes, and equal values.

        With ``atol`` values may differ by it. Names of models do not matter.

        Errors: AlnicoError for something that is not a task vector; NonFiniteError; those of reading.
        """
        _check_vector(other, "equals")
        if finite_number(atol, "atol") < 0:
            raise AlnicoError(
                f"atol is {atol:g}; expected 0 or more. Give the largest difference that counts as equal."
            )
        with self._differences(missing) as own, other._differences(missing) as theirs:
            if set(own.names) != set(theirs.names):
                return False
            own.fetch()
            theirs.fetch()
            for name in own.names:
                if own.job(name).shape != theirs.job(name).shape:
                    return False
                first, second = (np.asarray(d.tensor(name), np.float64) for d in (own, theirs))
                if not (np.abs(first - second) <= atol).all():
                    return False
        return True

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
            return self._of(terms, _common_missing(self, other))
        if isinstance(other, numbers.Real) and other == 0:
            return self  # the start value of sum()
        return self.on(other) if is_model(other) or is_array(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __array__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: numpy would take the names of tensors for an array."""
        raise TypeError(
            "a task vector is not an array; expected one tensor of it, as in tau['fc1.weight'], or "
            "tau.state_dict() for all."
        )

    def __neg__(self) -> TaskVector:
        return self * -1.0

    @ieee_arithmetic()
    def __mul__(self, factor: Any) -> TaskVector:
        if not isinstance(factor, numbers.Real) and not is_array(factor):
            return NotImplemented
        number = as_float(factor)
        terms = {pair: c * number for pair, c in self._terms.items()}
        if not all(map(math.isfinite, terms.values())):
            raise AlnicoError(
                f"a task vector is multiplied by {number:g}; expected a finite factor and finite "
                "coefficients."
            )
        return self._of(terms, self._missing)

    __rmul__ = __mul__

    @ieee_arithmetic()
    def __truediv__(self, divisor: Any) -> TaskVector:
        if not isinstance(divisor, numbers.Real) and not is_array(divisor):
            return NotImplemented
        number = as_float(divisor)
        if number == 0:
            raise AlnicoError("a task vector is divided by 0; expected another number.")
        return self * (1.0 / number)

    @overload
    def norm(self, per: None = None, *, missing: str | None = None) -> float: ...
    @overload
    def norm(self, per: NormPer, *, missing: str | None = None) -> dict[str, float]: ...
    @ieee_arithmetic()
    def norm(self, per: NormPer | None = None, *, missing: str | None = None) -> float | dict[str, float]:
        """Return the length over all float tensors, from float64 sums; ``per`` layer or tensor, by name.

        The layer of a tensor is its name up to the first number, or its module: ``model.layers.3``, ``fc1``.

        Errors: NonFiniteError with tensor and index of a NaN or an infinity; AlnicoError for a length beyond
        float64.
        """
        try:
            if per is not None:
                return {
                    name: math.ldexp(math.sqrt(products[0, 0]), exponent)
                    for name, (products, (exponent,)) in self._products(per, missing).items()
                }
            ((square,),), (exponent,) = self._whole_products(missing)
            return math.ldexp(math.sqrt(max(square, 0.0)), exponent)
        except OverflowError:
            raise AlnicoError(
                f"{self!r} is longer than float64 can hold; expected a finite length. Multiply it by a "
                "smaller number."
            ) from None

    @overload
    def cosine(self, other: TaskVector, per: None = None, *, missing: str | None = None) -> float: ...
    @overload
    def cosine(self, other: TaskVector, per: NormPer, *, missing: str | None = None) -> dict[str, float]: ...
    @ieee_arithmetic()
    def cosine(
        self, other: TaskVector, per: NormPer | None = None, *, missing: str | None = None
    ) -> float | dict[str, float]:
        """Return the cosine of the angle to another task vector, from float64 sums; ``per`` layer or tensor, by name.

        A layer or tensor in which one of them is 0 has NaN.

        Errors: AlnicoError if one of them is 0; NonFiniteError with tensor and index of a NaN or an infinity.
        """
        _check_vector(other, "cosine")
        if per is not None:
            cosines = {}
            for name, (products, _) in self._products(per, missing, other).items():
                lengths = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
                cosines[name] = float(products[0, 1]) / lengths if lengths > 0 else math.nan
            return cosines
        ((own, product), (_, others)), _ = self._whole_products(missing, other)
        if own <= 0 or others <= 0:
            raise AlnicoError(
                f"{self if own <= 0 else other!r} is 0 in every tensor; a cosine needs two directions."
            )
        return product / math.sqrt(own) / math.sqrt(others)

    def _whole_products(
        self, missing: str | None, *others: TaskVector
    ) -> tuple[Sequence[Sequence[float]], Sequence[int]]:
        """Return inner products and exponents, as :func:`_vector_products` does, also of stored task vectors."""
        vectors = (self, *others)
        if not any(side.is_nothing for vector in vectors for *_, side in vector.terms):
            chosen = checked_missing(missing) or _common_missing(*vectors)
            return _vector_products(vectors, chosen)
        with self._differences(missing, *others) as differences:
            differences.fetch()
            whole, exponents = differences.products(differences.stored)
            return whole.tolist(), exponents

    def _products(
        self, per: NormPer, missing: str | None, *others: TaskVector
    ) -> dict[str, tuple[np.ndarray, list[int]]]:
        """Return inner products, and exponents, of each layer or tensor."""
        if per not in ("layer", "tensor"):
            raise AlnicoError(f"per is {per!r}; expected layer, tensor or None for one number. Choose one.")
        with self._differences(missing, *others) as differences:
            differences.fetch()
            groups: dict[str, list[Job]] = {}
            for job in dict.fromkeys(map(differences.job, differences.names)):
                groups.setdefault(layer_of(job.name) if per == "layer" else job.name, []).append(job)
            return {name: differences.products(jobs) for name, jobs in groups.items()}

    def __repr__(self) -> str:
        return f"<task vector {_format_terms(self)}>"

    @never_fails
    def _repr_html_(self) -> str:
        return result_html("Task vector", _term_table(self), "Nothing is computed until a result is needed.")


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
        self._base = base if isinstance(base, Operand) else operand(base)
        self._tau = tau

    def __add__(self, tau: Any) -> Any:
        return LazyModel(self._base, self._tau + tau) if isinstance(tau, TaskVector) else NotImplemented

    __radd__ = __add__

    def __sub__(self, tau: Any) -> Any:
        return self + -tau if isinstance(tau, TaskVector) else NotImplemented

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the model, with generated names for models in memory."""
        return self._recipe_and_models()[0]

    @property
    def models(self) -> tuple[Any, ...]:
        """The models that it is computed from, the base first; without stored task vectors."""
        return tuple(self._recipe_and_models()[1].values())

    @ieee_arithmetic()
    def save(
        self,
        out: str | os.PathLike[str],
        *,
        dtype: Any = None,
        missing: str | None = None,
        unrelated: str = "error",
        memory: Size = DEFAULT_BUDGET_BYTES,
        threads: int | None = None,
        device: Any = DEFAULT_DEVICE,
        max_shard_size: Size = DEFAULT_MAX_SHARD_BYTES,
        overwrite: bool = False,
        overwrite_anything: bool = False,
        restart: bool = False,
        watch: Watcher | None = None,
    ) -> MergeResult:
        """Write the model into a directory, or into one file if the name ends in ``.safetensors``.

        Arguments are those of :func:`alnico.merge`; ``dtype`` is the output's, by default the promotion of
        the models' dtypes; ``missing`` replaces that of the task vector. An interrupted merge with models in memory starts again from the beginning.
        Errors: all of ``alnico.errors``.
        """
        run = RunOptions.of(memory=memory, threads=threads, watch=watch, device=device)
        recipe, models, deltas = self._recipe_and_models(dtype, unrelated, missing)
        target = Path(out)
        check_publishable(target)
        may_replace = replace_mode(overwrite, overwrite_anything)
        opened = open_operands(models, deltas, recipe_base(recipe))
        try:
            plan = in_words_of_python()(opened.plan)(
                recipe,
                run=run,
                max_shard_bytes=bytes_of(max_shard_size),
                single_file=target.name if target.suffix == ".safetensors" else None,
            )
            fetch_inputs(plan, target, overwrite=may_replace, watch=watch)
            in_memory = any(path_of(model) is None for model in models.values())
            must_restart = restart or in_memory or any(d.place is None for d in deltas.values())
            return run_plan(
                plan, target, overwrite=may_replace, restart=must_restart, watch=watch, caller=IN_PYTHON
            )
        finally:
            opened.close()

    @ieee_arithmetic()
    def state_dict(
        self,
        *,
        dtype: Any = None,
        missing: str | None = None,
        unrelated: str = "error",
        threads: int | None = None,
        device: Any = DEFAULT_DEVICE,
    ) -> dict[str, Any]:
        """Return the tensors: numpy arrays if all models are dicts of them, otherwise torch tensors.

        ``missing`` replaces that of the task vector.
        """
        recipe, models, deltas = self._recipe_and_models(dtype, unrelated, missing)
        run = RunOptions.of(threads=threads, device=device)
        with in_words_of_python():
            return merge_open_models(open_operands(models, deltas, recipe_base(recipe)), recipe, run)

    @ieee_arithmetic()
    def apply(
        self,
        module: Any,
        *,
        missing: str | None = None,
        unrelated: str = "error",
        threads: int | None = None,
        device: Any = DEFAULT_DEVICE,
    ) -> Any:
        """Put the tensors into a module, in place, and return it.

        With ``missing="drop"`` a tensor that some models lack stays as it is in the module.

        Errors: AlnicoError for a module that is an input of the model; MismatchError if its names or shapes
        differ.
        """
        check_module(module, "the module to fill")
        if any(value is module for value in self._recipe_and_models()[1].values()):
            raise AlnicoError(
                "the module to fill is an input of the model, and inputs are never changed. Fill a copy."
            )
        chosen = checked_missing(missing) or self._tau._missing
        state = self.state_dict(missing=chosen, unrelated=unrelated, threads=threads, device=device)
        fill(module, state, partly=chosen == "drop")
        return module

    def _recipe_and_models(
        self, dtype: Any = None, unrelated: str = "error", missing: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Operand]]:
        """Return the recipe, the models by their references in it, and the stored task vectors by theirs."""
        operands = _operands([self._tau])
        names, models = name_models([self._base, *(o for o in operands if not o.is_nothing)])
        entries = []
        for coefficient, model, base in self._tau.terms:
            entries += [(model, coefficient), *([] if base.is_nothing else [(base, -coefficient)])]
        entries = [(model, weight) for model, weight in entries if model != self._base]
        recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": names[self._base]}
        recipe["models"] = [
            {"model": names[model], "parameters": {"weight": weight}} for model, weight in entries
        ]
        if not entries:
            recipe = {"merge_method": "passthrough", "models": [names[self._base]]}
        if (chosen := checked_missing(missing) or self._tau._missing or "error") != "error":
            recipe["missing"] = chosen
        if unrelated != "error":
            recipe["unrelated"] = unrelated
        if dtype is not None:
            recipe["dtype"] = dtype_name(dtype)
        deltas = {names[o]: o for o in operands if o.is_delta}
        return recipe, {n: m for n, m in models.items() if n not in deltas}, deltas

    def __repr__(self) -> str:
        return f"<model {self._base.name} + {_format_terms(self._tau)}>"

    @never_fails
    def _repr_html_(self) -> str:
        return result_html(
            f"Model {self._base.name} plus task vectors",
            _term_table(self._tau),
            "Nothing is computed until a result is needed.",
        )


def recipe_base(recipe: Mapping[str, Any]) -> str:
    """Return the reference of the model that the others are put on."""
    return str(recipe.get("base_model") or recipe["models"][0])


def checked_missing(missing: str | None) -> str | None:
    """Return what to do with missing tensors; None for the default. Errors: RecipeError."""
    if missing is not None and missing not in MISSING:
        raise RecipeError(f"missing is {missing!r}; expected one of {', '.join(MISSING)}. Choose one.")
    return missing


def _split(model: Any, argument: str) -> tuple[Operand, tuple[TaskVector, ...]]:
    """Return a model as an operand, and the task vectors on it if it is a lazy model. Errors: ModelError."""
    if isinstance(model, LazyModel):
        return model._base, (model._tau,)
    return operand(model, argument), ()


def _common_missing(*vectors: TaskVector) -> str | None:
    """Return what all vectors do with missing tensors. Errors: AlnicoError if two of them differ."""
    given = list(dict.fromkeys(v._missing for v in vectors if v._missing is not None))
    if len(given) > 1:
        raise AlnicoError(
            f"missing is {given[0]!r} in one task vector and {given[1]!r} in another; expected one of the two. "
            "Make both with the same missing=."
        )
    return given[0] if given else None


def _check_vector(other: object, function: str) -> None:
    if not isinstance(other, TaskVector):
        raise AlnicoError(
            f"{function}: the other is of type {type(other).__name__}; expected a TaskVector. Make one with "
            "alnico.TaskVector(finetuned, base), or of a dict of differences with TaskVector.load."
        )


def _operands(vectors: Sequence[TaskVector]) -> list[Operand]:
    return [side for vector in vectors for _, model, base in vector.terms for side in (model, base)]


def _vector_products(
    vectors: Sequence[TaskVector], missing: str | None = None
) -> tuple[list[list[float]], list[int]]:
    """Return inner products of task vectors, divided by powers of 2, and the exponents of each one's power.

    The powers keep products of very large and very small coefficients from overflowing or vanishing, and
    change no bits of others. The coefficients of the models in a task vector sum to 0, so the differences may
    be taken from any one model: here from the first base. One pass gives the float64 inner products of these
    differences, and those of the task vectors are computed from them.
    """
    origin = vectors[0].terms[0][2]
    names, models = name_models([origin, *_operands(vectors)])
    others = [model for model in names if model != origin]
    if not others:
        return [[0.0] * len(vectors) for _ in vectors], [0] * len(vectors)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": names[origin],
        "models": [{"model": names[model], "parameters": {"weight": 0.5}} for model in others],
        "dtype": "float64",
        **({"missing": missing} if missing is not None else {}),
    }
    opened = open_models(models)
    try:
        with in_words_of_python():
            plan = opened.plan(recipe)
        products = inner_products(plan)
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


def _term_table(vector: TaskVector) -> ResultTable:
    rows = [[c, model.name, "" if base.is_nothing else base.name] for c, model, base in vector.terms]
    return ResultTable(("times", "model", "minus"), rows)


def _format_terms(vector: TaskVector) -> str:
    parts = []
    for i, (coefficient, model, base) in enumerate(vector.terms):
        sign = ("-" if coefficient < 0 else "") if i == 0 else (" - " if coefficient < 0 else " + ")
        size = abs(coefficient)
        what = model.name if base.is_nothing else f"({model.name} - {base.name})"
        parts.append(f"{sign}{'' if size == 1 else f'{size:g} x '}{what}")
    return "".join(parts)
