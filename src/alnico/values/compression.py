"""Compresses a task vector: the leading singular vectors of each matrix, and every other tensor whole."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from alnico.checkpoint.files import read_fully, write_fully
from alnico.checkpoint.output_path import Replace
from alnico.checkpoint.task_vector_file import LEFT, RIGHT
from alnico.engine.matrix_gpu import Decomposer, kind_of, matrix_gpus
from alnico.errors import AlnicoError, RecipeError, ResourceError
from alnico.events import Advanced, Reading, Watcher
from alnico.methods import find
from alnico.methods.base import MatrixMethod
from alnico.methods.shared.singular_vectors import rank_of_each
from alnico.notebook import ResultTable, never_fails, result_html, result_line
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.low_rank import Decomposed
from alnico.numerics.numbers import finite_number
from alnico.numerics.sizes import count_of, format_size
from alnico.plan.job import Job
from alnico.plan.memory import BASELINE_BYTES, BLAS_BYTES, BYTES_A_TENSOR
from alnico.plan.statistics_inputs import why_no_matrix
from alnico.run_options import RunOptions
from alnico.threads import Crew
from alnico.values.differences import Differences
from alnico.values.operands import Term
from alnico.values.task_vector_output import Put, StoredTensor, TaskVectorFiles

StoredTables = Literal["whole", "matrix"]
"""How tables of tokens and positions, and token heads, are stored: whole, or as the factors of a matrix."""

BLOCK = 1 << 18
"""Elements compared at a time."""


@dataclass(frozen=True)
class CompressedTensor:
    """What is stored of one tensor.

    ``rank`` is the number of singular vectors that are kept, of each matrix if there are several; None for a tensor that is
    whole. ``error`` is ``|D - L R| / |D|`` of the stored values, in float64; 0 where nothing is lost.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    bytes: int
    whole_bytes: int
    error: float


@dataclass(frozen=True)
class Compression:
    """A compressed task vector: where it is, its size, and what it lost.

    ``bytes`` and ``whole_bytes`` are those of all tensors, compressed and as :meth:`TaskVector.save` writes them. ``error``
    is the norm of what is lost, relative to that of the task vector.
    """

    path: Path
    bytes: int
    whole_bytes: int
    error: float
    tensors: tuple[CompressedTensor, ...] = field(repr=False)

    @property
    def share(self) -> float:
        """The size relative to that of the whole task vector."""
        return self.bytes / self.whole_bytes if self.whole_bytes else 1.0

    def data(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "whole_bytes": self.whole_bytes,
            "error": self.error,
            "tensors": [vars(tensor) for tensor in self.tensors],
        }

    def __repr__(self) -> str:
        factored = sum(t.rank is not None for t in self.tensors)
        return result_line(
            f"compressed task vector in {self.path}",
            f"{format_size(self.bytes)}, {self.share:.1%} of {format_size(self.whole_bytes)}",
            f"{count_of(factored, 'tensor')} of {len(self.tensors)} in factors",
            f"relative error {self.error:.3g}",
        )

    @never_fails
    def _repr_html_(self) -> str:
        rows = [[t.name, "whole" if t.rank is None else t.rank, t.bytes, t.error] for t in self.tensors]
        return result_html(
            "Compressed task vector",
            ResultTable(("tensor", "rank", "bytes", "error"), rows),
            facts=[
                ("path", self.path),
                ("size", format_size(self.bytes)),
                ("whole", format_size(self.whole_bytes)),
                ("error", self.error),
            ],
        )


