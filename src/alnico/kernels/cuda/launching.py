"""Turns the arguments of a call into what a kernel of a GPU takes: numbers, addresses and uploaded arrays

Numbers and keys are parameters of the kernel, in two tuples: a launch needs no copy for them. Arrays are uploaded into
the working memory of the thread. A result of few bytes is written into its pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alnico.kernels.array_tiles import width_of
from alnico.kernels.cuda.memory import DeviceBytes, GpuMemory
from alnico.kernels.cuda.source import PACK, Slots
from alnico.kernels.template import PARTS, ArgumentKind


class Room:
    """Cuts memory into parts that begin at multiples of 256 bytes."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> slice:
        start = self.size
        self.size += -(-count // 256) * 256
        return slice(start, start + count)


class FlatArguments:
    """The arguments of a scalar function as a call of a kernel passes them, and what they are to a kernel of a GPU."""

    def __init__(self, kinds: Sequence[ArgumentKind], real: np.dtype[Any], flat: Sequence[Any]) -> None:
        rest = iter(flat)
        self.kinds = kinds
        self.real = real
        self.parts: list[dict[str, Any]] = [{part: next(rest) for part in PARTS[kind]} for kind in kinds]

    def numbers(self, models: Sequence[int]) -> list[Any]:
        """The numbers and keys of some models, as two tuples. An empty tuple is no parameter: it has a zero."""
        slots = Slots(self.kinds, range(len(models)))
        numbers = tuple(
            self.real.type(self.parts[a][part] if n is None else self.parts[a][part][models[n]])
            for a, part, n in slots.numbers
        )
        keys = tuple(np.uint64(self.parts[a]["keys"][models[n]]) for a, n in slots.keys)
        return [numbers or (self.real.type(0),), keys or (np.uint64(0),)]

    def arrays(self, room: Room, models: Sequence[int], start: int, count: int) -> Uploads:
        """What the arrays of arguments are to a kernel, for ``count`` elements from ``start`` on."""
        uploads = Uploads()
        for kind, parts in zip(self.kinds, self.parts, strict=True):
            if kind == "ranked":
                ranks = parts["ranks"]
                if isinstance(ranks, DeviceBytes):
                    uploads.given.append(ranks[4 * count * models[0] :])
                else:
                    uploads.add(ranks[list(models)].astype(np.float32, copy=False), room)
            if kind in ("rows", "columns"):
                inner = int(parts["inner"])
                first, stop = 0, inner
                if kind == "rows":  # those of the block are enough
                    first, stop = start // inner, (start + count - 1) // inner + 1
                uploads.add(parts["a"][list(models), first:stop], room)
                uploads.given += [inner, first, stop - first]
        return uploads


class Uploads:
    """Numbers, memory of the GPU, and arrays with their places in the working memory."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def add(self, array: np.ndarray, room: Room) -> None:
        array = np.ascontiguousarray(array)
        self.given.append((array, room.take(array.nbytes)))

    def put(self, memory: GpuMemory, scratch: DeviceBytes) -> list[Any]:
        """Upload the arrays, and return what a kernel takes."""
        return [self._put(one, memory, scratch) for one in self.given]

    @staticmethod
    def _put(one: Any, memory: GpuMemory, scratch: DeviceBytes) -> Any:
        if isinstance(one, DeviceBytes):
            return memory.address(one, np.float32)
        if not isinstance(one, tuple):
            return one
        array, span = one
        memory.upload(array, scratch[span])
        return memory.address(scratch[span], array.dtype)


def storage(code: int) -> np.dtype[Any]:
    """What an element of a dtype is loaded as."""
    return np.dtype(f"u{width_of(code)}")


def addresses(memory: GpuMemory, raws: Sequence[DeviceBytes], codes: Sequence[int]) -> list[Any]:
    """The addresses of tensors of these dtypes."""
    return [memory.address(raw, storage(code)) for raw, code in zip(raws, codes, strict=True)]


def are_packed(tensors: Sequence[DeviceBytes], codes: Sequence[int]) -> bool:
    """Do the addresses of tensors of these dtypes allow loads of four elements?"""
    return all(t.address % min(16, PACK * width_of(c)) == 0 for t, c in zip(tensors, codes, strict=True))
