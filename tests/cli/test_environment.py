"""Variables of the environment with odd values: an error that names them, or no effect; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import pytest

from alnico.errors import AlnicoError
from alnico.kernels.build import _compile

ODD = {
    "HF_HUB_OFFLINE": "zz", "HF_ENDPOINT": "zz", "HF_HOME": "/dev/null", "XDG_CACHE_HOME": "relative", "TMPDIR": "/nonexistent", "COLUMNS": "-1",
    "NO_COLOR": "", "TERM": "", "OMP_NUM_THREADS": "abc", "ALNICO_CACHE_DIR": "/dev/null", "ALNICO_HUB_WAIT": "nan", "ALNICO_HUB_TIMEOUT": "1e400",
    "HOME": "/nonexistent", "LC_ALL": "xx_YY", "TZ": "zz",
}  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, "Check HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT."),
        (ODD, "is not in the cache"),
    ],
    ids=["timeout", "others"],
)
def test_a_model_of_the_hub_in_an_odd_environment(odd: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alnico", "inspect", "nobody/none", "--offline"],
        env=os.environ | odd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (13, False), done.stderr
    assert said in done.stderr


def test_numba_that_may_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(AlnicoError, match=r"^NUMBA_DISABLE_JIT is set; expected numba to compile kernels"):
        _compile("entry = None")


@pytest.mark.parametrize("theirs", [None, "active"])
def test_threads_of_torch_wait_without_work_unless_the_environment_says_otherwise(theirs: str | None) -> None:
    code = (
        "import os; from alnico.cli import entry, main; "
        "main.main = lambda: print(os.environ['OMP_WAIT_POLICY'], flush=True); entry.command()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if theirs is None else {"OMP_WAIT_POLICY": theirs}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{theirs or 'passive'}\n"
