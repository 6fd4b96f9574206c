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
