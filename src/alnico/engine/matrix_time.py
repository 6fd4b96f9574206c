"""Foretells how long the whole matrices of a plan take on this machine, and how much memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from alnico.devices import Device
from alnico.engine.matrix_gpu import MatrixGpu
from alnico.numerics.arrays import library_of, to_numpy
from alnico.numerics.blas import one_blas_thread
from alnico.plan.job import Job, Plan
from alnico.plan.memory import gpu_matrix_bytes, whole_bytes

PROBE_SIDE = 512
"""The side of the matrix whose eigenvectors are found to measure the machine, in about 30 ms."""

GPU_PROBE_SIDE = 1024
"""The side of the matrix that a GPU is measured with."""

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
    does not count its operations. Without ``operations_per_second``, this machine is measured (:func:`measure_rate`).

    On GPUs the memory is theirs. Each is taken to compute one matrix after the other, though several at once take less time.
    """
    jobs = [job for job in plan.jobs if job.matrix is not None]
    if not jobs or any(job.matrix is None or job.matrix.operations is None for job in jobs):
        return None
    at_once = min(plan.memory.threads, len(jobs))
    on_gpus = bool(plan.gpus) and all(job.matrix is not None and job.matrix.runs_on_gpu for job in jobs)
    rate = operations_per_second or (measure_gpu_rate(plan.gpus[0]) if on_gpus else measure_rate())
    work = [operations_of(job) for job in jobs]
    sharing = min(len(plan.gpus), len(jobs)) if on_gpus else at_once
    largest = max(map(gpu_matrix_bytes if on_gpus else whole_bytes, jobs))
    return MatrixForecast(len(jobs), largest, at_once, max(sum(work) / sharing, *work, 0.0) / rate)


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


def measure_gpu_rate(device: Device) -> float:
    """Return the operations per second of a GPU on a matrix of :data:`GPU_PROBE_SIDE`. Larger ones are faster; by how much has
    not been measured. Errors: as for :class:`alnico.engine.matrix_gpu.MatrixGpu`."""
    gpu = MatrixGpu(device)
    values = np.random.default_rng(0).standard_normal((GPU_PROBE_SIDE, GPU_PROBE_SIDE))
    product = gpu.matrix(values @ values.T)
    linear = library_of(product).linalg
    to_numpy(linear.eigh(product)[0])  # the first call starts the libraries
    begin = time.perf_counter()
    to_numpy(linear.eigh(product)[0])
    return EIGENVECTORS * GPU_PROBE_SIDE**3 / (time.perf_counter() - begin)