@dataclass(frozen=True)
class Kept:
    """How much of each matrix is kept: a share of its rank, or of its squares."""

    rank: float | None
    energy: float | None
    embeddings: StoredTables = "whole"

    @classmethod
    def of(cls, rank: Any, energy: Any, embeddings: Any) -> Kept:
        """Check the options of a caller. Errors: RecipeError."""
        given = [(name, v) for name, v in (("rank", rank), ("energy", energy)) if v is not None]
        if len(given) != 1:
            raise RecipeError(
                f"{'rank and energy are both given' if given else 'neither rank nor energy is given'}; expected one of the "
                "two. rank=0.125 keeps an eighth of all singular vectors, energy=0.9 as many as hold 0.9 of the squares."
            )
        name, value = given[0]
        if not 0 < finite_number(value, name) <= 1:
            raise RecipeError(f"{name} is {value:g}; expected a share in (0, 1].")
        if embeddings not in get_args(StoredTables):
            raise RecipeError(f"embeddings is {embeddings!r}; expected whole or matrix. Choose one.")
        return cls(rank, energy, embeddings)

    def most(self, rows: int, columns: int) -> int:
        """The most singular vectors that a matrix keeps."""
        return min(rows, columns) if self.rank is None else rank_of_each(self.rank, rows, columns, 1)

    def cut(self, found: Decomposed) -> Decomposed:
        """Leave out what is not kept."""
        if self.energy is None or not found.rank:
            return found
        squares = (found.values / found.values[0]) ** 2
        count = int(np.searchsorted(np.cumsum(squares), self.energy * squares.sum() * (1 - 1e-12))) + 1
        return Decomposed(found.left[:, :count], found.values[:count], found.right[:count])

    def text(self) -> str:
        return f"rank {self.rank:g}" if self.rank is not None else f"energy {self.energy:g}"

    def data(self) -> dict[str, Any]:
        return {
            **({"rank": self.rank} if self.rank is not None else {"energy": self.energy}),
            "embeddings": self.embeddings,
        }


@dataclass
class _Factors:
    """The factors of one matrix: their place in the spool (-1: zeros), the rank, the norms of the matrix and of what is lost."""

    place: int
    rank: int
    norm: float
    lost: float


def compress_task_vector(
    differences: Differences,
    terms: Sequence[Term],
    target: Path,
    kept: Kept,
    *,
    run: RunOptions,
    max_shard_bytes: int,
    overwrite: Replace,
    watch: Watcher | None = None,
) -> Compression:
    """Write the compressed tensors of the only task vector of ``differences``.

    Errors: OutputError, ResourceError, RunError; those of reading.
    """
    jobs = {job.name: job for job in differences.stored}
    gpus = matrix_gpus(run.device)
    options = kept.data() | ({"device": kind_of(gpus)} if gpus else {})
    files = TaskVectorFiles(target, terms, max_shard_bytes, kept.text(), options)
    whole = [(name, differences.dtype(job), job.shape) for name, job in jobs.items()]
    files.check_room(differences, whole, overwrite)
    matrices = [job for job in jobs.values() if _is_matrix(job, kept)]
    threads = _fit(matrices, kept, differences, run)
    differences.fetch()
    with files.part(overwrite) as part, tempfile.TemporaryFile(dir=part.path) as spool:
        work = _Compressing(differences, kept, spool.fileno(), target, Decomposer(gpus))
        with one_blas_thread(), Crew(threads, watch) as crew:
            crew.report(Reading(len(matrices), sum(8 * job.elements for job in matrices)))
            crew.run([(work.factorise, (job, i, crew)) for job in matrices for i in range(job.stack[0])])
            crew.run([(work.find_zeros, (job, crew)) for job in jobs.values() if job not in matrices])
        stored, described = _layout(work, jobs)
        files.write(part, stored, lambda name, put: work.write(jobs, name, put))
    norms = [work.norm_of(job) for job in jobs.values()]
    lost = math.hypot(*(one.error * norm for one, norm in zip(described, norms, strict=True)))
    return Compression(
        target,
        sum(t.bytes for t in described),
        sum(t.whole_bytes for t in described),
        lost / total if (total := math.hypot(*norms)) else 0.0,
        tuple(described),
    )


def _is_matrix(job: Job, kept: Kept) -> bool:
    """Is a tensor a matrix, or a stack of them, for methods over whole matrices?"""
    tables = "matrix" if kept.embeddings == "matrix" else "others"
    method = find("tsv").bind({"embeddings": tables}, 2)
    assert isinstance(method, MatrixMethod)
    return not why_no_matrix(job.name, job.shape, method)


