"""Wraps a user's function as a task: it takes a model and returns a score."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CellType, CodeType, ModuleType
from typing import Any

import numpy as np
import xxhash

from alnico.checkpoint.memory_model import MemoryModel, is_torch_tensor
from alnico.checkpoint.near_paths import suggestion
from alnico.errors import EvaluationError, ModelError
from alnico.evaluation.tasks import (
    EvaluatedModel,
    Goal,
    ModelKind,
    Score,
    checked_value,
    evaluation_failed,
    pool,
)
from alnico.numerics.arithmetic import callers_arithmetic

MOST_DEPTH = 4
"""How deep the data of a function is followed for its digest."""

OF_A_DICT = "The function received a dict of tensors, because no model is a module."
"""What a function may not expect, if it fails."""

PATHS = ("model_dir", "path")
"""Parameters that receive the directory of the checkpoint."""


class UserFunction:
    """Scores a model by ``function(model) -> float | dict | Score``.

    A parameter ``model_dir`` or ``path`` receives the directory of the checkpoint (a merge in memory, and weights without
    a config, are written for it), ``tokenizer`` the tokenizer, and the remaining one the module of ``kind`` in evaluation
    mode. Without a ``kind`` it receives the model as its caller has it: the module, for a checkpoint the module that its
    config names, and otherwise the dict of tensors. From a dict of metrics the score is the one named ``metric``, else its only one, else ``score``. A
    :class:`alnico.evaluation.tasks.Score` with examples gives intervals. Errors: EvaluationError if the function raises,
    or does not return a finite number.

    >>> from types import SimpleNamespace
    >>> UserFunction("size", lambda path: len(str(path))).evaluate(SimpleNamespace(label="m", directory="/models/m")).value
    9.0
    """

    size = 0
    is_function = True
    """The caller's own code scores: it may have inputs of its own."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        kind: ModelKind | None = "encoder",
        metric: str | None = None,
        goal: Goal = "max",
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.goal: Goal = goal
        self.weight = weight
        self._function = function
        self._kind = kind
        self._metric = metric
        self.metric = metric or "score"
        self._parameters = _parameters(function)
        if (
            len([word for word in self._parameters if word not in (*PATHS, "tokenizer")]) > 1
            or not self._parameters
        ):
            raise EvaluationError(
                f"{name}: the function takes ({', '.join(self._parameters)}); expected a model: one of model_dir, path or the module's name, "
                "and tokenizer. Give the others a default."
            )

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Call the function; it cannot be scored on a part of its examples."""
        where = f"{self.name} of {subject.label}"
        arguments = [
            subject.directory
            if word in PATHS
            else subject.tokenizer()
            if word == "tokenizer"
            else self._model_of(subject)
            for word in self._parameters
        ]
        try:
            with callers_arithmetic():
                result = self._function(*arguments)
        except (Exception, SystemExit) as error:
            received_dict = self._kind is None and any(type(one) is dict for one in arguments)
            raise evaluation_failed(where, error, OF_A_DICT if received_dict else "") from error
        if isinstance(result, Score):
            checked_value(result.value, where)
            return result
        return Score(
            checked_value(self._metric_of(result, where) if isinstance(result, Mapping) else result, where)
        )

    def _model_of(self, subject: EvaluatedModel) -> Any:
        whole = getattr(subject, "model", None)
        if self._kind is None and whole is not None:
            return whole()
        return subject.module(self._kind or "encoder")

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores on different examples, if the function returns them."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Return one digest: of the function's name and code, and of the data that it holds.

        The data that it finds by a global name or in a file is unknown.
        """
        return frozenset({digest_of(self._function)})

    def _metric_of(self, metrics: Mapping[str, Any], where: str) -> Any:
        metric = self._metric or (next(iter(metrics)) if len(metrics) == 1 else "score")
        if metric not in metrics:
            raise EvaluationError(
                f"{where}: the evaluation returned {', '.join(map(str, metrics)) or 'an empty dict'} but no {metric}; expected one score. "
                "Name the score with `metric`."
            )
        return metrics[metric]


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters to fill."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C
        return ["model"]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) and not any(
        p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ):
        return ["model"]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in positional if p.default is p.empty or p.name in (*PATHS, "tokenizer")]


def digest_of(value: Any) -> str:
    """Return a digest of a function with the data that it holds, or of data."""
    digest = xxhash.xxh3_128()
    _digest(value, digest)
    return digest.hexdigest()


def _digest(value: Any, digest: Any, depth: int = 0) -> None:
    """Add to a digest a function with the data that it holds, or data."""
    if isinstance(value, functools.partial) and not (value.args or value.keywords):
        value = value.func
    code = getattr(value, "__code__", None)
    held: Iterable[Any] = ()
    if isinstance(code, CodeType):
        digest.update(f"{value.__module__}:{value.__qualname__}:{code.co_names}:".encode() + code.co_code)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        held = (*code.co_consts, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items(), *cells)
    elif isinstance(value, CodeType):
        digest.update(f"{value.co_names}:".encode() + value.co_code)
        held = value.co_consts
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.items())
    elif isinstance(value, np.ndarray) or is_torch_tensor(value):
        _digest_tensor(value, digest)
    elif isinstance(value, (str, bytes, int, float, complex, type(None))):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, (list, tuple)):
        held = value
    elif isinstance(value, dict):
        held = value.items()
    else:
        digest.update(f"{type(value).__module__}:{type(value).__qualname__};".encode())
        held = (
            vars(value).items()
            if hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType))
            else ()
        )
    if depth < MOST_DEPTH:
        for one in held:
            _digest(one, digest, depth + 1)


def _digest_tensor(value: Any, digest: Any) -> None:
    try:
        source = MemoryModel("", {"": value})
    except ModelError:  # no plain numbers
        digest.update(type(value).__name__.encode())
        return
    tensor = source.tensors[""]
    raw = bytearray(tensor.byte_size)
    source.read_into("", 0, memoryview(raw))
    digest.update(f"{tensor.dtype}:{tensor.shape};".encode() + raw)


def find_function(reference: str, folder: str | os.PathLike[str] = ".") -> Callable[..., Any]:
    """Return the function ``module:function``, of a module in ``folder`` or one that Python finds. Runs the module.

    Errors: EvaluationError.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise EvaluationError(
            f"{reference!r}: is not a function; expected module:function, for example scoring:accuracy."
        )
    file = Path(folder) / f"{module.replace('.', os.sep)}.py"
    try:
        target: Any = _loaded(file) if file.is_file() else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise EvaluationError(
                f"{reference}: {file} does not exist, and Python finds no module {module}; expected one of them. "
                f"{suggestion(file, 'Check the name.', accepts=Path.is_file)}"
            ) from None
        raise evaluation_failed(reference, error) from error
    for word in attribute.split("."):
        target = getattr(target, word, None)
    if not callable(target):
        what = "has no" if target is None else "has no function"
        raise EvaluationError(
            f"{reference}: the module {what} {attribute}; expected a function. Check the name."
        )
    return target  # type: ignore[no-any-return]


def _loaded(path: Path) -> Any:
    """Load a file under a unique module name, since folders may have files of the same name; imports find its folder."""
    name = f"alnico_call_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # always exists for a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
