"""Reads and writes finish, or say why; few files are open at once."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import alnico
from alnico.checkpoint import files
from alnico.checkpoint.files import (
    MAX_OPEN_FILES,
    OpenFiles,
    copy_fully,
    open_to_read,
    read_fully,
    write_fully,
)
from alnico.errors import ModelError, RunError
from made import family


@pytest.fixture
def letters(tmp_path):
    path = tmp_path / "letters"
    path.write_bytes(b"abcdefghij")
    return path


@pytest.fixture
def descriptor(letters):
    opened = os.open(letters, os.O_RDWR)
    yield opened
    os.close(opened)


def fail(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_short_reads_are_completed(descriptor, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: whole(d, [buffers[0][:3]], offset))
    buffer = bytearray(8)
    read_fully(descriptor, memoryview(buffer), 1, "f")
    assert buffer == b"bcdefghi"


def test_short_writes_are_completed(descriptor, letters, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, offset: whole(d, data[:3], offset))
    write_fully(descriptor, memoryview(b"12345678"), 1, "f")
    assert letters.read_bytes() == b"a12345678j"


def test_a_failing_read_says_what_the_system_says(descriptor, monkeypatch):
    monkeypatch.setattr(os, "preadv", fail(errno.EIO))
    with pytest.raises(RunError) as caught:
        read_fully(descriptor, memoryview(bytearray(8)), 2, "m/f: w")
    assert str(caught.value) == (
        "m/f: w: reading 8 bytes at 2 failed (Input/output error). Check the disk; the same command resumes the merge."
    )


def test_a_full_disk_says_how_to_go_on(descriptor, monkeypatch):
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    with pytest.raises(RunError) as caught:
        write_fully(descriptor, memoryview(b"12345678"), 2, "m/f: w")
    assert str(caught.value) == (
        "m/f: w: writing 8 bytes at 2 failed (No space left on device). "
        "Make room or check the disk; the same command resumes the merge."
    )


def test_a_file_that_shrank_while_it_was_read_is_refused(descriptor):
    os.ftruncate(descriptor, 6)
    with pytest.raises(RunError) as caught:
        read_fully(descriptor, memoryview(bytearray(8)), 2, "m/f: w")
    assert str(caught.value) == (
        "m/f: w: the file ended at byte 6, expected 8 bytes at 2. "
        "It was changed while it was read; merge again from a complete file."
    )


def test_a_file_that_cannot_be_opened_is_a_model_error(tmp_path):
    with pytest.raises(ModelError) as caught:
        open_to_read(tmp_path / "none")
    assert str(caught.value) == (
        f"{tmp_path}/none: cannot be opened (No such file or directory). Check the path and its permissions."
    )


def test_no_more_files_stay_open_than_allowed(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(MAX_OPEN_FILES + 40)]
    for path in paths:
        path.write_text(path.name)
    opened = OpenFiles()
    before = open_descriptors()
    for path in paths:
        with opened.descriptor(path) as descriptor:
            assert os.pread(descriptor, 9, 0).decode() == path.name
        assert open_descriptors() - before <= MAX_OPEN_FILES
    opened.close()
    assert open_descriptors() == before


def test_a_file_read_again_is_not_the_first_to_be_closed(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.write_text(path.name)
    made = []
    monkeypatch.setattr(files, "open_to_read", lambda path: made.append(path) or open_to_read(path))
    opened = OpenFiles(limit=2)
    for path in (a, b, a, c, a, b):
        with opened.descriptor(path):
            pass
    assert made == [a, b, c, b]
    opened.close()


def test_a_lent_file_is_not_closed(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(5)]
    for path in paths:
        path.write_text(path.name)
    opened = OpenFiles(limit=1)
    with opened.descriptor(paths[0]) as lent:
        for path in paths[1:]:
            with opened.descriptor(path):
                pass
        assert os.pread(lent, 9, 0) == b"0"
    opened.close()


def test_threads_share_few_files(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(40)]
    for path in paths:
        path.write_text(path.name * 100)
    opened = OpenFiles(limit=4)
    together = threading.Barrier(4)

    def read(worker: int) -> None:
        together.wait()
        for i in range(400):
            path = paths[(i * 7 + worker * 11) % len(paths)]
            buffer = bytearray(10 * len(path.name))
            with opened.descriptor(path) as descriptor:
                files.read_fully(descriptor, memoryview(buffer), 0, "f")
            assert buffer.decode() == path.name * 10

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    opened.close()


# ---- copies within the system ---------------------------------------------------------------------------------------


def copied(tmp_path: Path, size: int, begin: int) -> tuple[bool, bytes]:
    (tmp_path / "from").write_bytes(bytes(range(256)))
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("w+b") as target:
        target.truncate(300)
        done = copy_fully(source.fileno(), begin, target.fileno(), 20, size, "from")
        return done, target.read()


def test_a_copy_puts_the_bytes_at_their_place(tmp_path: Path) -> None:
    done, found = copied(tmp_path, 100, 7)
    assert found == (bytes(20) + bytes(range(7, 107)) + bytes(180) if done else bytes(300))


def test_a_copy_in_parts_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(source: int, target: int, count: int, begin: int, offset: int) -> int:
        return os.pwrite(target, os.pread(source, min(count, 33), begin), offset)

    monkeypatch.setattr(os, "copy_file_range", some, raising=False)
    assert copied(tmp_path, 100, 7) == (True, bytes(20) + bytes(range(7, 107)) + bytes(180))


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_system_that_cannot_copy_is_told_by_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    assert copied(tmp_path, 100, 7) == (False, bytes(300))
    monkeypatch.delattr(os, "copy_file_range")
    assert copied(tmp_path, 100, 7) == (False, bytes(300))


def test_a_copy_that_fails_on_the_way_or_ends_early_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[int | OSError] = [40, OSError(errno.ENOSPC, "No space left on device"), 40, 0]

    def failing(*_: int) -> int:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "copy_file_range", failing, raising=False)
    with pytest.raises(
        RunError, match=r"^from: copying 100 bytes to 20 failed \(No space left on device\)\. Make room"
    ):
        copied(tmp_path, 100, 7)
    with pytest.raises(
        RunError, match=r"^from: the file ended at byte 47, expected 100 bytes at 7\. It was changed"
    ):
        copied(tmp_path, 100, 7)


def test_a_system_that_cannot_run_alnico_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, (tuned,) = family(tmp_path, 1)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "statvfs")
    message = (
        r"cannot be read: Python has no os\.preadv, os\.statvfs on this system \(\w+\); "
        r"alnico needs Linux or macOS\. On Windows run it in WSL or in a container\."
    )
    with pytest.raises(RunError, match=message):
        alnico.plan({"merge_method": "linear", "models": [str(base), str(tuned)]})
    with pytest.raises(RunError, match=message):
        alnico.inspect(base)
