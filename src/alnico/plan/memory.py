"""Computes the peak memory of a run in advance; chooses threads and block size for a budget."""

from __future__ import annotations

from collections.abc import Sequence

from alnico.checkpoint.source import Source
from alnico.devices import CPU, Device, free_bytes
from alnico.errors import ResourceError
from alnico.kernels.constants import FEW_MODELS, LEAF, TILE
from alnico.kernels.facts import Bernoulli, Gram, Largest, Sum
from alnico.numerics.sizes import format_size
from alnico.plan.job import Job, MemoryPlan
from alnico.plan.remote_reads import largest_held

BASELINE_BYTES = 330 << 20
"""Resident size of the interpreter, numpy, numba and LLVM after compiling; measured: 240 to 300 MiB."""

BYTES_A_TENSOR = 2_000
"""Python objects for one input tensor and its job; measured."""

BLOCK_ELEMENTS = 8 * LEAF
"""The most elements that are read, mixed and written at a time on the processor."""

BLOCK_BYTES = 8 << 20
"""A block has fewer bytes than this in all inputs and the output together, unless it is one leaf: a larger one would leave the
cache."""

GPU_BLOCK_ELEMENTS = 32 * LEAF
"""The same on a GPU: a call of a kernel there takes as long as computing some hundred thousand elements."""

CUDA_BYTES = 512 << 20
"""The memory that a process needs to use a GPU, in the processor's memory and on the GPU, before any tensor: an estimate."""

HISTOGRAM_BYTES = 65_536 * 8
"""One model's counters while a kth largest magnitude is searched."""

DRAWN_BYTES = 1 << 19
"""The most bytes that one thread keeps of what was drawn for one model's tensor: a bit for each element."""

BLAS_BYTES = 32 << 20
"""The most memory that one BLAS thread allocates; measured with OpenBLAS."""

GPU_LIBRARY_BYTES = 256 << 20
"""The most memory of a GPU that cuBLAS and cuSOLVER take next to a matrix's numbers. Not measured."""

REMOTE_BYTES = 64 << 20
"""The memory of the libraries and connections by which models at URLs are read."""

SCRATCH_BYTES = 8 * TILE
"""What a kernel needs for each of many models: a tile of its values. The tiles of few are in the baseline."""

LEAST_AHEAD_BYTES = 32 << 20
MOST_AHEAD_BYTES = 1 << 30
"""The memory for tensors of models at URLs that are read before they are needed: the least, and the most unless a tensor that is
read several times needs more."""

SELECTION_BYTES = 32 << 20
"""The most bytes of candidate values while the kth largest magnitudes of a tensor are searched, over all
models."""


