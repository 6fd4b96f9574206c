"""Every call of the system fails once: the run ends with the cause, leaves nothing half made, and is taken up."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.file_model import FileModel
from alnico.errors import AlnicoError, OutputError, RunError
from os_calls import READS, WRITES, Call, Counting, watched
from small_merges import everything, made_recipe, merged, tensors_in

Failing = Callable[[Call, Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_recipe(tmp_path_factory.mktemp("models"))


def short(call: Call, make: Callable[[], Any]) -> Any:
    """Read or write half of what was asked: no failure, the caller goes on."""
    if call.name == "preadv":
        (buffer,) = call.arguments[1]
        return os.preadv(call.arguments[0], [buffer[: max(len(buffer) // 2, 1)]], call.arguments[2])
    if call.name in ("pwrite", "write"):
        data = call.arguments[1]
        return getattr(os, call.name)(call.arguments[0], data[: max(len(data) // 2, 1)], *call.arguments[2:])
    return make()


def ended(call: Call, make: Callable[[], Any]) -> Any:
    """A reader at the end of a file that has become shorter."""
    return 0 if call.name in ("preadv", "copy_file_range") else make()


def fails(call: Call, _make: Callable[[], Any]) -> Any:
    code = errno.ENOSPC if call.name in WRITES else errno.EIO
    raise OSError(code, os.strerror(code), str(call.path))


def watched_merge(
    recipe: Path, out: Path, number: int, at: Failing, **options: Any
) -> tuple[Counting, AlnicoError | None]:
    """Merge with one call failing; returns what was counted, and the error it ended with."""
    counting = Counting(number, at)
    # Inputs and output lie under one root, so that a failing read is one of the calls.
    with watched(recipe.parent, counting):
        try:
            merged(recipe, out, **options)
        except AlnicoError as error:
            return counting, error
    return counting, None


def taken_up(recipe: Path, out: Path, finished: set[str], **options: Any) -> None:
    """Give the same command again: what is finished is kept, and its inputs are not read."""
    read: set[str] = set()
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        read.add(name)
        real(model, name, offset, buffer)

    with pytest.MonkeyPatch.context() as patch, watched(recipe.parent):
        patch.setattr(FileModel, "read_into", read_into)
        assert merged(recipe, out, **options).resumed == len(finished)
    assert not read & finished


@pytest.mark.slow
@pytest.mark.parametrize("at", [fails, short, ended], ids=["fails", "short", "ended"])
def test_a_failure_of_any_call_is_named_leaves_nothing_half_made_and_is_taken_up(
    at: Failing, recipe: Path
) -> None:
    root = recipe.parent
    out, journal = root / "out", root / ".out.alnico-part" / "journal.jsonl"
    with watched(root):
        expected = everything(merged(recipe, root / "whole").path)
    names = {job.name for job in alnico.plan(recipe).jobs}
    calls: list[Call] = []
    with watched(root, lambda call, make: (calls.append(call), make())[1]):
        merged(recipe, out)
    shutil.rmtree(out)
    wanted = [n for n, call in enumerate(calls) if at is fails or call.name in (*READS, *WRITES)]
    failed: dict[str, int] = {}
    resumed = 0
    for number in wanted:
        before: set[str] = set()

        def at_once(call: Call, make: Callable[[], Any], before: set[str] = before) -> Any:
            before |= tensors_in(journal)
            return at(call, make)

        counting, error = watched_merge(recipe, out, number, at_once)
        call = counting.hit
        assert call is not None
        if error is not None:
            failed[call.name] = failed.get(call.name, 0) + 1
            assert str(root) in str(error) or any(name in str(error) for name in names), (call, error)
            assert error.exit_code in (
                (3,)
                if call.path == recipe
                else (7,)  # the disk is full before anything is begun
                if call.path.name == ".out.alnico-part-gone" and not tensors_in(journal)
                else (8, 9)
                if call.path.name in ("lock", ".out.alnico-part")
                else (4, 9)
            ), (call, error)
        found = everything(out)
        assert found in ({}, expected), call
        if not found:
            assert error is not None, call
            assert before <= tensors_in(journal), call
            taken_up(recipe, out, tensors_in(journal))
            resumed += bool(before)
        assert everything(out) == expected, call
        shutil.rmtree(out)
        for left in root.glob(".*"):
            shutil.rmtree(left)
    shutil.rmtree(root / "whole")
    print(
        f"{at.__name__}: {len(wanted)} calls, {sum(failed.values())} ended the run, {resumed} with finished tensors: {failed}"
    )
    if at is fails:
        named = {
            "preadv",
            "pwrite",
            "copy_file_range",
            "fdatasync",
            "fsync",
            "replace",
            "renameat2",
            "open",
            "write",
            "ftruncate",
            "read",
        }
        assert named <= failed.keys()
    assert resumed or at is short


@pytest.mark.slow
@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_a_failure_of_any_call_leaves_the_old_model_or_the_new_one(
    can_exchange: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alnico.checkpoint import durable

    if not can_exchange:
        monkeypatch.setattr(durable, "_renameat2", lambda: None)
    root = recipe.parent
    other = root / "other.yml"
    other.write_text(recipe.read_text().replace("0.5", "0.3"))
    with watched(root):
        old = everything(merged(other, root / "old").path)
        new = everything(merged(recipe, root / "new").path)
    calls: list[Call] = []
    shutil.copytree(root / "old", root / "out")
    with watched(root, lambda call, make: (calls.append(call), make())[1]):
        merged(recipe, root / "out", overwrite=True)
    # What comes before the finished model gets its name is the same as without an old model.
    for number in range(
        min(n for n, call in enumerate(calls) if call.path.name == "published.json.tmp"), len(calls)
    ):
        shutil.rmtree(root / "out")
        shutil.copytree(root / "old", root / "out")
        counting, error = watched_merge(recipe, root / "out", number, fails, overwrite=True)
        assert everything(root / "out") in ((old, new) if error is not None else (new,)), (
            counting.hit,
            error,
        )
        if error is not None:
            with watched(root):
                merged(recipe, root / "out", overwrite=True)
        assert everything(root / "out") == new, counting.hit
        for left in root.glob(".*"):
            shutil.rmtree(left)
    for name in ("out", "old", "new"):
        shutil.rmtree(root / name)


def test_a_short_read_and_a_read_that_fails_name_the_tensor_and_the_file(recipe: Path) -> None:
    root = recipe.parent
    file = root / "tuned-0" / "model-00001-of-00002.safetensors"

    def reads(call: Call, make: Callable[[], Any]) -> Any:
        if (
            call.name == "preadv" and call.path == file and len(call.arguments[1][0]) == 16 * 8 * 4
        ):  # the first matrix
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return make()

    with watched(root, reads), pytest.raises(RunError) as caught:
        alnico.merge(recipe, root / "out")
    assert str(caught.value).startswith(f"{file}: first: reading 512 bytes at ")
    assert str(caught.value).endswith(
        " failed (Input/output error). Check the disk; the same command resumes the merge."
    )
    shutil.rmtree(root / ".out.alnico-part")


def test_a_target_that_cannot_be_written_is_refused_by_its_name(recipe: Path) -> None:
    root = recipe.parent

    def read_only(call: Call, make: Callable[[], Any]) -> Any:
        if call.name == "mkdir":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(call.path))
        return make()

    with watched(root, read_only), pytest.raises(OutputError) as caught:
        merged(recipe, root / "out")
    assert str(caught.value) == (
        f"{root}/out: nothing of that name can be created in {root} (Read-only file system). Choose another output."
    )
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_that_raises_ends_the_others_and_the_tensor_is_told(
    threads: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no error of files or models is a mistake of ours: it keeps its traceback, and says where it happened."""
    root = recipe.parent
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        if name == "norm" and threading.current_thread().name.startswith("alnico"):
            raise ZeroDivisionError("a mistake of ours")
        real(model, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", read_into)
    with pytest.raises(ZeroDivisionError) as caught:
        alnico.merge(recipe, root / "out", threads=threads)
    assert caught.value.__notes__ == [
        f"alnico: while making norm of {root}/tuned-0, {root}/tuned-1, {root}/base"
    ]
    monkeypatch.undo()
    assert not (root / "out").exists()
    assert merged(recipe, root / "out", restart=True).resumed == 0
    shutil.rmtree(root / "out")
