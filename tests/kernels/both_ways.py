"""Runs a kernel compiled and with numpy, and compares every byte that it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from alnico.kernels.build import Description, compile_kernel
from alnico.kernels.choice import Interpreted
from alnico.kernels.constants import WORD
from alnico.kernels.measure_kernels import MeasureKernel


def in_both_ways(kernel: Description) -> Callable[..., int]:
    """Return a function that calls the compiled kernel, after numpy has made the same of copies of the arguments."""
    compiled, interpreted = compile_kernel(kernel), Interpreted(kernel)

    def call(*arguments: Any) -> int:
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        result, other = compiled(*arguments), interpreted(*copies)
        if not compiled.interface.returns:
            compare(kernel, arguments, copies)
        elif result < 0:
            assert other < 0
            compare(kernel, arguments, copies)
        else:  # refused: the first element of the part with the fault, which differs in size
            assert other >= 0
        return result

    return call


def compare(kernel: Description, arguments: tuple[Any, ...], copies: list[Any]) -> None:
    for position, (by_compiled, by_numpy) in enumerate(zip(arguments, copies, strict=True)):
        if isinstance(by_compiled, np.ndarray):
            if isinstance(kernel, MeasureKernel) and kernel.reduction == "bracket" and position == 9:
                check_gathered(arguments[8][:, 1].tolist(), by_compiled, by_numpy)
            else:
                assert by_compiled.tobytes() == by_numpy.tobytes(), kernel


def check_gathered(counts: list[int], by_compiled: np.ndarray, by_numpy: np.ndarray) -> None:
    """What a bracket gathered, where there was room for it; behind it is whatever was there."""
    for n, count in enumerate(counts):
        if count + WORD <= by_compiled.shape[1]:
            assert by_compiled[n, :count].tobytes() == by_numpy[n, :count].tobytes()
