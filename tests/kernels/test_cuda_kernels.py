"""Kernels of a GPU, in numba-cuda's simulator: the bits of the processor's kernels, for every method and every dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.simulated_gpu import CLAIMS

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_in_the_simulator_a_gpu_gives_the_bits_of_the_processor(claim: str) -> None:
    """Every byte that a kernel writes, not only within a unit in the last place."""
    pytest.importorskip("numba_cuda")
    ended = subprocess.run(
        [sys.executable, "-m", "kernels.simulated_gpu", claim],
        cwd=TESTS,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    if claim.startswith("methods"):
        assert {"MixKernel", "bracket", "values"} <= set(ended.stdout.split())