def _fit(matrices: Sequence[Job], kept: Kept, differences: Differences, run: RunOptions) -> int:
    """Return how many matrices at a time the budget holds. Errors: ResourceError."""
    fixed = (
        BASELINE_BYTES
        + BYTES_A_TENSOR * len(differences.plan.jobs)
        + sum(s.held_bytes + s.reading_bytes for s in differences.plan.sources)
    )

    def needed(job: Job) -> int:
        _, rows, columns = job.stack
        numbers = 2 * rows * columns + 6 * min(rows, columns) ** 2
        return 8 * (numbers + 3 * kept.most(rows, columns) * (rows + columns)) + BLAS_BYTES

    largest = max(matrices, key=needed, default=None)
    if largest is None:
        return 1
    threads = min((run.memory_bytes - fixed) // needed(largest), run.threads)
    if threads < 1:
        least = fixed + needed(largest)
        raise ResourceError(
            f"compress: {largest.name} is decomposed as a whole matrix and needs {format_size(needed(largest))} at once, "
            f"all of it {format_size(least)}; the budget is {format_size(run.memory_bytes)}. Raise memory to "
            f"{-(-least // (1 << 20))}MiB."
        )
    return threads


class _Compressing:
    """The factors of all matrices, in a temporary file until their ranks are known."""

    def __init__(
        self,
        differences: Differences,
        kept: Kept,
        descriptor: int,
        target: Path,
        decomposer: Decomposer,
    ) -> None:
        self._decomposer = decomposer
        self._differences = differences
        self._kept = kept
        self._descriptor = descriptor
        self._target = target
        self._end = 0
        self.factors: dict[str, dict[int, _Factors]] = {}
        self._whole_norms: dict[str, list[float]] = {}

    def real(self, job: Job) -> np.dtype[Any]:
        return np.dtype(np.float64 if self._differences.dtype(job) == "F64" else np.float32)

    def factorise(self, job: Job, index: int, crew: Crew) -> None:
        """Decompose one matrix of a tensor, and put its factors aside. Errors: those of reading."""
        _, rows, columns = job.stack
        size = rows * columns
        real = self.real(job)
        matrix = np.empty((rows, columns))
        flat = matrix.reshape(-1)

        def put(offset: int, raw: np.ndarray) -> None:
            crew.check()
            values = raw.view(real)
            first = offset // real.itemsize - index * size
            flat[first : first + values.size] = values

        self._differences.write(job, put, (index * size, (index + 1) * size))
        crew.check()
        most = self._kept.most(rows, columns)
        found = self._kept.cut(self._decomposer.leading(job.name, matrix, most, crew.check))
        left, right = (x.astype(real) for x in found.factors(max(found.rank, 1)))
        norm, lost = _norms(matrix, left, right)
        crew.check()
        data = np.concatenate([left.reshape(-1), right.reshape(-1)]).view(np.uint8)
        with crew.lock:
            place, self._end = self._end, self._end + data.nbytes
            self.factors.setdefault(job.name, {})[index] = _Factors(place, left.shape[1], norm, lost)
        write_fully(self._descriptor, memoryview(data), place, self._target, job.name)
        crew.report(Advanced(job.name, 8 * size))

    def find_zeros(self, job: Job, crew: Crew) -> None:
        """Give a tensor that did not change, such as a frozen table, factors of zeros. Errors: those of reading."""
        if len(job.shape) < 2 or not job.elements:
            return
        for _, values in self._differences.blocks(job):
            crew.check()
            if values.any():
                return
        with crew.lock:
            self.factors[job.name] = {i: _Factors(-1, 1, 0.0, 0.0) for i in range(job.stack[0])}

    def rank(self, job: Job) -> int | None:
        """The rank of the factors of each matrix of a tensor; None where they would be no smaller than the tensor."""
        if job.name not in self.factors:
            return None
        _, rows, columns = job.stack
        rank = max(one.rank for one in self.factors[job.name].values())
        return rank if rank * (rows + columns) < rows * columns else None

    def norm_of(self, job: Job) -> float:
        """The norm of a tensor: of one in factors, or of one that was written."""
        of_matrices = self.factors.get(job.name, {})
        norms = [one.norm for one in of_matrices.values()] or self._whole_norms[job.name]
        return math.hypot(*norms)

    def lost_of(self, job: Job) -> float:
        return math.hypot(*(one.lost for one in self.factors[job.name].values()))

    def write(self, jobs: dict[str, Job], name: str, put: Put) -> None:
        """Pass the bytes of a stored tensor: one that is whole, or a factor."""
        if name in jobs:
            self._write_whole(jobs[name], put)
            return
        is_left = name.endswith(LEFT)
        job = jobs[name.removesuffix(LEFT if is_left else RIGHT)]
        count, rows, columns = job.stack
        rank, at = self.rank(job), 0
        assert rank is not None
        for index in range(count):
            one = self.factors[job.name][index]
            real = self.real(job)
            shape = (rows, one.rank) if is_left else (one.rank, columns)
            values = np.zeros(shape, real)
            place = one.place if is_left else one.place + rows * one.rank * real.itemsize
            if one.place >= 0:
                read_fully(self._descriptor, memoryview(values).cast("B"), place, str(self._target))
            padded = np.zeros((rows, rank) if is_left else (rank, columns), real)
            padded[:, : one.rank] = values if is_left else 0
            if not is_left:
                padded[: one.rank] = values
            put(at, padded.reshape(-1).view(np.uint8))
            at += padded.nbytes

    def _write_whole(self, job: Job, put: Put) -> None:
        norms = self._whole_norms[job.name] = [0.0]
        real = self.real(job)

        def put_and_measure(offset: int, raw: np.ndarray) -> None:
            norms.append(_norm(raw.view(real).astype(np.float64)))
            put(offset, raw)

        self._differences.write(job, put_and_measure)


def _layout(work: _Compressing, jobs: dict[str, Job]) -> tuple[list[StoredTensor], list[CompressedTensor]]:
    """Return the tensors to write, and what they store of each tensor. Errors: AlnicoError for a name that both have."""
    stored: list[StoredTensor] = []
    described: list[CompressedTensor] = []
    for name, job in jobs.items():
        count, rows, columns = job.stack if len(job.shape) > 1 else (1, 1, job.elements)
        dtype = "F64" if work.real(job) == np.float64 else "F32"
        width = work.real(job).itemsize
        rank = work.rank(job)
        if rank is None:
            stored.append((name, dtype, job.shape))
            described.append(
                CompressedTensor(name, job.shape, None, width * job.elements, width * job.elements, 0.0)
            )
            continue
        stack = (count,) if job.shape[:-2] and job.shape[-2:] == (rows, columns) else ()
        rest = job.shape[len(stack) + 1 :]
        for ending, shape in ((LEFT, (*stack, rows, rank)), (RIGHT, (*stack, rank, *rest))):
            if name + ending in jobs:
                raise AlnicoError(
                    f"{name}{ending}: is a tensor of the task vector, and a factor of {name} would have its name; expected "
                    "other names. Rename the tensor."
                )
            stored.append((name + ending, dtype, shape))
        norm = work.norm_of(job)
        error = work.lost_of(job) / norm if norm else 0.0
        size = width * count * rank * (rows + columns)
        described.append(CompressedTensor(name, job.shape, rank, size, width * job.elements, error))
    return stored, described


def _norm(values: np.ndarray) -> float:
    """The norm of numbers, also of very large and small ones."""
    most = float(np.abs(values).max(initial=0.0))
    return most * float(np.linalg.norm((values / most).reshape(-1))) if most else 0.0


def _norms(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return the norms of a matrix and of what its factors lose; their product is rounded as it is when it is read."""
    rows, columns = matrix.shape
    height = max(BLOCK // max(columns, 1), 1)
    norms, lost = [], []
    wide = right.astype(np.float64)
    for first in range(0, rows, height):
        part = matrix[first : first + height]
        product = (left[first : first + height].astype(np.float64) @ wide).astype(left.dtype)
        norms.append(_norm(part))
        lost.append(_norm(part - product))
    return math.hypot(*norms), math.hypot(*lost)


__all__ = ["CompressedTensor", "Compression", "Kept", "StoredTables", "compress_task_vector"]
