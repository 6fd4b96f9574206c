"""`benchmarks/gpu.py` is ready: its parts that need no real GPU run on a made one, in numba-cuda's simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import sys
from pathlib import Path
from alnico.devices import Device, made_gpus
import gpu
made = Device("cuda:0", "Made", 8 << 30)
page = Path(sys.argv[1]) / "page.md"
page.write_text("# Page\\n\\n<!-- gpu -->\\nNot measured.\\n<!-- /gpu -->\\n\\nEnd.\\n")
with made_gpus([made]):
    text = gpu.run(Path(sys.argv[1]), made, only=["memory", "matrices"], millions=0.002, shape=(64, 96), runs=1)
gpu.put_into(page, text)
"""


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_writes_its_tables_into_the_page(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Page\n\n<!-- gpu -->\nMeasured on cuda:0 (Made, 8.6 GB)")
    assert page.endswith("<!-- /gpu -->\n\nEnd.\n")
    assert "Not measured" not in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[0] != "| ---"] == [
        "| method", "| linear", "| task_arithmetic", "| ties", "| dare_ties", "| matrices", "| 64 x 96 x 4",
    ]  # fmt: skip
    assert float(rows[-1][-1].strip(" |")) < 1e-6  # float32 results of float64 matrices
