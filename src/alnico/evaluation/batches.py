"""Runs a task's examples in batches that fit the memory: out of memory halves a batch, which is reported once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from alnico.errors import AlnicoError, EvaluationError
from alnico.evaluation.tasks import EvaluatedModel, evaluation_failed
from alnico.events import BatchHalved, BatchWarning

BatchRow = TypeVar("BatchRow")
BatchResult = TypeVar("BatchResult")

MOST_ROWS = 1024
"""The largest batch to which a batch grows on a GPU."""

GROWS_BELOW = 0.25
"""A batch on a GPU is doubled while it needs less than this share of the free memory."""

NOT_ENOUGH = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says of a GPU, and of the processor's memory on Linux and elsewhere."""


def is_out_of_memory(error: BaseException) -> bool:
    """Did torch find too little memory? Follows what an error was raised from.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), is_out_of_memory(KeyError("w"))
    (True, False)
    """
    seen: list[BaseException] = []
    left: BaseException | None = error
    while left is not None and left not in seen:
        if isinstance(left, MemoryError) or type(left).__name__ == "OutOfMemoryError":
            return True
        if isinstance(left, RuntimeError) and any(words in str(left) for words in NOT_ENOUGH):
            return True
        seen.append(left)
        left = left.__cause__ or left.__context__
    return False


class Batches:
    """The size of a task's batches. It starts at ``size``, and the task keeps what fits.

    Out of memory halves it. A size below the start is reported once, as :class:`alnico.events.BatchHalved`, to the
    ``watch`` of the subject, or else as a warning. On a GPU the size doubles while a batch needs little of the free
    memory. ``rows`` says what a batch consists of, in messages; ``advice`` what to do if one of them does not fit.
    """

    def __init__(self, name: str, size: int, *, rows: str = "examples", advice: str = "") -> None:
        self.size = size
        self._name = name
        self._start = size
        self._rows = rows
        self._advice = advice
        self._refused = 0
        self._is_said = False
        self._may_grow = True

    def each(
        self,
        rows: Sequence[BatchRow],
        compute: Callable[[Sequence[BatchRow]], BatchResult],
        subject: EvaluatedModel,
        device: Any = None,
        *,
        halves: bool = True,
    ) -> Iterator[tuple[Sequence[BatchRow], BatchResult]]:
        """Yield batches of rows, each with what ``compute`` returns for it. ``device`` is the torch device.

        Without ``halves`` out of memory is raised as it is: graphs of smaller batches would be as large together, so a
        caller that needs gradients gives fewer rows. Errors: EvaluationError, also for what ``compute`` raises.
        """
        begin = 0
        while begin < len(rows):
            part = rows[begin : begin + self.size]
            memory = _GpuUse(device)
            try:
                result = compute(part)
            except AlnicoError:
                raise
            except Exception as error:
                if not halves and is_out_of_memory(error):
                    raise
                self._make_smaller(error, len(part), subject)
                continue
            begin += len(part)
            self._say(subject)
            if len(part) == self.size:
                self._grow(memory)
            yield part, result

    def whole(self, compute: Callable[[int], BatchResult], subject: EvaluatedModel) -> BatchResult:
        """Return what ``compute`` returns for the size of a batch; it runs again where that is too large.

        Errors: as for :meth:`each`.
        """
        while True:
            try:
                result = compute(self.size)
            except AlnicoError:
                raise
            except Exception as error:
                self._make_smaller(error, self.size, subject)
                continue
            self._say(subject)
            return result

    def _make_smaller(self, error: Exception, rows: int, subject: EvaluatedModel) -> None:
        """Halve the size of the batches for an error that means too little memory; raise any other."""
        where = f"{self._name}: {subject.label}"
        if not is_out_of_memory(error):
            raise evaluation_failed(where, error) from error
        # The frames of the error hold the tensors of the batch.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        release_memory()
        if rows <= 1:
            raise EvaluationError(
                f"{where}: the memory is too small for a batch of one of its {self._rows}; expected room for it. "
                f"{self._advice}Choose a smaller dtype, or another device."
            ) from None
        self._may_grow = False
        self._refused = self._refused or rows
        self.size = max(1, min(self.size, rows) // 2)

    def _say(self, subject: EvaluatedModel) -> None:
        if self._is_said or not self._refused or self.size >= self._start:
            return
        self._is_said = True
        event = BatchHalved(self._name, subject.label, self._rows, self._refused, self.size)
        watch = getattr(subject, "watch", None)
        if watch is not None:
            watch(event)
        else:
            warnings.warn(str(event), BatchWarning, stacklevel=4)

    def _grow(self, memory: _GpuUse) -> None:
        if self._may_grow and self.size < MOST_ROWS and memory.share() < GROWS_BELOW:
            self.size = min(2 * self.size, MOST_ROWS)


class _GpuUse:
    """What a batch needs of the free memory of its GPU."""

    def __init__(self, device: Any) -> None:
        self._device = device if getattr(device, "type", "cpu") == "cuda" else None
        self._before = 0
        if self._device is not None:
            cuda = _cuda()
            cuda.reset_peak_memory_stats(self._device)
            self._before = cuda.memory_allocated(self._device)

    def share(self) -> float:
        """Return the share since the start; 1 on the processor, whose memory is not measured."""
        if self._device is None:
            return 1.0
        cuda = _cuda()
        needed = cuda.max_memory_allocated(self._device) - self._before
        # What torch keeps without using it is free, too.
        kept = cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device)
        free = cuda.mem_get_info(self._device)[0] + kept
        return float(needed / max(free, 1))


def _cuda() -> Any:
    import torch

    return torch.cuda


def input_device(module: Any) -> Any:
    """Return the torch device on which a module expects its inputs: that of its first parameter, or None."""
    return next((parameter.device for parameter in module.parameters()), None)


def on_device(inputs: Mapping[Any, Any], module: Any) -> dict[Any, Any]:
    """Return tensors on the device of a module; float32 becomes its dtype if that is bfloat16 or float16."""
    import torch

    first = next(module.parameters(), None)
    if first is None:
        return dict(inputs)
    half = first.dtype if first.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return {
        name: value.to(first.device, half if value.dtype == torch.float32 else value.dtype)
        for name, value in inputs.items()
    }


def release_memory() -> None:
    """Give the memory back to the GPUs that torch keeps without using it."""
    cuda = _cuda()
    if cuda.is_available():
        cuda.empty_cache()
