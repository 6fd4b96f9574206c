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


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.kernel"))


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
    assert kept(cache) == []


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


def test_a_kernel_is_kept_and_found_again(cache, monkeypatch):
    assert works(compile_anew())
    (file,) = kept(cache)
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", None)
    assert works(compile_anew())
    assert kept(cache) == [file]
    assert file.stat().st_mtime_ns == written


@pytest.mark.usefixtures("cache")
def test_a_kernel_from_the_cache_is_run_without_numba():
    compile_anew()
    program = PROGRAM.format(folder=str(Path(__file__).parent)) + "assert 'numba' not in sys.modules, 'numba was imported'"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "works\n"), ended.stderr


def test_a_full_disk_costs_time_not_the_merge(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("replace", "fdopen"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            assert works(compile_anew())
        assert not list(cache.glob("*.tmp"))
        assert kept(cache) == []


@pytest.mark.parametrize("size", [0, 5, 60, 3000])
def test_a_file_that_was_cut_off_costs_time_not_the_merge(cache, size):
    compile_anew()
    (file,) = kept(cache)
    whole = file.read_bytes()
    os.truncate(file, size)
    assert works(compile_anew())
    assert file.read_bytes()[:60] == whole[:60] or len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize("place", [3, 20, 60, -1])
def test_a_changed_file_is_not_believed(cache, place):
    compile_anew()
    (file,) = kept(cache)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert build._read(file) is None
    assert works(compile_anew())
    assert build._read(file) is not None


def test_equal_text_is_one_kernel_whatever_function_it_came_from(cache):
    def another():
        def halved(x):
            return x * 0.5

        return halved

    first = compile_anew()
    assert build.compiled(MeasureKernel("values", another(), 1, False, (), "float32"))._code is first._code
    assert len(kept(cache)) == 1


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
    import llvmlite.binding

    text = KERNEL.text()
    keys = {build._key(text), build._key(text + "\n")}
    changes = [
        (build, "_pieces", lambda: b"other"),
        (build, "_versions", lambda: ("numba 0.0",)),
        (llvmlite.binding, "get_host_cpu_name", lambda: "other"),
        (sys, "version", "other"),
    ]
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.add(build._key(text))
    assert len(keys) == 6


@pytest.mark.usefixtures("cache")
def test_arguments_a_kernel_does_not_take_are_refused():
    run = compile_anew()
    raw, codes, chosen, found = np.zeros(8, np.uint8), np.array([CODE_F32]), np.array([0]), np.empty((1, 2), np.float32)
    run((raw,), codes, raw, CODE_F32, 0, chosen, found)
    for wrong in [
        ((raw, raw), codes, raw, CODE_F32, 0, chosen, found),
        ((raw,), codes.astype(np.int32), raw, CODE_F32, 0, chosen, found),
        ((raw,), codes, raw, CODE_F32, 0, chosen, found[0]),
        ((raw,), codes, raw, CODE_F32, 0, chosen, np.empty((2, 2), np.float32).T),
        ((raw,), codes, raw, CODE_F32, 0, chosen),
    ]:
        with pytest.raises(TypeError):
            run(*wrong)


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_cache
assert test_cache.works(test_cache.build.compiled(test_cache.KERNEL))
print("works")
"""


MIXED = """
import os, sys
sys.path.insert(0, {folder!r})
import hashlib
import numpy as np
import test_cache
from alnico.kernels.build import compiled, features
from alnico.kernels.measuring import GramKernel, MeasureKernel
from alnico.methods import find
from alnico.engine.arguments import kind_of
from alnico.kernels.mixing import MixKernel

random = np.random.default_rng(0)
raws = tuple(random.standard_normal(9999).astype(np.float32).view(np.uint8) for _ in range(4))
codes, merge = np.ones(3, np.int64), find("ties").bind({{"density": 0.3}}, 3)
found = hashlib.sha256()
out = np.zeros(4 * 9999, np.uint8)
numbers = [np.linspace(0.1, 0.5, 3, dtype=np.float32) if kind_of(a) == "numbers" else 1.0 for a in merge.arguments]
compiled(MixKernel(merge.mix, 3, True, tuple(map(kind_of, merge.arguments)), "float32"))(
    raws[:3], codes, raws[3], 1, out, 1, 0, 0, *numbers
)
found.update(out)
sums = np.zeros((1, 6))
compiled(GramKernel(3, True, "float32"))(raws[:3], codes, raws[3], 1, 0, 9999, sums)
found.update(sums)
leaves = np.zeros((3, 1))
compiled(MeasureKernel("sum", test_cache.halved, 3, True, (), "float32"))(raws[:3], codes, raws[3], 1, 0, np.arange(3), leaves)
found.update(leaves)
print(found.hexdigest())
"""


def test_the_width_of_vectors_changes_no_bit(tmp_path):
    import llvmlite.binding

    own = llvmlite.binding.get_host_cpu_features().flatten()
    narrow = ",".join(f"-{f[1:]}" if f[1:4] in ("avx", "fma", "vae", "vpc", "gfn") else f for f in own.split(","))
    found = set()
    for number, features in enumerate([None, own, narrow]):
        environment = {**os.environ, "ALNICO_CACHE_DIR": str(tmp_path / str(number))}
        if features is not None:
            environment["NUMBA_CPU_FEATURES"] = features
        program = MIXED.format(folder=str(Path(__file__).parent))
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
        assert ended.returncode == 0, ended.stderr
        found.add(ended.stdout)
    assert len(found) == 1


def test_choosing_features_for_numba_leaves_the_environment_as_it_was():
    program = "import os, sys; from alnico.kernels import build; build._import_numba(); assert 'numba' in sys.modules; "
    program += "print('NUMBA_CPU_FEATURES' in os.environ)"
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CPU_FEATURES"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert ended.stdout == "False\n", ended.stderr


def test_two_processes_at_once_both_compile(cache):
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out, errors) == (0, "works\n", "")
    assert len(kept(cache)) == 1
    assert not list(cache.glob("*.tmp"))