def fit_memory(
    jobs: Sequence[Job],
    budget_bytes: int,
    threads: int,
    tensors: int,
    sources: Sequence[Source] = (),
    devices: Sequence[Device] = (CPU,),
    keeps_factors: bool = False,
    reserved_bytes: int = 0,
) -> MemoryPlan:
    """Choose threads and a block size for a budget, and on GPUs for their free memory. ``tensors`` is the number of tensors of
    all inputs. ``keeps_factors``: decompositions of matrices are written to files. ``reserved_bytes`` are used by other work at the
    same time.

    If memory is short, first the blocks shrink, then the number of threads.
    Errors: ResourceError if one thread with the smallest block does not fit; it names a sufficient budget.
    """
    facts = max((_fact_bytes(j) for j in jobs), default=0) + max(
        (s.reading_bytes for s in sources), default=0
    )
    on_gpu = devices[0].is_gpu
    remote, of_matrix, of_held = largest_held(jobs, sources)
    least_ahead = max(min(remote, LEAST_AHEAD_BYTES), of_matrix)
    most_ahead = min(max(MOST_AHEAD_BYTES, of_held), remote)
    fixed = (
        sum(s.held_bytes for s in sources)
        + BASELINE_BYTES
        + reserved_bytes
        + least_ahead
        + (REMOTE_BYTES if remote else 0)
        + (CUDA_BYTES if on_gpu else 0)
        + BYTES_A_TENSOR * tensors
        + (SELECTION_BYTES if any(_levels(j) for j in jobs) else 0)
    )
    widths = [sum(i.width for i in j.read) + j.width for j in jobs if j.kind != "copy"]
    widest = max([2, *widths]) if widths else 16  # comparing bytes needs two buffers
    models = max((len(j.inputs) for j in jobs if j.is_computed), default=1)
    counters = models * HISTOGRAM_BYTES * 2 if any(_levels(j) for j in jobs) else 0
    counters += models * DRAWN_BYTES if any(_draws(j) for j in jobs) else 0
    scratch = models * SCRATCH_BYTES if models > FEW_MODELS else 0

    def held_bytes(job: Job) -> int:
        return host_matrix_bytes(job, keeps_factors=keeps_factors) if on_gpu else whole_bytes(job)

    largest = max((j for j in jobs if j.matrix is not None), key=held_bytes, default=None)
    whole = held_bytes(largest) if largest is not None else 0
    matrices = sum(j.matrix is not None for j in jobs)
    free = min(map(free_bytes, devices)) if on_gpu else 0
    for workers in range(max(threads, 1), 0, -1):
        for block in (*((GPU_BLOCK_ELEMENTS,) if on_gpu else ()), *_block_sizes(widest)):
            worker = (
                widest * block
                + counters
                + facts
                + scratch
                + max((_rank_bytes(j, block) for j in jobs), default=0)
            )
            peak = fixed + workers * worker + min(workers, matrices) * whole
            needed, most = _gpu_bytes(jobs, workers, block, facts) if on_gpu else (0, 0)
            if peak <= budget_bytes and needed <= free:
                ahead = max(least_ahead, min(least_ahead + budget_bytes - peak, most_ahead))
                return MemoryPlan(
                    budget_bytes, peak + ahead - least_ahead, workers, worker, block, min(most, free), ahead
                )
    if on_gpu:
        _refuse_small_gpu(jobs, devices, _gpu_bytes(jobs, 1, LEAF, facts)[0])
    least = (
        fixed
        + widest * LEAF
        + counters
        + facts
        + scratch
        + whole
        + max((_rank_bytes(j, LEAF) for j in jobs), default=0)
    )
    enough = f"{-(-least // (1 << 20))}MiB"
    if largest is not None and least - whole <= budget_bytes:
        raise ResourceError(
            f"plan: {largest.name} is merged as a whole matrix and needs "
            f"{format_size(whole)} at once, the merge {format_size(least)}; the budget is "
            f"{format_size(budget_bytes)}. Raise --memory to {enough}, or use another method for this tensor."
        )
    raise ResourceError(
        f"plan: the merge needs at least {format_size(least)} of memory, the budget is "
        f"{format_size(budget_bytes)}. Raise --memory to {enough}."
    )


