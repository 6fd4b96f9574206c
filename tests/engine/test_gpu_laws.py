"""Merges on GPUs, in numba-cuda's simulator: for every method of the registry, the bytes of a merge on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alnico.methods import registry
from engine.simulated_merges import CLAIMS, OTHERS

TESTS = Path(__file__).parents[1]


OF_EACH_KIND = (
    "linear",
    "slerp",
    "ties",
    "dare_ties",
    "della",
    "sce",
    "passthrough",
    "fisher",
    "tsv",
    "regmean",
)
"""A method of each way to compute a tensor. Two claims are checked with these in each run, and all with every method each night."""

AROUND_KERNELS = [claim for claim in CLAIMS if claim != "files_on_one_gpu"]


def simulated(claim: str, *methods: str) -> str:
    """Return what a process prints that checks a claim in the simulator, for some methods or all."""
    ended = subprocess.run(
        [sys.executable, "-m", "engine.simulated_merges", claim, *methods],
        cwd=TESTS,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return ended.stdout


@pytest.mark.parametrize(
    ("claim", "methods"),
    [
        pytest.param(
            "files_on_one_gpu",
            ("linear", "ties", "dare_ties"),
            marks=[pytest.mark.slow, pytest.mark.before_each_merge],
        ),
        *(
            pytest.param(claim, OF_EACH_KIND, marks=pytest.mark.slow)
            for claim in ("files_on_two_gpus", "in_memory")
        ),
        pytest.param("files_on_one_gpu", (), marks=pytest.mark.nightly),
        *(pytest.param(claim, (), marks=pytest.mark.nightly) for claim in AROUND_KERNELS),
    ],
)
def test_a_merge_on_a_gpu_has_the_bytes_of_the_processor(claim: str, methods: tuple[str, ...]) -> None:
    """Whole matrices, which torch computes, agree to a unit in the last place; all others in every bit."""
    pytest.importorskip("numba_cuda")
    pytest.importorskip("torch")
    problems = dict(json.loads(line) for line in simulated(claim, *methods).splitlines())
    assert problems == {name: [] for name in methods or registry()}


@pytest.mark.slow
@pytest.mark.parametrize("claim", OTHERS)
def test_in_the_simulator(claim: str) -> None:
    """The claims, and what their names mean, are in simulated_merges.py."""
    pytest.importorskip("numba_cuda")
    assert simulated(claim) == ""
