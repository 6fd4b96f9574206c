"""Kernels that are compiled ahead of their use: which, how often, and what is said of them."""

import subprocess
import sys

import pytest

import alnico
from alnico.engine.warm import _compile, warm
from alnico.errors import MethodError, OutputError, RecipeError, RunError
from alnico.kernels import build, choice

MERGES = """
import numpy as np
import alnico
from alnico.kernels import build
from alnico.kernels.choice import forced

def never(text):
    raise SystemExit("compiles:\\n" + text)

build._compile = never
random = np.random.default_rng(0)
models = [{"large": random.standard_normal((512, 256), np.float32), "bias": np.ones(9, np.float32)} for _ in range(13)]
with forced("compiled"):
    for count in (3, 12):
        for density in (0.2, 0.7):
            alnico.merge_state_dicts(models[:count], "ties", base=models[12], density=density, unrelated="allow")
print("done")
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    choice.forget()
    yield tmp_path / "cache" / "kernels"
    choice.forget()


@pytest.mark.slow
def test_after_warm_a_merge_compiles_nothing(cache):
    result = warm(["ties"], models=[3, 12], threads=1)
    assert result.methods == ("ties",)
    assert (result.made, result.ready) == (len(list(cache.glob("*.kernel"))), 0)
    assert result.byte_size > 10_000 * result.made
    ended = subprocess.run([sys.executable, "-c", MERGES], capture_output=True, text=True, timeout=240)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
    again = warm(["ties"], models=[3, 12], threads=1)
    assert (again.made, again.ready) == (0, result.made)


@pytest.mark.usefixtures("cache")
def test_each_kernel_is_compiled_once_for_all_methods_and_numbers(monkeypatch):
    compiled = []
    monkeypatch.setattr("alnico.engine.warm._compile", lambda texts, _processes: compiled.extend(texts))
    monkeypatch.setattr(build, "is_ready", lambda text: text in compiled)
    result = warm(models=[2, 9, 40, 200], dtypes=["bfloat16", "float16"])
    assert len(compiled) == len(set(compiled)) == result.made
    assert "ties" in result.methods
    assert set(result.left) == {"fisher", "passthrough", "regmean"}
    one = len(compiled)
    assert warm(models=[9], dtypes=["float32"]).made == 0
    assert warm(models=[3]).made > 0
    assert warm(["linear"], models=[2], dtypes=["float64"]).made == 1
    assert len(compiled) > one


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(MethodError, match="tie"):
        warm(["tie"])
    with pytest.raises(RecipeError) as refused:
        warm(["ties"], models=[0, 2], dtypes=["int8"])
    assert refused.value.args == (
        "models has 0; expected whole numbers from 1 on",
        "dtypes has int8; expected bfloat16, float16, float32, float64",
    )
    monkeypatch.setattr(build, "_compile", lambda _text: ("nothing", b""))
    monkeypatch.setattr(build, "MachineCode", lambda *_: None)
    monkeypatch.setattr(build, "write_kernel", lambda *_: False)
    with pytest.raises(OutputError, match="does not keep kernels"):
        warm(["linear"], models=[2], threads=1)
    assert alnico.warm is warm


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_processes_that_compile_import_nothing_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yaml.py").write_text("open('imported', 'w')\n")
    with pytest.raises(RunError):  # these are no kernels
        _compile(["1", "2"], 2)
    assert not (tmp_path / "imported").exists()
