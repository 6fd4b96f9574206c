"""The cache of compiled kernels saves time and never decides whether a merge runs, or with what."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from alnico.kernels import build
from alnico.kernels.build import cache_directory
from alnico.kernels.measuring import MeasureKernel

CODE_F32 = 1

pytestmark = pytest.mark.slow  # compiles, and compiles again


def halved(x):
    return x * 0.5


KERNEL = MeasureKernel("values", halved, 1, False, (), "float32")


def works(run) -> bool:
    values = np.array([2.0, -3.0], np.float32)
    found = np.empty(2, np.float32)
    raw = values.view(np.uint8)
    run((raw,), np.array([CODE_F32]), raw, CODE_F32, 0, np.array([0]), found[None])
    return found.tolist() == [1.0, -1.5]


def compile_anew(kernel=KERNEL):
    """As in a new process: nothing is remembered."""
    build.compiled.cache_clear()
    build._compiled.cache_clear()
    return build.compiled(kernel)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "kernels"
    build.compiled.cache_clear()
    build._compiled.cache_clear()


def modules(cache: Path) -> list[Path]:
    return sorted(cache.glob("alnico_kernel_*.py"))


# Where it is.


def test_the_directory_is_made_for_us_alone(cache):
    assert cache_directory() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


def test_the_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("ALNICO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "alnico" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "alnico" / "kernels"


def test_a_directory_others_may_write_is_not_trusted(cache):
    cache.mkdir(parents=True)
    for mode in (0o770, 0o707, 0o720, 0o702):
        cache.chmod(mode)
        assert cache_directory() is None
    assert works(compile_anew())
    assert modules(cache) == []


def test_a_directory_of_another_user_is_not_trusted(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert cache_directory() is None


def test_a_directory_that_cannot_be_made_or_written_is_done_without(cache, monkeypatch):
    cache.parent.write_text("a file")
    assert cache_directory() is None
    assert works(compile_anew())
    cache.parent.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_directory() is None


def test_without_a_home_there_is_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("ALNICO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_directory() is None


def test_a_directory_that_is_read_only_is_done_without(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    if os.getuid() == 0:  # who may write everywhere, so the system is made to answer as it answers others
        monkeypatch.setattr(os, "access", lambda path, mode: not (os.fspath(path) == os.fspath(cache) and mode & os.W_OK))
    assert cache_directory() is None


# What it does.


def test_a_kernel_is_kept_and_found_again(cache):
    assert works(compile_anew())
    (module,) = modules(cache)
    compiled_files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.nbc")}
    assert compiled_files
    assert works(compile_anew())
    assert modules(cache) == [module]
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.nbc")} == compiled_files


def test_a_full_disk_costs_time_not_the_merge(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("replace", "fdopen"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            assert works(compile_anew())
        assert not list(cache.glob("*.tmp"))
        assert modules(cache) == []


@pytest.mark.parametrize(("pattern", "size"), [("*.py", 0), ("*.nbi", 40), ("*.nbc", 0)])
def test_a_damaged_file_costs_time_not_the_merge(cache, pattern, size):
    compile_anew()
    (damaged,) = list(cache.rglob(pattern))
    os.truncate(damaged, size)
    sys.modules.pop(modules(cache)[0].stem, None)
    for made in cache.glob("__pycache__/*.pyc"):
        made.unlink()
    assert works(compile_anew())
    assert works(compile_anew())  # and is replaced: by the first of these, or by the second
    assert len(list(cache.rglob("*.nbc"))) == 1


def test_a_changed_module_is_not_believed(cache):
    compile_anew()
    (module,) = modules(cache)
    text = module.read_text()
    module.write_text(text.replace("0.5", "0.7"))
    assert works(compile_anew())
    assert module.read_text() == text


def test_equal_text_is_one_kernel_whatever_function_it_came_from(cache):
    def another():
        def halved(x):
            return x * 0.5

        return halved

    first = compile_anew()
    assert build.compiled(MeasureKernel("values", another(), 1, False, (), "float32")) is first
    assert len(modules(cache)) == 1


def function_of(tmp_path: Path, version: int, source: str):
    path = tmp_path / f"version{version}.py"
    path.write_text(textwrap.dedent(source))
    names = {"__name__": "a_method"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["of"]


def test_an_edited_called_function_is_another_kernel(tmp_path):
    source = """
        def inner(x):
            return x * 2.0

        def of(x):
            return inner(x) + 1.0
    """
    texts = [
        MeasureKernel("values", function_of(tmp_path, version, text), 1, False, (), "float32").text()
        for version, text in enumerate([source, source, source.replace("2.0", "3.0")])
    ]
    assert texts[0] == texts[1]
    assert build._key(texts[0]) == build._key(texts[1])
    assert build._key(texts[0]) != build._key(texts[2])


def test_the_key_knows_the_compiled_pieces_the_versions_and_the_machine(monkeypatch):
    import llvmlite
    import llvmlite.binding
    import numba

    text = KERNEL.text()
    keys = {build._key(text), build._key(text + "\n")}
    changes = [
        (build, "_pieces", lambda: b"other"),
        (numba, "__version__", "0.0"),
        (llvmlite, "__version__", "0.0"),
        (llvmlite.binding, "get_host_cpu_name", lambda: "other"),
        (sys, "version", "other"),
    ]
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.add(build._key(text))
    assert len(keys) == 7


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_cache
assert test_cache.works(test_cache.build.compiled(test_cache.KERNEL))
print("works")
"""


def test_two_processes_at_once_both_compile(cache):
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out, errors) == (0, "works\n", "")
    assert len(modules(cache)) == 1
    assert not list(cache.glob("*.tmp"))
