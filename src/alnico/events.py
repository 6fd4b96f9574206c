"""What a running merge tells whoever watches it. Events come from any thread, one at a time for a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

from alnico.plan.job import Plan


@dataclass(frozen=True)
class Fetching:
    """``files`` of the models on the hub, with ``total_bytes``, are downloaded before the merge."""

    models: tuple[str, ...]
    files: int
    total_bytes: int


@dataclass(frozen=True)
class Fetched:
    """``bytes_done`` more bytes have come; negative if a broken download begins again."""

    bytes_done: int


@dataclass(frozen=True)
class Started:
    """The plan begins; ``resumed`` tensors of it, with ``resumed_bytes`` of output, were finished before and are kept."""

    plan: Plan
    resumed: int
    resumed_bytes: int


@dataclass(frozen=True)
class Compiling:
    """Kernels are compiled or loaded; this can take seconds the first time."""

    kernels: int


@dataclass(frozen=True)
class Measuring:
    """What a method must know of the whole model is measured over ``tensors``, before the first is merged."""

    tensors: int


@dataclass(frozen=True)
class Reading:
    """``tensors``, with ``total_bytes`` in all models, are read, for their statistics or to be checked; nothing is written."""

    tensors: int
    total_bytes: int


@dataclass(frozen=True)
class Advanced:
    """``bytes_done`` more bytes of output stand at their place, or have been read; ``tensor`` is being worked on."""

    tensor: str
    bytes_done: int


@dataclass(frozen=True)
class TensorDone:
    """One output tensor is finished."""

    tensor: str
    digest: str


@dataclass(frozen=True)
class Finished:
    """The output stands under its name."""

    path: str
    seconds: float


Event = Union[Fetching, Fetched, Started, Compiling, Measuring, Reading, Advanced, TensorDone, Finished]

Watcher = Callable[[Event], None]
"""What a caller passes as ``watch``: it gets every event."""