def _block_sizes(widest: int) -> list[int]:
    """The sizes of blocks to try, for elements of so many bytes in all inputs and the output."""
    sizes = (BLOCK_ELEMENTS, BLOCK_ELEMENTS // 2)
    return [*(size for size in sizes if size * widest < BLOCK_BYTES), LEAF]


def _gpu_bytes(jobs: Sequence[Job], workers: int, block: int, facts: int) -> tuple[int, int]:
    """Return the memory of one GPU that so many threads need, and the most that they use: blocks of inputs and output, ranks,
    counters, and whole matrices, of which one must fit. Each thread may work on any GPU, and keeps its blocks there."""
    computed = [j for j in jobs if j.is_computed]
    if not computed:  # copies never go to a GPU
        return 0, 0
    widths = [sum(i.width for i in j.read) + j.width for j in computed if j.kind == "mix"]
    models = max((len(j.inputs) for j in computed), default=1)
    ranks = 4 * models if any(j.merge is not None and j.merge.uses_ranks for j in computed) else 0
    counters = models * HISTOGRAM_BYTES if any(_levels(j) for j in computed) else 0
    matrices = sorted(map(gpu_matrix_bytes, jobs), reverse=True)[:workers]
    worker = (max(widths, default=0) + ranks) * block + counters + facts
    blocks = CUDA_BYTES + workers * worker
    return blocks + max(matrices, default=0), blocks + sum(matrices)


def _refuse_small_gpu(jobs: Sequence[Job], devices: Sequence[Device], least: int) -> None:
    """Refuse a GPU without room for the smallest blocks. Errors: ResourceError."""
    device = min(devices, key=free_bytes)
    free = free_bytes(device)
    if least <= free:
        return
    largest = max(jobs, key=gpu_matrix_bytes)
    matrix = gpu_matrix_bytes(largest)
    needs = "needs"
    if matrix and least - matrix <= free:
        needs = f"merges {largest.name} as a whole matrix, which takes {format_size(matrix)}, and needs"
    raise ResourceError(
        f"plan: the merge {needs} {format_size(least)} of {device}; {format_size(free)} are free. End other programs that use it, "
        "or choose another device, such as cpu."
    )


def whole_bytes(job: Job) -> int:
    """Return the bytes to merge a whole matrix: float64 numbers and the work space of BLAS."""
    if job.matrix is None:
        return 0
    _, rows, columns = job.stack
    return 8 * job.matrix.numbers(rows, columns, len(job.inputs), *job.matrix.arguments) + BLAS_BYTES


def host_matrix_bytes(job: Job, *, keeps_factors: bool) -> int:
    """Return the bytes of the processor's memory to merge a whole matrix where there are GPUs: all of it if its method stays on
    the processor, else only what is kept of it in files, twice, on its way from the GPU and back."""
    if not gpu_matrix_bytes(job):
        return whole_bytes(job)
    _, rows, columns = job.stack
    kept = 2 * 8 * (rows + columns) * min(rows, columns) if keeps_factors else 0
    return kept + BLAS_BYTES


def gpu_matrix_bytes(job: Job) -> int:
    """Return the bytes of a GPU's memory to merge a whole matrix there; 0 if its method stays on the processor."""
    if job.matrix is None or not job.matrix.runs_on_gpu:
        return 0
    return whole_bytes(job) - BLAS_BYTES + GPU_LIBRARY_BYTES


def _levels(job: Job) -> bool:
    """Does a job measure facts of whole tensors before it merges?"""
    return (
        job.merge is not None
        and job.merge.copies is None
        and bool(any(job.merge.levels()) or job.merge.of_model)
    )


def _draws(job: Job) -> bool:
    """Are facts of a job measured of what is drawn?"""
    if not _levels(job):
        return False
    assert job.merge is not None
    facts = (f for level in job.merge.levels() for f in level if not isinstance(f, Gram))
    return any(isinstance(a, Bernoulli) for f in facts for a in f.arguments)


def _fact_bytes(job: Job) -> int:
    """Return the bytes of the facts and coefficients of all rows or columns of a tensor."""
    if not _levels(job) or not job.elements:
        return 0
    assert job.merge is not None
    extents = {fact.over for level in job.merge.levels() for fact in level if isinstance(fact, Gram)} - {
        "tensor"
    }
    models = len(job.inputs)
    numbers = 2 * models * models + 6 * models  # products, their square, cosines, coefficients
    count = {"row": job.elements // job.row, "column": job.columns}
    grams = sum(8 * numbers * (count[extent] + -(-job.elements // LEAF)) for extent in extents)
    if models > FEW_MODELS and any(isinstance(f, Gram) for level in job.merge.levels() for f in level):
        grams += 4 * models * (models + 1) * (-(-job.elements // LEAF) + 1)  # the parts of all leaves
    # Sums and largest values of rows: parts, results, and two steps of values derived from them.
    rows = sum(
        isinstance(f, Largest) or (isinstance(f, Sum) and f.over == "row")
        for level in job.merge.levels()
        for f in level
    )
    return grams + 4 * rows * 8 * models * (count["row"] + -(-job.elements // LEAF))


def _rank_bytes(job: Job, block: int) -> int:
    """Return the bytes to rank the complete rows around a block, in addition to their inputs."""
    if job.merge is None or not job.merge.uses_ranks:
        return 0
    elements = min(block + 2 * job.row, job.elements)
    models = len(job.inputs)
    widest = sum(i.width for i in job.read)
    return elements * (8 * models + 24) + (elements - min(block, elements)) * widest
