"""A whole matrix merged by TSV: alnico, and the same steps by float32 `torch.linalg.svd`, in one thread of one process each.

    python benchmarks/spectral_speed.py --shape 4096x4096 --shape 14336x4096       # seconds
    python benchmarks/spectral_speed.py --shape 4096x4096 --rank 0.25              # a quarter of the singular vectors
    python benchmarks/spectral_speed.py --error 2048                               # distance from float64, full SVD
    python benchmarks/spectral_speed.py --shape 14336x4096 --device cuda           # a GPU, and two cores

The steps are N decompositions, the polar factors of the stacked left and right singular vectors, their sum, the projection scale and
the sum times it. alnico's run its own code (`alnico.methods.tsv`) on arrays in memory, in float64; torch has a full SVD for each
decomposition and polar factor. Task vectors are products of Gaussian matrices with singular values near i^-0.5, in float32. Each program
runs once, in turn, with BLAS in one thread; CPU seconds stand beside the seconds, since machines are shared.

With `--device` alnico's code alone runs: on the GPU, which gets the task vectors out of the processor's memory as in a merge, first
one matrix alone, then several at once (`--at-once`), each in its own thread and stream; and on two cores, which merge two matrices at
once. Seconds are those of a matrix: of several at once, their share. The difference is the largest of an entry, as a share of the
largest entry. `--device made` is torch on the processor, to try the script.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from alnico.devices import Device, devices_for, made_gpus
from alnico.engine.matrix_gpu import MatrixGpu, MatrixRoom
from alnico.methods import registry
from alnico.methods.base import MatrixMethod
from alnico.numerics.arrays import AnyArray, to_numpy
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.low_rank import Decomposed

DECAY = -0.5


def task_vector(rows: int, columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    side = min(rows, columns)
    left = random.standard_normal((rows, side), np.float32) / np.float32(np.sqrt(rows))
    right = random.standard_normal((side, columns), np.float32) / np.float32(np.sqrt(columns))
    return (left * np.arange(1, side + 1, dtype=np.float32) ** DECAY) @ right


class ArrayMatrices:
    """Task vectors in memory, as a method reads them."""

    is_transposed = False

    def __init__(self, values: list[np.ndarray]) -> None:
        self._values = values
        self.models, self.shape = len(values), values[0].shape
        self.whole = self.shape

    def value(self, model: int) -> np.ndarray:
        return self._values[model].astype(np.float64)

    def side(self, kind: str, model: int) -> np.ndarray:
        raise NotImplementedError

    def leading(self, model: int, count: int) -> Decomposed:
        return leading_vectors(self.value(model), count)

    def kept(self, name: object, models: object, make: object) -> tuple[np.ndarray, ...]:
        return make()

    def note(self, text: str, *values: float) -> None:
        print("note:", text.format(*values))


class GpuMatrices(ArrayMatrices):
    """Task vectors in memory, as a method reads them on a GPU."""

    def __init__(self, values: list[np.ndarray], gpu: MatrixGpu) -> None:
        super().__init__(values)
        self._gpu = gpu

    def value(self, model: int) -> AnyArray:
        return self._gpu.matrix(self._values[model]).double()

    def kept(self, name: object, models: object, make: object) -> tuple[AnyArray, ...]:
        return tuple(map(self._gpu.compact, make()))


def by_alnico(values: list[np.ndarray], rank: float = 1.0, gpu: MatrixGpu | None = None) -> np.ndarray:
    method = registry()["tsv"].bind({"least": 0.0, "rank": rank}, len(values))
    assert isinstance(method, MatrixMethod)
    matrices = ArrayMatrices(values) if gpu is None else GpuMatrices(values, gpu)
    with one_blas_thread():
        return to_numpy(method.make(matrices, *method.arguments))


@dataclass(frozen=True)
class GpuRow:
    """Seconds for a matrix on a GPU, alone and with others at once, and on two cores; and the largest difference of the results."""

    device: str
    rows: int
    columns: int
    models: int
    rank: float
    at_once: int
    alone_seconds: float
    gpu_seconds: float
    two_core_seconds: float
    difference: float
    gpu_bytes: int

    def __str__(self) -> str:
        return (
            f"| {self.rows} x {self.columns} | {self.models} | {self.rank:g} | {self.alone_seconds:.2f} | {self.at_once} | "
            f"{self.gpu_seconds:.2f} | {self.two_core_seconds:.1f} | "
            f"{self.two_core_seconds / self.gpu_seconds:.1f} | {self.difference:.1e} | {self.gpu_bytes / 1e9:.2f} |"
        )


GPU_HEADER = (
    "| matrix | models | rank | GPU, alone, s | at once | GPU, each, s | two cores, each, s | times | difference | GPU memory, GB |\n"
    f"|{'---|' * 10}"
)


def gpu_row(
    device: Device, rows: int, columns: int, models: int = 4, rank: float = 1.0, at_once: int = 4
) -> GpuRow:
    """Merge one matrix by TSV on a GPU and on two cores."""
    gpu = MatrixGpu(device)
    values = [task_vector(rows, columns, seed) for seed in range(models)]
    by_alnico([value[:96, :80].copy() for value in values], rank, gpu)  # the first call starts the libraries
    is_cuda, room = device.torch_name != "cpu", MatrixRoom()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device.torch_name)
    begin = time.perf_counter()
    found = by_alnico(values, rank, gpu)
    alone = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(device.torch_name) if is_cuda else 0

    def on_gpu(_: int) -> None:
        with room.taken(device, "the matrix", peak):
            by_alnico(values, rank, gpu)

    begin = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(on_gpu, range(at_once)))
    each = (time.perf_counter() - begin) / at_once
    begin = time.perf_counter()
    with one_blas_thread(), ThreadPoolExecutor(2) as threads:
        expected, _ = threads.map(lambda _: by_alnico(values, rank), range(2))
    two_cores = (time.perf_counter() - begin) / 2
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    return GpuRow(str(device), rows, columns, models, rank, at_once, alone, each, two_cores, difference, peak)


def by_torch(values: list[np.ndarray], rank: float = 1.0, dtype: torch.dtype = torch.float32) -> np.ndarray:
    torch.set_num_threads(1)
    matrices = [torch.from_numpy(value).to(dtype) for value in values]
    count = int(rank * min(matrices[0].shape) / len(matrices))
    lefts, sizes, rights = [], [], []
    for matrix in matrices:
        left, size, right = torch.linalg.svd(matrix, full_matrices=False)
        lefts.append(left[:, :count].clone())
        sizes.append(size[:count])
        rights.append(right[:count].clone())
    both = []
    for stack in (torch.cat(lefts, 1), torch.cat(rights, 0)):
        left, _, right = torch.linalg.svd(stack, full_matrices=False)
        both.append(left @ right)
    merged = (both[0] * torch.cat(sizes)) @ both[1]
    scale = sum((m * m).sum() for m in matrices) / sum((m * merged).sum() for m in matrices)
    return (merged * scale).numpy()


def timed(make: object, values: list[np.ndarray], rank: float) -> tuple[float, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    make(values, rank)
    return time.perf_counter() - begin, time.process_time() - cpu


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", default=[], help="ROWSxCOLUMNS, may be repeated")
    parser.add_argument(
        "--error", type=int, default=0, help="side of a square matrix to compare with float64"
    )
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--rank", type=float, default=1.0, help="tsv's share of the singular vectors")
    parser.add_argument("--only-alnico", action="store_true")
    parser.add_argument(
        "--device", help="cuda or cuda:N: alnico on this GPU and on two cores; made tries it without one"
    )
    parser.add_argument("--at-once", type=int, default=4, help="matrices at once on the GPU")
    given = parser.parse_args()
    print(
        f"{platform.machine()}, numpy {np.__version__}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    if given.device:
        made = [Device("cuda:0", "made", 8 << 30)]
        with made_gpus(made) if given.device == "made" else nullcontext():
            (device, *_) = made if given.device == "made" else devices_for("merging", given.device)
            print(f"{device}\n{GPU_HEADER}")
            for shape in given.shape:
                rows, columns = map(int, shape.split("x"))
                print(gpu_row(device, rows, columns, given.models, given.rank, given.at_once), flush=True)
        return
    for shape in given.shape:
        rows, columns = map(int, shape.split("x"))
        values = [task_vector(rows, columns, seed) for seed in range(given.models)]
        own, own_cpu = timed(by_alnico, values, given.rank)
        line = f"| {rows} x {columns} | {given.models} | {given.rank:g} | {own:.1f} | {own_cpu:.1f} |"
        if not given.only_alnico:
            theirs, their_cpu = timed(by_torch, values, given.rank)
            line += f" {theirs:.1f} | {their_cpu:.1f} | {their_cpu / own_cpu:.1f} |"
        print(line, flush=True)
    if given.error:
        values = [task_vector(given.error, given.error, seed) for seed in range(given.models)]
        expected = by_torch(values, given.rank, torch.float64)
        own, theirs = (distance(make(values, given.rank), expected) for make in (by_alnico, by_torch))
        print(f"alnico {own:.1e}, torch float32 {theirs:.1e}")


if __name__ == "__main__":
    main()
