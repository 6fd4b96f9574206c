"""Reads what an optimizer's state says about its step: counts and rates that all ranks of one step share."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alnico.checkpoint.files import open_to_read, read_fully
from alnico.checkpoint.pickle_parser import PickledObject
from alnico.checkpoint.pickles import Pickle, PickledTensor, is_size, shard_of
from alnico.numerics.dtypes import DTYPES

SHARED = frozenset(("step", "lr", "cur_iter", "ds_version"))
"""Keys whose values are those of all ranks: steps of the optimizer, its rate, steps of the loss scaler, the version of DeepSpeed."""
NUMBERS = ("F64", "F32", "I64", "I32")
"""Dtypes of tensors that hold such a number."""
MOST_VALUES = 64
MOST_LEVELS = 6
"""Dicts and lists inside one another in which values are looked for."""
MOST_CHARACTERS = 40


def stated_steps(path: Path, loaded: Pickle) -> Mapping[str, str]:
    """Return the values under :data:`SHARED` in a file of an optimizer, as text, by the keys that lead to them.

    Numbers that torch keeps as tensors are read from the file. Errors: ModelError for such a tensor outside of its storage.
    """
    found: dict[str, str] = {}
    tensors: dict[str, PickledTensor] = {}
    waiting: deque[tuple[str, int, Any]] = deque([("", 0, loaded.value)])
    seen: set[int] = set()  # a container may hold itself
    while waiting and len(found) + len(tensors) < MOST_VALUES:
        place, level, container = waiting.popleft()
        if id(container) in seen or level == MOST_LEVELS:
            continue
        seen.add(id(container))
        for i, (key, value) in enumerate(_entries(container)):
            name = key[:MOST_CHARACTERS] if isinstance(key, str) else str(i)
            inner = f"{place}.{name}" if place else name
            if name not in SHARED:
                waiting.append((inner, level + 1, value))
            elif isinstance(value, PickledTensor):
                if value.dtype in NUMBERS and math.prod(value.shape) == 1:
                    tensors[inner] = value
            elif isinstance(value, (str, float)) or is_size(value):
                found[inner] = str(value)[:MOST_CHARACTERS]
    return found | _numbers(path, loaded, tensors)


def _entries(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, PickledObject):
        return container.fields().items()
    if isinstance(container, dict):
        return container.items()
    return enumerate(container) if isinstance(container, (list, tuple)) else ()


def _numbers(path: Path, loaded: Pickle, tensors: Mapping[str, PickledTensor]) -> dict[str, str]:
    """The values of tensors of one number."""
    if not tensors:
        return {}
    found = {}
    descriptor = open_to_read(path)
    try:
        for tensor in shard_of(path, loaded, tensors).header.tensors:
            data = bytearray(tensor.end - tensor.begin)
            read_fully(descriptor, memoryview(data), tensor.begin, path, tensor.name)
            found[tensor.name] = str(np.frombuffer(data, DTYPES[tensor.dtype].storage)[0].item())
    finally:
        os.close(descriptor)
    return found
