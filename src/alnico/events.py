"""Defines the events that a running command reports to its caller's ``watch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union


@dataclass(frozen=True)
class Fetching:
    """``files`` of the models on the hub, or of a task vector in a store, with ``total_bytes``, are downloaded; with
    ``is_upload`` they are sent there."""

    models: tuple[str, ...]
    files: int
    total_bytes: int
    is_upload: bool = False


@dataclass(frozen=True)
class Fetched:
    """``bytes_done`` more bytes are downloaded, or sent; the number is negative if a broken download starts again."""

    bytes_done: int


@dataclass(frozen=True)
class Started:
    """A plan (:class:`alnico.plan.job.Plan`) begins.

    An earlier run finished ``resumed`` of its tensors, with ``resumed_bytes`` of output; they are kept.
    """

    plan: Any
    resumed: int
    resumed_bytes: int


@dataclass(frozen=True)
class Compiling:
    """Kernels are compiled or loaded; this can take seconds the first time."""

    kernels: int


@dataclass(frozen=True)
class Measuring:
    """Facts about the whole model are measured over ``tensors`` before the first tensor is merged."""

    tensors: int


@dataclass(frozen=True)
class Reading:
    """``tensors``, with ``total_bytes`` in all models, are read to be measured or checked; nothing is written."""

    tensors: int
    total_bytes: int


@dataclass(frozen=True)
class Advanced:
    """``bytes_done`` more bytes of output are written, or of input are read; ``tensor`` is the current one.

    Bytes of a whole matrix are counted as its models are decomposed, since that takes the time.
    """

    tensor: str
    bytes_done: int


@dataclass(frozen=True)
class Noted:
    """The method has something to say about a tensor: ``str`` of the event is a clause.

    It is ``form`` with ``values``, labels of models and numbers, in the places of its ``{}``.
    """

    tensor: str
    form: str
    values: tuple[str | float, ...] = ()

    def __str__(self) -> str:
        return self.form.format(*self.values) if self.values else self.form


@dataclass(frozen=True)
class TensorDone:
    """One output tensor is finished."""

    tensor: str
    digest: str


@dataclass(frozen=True)
class Finished:
    """The output is at ``path``, its final name."""

    path: str
    seconds: float


@dataclass(frozen=True)
class Counted:
    """``done`` of ``total`` parts are done; ``what`` names them: updates, examples, tasks or layers."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Scored:
    """A model has a score on a task (:class:`alnico.evaluation.tasks.Score`); ``metric`` names what it is."""

    model: str
    task: str
    score: Any
    metric: str = "score"


@dataclass(frozen=True)
class BatchHalved:
    """The memory was too small for a batch of a task on a model: batches have ``now`` instead of ``before`` examples.

    ``rows`` is what the task calls its examples. It is reported once per task. ``str`` of the event is a sentence.
    """

    task: str
    model: str
    rows: str
    before: int
    now: int

    def __str__(self) -> str:
        return (
            f"{self.task}: {self.model}: the memory was too small for batches of {self.before} {self.rows}; they have "
            f"{self.now} now."
        )


class BatchWarning(UserWarning):
    """A batch was halved (:class:`BatchHalved`), and there is no watcher."""


@dataclass(frozen=True)
class SoupTried:
    """A soup tried one more average (:class:`alnico.tune.soup.SoupStep`)."""

    step: Any


@dataclass(frozen=True)
class TrialDone:
    """A trial of a search ended (:class:`alnico.tune.search.samplers.request.Trial`)."""

    trial: Any


@dataclass(frozen=True)
class Learned:
    """One of ``total`` steps of learning coefficients is done (:class:`alnico.tune.adamerge.LearningStep`)."""

    step: Any
    total: int


@dataclass(frozen=True)
class ScaleTried:
    """One of ``total`` trials of a search for weights or scales is done (:class:`alnico.tune.weight_trials.WeightTrial`)."""

    trial: Any
    total: int


@dataclass(frozen=True)
class PointScored:
    """``done`` of ``total`` points of a curve are scored; ``place`` is the last one, with its scores by task."""

    place: str
    scores: Any
    done: int
    total: int


Event = Union[
    Fetching, Fetched, Started, Compiling, Measuring, Reading, Advanced, TensorDone, Finished,
    Counted, Scored, BatchHalved, SoupTried, TrialDone, Learned, ScaleTried, PointScored, Noted,
]  # fmt: skip

Watcher = Callable[[Event], None]
"""What a caller passes as ``watch``. It receives every event, from any thread, one at a time for a tensor."""
