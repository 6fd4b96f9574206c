"""Chooses for each kernel whether to compile it or to run it with numpy, by the work there is for it.

Both give the same bits. A kernel that is compiled already, in this process or in the cache, is used as soon as the
work is worth loading it. One that is not is compiled once running it with numpy has taken, over all runs, about as
long as compiling takes: then neither choice costs more than twice the better one. Importing this file imports
neither numba nor llvmlite.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from alnico.kernels import build
from alnico.kernels.array_source import NoArrayForm
from alnico.kernels.build import MOST_KERNELS, Description, Kernel
from alnico.kernels.cache import read_kernel, read_spent, write_spent
from alnico.kernels.interpret_analysis import run_of
from alnico.kernels.template import KernelDescription

if TYPE_CHECKING:
    from alnico.kernels.cuda.kernel import CudaKernel
    from alnico.kernels.cuda.memory import GpuMemory

Backend = Literal["compiled", "interpreted"]

STEP_SECONDS = 0.3e-9
"""One operation of numpy on one float32, as a mean over the methods (benchmarks/first_use.py)."""

NEGLIGIBLE_SECONDS = 0.002
"""Work that is not counted: finding out which kernel it is takes as long."""

LOADING_SECONDS = 0.1
"""Work that is not worth looking for a compiled kernel: loading the first one takes as long."""

COMPILING_SECONDS = 3.0
"""What compiling a kernel takes, a part of importing numba included."""

_MOST_RECORDS = 4096

_forced: list[Backend] = []


class Interpreted:
    """A kernel that numpy runs, called as a :class:`Kernel` is."""

    def __init__(self, kernel: KernelDescription) -> None:
        self.interface = kernel.interface()
        self._run, steps = run_of(kernel)
        self.seconds = STEP_SECONDS * steps * (2 if kernel.real == "float64" else 1)
        """The estimated time for one element."""
        self._checks = [build._packer(kind, self.interface.models) for _, kind in self.interface.parameters]

    def __call__(self, *arguments: Any) -> int:
        if len(arguments) != len(self._checks):
            raise TypeError(f"the kernel takes {self.interface.signature()}; got {len(arguments)} arguments")
        for check, argument in zip(self._checks, arguments, strict=True):
            check(argument)
        with np.errstate(all="ignore"):
            return self._run(*arguments) or 0


Runnable = Kernel | Interpreted


class _ChosenKernel:
    """What was chosen for a kernel: ``interpreted`` until it is ``compiled``."""

    def __init__(self, kernel: KernelDescription) -> None:
        self.compiled: Kernel | None = None
        self.interpreted: Interpreted | None = None
        self.uncounted = 0.0
        """Seconds of work without compiling, not yet in the record of its text."""
        try:
            self.interpreted = Interpreted(kernel)
        except NoArrayForm:
            self.compiled = _compiled(kernel)


class _TimeSpent:
    """The seconds that kernels of one text have run in this process without being compiled."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.stored = 0.0
        """Of ``spent``, what the cache has been asked about and told."""
        self.before = 0.0
        """What earlier runs spent."""


def kernel_for(
    kernel: KernelDescription, elements: int = 0, gpu: GpuMemory | None = None
) -> Runnable | CudaKernel:
    """Return what runs a kernel: it compiled, or numpy. ``elements`` are those that it is about to be run on.

    Call it with all elements of a run before its first block; later calls for the same kernel, without a number,
    return what was chosen. With a ``gpu`` a kernel that mixes or measures runs there, on tensors in its memory,
    whatever there is to do; others run on the processor.
    """
    if gpu is not None:
        from alnico.kernels.cuda.kernel import CudaKernel, GpuDescription

        if isinstance(kernel, GpuDescription):
            return CudaKernel(kernel, gpu)
    if _forced:
        return _compiled(kernel) if _forced[-1] == "compiled" else _interpreted(kernel)
    choice = _choice(kernel)
    if choice.compiled is None and choice.interpreted is not None:
        choice.uncounted += elements * choice.interpreted.seconds
        if choice.uncounted >= NEGLIGIBLE_SECONDS:
            seconds, choice.uncounted = choice.uncounted, 0.0
            if _is_worth_compiling(kernel, seconds):
                choice.compiled = _compiled(kernel)
    chosen = choice.compiled or choice.interpreted
    assert chosen is not None
    return chosen


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Run every kernel that is chosen in a block, in all threads, in one way. For tests and measurements.

    Errors, where it is "interpreted": NoArrayForm for a kernel that numpy cannot run.
    """
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def forget() -> None:
    """Choose again for every kernel, as a new process does. For tests and measurements."""
    for cached in (_choice, _record, build.compile_kernel, build._load_or_compile):
        cached.cache_clear()


def _is_worth_compiling(kernel: KernelDescription, seconds: float) -> bool:
    """Whether a kernel is compiled already, or has run for long enough without."""
    text = build.text_of(cast("Description", kernel))
    record = _record(hashlib.sha256(text.encode()).digest())
    record.spent += seconds
    if record.spent - record.stored < LOADING_SECONDS:
        return False
    key = build._key(text)
    if read_kernel(key) is not None:
        return True
    record.before = max(record.before, read_spent(key) - record.stored)
    record.stored = record.spent
    if record.before + record.spent > COMPILING_SECONDS:
        return True
    write_spent(key, record.before + record.spent)
    return False


def _compiled(kernel: KernelDescription) -> Kernel:
    return build.compile_kernel(cast("Description", kernel))  # which asks for no more than the protocol has


@functools.lru_cache(maxsize=MOST_KERNELS)
def _choice(kernel: KernelDescription) -> _ChosenKernel:
    return _ChosenKernel(kernel)


@functools.lru_cache(maxsize=MOST_KERNELS)
def _interpreted(kernel: KernelDescription) -> Interpreted:
    return Interpreted(kernel)


@functools.lru_cache(maxsize=_MOST_RECORDS)
def _record(_digest: bytes) -> _TimeSpent:
    return _TimeSpent()
