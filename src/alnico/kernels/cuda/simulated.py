"""The instructions of a GPU in plain Python, for the simulator: the names of instructions.py

An address is :class:`Numbers`.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Numbers:
    """An address in the simulator: numbers that can be loaded and stored by their place."""

    def __init__(self, array: Any) -> None:
        self.array = array


_adding = threading.Lock()


def _load(_name: str, _is_constant: bool = True) -> Callable[..., Any]:
    return lambda cells, place: cells.array[place]


def _load4(_name: str) -> Callable[..., Any]:
    return lambda cells, place: tuple(cells.array[4 * place : 4 * place + 4])


def _store(_name: str) -> Callable[..., Any]:
    return lambda cells, place, value: operator.setitem(cells.array, place, value)


def _store4(_name: str) -> Callable[..., Any]:
    return lambda cells, place, *values: operator.setitem(
        cells.array, slice(4 * place, 4 * place + 4), values
    )


def _add(_name: str) -> Callable[..., Any]:
    def add(cells: Numbers, place: int, value: int) -> Any:
        with _adding:
            before = int(cells.array[place])
            cells.array[place] = before + value
        return before

    return add


def _bits(_before: str, after: str) -> Callable[..., Any]:
    dtype = np.dtype(after)
    return lambda value: value.view(dtype)


def product(a: Any, b: Any) -> Any:
    """``a * b``, rounded before anything is added to it."""
    return a * b


def quotient(a: Any, b: Any) -> Any:
    """``a / b``."""
    return a / b


def select(condition: Any, chosen: Any, other: Any) -> Any:
    """``chosen if condition else other``, in the wider of their types."""
    if type(chosen) is type(other):
        return chosen if condition else other
    return np.result_type(chosen, other).type(chosen if condition else other)


def address_at(table: Numbers, place: int) -> Any:
    """An address out of a table of addresses."""
    return table.array[place]


root, with_sign = np.sqrt, np.copysign


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function one that kernels call."""
    return function


load_u8, load_u16, load_u32, load_u64 = (_load(name) for name in ("u8", "u16", "u32", "u64"))
load_i64, load_f32, load_f64 = (_load(name) for name in ("i64", "f32", "f64"))
reload_f64 = _load("f64", False)
load4_u8, load4_u16, load4_u32, load4_u64 = (_load4(name) for name in ("u8", "u16", "u32", "u64"))
store_u16, store_u32, store_u64 = (_store(name) for name in ("u16", "u32", "u64"))
store_i64, store_f32, store_f64 = (_store(name) for name in ("i64", "f32", "f64"))
store4_u16, store4_u32, store4_u64 = (_store4(name) for name in ("u16", "u32", "u64"))
add_u32, add_u64 = _add("u32"), _add("u64")
float_of, bits_of = _bits("uint32", "float32"), _bits("float32", "uint32")
double_of, long_of = _bits("uint64", "float64"), _bits("float64", "uint64")
