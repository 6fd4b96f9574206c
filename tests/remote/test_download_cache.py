"""Pieces of remote models that are kept for later runs, and models of the hub that are read by ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint.remote.download_cache import PieceFiles
from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import OutputError
from counting_folder import ADDRESS, Elsewhere
from hub.stub import Hub, serving
from made import family

VERSION = FileVersion(100, '"tag"')


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def requested(elsewhere: Elsewhere) -> int:
    return sum(elsewhere.weight_bytes().values())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_second_run_requests_no_weights(elsewhere: Elsewhere, tmp_path: Path, method: str) -> None:
    base, tuned = family(elsewhere.root, 2, shards=2)
    recipe = alnico.make_recipe(
        [f"{ADDRESS}/{path.name}" for path in tuned],
        method,
        base=f"{ADDRESS}/{base.name}" if method == "ties" else None,
    )
    plain = alnico.merge(recipe, tmp_path / "plain").plan
    elsewhere.reads.clear()
    for name in ("first", "second"):
        alnico.merge(recipe, tmp_path / name, download_cache=tmp_path / "pieces")
        count = requested(elsewhere)
        if name == "first":
            assert 0 < count <= plain.bytes_to_request
            assert count == sum(path.stat().st_size - 16 for path in (tmp_path / "pieces").iterdir())
        else:
            assert count == 0
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "plain" / "model.safetensors").read_bytes()
        elsewhere.reads.clear()
    assert (tmp_path / "pieces").stat().st_mode & 0o777 == 0o700


def test_another_version_of_a_file_is_requested(elsewhere: Elsewhere, tmp_path: Path) -> None:
    for seed in (0, 1):
        family(elsewhere.root, 1, seed=seed)
        elsewhere.reads.clear()
        with alnico.open_model(f"{ADDRESS}/base", download_cache=tmp_path / "pieces") as model:
            there = model.read("model.norm.weight")
        assert requested(elsewhere) > 0
        with alnico.open_model(elsewhere.root / "base") as model:
            assert (model.read("model.norm.weight") == there).all()


def put_and_get(pieces: PieceFiles, offset: int, size: int = 1000) -> bool:
    data = bytes([offset % 251]) * size
    pieces.put("s3://b/m", VERSION, offset, memoryview(data))
    found = bytearray(size)
    return pieces.get("s3://b/m", VERSION, offset, memoryview(found)) and bytes(found) == data


def test_a_damaged_piece_is_not_used(tmp_path: Path) -> None:
    pieces = PieceFiles(tmp_path / "pieces", 1 << 20)
    assert put_and_get(pieces, 0)
    (file,) = (tmp_path / "pieces").iterdir()
    for damage in (lambda data: b"x" + data[1:], lambda data: data[:-1], lambda data: data + b"x"):
        assert put_and_get(pieces, 0)
        file.write_bytes(damage(file.read_bytes()))
        assert not pieces.get("s3://b/m", VERSION, 0, memoryview(bytearray(1000)))
        assert not file.exists()


def test_pieces_used_least_recently_are_removed(tmp_path: Path) -> None:
    pieces = PieceFiles(tmp_path / "pieces", 10_500)
    for i in range(10):
        assert put_and_get(pieces, i)
    assert pieces.get("s3://b/m", VERSION, 0, memoryview(bytearray(1000)))  # used now
    assert put_and_get(pieces, 10)
    found = [pieces.get("s3://b/m", VERSION, i, memoryview(bytearray(1000))) for i in range(11)]
    assert found[0]
    assert found[10]
    assert not found[1]
    assert sum(path.stat().st_size for path in (tmp_path / "pieces").iterdir()) <= 10_500
    assert not put_and_get(pieces, 11, 20_000)  # larger than all


def test_processes_share_a_folder_of_pieces(tmp_path: Path) -> None:
    both = [PieceFiles(tmp_path / "pieces", 50_000) for _ in range(2)]
    failures: list[BaseException] = []

    def work(pieces: PieceFiles) -> None:
        try:
            for i in range(200):
                put_and_get(pieces, i % 80)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(pieces,)) for pieces in both * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(path.suffix == ".piece" for path in (tmp_path / "pieces").iterdir())


def test_the_limit_is_that_of_all_models_that_write_into_a_folder(tmp_path: Path) -> None:
    models = [PieceFiles(tmp_path / "pieces", 50_000) for _ in range(3)]
    for i in range(40):
        for number, pieces in enumerate(models):
            pieces.put(f"s3://b/{number}", VERSION, i, memoryview(bytes(1000)))
    assert sum(path.stat().st_size for path in (tmp_path / "pieces").iterdir()) <= 50_000 * (1 + 3 / 64)


def test_a_folder_that_is_removed_costs_time_only(tmp_path: Path) -> None:
    pieces = PieceFiles(tmp_path / "pieces", 1 << 20)
    (tmp_path / "pieces").rmdir()
    assert not put_and_get(pieces, 0)


def test_a_folder_that_others_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected a folder that only you may write to"):
        PieceFiles(tmp_path / "open", 1 << 20)
    with pytest.raises(OutputError, match="cannot be made a folder for downloads"):
        PieceFiles(tmp_path / "file", 1 << 20)


def test_a_model_of_the_hub_is_streamed(hub: Hub, tmp_path: Path) -> None:
    base, tuned = family(tmp_path / "models", 1, shards=2)
    hub.add("org/base", base)
    commit = hub.add("org/tuned", tuned[0])
    recipe = alnico.make_recipe(["org/tuned", "org/base"], "linear")
    result = alnico.merge(recipe, tmp_path / "streamed", stream=True)
    cached = [p.name for p in (tmp_path / "cache").rglob("*") if p.suffix == ".safetensors"]
    assert cached == []
    assert hub.weight_bytes() == result.plan.bytes_to_request > 0
    alnico.merge(recipe, tmp_path / "downloaded")
    for name in ("model.safetensors", "config.json", "alnico.lock.json", "README.md"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "downloaded" / name).read_bytes()
    assert commit in (tmp_path / "streamed" / "alnico.lock.json").read_text()
