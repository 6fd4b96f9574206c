"""A store that is killed at every call of the system, or whose every call fails, has the old state or the new, and goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_vectors import write_vector

import alnico
from alnico.errors import AlnicoError
from os_calls import WRITES, Call, Counting, watched


def dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(call: Call, make: Callable[[], Any]) -> Any:
    if call.name in (*WRITES, "open", "rename", "renameat2", "replace", "fsync"):
        raise OSError(errno.ENOSPC, "No space left on device", os.fspath(call.path))
    return make()


def runs(work: Callable[[], object]) -> int:
    """Run work in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except AlnicoError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(store: alnico.Store) -> dict[str, str]:
    """All versions of a store, each with what it is, from its files alone; and what each says it holds is true."""
    vectors = store.folder / "vectors"
    found = {}
    for path in sorted(vectors.glob("*/*/taskvector.json")):
        weights = (path.parent / "taskvector.safetensors").read_bytes()
        assert json.loads(path.read_text())["files"]["taskvector.safetensors"]["size"] == len(weights)
        found[f"{path.parent.parent.name}@{path.parent.name}"] = weights[-4:].hex()
    return found


def nothing(_store: alnico.Store, _root: Path) -> None:
    pass


def with_one(store: alnico.Store, root: Path) -> None:
    store.add(root / "one")


def with_remote(_store: alnico.Store, root: Path) -> None:
    other = alnico.Store(root / "other")
    other.add(root / "one")
    other.push("sql", os.fspath(root / "remote"))


BASE = {"w": np.zeros((8, 8), np.float32), "v": np.ones(8, np.float32)}
TUNED = {"w": np.arange(64, dtype=np.float32).reshape(8, 8), "v": np.ones(8, np.float32)}

WORK: dict[str, tuple[Callable[[alnico.Store, Path], None], Callable[[alnico.Store, Path], object]]] = {
    "the first": (nothing, lambda s, root: s.add(root / "one")),
    "a second": (with_one, lambda s, root: s.add(root / "two")),
    "create": (with_one, lambda s, _: s.create(TUNED, BASE, "sql", encoding="whole", threads=1)),
    "remove": (with_one, lambda s, _: s.remove("sql")),
    "describe": (with_one, lambda s, _: s.update("sql", description="new")),
    "list": (with_one, lambda s, _: s.list()),
    "pull": (with_remote, lambda s, root: s.pull("sql", source=os.fspath(root / "remote"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("at", [dies, fails], ids=["killed", "failed"])
@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.nightly)], ids=["some", "every"])
def test_a_kill_or_a_failure_leaves_the_old_or_the_new(
    tmp_path: Path, what: str, at: Callable[..., Any], step: int
) -> None:
    """At some calls, the first and the last among them; at every call each night."""
    prepare, work = WORK[what]
    write_vector(tmp_path / "one", value=1)
    write_vector(tmp_path / "two", value=2)
    begin = tmp_path / "begin"
    prepare(alnico.Store(begin), tmp_path)
    copy = tmp_path / "store"

    def fresh() -> alnico.Store:
        shutil.rmtree(copy, ignore_errors=True)
        if begin.exists():
            shutil.copytree(begin, copy)
        return alnico.Store(copy)

    store = fresh()
    old = content(store)
    with watched(copy, counting := Counting(-1, at)):
        work(store, tmp_path)
    new = content(store)
    statuses, states = set(), set()
    for number in sorted({*range(0, counting.calls, step), counting.calls - 1}):
        store = fresh()

        def interrupted(store: alnico.Store = store, number: int = number) -> None:
            with watched(copy, Counting(number, at)):
                work(store, tmp_path)

        statuses.add(runs(interrupted))
        found = content(store)
        assert found in (old, new), f"call {number}"
        states.add(found == new)
        listed = store.list(all_versions=True)
        assert sorted(listed.references) == sorted(found), f"call {number}"
        assert not listed.notes
        assert store.add(write_vector_once(tmp_path)).name == "after"
        assert not list((copy / "unfinished").iterdir()), f"call {number}"
        assert all(store.verify(name).vectors for name in found)
    assert 1 not in statuses, "an error that is not alnico's"
    if at is dies:
        assert statuses == {-signal.SIGKILL}
    if new != old:
        assert states == {True, False}


def write_vector_once(root: Path) -> Path:
    return root / "after" if (root / "after").exists() else write_vector(root / "after", "after", value=5)
