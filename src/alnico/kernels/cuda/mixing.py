"""Mixes on a GPU: decodes the elements of all inputs, computes the equation, encodes the result"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from alnico.kernels.array_tiles import width_of
from alnico.kernels.constants import UNROLLED_MODELS
from alnico.kernels.cuda.compiled import MOST_TEXTS, compiled
from alnico.kernels.cuda.launching import FlatArguments, Room, Uploads, addresses, are_packed, storage
from alnico.kernels.cuda.memory import DeviceBytes, GpuMemory
from alnico.kernels.cuda.source import PACK, many_slots, mix_text
from alnico.kernels.mix_kernel import MixKernel


def mix(
    kernel: MixKernel, memory: GpuMemory, raws: Sequence[DeviceBytes], codes: np.ndarray, base: Any, base_code: int,
    out: DeviceBytes, out_code: int, start: int, keep_equal: int, *flat: Any,
) -> int:  # fmt: skip
    """Fill ``out``, which shares no byte with an input. Returns -1, or 0 if a number is NaN or infinite."""
    count = out.size // width_of(out_code)
    if not count:
        return -1
    arguments = FlatArguments(kernel.kinds, np.dtype(kernel.real), flat)
    models = range(kernel.models)
    is_many = kernel.models > UNROLLED_MODELS
    flag = memory.mailbox(8).view(np.int64)
    flag[0] = -1
    room = Room()
    extra = arguments.arrays(room, models, start, count)
    tables = Uploads()
    if is_many:
        for array in (*_tables(arguments, kernel.models), codes.astype(np.int64)):
            tables.add(array, room)
    table = room.take(8 * len(raws))
    scratch = memory.scratch(room.size)
    tensors, dtypes = [*raws, out], [*codes.tolist(), int(out_code)]
    of_base: Any = 0
    if kernel.of_deltas:
        of_base = memory.address(base, storage(base_code))
        tensors, dtypes = [*tensors, base], [*dtypes, int(base_code)]
    given: list[Any] = [count, start, int(keep_equal), memory.address(out, storage(out_code))]
    given.append(memory.address(flag, np.int64))
    inputs = addresses(memory, raws, codes.tolist())
    if is_many:
        function = _mixing_kernel(kernel, (), int(base_code), int(out_code), False)
        numbers, keys, of_codes = tables.put(memory, scratch)
        given += [numbers, keys, of_base, memory.table(inputs, scratch[table]), of_codes]
    else:
        of = tuple(codes.tolist())
        function = _mixing_kernel(kernel, of, int(base_code), int(out_code), are_packed(tensors, dtypes))
        given += [*arguments.numbers(models), of_base, *inputs]
    given += extra.put(memory, scratch)
    memory.launch(function, given, work=count if is_many else -(-count // PACK))
    memory.finish()
    return int(flag[0])


@functools.lru_cache(maxsize=MOST_TEXTS)
def _mixing_kernel(
    kernel: MixKernel, codes: tuple[int, ...], base_code: int, out_code: int, packed: bool
) -> Any:
    return compiled(mix_text(kernel, codes, base_code, out_code, packed=packed))


def _tables(arguments: FlatArguments, models: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and keys of a kernel of many models, as two arrays."""
    places, firsts = many_slots(arguments.kinds, models)
    numbers = [np.asarray(arguments.parts[a][part], arguments.real).reshape(-1) for a, part in places]
    keys = [np.asarray(arguments.parts[a]["keys"], np.uint64) for a in firsts]
    return (
        np.concatenate(numbers) if numbers else np.zeros(1, arguments.real),
        np.concatenate(keys) if keys else np.zeros(1, np.uint64),
    )
