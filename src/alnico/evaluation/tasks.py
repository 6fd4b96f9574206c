"""Defines tasks and scores: the interface of evaluation, soups, search and everything else that scores models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from alnico.errors import EvaluationError

if TYPE_CHECKING:
    import torch

ModelKind = Literal["encoder", "classifier", "causal"]
"""The module a task needs: the model without a head, with its classifier, or with its language-model head."""

Goal = Literal["max", "min"]
"""Whether a higher or a lower score is better."""

Link = Literal["mean", "exp"]


@dataclass(frozen=True, eq=False)
class Score:
    """A model's result on one task, in the task's unit.

    ``examples`` (n,) float64 has the contribution of each example, in the task's order: 1 or 0 for an accuracy, the mean
    negative log-likelihood of a window's tokens for a perplexity. It is None if the task reports only its value. ``link``
    says how the value is computed from them: their mean, or exp of it.
    """

    value: float
    examples: np.ndarray | None = None
    link: Link = "mean"


def pool(scores: Sequence[Score]) -> Score:
    """Combine scores of one task on different examples into the score on all of them. Each needs its examples.

    >>> pool([Score(1.0, np.ones(1)), Score(0.0, np.zeros(3))]).value
    0.25
    """
    examples = [score.examples for score in scores if score.examples is not None]
    if len(examples) != len(scores) or not examples:
        raise EvaluationError(
            "scores without examples cannot be pooled; expected the contribution of each example. Score all examples at once."
        )
    joined, link = np.concatenate(examples), scores[0].link
    mean = float(joined.mean())
    return Score(math.exp(mean) if link == "exp" else mean, joined, link)


def evaluation_failed(where: str, error: BaseException, advice: str = "") -> EvaluationError:
    """Return the error for an exception in code that alnico called: its type, its first line, and more ``advice``.

    >>> evaluation_failed("news: merged", KeyError("pixel_values"))
    EvaluationError("news: merged: the evaluation raised KeyError: 'pixel_values'; expected a score. Correct the called code, or the data.")
    """
    try:
        text = (str(error).strip() or "no message").splitlines()[0][:300].rstrip(".")
    except Exception:  # its own text raises an exception
        text = "no message"
    return EvaluationError(
        f"{where}: the evaluation raised {type(error).__name__}: {text}; expected a score. Correct the called code, or the data.{advice and ' '}{advice}"
    )


def checked_value(value: Any, where: str) -> float:
    """Return a task's value as a finite number. Errors: EvaluationError otherwise.

    >>> checked_value(1, "mine: merged")
    1.0
    """
    is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"
    if is_boolean or not hasattr(value, "__float__") or isinstance(value, str):
        raise EvaluationError(
            f"{where}: the evaluation returned a {type(value).__name__}; expected a finite number. Correct the called code."
        )
    try:
        number = float(
            value.detach() if hasattr(value, "detach") else value
        )  # torch warns of a loss with its graph
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise EvaluationError(
            f"{where}: the evaluation returned a {type(value).__name__} that is not a number; expected a finite number. Correct the called code."
        ) from None
    if not math.isfinite(number):
        raise EvaluationError(
            f"{where}: the evaluation returned {number}; expected a finite number. Check the model for NaN, or correct the called code."
        )
    return number


class EvaluatedModel(Protocol):
    """A model as tasks see it: on disk, or a merge in memory that the next one replaces."""

    label: str

    @property
    def directory(self) -> Path:
        """Its directory as a checkpoint. A model in memory is written on first use."""
        ...

    def module(self, kind: ModelKind) -> Any:
        """Return the transformers module in evaluation mode, always the same object. Errors: ModelError, EvaluationError."""
        ...

    def tokenizer(self) -> Any:
        """Return the transformers tokenizer."""
        ...


class Task(Protocol):
    """One ability, measured on examples.

    A task may also name its ``metric``, such as ``accuracy``, and what it has ``counted``, such as ``windows``
    (default ``score`` and ``examples``).
    """

    name: str
    goal: Goal
    weight: float
    """The weight of the task in a mean over tasks, above 0."""
    size: int
    """The number of examples; 0 if the task cannot be scored on a part of them."""

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Score a model on all examples or on some. Errors: EvaluationError, with the task's name, unless finite."""
        ...

    def pooled(self, scores: Sequence[Score]) -> Score:
        """Combine scores on different examples into the score on all of them."""
        ...

    def digests(self) -> frozenset[str]:
        """Return the digests of its examples: tasks with a common digest share an example."""
        ...


def metric_of(task: Task) -> str:
    """Return the name of what a task measures, its ``metric``; ``score`` if it does not name it."""
    return str(getattr(task, "metric", "score"))


def counted_of(task: Task) -> str:
    """Return what a task counts as its examples, its ``counted``."""
    return str(getattr(task, "counted", "examples"))


@runtime_checkable
class Differentiable(Task, Protocol):
    """A task that can return the logits of classes without using labels."""

    kind: ModelKind

    def logits(self, subject: EvaluatedModel, examples: Sequence[int]) -> torch.Tensor:
        """Return logits (n, classes) float32, with the autograd graph if torch records one. Labels are never read."""
        ...


def shared_examples(tasks: Sequence[Task], others: Sequence[Task]) -> Iterator[tuple[Task, Task, int]]:
    """Yield pairs of tasks, one of each list, that share examples, with the number shared."""
    for task in tasks:
        for other in others:
            if count := len(task.digests() & other.digests()):
                yield task, other, count
