"""Foretells how long the whole matrices of a plan take on this machine, and how much memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from alnico.numerics.blas import one_blas_thread
from alnico.plan.job import Job, Plan
from alnico.plan.memory import whole_bytes

PROBE_SIDE = 512
"""The side of the matrix whose eigenvectors are found to measure the machine, in about 30 ms."""

EIGENVECTORS = 9.0
"""Operations to find all eigenvectors of a symmetric matrix, divided by the cube of its side, as methods count them."""

LARGE = 1.45
"""How much faster large matrices are per operation than the probe; measured at 2,048 and 4,096 (AMD EPYC, AVX-512)."""


@dataclass(frozen=True)
class MatrixForecast:
    """What the whole matrices of a plan take: ``tensors`` of them, ``largest_bytes`` for the largest, ``at_once`` at the
    same time, and about ``seconds`` in all."""

    tensors: int
    largest_bytes: int
    at_once: int
    seconds: float


def forecast_matrices(plan: Plan, operations_per_second: float | None = None) -> MatrixForecast | None:
    """Foretell time and memory of the tensors that are merged as whole matrices; None if there are none, or if their method
    does not count its operations. Without ``operations_per_second``, this machine is measured (:func:`measure_rate`)."""
    jobs = [job for job in plan.jobs if job.matrix is not None]
    if not jobs or any(job.matrix is None or job.matrix.operations is None for job in jobs):
        return None
    at_once = min(plan.memory.threads, len(jobs))
    rate = operations_per_second or measure_rate()
    work = [operations_of(job) for job in jobs]
    return MatrixForecast(
        len(jobs), max(map(whole_bytes, jobs)), at_once, max(sum(work) / at_once, *work, 0.0) / rate
    )


def operations_of(job: Job) -> float:
    """Return the floating-point operations of a whole matrix, or of a stack of them."""
    assert job.matrix is not None
    assert job.matrix.operations is not None
    count, rows, columns = job.stack
    return count * job.matrix.operations(rows, columns, len(job.inputs), *job.matrix.arguments)


def measure_rate() -> float:
    """Return the operations per second of one thread of this machine on large matrices, from a small one."""
    values = np.random.default_rng(0).standard_normal((PROBE_SIDE, PROBE_SIDE))
    product = values @ values.T
    with one_blas_thread():
        np.linalg.eigh(product[:64, :64])  # the first call starts the library
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            np.linalg.eigh(product)
            seconds.append(time.perf_counter() - begin)
    return LARGE * EIGENVECTORS * PROBE_SIDE**3 / min(seconds)
