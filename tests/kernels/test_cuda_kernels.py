"""Kernels of a GPU, in numba-cuda's simulator: the bits of the processor's kernels, for every method and every dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alnico.devices import devices_here
from kernels.simulated_gpu import CLAIMS, SHARES

TESTS = Path(__file__).parents[1]


def ended(claim: str, *, simulates: bool) -> subprocess.CompletedProcess[str]:
    """A process that has checked a claim."""
    return subprocess.run(
        [sys.executable, "-m", "kernels.simulated_gpu", claim],
        cwd=TESTS,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulates))},
        capture_output=True,
        text=True,
    )


OTHER_METHODS = [f"methods_{n}_of_{SHARES}" for n in range(1, SHARES)]


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(claim, marks=pytest.mark.nightly if claim in OTHER_METHODS else pytest.mark.slow)
        for claim in CLAIMS
    ],
)
def test_in_the_simulator_a_gpu_gives_the_bits_of_the_processor(claim: str) -> None:
    """Every byte that a kernel writes, not only within a unit in the last place."""
    pytest.importorskip("numba_cuda")
    process = ended(claim, simulates=True)
    assert process.returncode == 0, process.stderr[-5000:]
    if claim.startswith("methods"):
        assert {"MixKernel", "bracket", "values"} <= set(process.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_gpu_gives_the_bits_of_the_processor(claim: str) -> None:
    if len(devices_here()) == 1:
        pytest.skip("this machine has no GPU that can be used")
    process = ended(claim, simulates=False)
    assert process.returncode == 0, process.stderr[-5000:]


@pytest.mark.parametrize(
    "step", [pytest.param(24, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_what_a_gpu_runs_rounds_as_the_processor_and_keeps_values_in_registers(
    step: int, tmp_path: Path
) -> None:
    """Every ``step``-th kernel that the methods need, compiled for two generations of GPUs."""
    pytest.importorskip("numba_cuda")
    file = tmp_path / "texts.json"
    command = [sys.executable, "-m", "kernels.gpu_code"]
    simulator = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    if subprocess.run([*command, "check", str(file), "0"], cwd=TESTS, capture_output=True).returncode == 77:
        pytest.skip("numba-cuda finds no toolkit; numba-cuda[cu13] brings one")
    subprocess.run([*command, "texts", str(file)], cwd=TESTS, env=simulator, capture_output=True, check=True)
    checked = subprocess.run(
        [*command, "check", str(file), str(step)], cwd=TESTS, capture_output=True, text=True
    )
    assert (checked.stdout, checked.returncode) == ("", 0), checked.stderr[-3000:]
