"""Hints to the page cache name the right bytes, and change nothing where the system does not take them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from alnico.checkpoint import page_cache


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    path = tmp_path / "letters"
    path.write_bytes(b"abcdefghij")
    return path


@pytest.fixture
def descriptor(letters: Path) -> Iterator[int]:
    opened = os.open(letters, os.O_RDWR)
    yield opened
    os.close(opened)


def test_without_a_way_to_start_writing_back_nothing_is_lost(
    descriptor: int, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise AttributeError("sync_file_range")

    page_cache._sync_file_range.cache_clear()
    monkeypatch.setattr(page_cache.ctypes, "CDLL", none)
    os.pwrite(descriptor, b"ABC", 0)
    page_cache.start_writeback(descriptor, 0, 3)
    monkeypatch.undo()
    page_cache._sync_file_range.cache_clear()
    page_cache.start_writeback(descriptor, 0, 3)
    assert letters.read_bytes() == b"ABCdefghij"


def test_bytes_are_asked_for_in_steps_that_the_disk_takes(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *request: asked.append(request), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(page_cache, "_bytes_at_once", lambda _device: 4)
    page_cache.ask_to_read(descriptor, 1, 9)
    assert asked == [(descriptor, 1, 4, 3), (descriptor, 5, 4, 3), (descriptor, 9, 1, 3)]


def test_a_system_or_a_disk_without_such_hints_is_left_alone(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.ESPIPE, "Illegal seek")

    monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    page_cache.ask_to_read(descriptor, 0, 10)
    monkeypatch.delattr(os, "posix_fadvise")
    page_cache.ask_to_read(descriptor, 0, 10)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_the_share_of_a_file_that_is_not_in_memory(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(page_cache, "LOOKED_AT_BYTES", 3)
    looked: list[int] = []

    def preadv(_descriptor: int, buffers: list[bytearray], place: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        assert [len(buffer) for buffer in buffers] == [1]
        looked.append(place)
        if place == 6:
            raise OSError(error, "no")
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert page_cache.missing_from_cache(descriptor, 10) == 1 / 4
    assert looked == [0, 3, 6, 9]
    assert page_cache.missing_from_cache(descriptor, 0) == 0


def test_a_file_that_was_just_written_is_in_memory_where_the_system_says_so(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page_cache.missing_from_cache(descriptor, 10) in (0.0, 1.0)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert page_cache.missing_from_cache(descriptor, 10) == 1.0


GROUPS = {
    "version 2": ("0::/a/b", {"a/memory.max": "3000\n", "a/b/memory.max": "max\n"}, 3000),
    "version 1": ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
    "in a container": ("0::/", {"memory.max": "1000"}, 1000),
    "no limit": ("7:cpu:/a", {"memory/a/memory.limit_in_bytes": "2000"}, 9 << 10),
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_cache_is_as_large_as_the_control_group_lets_it_be(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, limits, expected = GROUPS[group]
    monkeypatch.setattr(page_cache, "PROCESSES", tmp_path / "proc")
    monkeypatch.setattr(page_cache, "GROUPS", tmp_path / "groups")
    assert page_cache.cache_bytes() == 1 << 30  # nothing is said
    for name, text in {
        "proc/meminfo": "MemTotal: 12 kB\nMemAvailable: 9 kB\n",
        "proc/self/cgroup": f"{line}\n",
        **{f"groups/{name}": text for name, text in limits.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert page_cache.cache_bytes() == expected
