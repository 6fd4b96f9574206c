"""Runs kernels on a GPU: called as those of the processor, with tensors in the GPU's memory"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from alnico.kernels.array_tiles import width_of
from alnico.kernels.constants import UNROLLED_MODELS
from alnico.kernels.cuda.memory import DeviceBytes, GpuMemory
from alnico.kernels.cuda.source import PACK, Slots, many_slots, mix_text
from alnico.kernels.mix_kernel import MixKernel
from alnico.kernels.template import PARTS, ArgumentKind

_compiling = threading.Lock()


class CudaKernel:
    """A kernel of a GPU, called as a :class:`alnico.kernels.build.Kernel` is.

    ``raws``, ``base``, ``out`` and ``ranks`` are :class:`DeviceBytes`; all other arguments are arrays and numbers of
    the processor, which are uploaded, or filled with the result.
    """

    def __init__(self, description: Any, memory: GpuMemory) -> None:
        self.interface = description.interface()
        self.description = description
        self.memory = memory

    def __call__(self, *arguments: Any) -> int:
        if len(arguments) != len(self.interface.parameters):
            names = ", ".join(name for name, _ in self.interface.parameters)
            raise TypeError(f"the kernel takes {names}; got {len(arguments)} arguments")
        return _mix(self.description, self.memory, *arguments)


def compiled(text: str) -> Any:
    """Return the kernel of a text, for any GPU; it is compiled when it is first launched there."""
    with _compiling:
        return _compiled(text)


@functools.lru_cache(maxsize=512)
def _compiled(text: str) -> Any:
    from alnico.kernels.cuda import elements

    names = {**vars(elements), "__name__": "alnico_gpu_kernel"}
    exec(compile(text, "<alnico gpu kernel>", "exec"), names)
    if elements.SIMULATED:
        quiet = "def quiet(*arguments):\n    with np.errstate(all='ignore'):\n        run(*arguments)\n"
        exec(compile(quiet, "<alnico gpu kernel>", "exec"), names)
        return elements.jit(names["quiet"])
    return elements.jit(names["run"])


class _FlatArguments:
    """The flat arguments of a scalar function, by argument."""

    def __init__(self, kinds: Sequence[ArgumentKind], flat: Sequence[Any]) -> None:
        rest = iter(flat)
        self.kinds = kinds
        self.parts: list[dict[str, Any]] = [{part: next(rest) for part in PARTS[kind]} for kind in kinds]

    def number(self, argument: int, part: str, model: int | None) -> Any:
        value = self.parts[argument][part]
        return value if model is None else value[model]


class _Room:
    """Cuts the working memory of a call into parts of 256 bytes."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> slice:
        start = self.size
        self.size += -(-count // 256) * 256
        return slice(start, start + count)


def _mix(
    kernel: MixKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray, base: Any, base_code: int,
    out: DeviceBytes, out_code: int, start: int, keep_equal: int, *flat: Any,
) -> int:  # fmt: skip
    real = np.dtype(kernel.real)
    arguments = _FlatArguments(kernel.kinds, flat)
    count = out.size // width_of(out_code)
    if not count:
        return -1
    flag = memory.mailbox(8).view(np.int64)
    flag[0] = -1
    room = _Room()
    is_many = kernel.models > UNROLLED_MODELS
    each = _extra_room(arguments, room, range(kernel.models), start, count, real)
    tables = [room.take(8 * len(raws)), room.take(8 * len(raws))] if is_many else []
    if is_many:
        numbers, keys = _tables(arguments, kernel.models, real)
        tables += [room.take(numbers.nbytes), room.take(keys.nbytes)]
    scratch = memory.scratch(room.size)
    of_base = memory.address(base, _storage(base_code)) if kernel.of_deltas else 0
    to = memory.address(out, _storage(out_code))
    given: list[Any] = [count, start, int(keep_equal), to, memory.address(flag.view(np.uint8), np.int64)]
    addresses = [memory.address(r, _storage(c)) for r, c in zip(raws, codes.tolist(), strict=True)]
    if is_many:
        text = mix_text(kernel, (), int(base_code), int(out_code), packed=False)
        wholes = codes.astype(np.int64)
        for host, span in ((wholes, tables[1]), (numbers, tables[2]), (keys, tables[3])):
            memory.upload(host, scratch[span])
        given += [
            memory.address(scratch[tables[2]], real),
            memory.address(scratch[tables[3]], np.uint64),
            of_base,
        ]
        given += [memory.table(addresses, scratch[tables[0]]), memory.address(scratch[tables[1]], np.int64)]
    else:
        tensors = [*raws, out, *([base] if kernel.of_deltas else [])]
        widths = [
            width_of(c) for c in [*codes.tolist(), out_code, *([base_code] if kernel.of_deltas else [])]
        ]
        packed = all(t.address % min(16, PACK * w) == 0 for t, w in zip(tensors, widths, strict=True))
        text = mix_text(kernel, tuple(codes.tolist()), int(base_code), int(out_code), packed=packed)
        slots = Slots(kernel.kinds, range(kernel.models))
        given += [*_numbers(arguments, slots, real), of_base, *addresses]
    given += _extra(each, memory, scratch)
    memory.launch(compiled(text), given)
    memory.finish()
    return int(flag[0])


def _storage(code: int) -> Any:
    return np.dtype(f"u{width_of(code)}")


def _numbers(arguments: _FlatArguments, slots: Slots, real: Any) -> list[Any]:
    """The numbers and keys of a kernel as two tuples; a kernel takes no empty one."""
    numbers = tuple(real.type(arguments.number(*slot)) for slot in slots.numbers)
    keys = tuple(np.uint64(arguments.parts[a]["keys"][m]) for a, m in slots.keys)
    return [numbers or (real.type(0),), keys or (np.uint64(0),)]


def _tables(arguments: _FlatArguments, models: int, real: Any) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and keys of a kernel of many models as two arrays."""
    places, firsts = many_slots(arguments.kinds, models)
    numbers = [np.asarray(arguments.parts[a][part], real).reshape(-1) for a, part in places]
    keys = [np.asarray(arguments.parts[a]["keys"], np.uint64) for a in firsts]
    return (
        np.concatenate(numbers) if numbers else np.zeros(1, real),
        np.concatenate(keys) if keys else np.zeros(1, np.uint64),
    )


def _extra_room(
    arguments: _FlatArguments,
    room: _Room,
    models: Sequence[int],
    start: int,
    count: int,
    real: Any,
) -> list[Any]:
    """What the arrays of arguments are to a kernel: numbers, and arrays with their places in the working memory."""
    extra: list[Any] = []
    for kind, parts in zip(arguments.kinds, arguments.parts, strict=True):
        if kind == "ranked":
            ranks = parts["ranks"]
            if isinstance(ranks, np.ndarray):
                ranks = np.ascontiguousarray(ranks[list(models)], np.float32)
                extra.append((ranks, room.take(ranks.nbytes)))
            else:
                extra.append(ranks)
        if kind in ("rows", "columns"):
            inner = int(parts["inner"])
            # Of rows, those of the block are enough.
            first, stop = (start // inner, (start + count - 1) // inner + 1) if kind == "rows" else (0, inner)
            values = np.ascontiguousarray(parts["a"][list(models), first:stop], real)
            extra += [(values, room.take(values.nbytes)), inner, first, stop - first]
    return extra


def _extra(each: list[Any], memory: GpuMemory, scratch: DeviceBytes) -> list[Any]:
    given: list[Any] = []
    for one in each:
        if isinstance(one, tuple):
            array, span = one
            memory.upload(array, scratch[span])
            given.append(memory.address(scratch[span], array.dtype))
        elif isinstance(one, DeviceBytes):
            given.append(memory.address(one, np.float32))
        else:
            given.append(one)
    return given
