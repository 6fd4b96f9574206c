"""A function of the user's as a task: it gets a model and gives a score."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alnico.errors import EvaluationError
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

PATHS = ("model_dir", "path")
"""Parameters that get the directory of the checkpoint."""


class UserFunction:
    """What ``function(model) -> float | dict | Score`` says of a model.

    A parameter called ``model_dir`` or ``path`` gets the directory of the checkpoint (a merge in memory is written for it, and so are weights
    without a config, as ``model.safetensors``), one called
    ``tokenizer`` the tokenizer, the other one the module of ``kind``, in evaluation mode. A dict of metrics gives the one called
    ``metric``, else its only one, else ``score``. With a :class:`alnico.evaluation.tasks.Score` that has its examples there are intervals.
    What it raises, and anything but a finite number, is an EvaluationError.

    >>> from types import SimpleNamespace
    >>> UserFunction("size", lambda path: len(str(path))).evaluate(SimpleNamespace(label="m", directory="/models/m")).value
    9.0
    """

    size = 0

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        kind: ModelKind = "encoder",
        metric: str | None = None,
        goal: Goal = "max",
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.goal: Goal = goal
        self.weight = weight
        self._function = function
        self._kind: ModelKind = kind
        self._metric = metric
        self._asked = _asked(function)
        if len([word for word in self._asked if word not in (*PATHS, "tokenizer")]) > 1 or not self._asked:
            raise EvaluationError(
                f"{name}: the function takes ({', '.join(self._asked)}); expected a model: one of model_dir, path or the module's name, "
                "and tokenizer. Give the others a default."
            )

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """What the function says; it cannot be asked for a part of its examples."""
        where = f"{self.name}: {subject.label}"
        given = [
            subject.directory
            if word in PATHS
            else subject.tokenizer()
            if word == "tokenizer"
            else subject.module(self._kind)
            for word in self._asked
        ]
        try:
            with callers_arithmetic():
                found = self._function(*given)
        except (Exception, SystemExit) as error:
            raise evaluation_failed(where, error) from error
        if isinstance(found, Score):
            checked_value(found.value, where)
            return found
        return Score(
            checked_value(self._chosen(found, where) if isinstance(found, Mapping) else found, where)
        )

    def pooled(self, scores: Sequence[Score]) -> Score:
        """The score on all examples of several scores, where the function told them."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """What the function reads is not known; by its name, the same function is found again."""
        return frozenset(
            {
                f"{getattr(self._function, '__module__', '')}:{getattr(self._function, '__qualname__', repr(self._function))}"
            }
        )

    def _chosen(self, found: Mapping[str, Any], where: str) -> Any:
        metric = self._metric or (next(iter(found)) if len(found) == 1 else "score")
        if metric not in found:
            raise EvaluationError(
                f"{where}: the evaluation gave {', '.join(map(str, found)) or 'an empty dict'}, and no {metric}; expected one score. "
                "Say `metric`, the one that counts."
            )
        return found[metric]


def _asked(function: Callable[..., Any]) -> list[str]:
    """The parameters that are given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a function in C
        return ["model"]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty or p.name in (*PATHS, "tokenizer")]


def find_function(reference: str, folder: str | os.PathLike[str] = ".") -> Callable[..., Any]:
    """Return the function ``module:function``, of a module in ``folder`` or one that Python finds. Runs the module.

    Errors: EvaluationError.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise EvaluationError(
            f"{reference!r}: is no function; expected module:function, as in scoring:accuracy."
        )
    beside = Path(folder) / f"{module.replace('.', os.sep)}.py"
    try:
        found: Any = _loaded(beside) if beside.is_file() else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise EvaluationError(
                f"{reference}: there is no {beside}, and Python finds no module {module}; expected one of both. Check the name."
            ) from None
        raise evaluation_failed(reference, error) from error
    for word in attribute.split("."):
        found = getattr(found, word, None)
    if not callable(found):
        what = "has no" if found is None else "has no function"
        raise EvaluationError(
            f"{reference}: the module {what} {attribute}; expected a function. Check the name."
        )
    return found  # type: ignore[no-any-return]


def _loaded(path: Path) -> Any:
    """A module of a file under a name of its own, as two folders may have files of one name. Its folder is searched while it is read."""
    name = f"alnico_call_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a file that ends in .py there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
