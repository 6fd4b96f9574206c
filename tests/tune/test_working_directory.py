"""What lies in the working directory is a stranger's, perhaps: no module and no settings of libraries are taken from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
from alnico.tune.search import workers

class Order:
    made = ()

    class space:
        methods = ()

    def evaluator(self):
        return self

    def scores(self, number, point, rung):
        import os
        return {"is_set": float("PYTHONSAFEPATH" in os.environ)}

if __name__ == "__main__":
    worker = workers.LocalProcess(Order(), 1)
    print(worker.scores(0, {}, 0).result(timeout=60).scores, "PYTHONSAFEPATH" in workers.os.environ)
    worker.close()
"""


@pytest.mark.parametrize("name", ["multiprocessing", "signal"])
def test_a_worker_of_a_search_runs_no_file_of_the_working_directory(tmp_path: Path, name: str) -> None:
    place = tmp_path / "strangers"
    place.mkdir()
    (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    (tmp_path / "search.py").write_text(WORKER)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, tmp_path / "search.py"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not (tmp_path / "ran").exists()
    assert (done.stdout, done.returncode) == ("{'is_set': 0.0} False\n", 0)


LIBRARIES = """
from alnico.kernels.build import _import_numba
from alnico.analysis.charts import without_local_settings
from alnico.installation import import_extra

_import_numba()
import numba
with without_local_settings():
    import_extra("matplotlib.figure", "a test", "report")
    import numba.cuda
import matplotlib
numba.core.config.reload_config()
numba.cuda.core.config.reload_config()
assert not numba.cuda.core.config.ENABLE_CUDASIM
print(numba.config.DISABLE_JIT, matplotlib.rcParams["savefig.dpi"])
"""


@pytest.mark.parametrize("kind", ["settings", "damaged", "pipes"])
def test_libraries_take_no_settings_from_the_working_directory(tmp_path: Path, kind: str) -> None:
    numba, matplotlib = tmp_path / ".numba_config.yaml", tmp_path / "matplotlibrc"
    if kind == "pipes":
        os.mkfifo(numba)
        os.mkfifo(matplotlib)
    else:
        numba.write_text("disable_jit: 1\nenable_cudasim: 1" if kind == "settings" else "a: [")
        matplotlib.write_bytes(b"savefig.dpi: 7" if kind == "settings" else b"backend: \xff")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "MATPLOTLIB"))}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0 figure\n", "", 0)
