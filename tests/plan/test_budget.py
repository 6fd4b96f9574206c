"""The budget: what fits is planned within it, what does not is refused with the figure that would do."""

from __future__ import annotations

import re

import pytest

from alnico.devices import Device, made_gpus
from alnico.errors import ResourceError
from alnico.kernels.constants import LEAF
from alnico.methods import find
from alnico.numerics.dtypes import DTYPES
from alnico.numerics.sizes import parse_size
from alnico.plan.job import Input, Job
from alnico.plan.memory import BASELINE_BYTES, BYTES_A_TENSOR, SELECTION_BYTES, fit_memory

MIB = 1 << 20


def mix(elements: int, models: int = 3, dtype: str = "BF16", method: str = "ties", **options: object) -> Job:
    """A job of ties that has to find thresholds, or of another method."""
    merge = find(method).bind({"density": 0.5} if method == "ties" else options, models)
    size = elements * DTYPES[dtype].bytes
    inputs = tuple(Input(i, "w", dtype, size) for i in range(models))
    base = Input(models, "w", dtype, size) if find(method).space == "delta" else None
    return Job("mix", "w", dtype, (elements,), elements, size, inputs, base, merge)


def copy(size: int) -> Job:
    return Job("copy", "w", "F32", (size // 4,), size // 4, size, (Input(0, "w", "F32", size),))


def test_a_small_merge_has_all_threads_and_large_blocks() -> None:
    memory = fit_memory([mix(100_000)], 2 << 30, 8, 4)
    assert memory.threads == 8
    assert memory.block_elements > LEAF


def test_a_gpu_of_any_size_will_do_where_all_is_copied() -> None:
    gpus = (Device("cuda:0", "Small", MIB),)
    with made_gpus(gpus):
        assert fit_memory([copy(1000)], 2 << 30, 8, 4, devices=gpus).gpu_bytes == 0
        with pytest.raises(ResourceError) as refused:
            fit_memory([copy(1000), mix(1000)], 2 << 30, 8, 4, devices=gpus)
    assert str(refused.value) == (
        "plan: the merge needs 539.1 MB of cuda:0 (Small, 1.0 MB); 1.0 MB are free. End other programs that use it, or choose "
        "another device, such as cpu."
    )


@pytest.mark.parametrize("budget", [400 * MIB, 512 * MIB, 1 << 30, 2 << 30, 64 << 30])
@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize(
    "jobs",
    [
        [mix(1_000_000_000, 8, "F32")],
        [mix(30_000_000), mix(100)],
        [mix(10**8, 2, method="linear")],
        [copy(10**10)],
        [],
    ],
    ids=["large", "middle", "linear", "copy", "nothing"],
)
def test_the_planned_peak_is_never_above_the_budget(jobs: list[Job], budget: int, threads: int) -> None:
    memory = fit_memory(jobs, budget, threads, 4 * len(jobs))
    assert memory.peak_bytes <= memory.budget_bytes == budget
    assert 1 <= memory.threads <= threads
    assert memory.peak_bytes >= BASELINE_BYTES + memory.threads * memory.worker_bytes
    assert memory.block_elements % LEAF == 0


@pytest.mark.parametrize(
    "job", [mix(10**7), mix(10**9, 8, "F64"), mix(100), mix(10**7, 2, method="linear"), copy(10**9)]
)
@pytest.mark.parametrize("tensors", [4, 40_000])
def test_a_refusal_names_the_budget_that_does(job: Job, tensors: int) -> None:
    with pytest.raises(ResourceError) as caught:
        fit_memory([job], 100 * MIB, 8, tensors)
    assert caught.value.exit_code == 7
    found = re.fullmatch(
        r"plan: the merge needs at least [\d.]+ MB of memory, the budget is 104\.9 MB\. Raise --memory to (\d+MiB)\.",
        str(caught.value),
    )
    assert found is not None
    enough = parse_size(found[1])
    memory = fit_memory([job], enough, 8, tensors)
    assert memory.block_elements == LEAF
    assert memory.peak_bytes <= enough
    with pytest.raises(ResourceError):
        fit_memory([job], enough - MIB, 8, tensors)


def test_less_memory_means_fewer_threads_and_smaller_blocks() -> None:
    job = mix(50_000_000, 5, "F32")
    fixed = BASELINE_BYTES + SELECTION_BYTES
    wide, middle, tight = (fit_memory([job], fixed + size * MIB, 16, 9) for size in (20_000, 200, 10))
    assert wide.threads == 16
    assert middle.threads == 16
    assert (tight.threads, tight.block_elements) == (1, LEAF)
    assert wide.block_elements > LEAF


def test_facts_of_rows_and_ranks_are_counted() -> None:
    plain, by_row = (
        fit_memory([mix(10**6, 2, method="model_stock", filter_wise=f)], 2 << 30, 1, 4).worker_bytes
        for f in (False, True)
    )
    assert by_row == plain + 8 * (2 * 4 + 6 * 2) * (
        1 + -(-(10**6) // LEAF)
    )  # a tensor of one dimension is one row
    dropped, ranked = (
        fit_memory([mix(10**6, 2, method=m, density=0.5)], 2 << 30, 1, 4) for m in ("dare_ties", "della")
    )
    assert ranked.worker_bytes - dropped.worker_bytes >= 10**6 * (
        8 + 8 + 4 + 2 * 4
    )  # the row is the whole tensor


def test_ten_thousand_tensors_cost_memory_too() -> None:
    few, many = fit_memory([mix(1000)], 2 << 30, 1, 4), fit_memory([mix(1000)], 2 << 30, 1, 10_004)
    assert many.peak_bytes - few.peak_bytes == 10_000 * BYTES_A_TENSOR


def test_more_models_need_more_memory_until_their_blocks_become_shorter() -> None:
    plans = [fit_memory([mix(1000, k)], 2 << 30, 1, 0) for k in range(1, 20)]
    of_block: dict[int, list[int]] = {}
    for plan in plans:
        of_block.setdefault(plan.block_elements, []).append(plan.peak_bytes)
    assert list(of_block) == [8 * LEAF, 4 * LEAF, LEAF]
    assert all(peaks == sorted(set(peaks)) for peaks in of_block.values())


@pytest.mark.parametrize("threads", [0, -3])
def test_no_threads_are_one(threads: int) -> None:
    assert fit_memory([mix(1000)], 2 << 30, threads, 4).threads == 1


def test_each_of_several_gpus_has_the_blocks_of_all_threads() -> None:
    """A thread makes tensors of any GPU, and has blocks on each."""
    gpus = [Device(f"cuda:{i}", "Made", 8 << 30) for i in range(2)]
    with made_gpus(gpus):
        one, two = (fit_memory([mix(10**8)], 8 << 30, 8, 4, devices=gpus[:n]) for n in (1, 2))
    assert one.threads == two.threads == 8
    assert one.gpu_bytes == two.gpu_bytes
