"""Candidates that are merged on a GPU, in numba-cuda's simulator: the values of the processor's merges, in the module's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.simulated_candidates import CLAIMS

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "claim",
    [pytest.param(c, marks=pytest.mark.nightly if n else pytest.mark.slow) for n, c in enumerate(CLAIMS)],
)
def test_in_the_simulator(claim: str) -> None:
    pytest.importorskip("numba_cuda")
    ended = subprocess.run(
        [sys.executable, "-m", "evaluation.simulated_candidates", claim],
        cwd=TESTS,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
