"""What scores a model: the one interface of evaluation, soups, search and everything else that measures on data."""

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
"""What a task needs of a transformers checkpoint: the model without a head, with its classifier, or with its language-model head."""

Goal = Literal["max", "min"]
"""Is more better, or less?"""

Link = Literal["mean", "exp"]


@dataclass(frozen=True, eq=False)
class Score:
    """A model's result on one task, in the task's unit.

    ``examples`` (n,) float64 is what each example contributed, in the task's order: 1 or 0 for an accuracy, the negative log-likelihood
    of a token, on the mean of a window, for a perplexity. None where a task tells its value alone. ``link`` says how the value follows
    from them: it is their mean, or exp of it.
    """

    value: float
    examples: np.ndarray | None = None
    link: Link = "mean"


def pool(scores: Sequence[Score]) -> Score:
    """The score on all examples of several scores of one task, on different ones. Each must have its examples.

    >>> pool([Score(1.0, np.ones(1)), Score(0.0, np.zeros(3))]).value
    0.25
    """
    examples = [score.examples for score in scores if score.examples is not None]
    if len(examples) != len(scores) or not examples:
        raise EvaluationError(
            "scores without their examples cannot be pooled; expected what each example contributed. Score all at once."
        )
    joined, link = np.concatenate(examples), scores[0].link
    mean = float(joined.mean())
    return Score(math.exp(mean) if link == "exp" else mean, joined, link)


def evaluation_failed(where: str, error: BaseException) -> EvaluationError:
    """What is said where something that alnico called has raised: its kind and its first line.

    >>> evaluation_failed("news: merged", KeyError("pixel_values"))
    EvaluationError("news: merged: the evaluation raised KeyError: 'pixel_values'; expected a score. Mend what was called, or the data.")
    """
    try:
        text = (str(error).strip() or "without a word").splitlines()[0][:300].rstrip(".")
    except Exception:  # of a class whose text fails, too
        text = "without a word"
    return EvaluationError(
        f"{where}: the evaluation raised {type(error).__name__}: {text}; expected a score. Mend what was called, or the data."
    )


def checked_value(value: Any, where: str) -> float:
    """A finite number as a task gives it. Errors: EvaluationError, for anything else.

    >>> checked_value(1, "mine: merged")
    1.0
    """
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        raise EvaluationError(
            f"{where}: the evaluation gave a {type(value).__name__}; expected a finite number. Mend what was called."
        )
    try:
        number = float(
            value.detach() if hasattr(value, "detach") else value
        )  # torch warns of a loss with its graph
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise EvaluationError(
            f"{where}: the evaluation gave a {type(value).__name__} that is no number; expected a finite number. Mend what was called."
        ) from None
    if not math.isfinite(number):
        raise EvaluationError(
            f"{where}: the evaluation gave {number}; expected a finite number. Look for NaN in the model, or mend what was called."
        )
    return number


class EvaluatedModel(Protocol):
    """A model as tasks see it: on disk, or a merge in memory that the next one replaces."""

    label: str

    @property
    def directory(self) -> Path:
        """Where it lies as a checkpoint. What is in memory alone is written there when first asked."""
        ...

    def module(self, kind: ModelKind) -> Any:
        """The transformers module, in evaluation mode: the same object at every call. Errors: ModelError, EvaluationError."""
        ...

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        ...


class Task(Protocol):
    """One thing to be good at, measured on some examples."""

    name: str
    goal: Goal
    weight: float
    """Of the task in a mean over tasks, above 0."""
    size: int
    """Examples there are; 0 where a task cannot be taken in part."""

    def evaluate(self, subject: EvaluatedModel, examples: Sequence[int] | None = None) -> Score:
        """Score a model, on all examples or on some. Errors: EvaluationError, with the task's name, for anything but a finite number."""
        ...

    def pooled(self, scores: Sequence[Score]) -> Score:
        """The score on all examples of several scores on different ones."""
        ...

    def digests(self) -> frozenset[str]:
        """What its examples are known by: tasks that share one share an example."""
        ...


@runtime_checkable
class Differentiable(Task, Protocol):
    """A task whose model can be asked for the scores of classes, before the softmax, without its labels."""

    kind: ModelKind

    def logits(self, subject: EvaluatedModel, examples: Sequence[int]) -> torch.Tensor:
        """Return (n, classes) float32, with the graph of the module's parameters where torch records one. Labels are never read."""
        ...


def shared_examples(tasks: Sequence[Task], others: Sequence[Task]) -> Iterator[tuple[Task, Task, int]]:
    """Give every two tasks, one of each, that share examples, and how many."""
    for task in tasks:
        for other in others:
            if count := len(task.digests() & other.digests()):
                yield task, other, count
