"""Inputs in memory as a task without labels: batches of tensors, and the logits of a module on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alnico.checkpoint.memory_model import import_torch, is_torch_module, is_torch_tensor
from alnico.errors import EvaluationError
from alnico.evaluation.batches import Batches, input_device, is_out_of_memory, on_device
from alnico.evaluation.tasks import EvaluatedModel, Goal, ModelKind, Score, evaluation_failed, pool
from alnico.evaluation.user_function import digest_of
from alnico.numerics.arithmetic import callers_arithmetic

if TYPE_CHECKING:
    import torch

EXPECTED = "a tensor of inputs, batches of them (a list or a DataLoader), or a function that takes the module and returns logits"


class InputBatches:
    """The inputs of one task, for methods that learn from the logits of a module and read no labels.

    ``inputs`` are a tensor (n, ...), batches of tensors, or batches of dicts of tensors, which the module gets as
    keywords. Of a batch that is a tuple or a list the first element counts: labels are never read. A function
    ``f(module)`` returns logits (n, classes) of its own inputs, all at each step. The module returns logits, or an object
    with ``logits``. Errors: EvaluationError.
    """

    goal: Goal = "max"
    weight = 1.0
    metric = "logits"
    kind: ModelKind = "classifier"

    def __init__(self, name: str, inputs: Any) -> None:
        self.name = name
        self._function: Callable[[Any], Any] | None = None
        self._parts: dict[str | None, Any] = {}
        if callable(inputs) and not is_torch_module(inputs) and not is_torch_tensor(inputs):
            self._function = inputs
            self.size = 1
            return
        torch = import_torch("inputs in memory")
        whole = isinstance(inputs, (np.ndarray, Mapping)) or is_torch_tensor(inputs)
        if not whole and (isinstance(inputs, (str, bytes)) or not isinstance(inputs, Iterable)):
            raise EvaluationError(f"{name} is of type {type(inputs).__name__}; expected {EXPECTED}.")
        batches = [self._batch(batch) for batch in ([inputs] if whole else inputs)]
        if not batches:
            raise EvaluationError(f"{name} is empty; expected at least one input. Give the task's inputs.")
        try:
            self._parts = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        except (KeyError, RuntimeError, TypeError) as error:
            raise EvaluationError(
                f"{name}: its batches cannot be joined ({str(error).splitlines()[0][:200]}); expected batches that "
                "differ only in their number of inputs. Pad them to one shape."
            ) from None
        self.size = len(next(iter(self._parts.values())))
        self._sizes = Batches(name, max(self.size, 1), rows="inputs")

    @property
    def is_function(self) -> bool:
        """Does a function of the caller run the module on inputs of its own?"""
        return self._function is not None

    def _batch(self, batch: Any) -> dict[str | None, Any]:
        """Return the tensors of a batch by keyword; the only argument has None."""
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        parts = dict(batch) if isinstance(batch, Mapping) else {None: batch}
        parts = {key: self._tensor(value) for key, value in parts.items() if key != "labels"}
        if not parts:
            raise EvaluationError(f"{self.name}: a batch holds no inputs; expected {EXPECTED}.")
        return parts

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            return import_torch("inputs in memory").from_numpy(np.ascontiguousarray(value))
        if is_torch_tensor(value) and value.dim():
            return value.detach()
        raise EvaluationError(
            f"{self.name}: holds a value of type {type(value).__name__}; expected {EXPECTED}."
        )

    def logits(self, subject: EvaluatedModel, examples: Sequence[int]) -> torch.Tensor:
        """Return the logits (n, classes) of a module on some inputs, with their graph. Errors: EvaluationError."""
        module = subject.module(self.kind)
        if self._function is not None:
            return self._logits_of(lambda _: self._function(module), (), subject)  # type: ignore[misc]

        def run(rows: Sequence[int]) -> Any:
            chosen = on_device({key: value[list(rows)] for key, value in self._parts.items()}, module)
            only = chosen.get(None)
            return module(**{str(k): v for k, v in chosen.items()}) if only is None else module(only)

        parts = [
            logits
            for _, logits in self._sizes.each(
                list(examples),
                lambda rows: self._logits_of(run, rows, subject),
                subject,
                input_device(module),
                halves=not import_torch("inputs in memory").is_grad_enabled(),
            )
        ]
        return parts[0] if len(parts) == 1 else import_torch("inputs in memory").cat(parts)

    def _logits_of(
        self, run: Callable[[Sequence[int]], Any], rows: Sequence[int], subject: EvaluatedModel
    ) -> torch.Tensor:
        """Run the caller's module or function, and return its logits. Errors: EvaluationError; those of too little memory."""
        try:
            with callers_arithmetic():
                result = run(rows)
        except Exception as error:  # the module and the function are the caller's
            if rows and is_out_of_memory(error):
                raise
            raise evaluation_failed(f"{self.name} of {subject.label}", error) from error
        logits: Any = getattr(result, "logits", result)
        if not is_torch_tensor(logits) or logits.dim() < 2:
            what = (
                f"a tensor of shape {tuple(logits.shape)}"
                if is_torch_tensor(logits)
                else type(logits).__name__
            )
            raise EvaluationError(
                f"{self.name} of {subject.label}: the module returned {what}; expected logits of shape (inputs, classes). "
                "Give a function that takes the module and returns logits."
            )
        return logits  # type: ignore[no-any-return]

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Refuse: inputs without labels have no score."""
        raise EvaluationError(
            f"{self.name}: are inputs without labels, which no score can be computed from; expected a function that scores."
        )

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores on different examples."""
        return pool(scores)

    def digests(self) -> frozenset[str]:
        """Return one digest of all inputs."""
        return frozenset({digest_of(self._function or list(self._parts.values()))})


def as_input_tasks(inputs: Any, argument: str = "inputs") -> tuple[InputBatches, ...]:
    """Return a task for each entry of a dict by name, or of a list. Errors: EvaluationError."""
    if isinstance(inputs, Mapping):
        return tuple(InputBatches(str(name), of_task) for name, of_task in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return tuple(InputBatches(f"{argument}[{i}]", of_task) for i, of_task in enumerate(inputs))
    return (InputBatches(argument, inputs),)
