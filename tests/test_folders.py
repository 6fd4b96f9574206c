"""Folders that are held open: no link under a name in them is followed, nothing is waited for, and what is not ours is told."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alnico import folders
from alnico.checkpoint.durable import copy_file, exchange, rename_new, replace_file, sync_directory
from alnico.errors import RunError
from alnico.folders import (
    DEEPEST,
    HAS_DESCRIPTORS,
    Folder,
    fault_in,
    make_folder,
    open_new,
    open_to_write,
    owner_fault_at,
    remove,
)

pytestmark = pytest.mark.skipif(not HAS_DESCRIPTORS, reason="this system opens no folders")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder elsewhere that links lead to."""
    place = tmp_path / "victim"
    place.mkdir()
    (place / "precious").write_text("mine")
    return place


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    place = tmp_path / "ours"
    place.mkdir(0o700)
    return place


def error_at_once(call: Callable[[], object]) -> OSError:
    """What a call raises that must not wait."""
    found: list[OSError] = []

    def run() -> None:
        try:
            call()
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits"
    return found[0]


def test_a_folder_is_not_opened_through_a_link(ours: Path, victim: Path) -> None:
    (ours / "link").symlink_to(victim)
    with pytest.raises(OSError, match="link"):
        Folder(ours / "link")
    with pytest.raises(OSError, match="precious"):
        Folder(victim / "precious")


@pytest.mark.parametrize("is_held", [True, False])
def test_nothing_is_written_through_a_link(is_held: bool, ours: Path, victim: Path) -> None:
    (ours / "link").symlink_to(victim / "precious")
    (ours / "to a folder").symlink_to(victim)
    folder = Folder(ours)
    try:
        inside = folder if is_held else None
        with pytest.raises(OSError, match="link"):
            open_to_write(ours / "link", inside)
        with pytest.raises(FileExistsError):
            make_folder(ours / "to a folder", inside)
        with pytest.raises(FileExistsError):
            make_folder(ours / "link", inside)
        remove(ours / "to a folder", inside)
        remove(ours / "link", inside)
    finally:
        folder.close()
    assert list(ours.iterdir()) == []
    assert (victim / "precious").read_text() == "mine"


def test_a_report_takes_the_place_of_a_link(ours: Path, victim: Path) -> None:
    (ours / "report.html").symlink_to(victim / "precious")
    with open_new(ours / "report.html") as file:
        file.write("new")
    assert not (ours / "report.html").is_symlink()
    assert (victim / "precious").read_text() == "mine"


def test_a_link_is_not_brought_to_the_disk(ours: Path, victim: Path) -> None:
    (ours / "link").symlink_to(victim)
    folder = Folder(ours)
    with pytest.raises(RunError, match="could not be flushed to disk"):
        sync_directory(ours / "link", folder)
    folder.close()


def test_a_pipe_is_not_waited_for(ours: Path) -> None:
    os.mkfifo(ours / "pipe")
    assert error_at_once(lambda: open_to_write(ours / "pipe")).filename == str(ours / "pipe")


def test_folders_in_one_another_are_looked_at_to_a_depth(ours: Path) -> None:
    deep = ours
    for _ in range(DEEPEST):
        deep = deep / "d"
    deep.mkdir(parents=True)
    folder = Folder(ours)
    assert fault_in(folder) is None
    (deep / "d").mkdir()
    assert fault_in(folder) == f"{deep / 'd'} is nested more than {DEEPEST} folders deep"
    folder.close()


def test_files_that_the_group_may_write_are_no_fault_in_a_folder_closed_to_it(ours: Path) -> None:
    (ours / "file").write_text("")
    (ours / "file").chmod(0o664)
    folder = Folder(ours)
    assert fault_in(folder) is None
    ours.chmod(0o750)
    assert fault_in(folder) == f"{ours / 'file'} can be written by others (its mode is 0664)"
    folder.close()


def test_a_link_is_not_taken_for_ours(ours: Path, victim: Path) -> None:
    (ours / "link").symlink_to(victim)
    assert owner_fault_at(ours / "link") == "is a link"
    assert owner_fault_at(ours) is None


def test_what_is_sample_file_a_folder_tells_nothing_of_another_disk(ours: Path) -> None:
    device = ours.stat().st_dev
    assert folders._sample_file(ours, device) is not None
    assert folders._sample_file(ours, device + 1) is None
    assert list(ours.parent.iterdir()) == [ours]


@pytest.fixture
def moved(ours: Path, victim: Path) -> Iterator[Folder]:
    """A folder that is held, and that another user has renamed and replaced by a link."""
    (ours / "made").write_text("ours")
    folder = Folder(ours)
    ours.rename(ours.with_name("moved"))
    ours.symlink_to(victim)
    yield folder
    folder.close()


def test_files_are_made_and_renamed_in_the_folder_that_is_held(
    moved: Folder, victim: Path, tmp_path: Path
) -> None:
    (victim / "made").write_text("theirs")
    (tmp_path / "source").write_text("copied")
    copy_file(tmp_path / "source", moved.path / "copy", moved)
    replace_file(moved.path / "replaced", "new", moved)
    rename_new(moved.path / "made", tmp_path / "out", moved)
    assert (tmp_path / "out").read_text() == "ours"
    assert exchange(moved.path / "copy", tmp_path / "out", moved) in (True, False)
    assert sorted(p.name for p in victim.iterdir()) == ["made", "precious"]
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == ["copy", "replaced"]


def test_what_is_replaced_is_written_anew(ours: Path, victim: Path) -> None:
    """A hard link under the name that the new contents have at first is no way to another file."""
    os.link(victim / "precious", ours / "file.tmp")
    replace_file(ours / "file", "new")
    assert ((ours / "file").read_text(), (victim / "precious").read_text()) == ("new", "mine")
