"""The local store: adding, listing, removing, and what is left when a writer is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from small_vectors import write_vector

import alnico
from alnico.errors import AlnicoError, ModelError, OutputError, ResourceError, VerificationError


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, without the index."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("index.sqlite")
    }


@pytest.fixture
def store(tmp_path: Path) -> alnico.Store:
    return alnico.Store(tmp_path / "store")


def test_what_is_added_is_listed(tmp_path: Path, store: alnico.Store) -> None:
    assert len(store.list()) == 0
    assert not store.folder.exists()  # looking makes nothing
    entry = store.add(write_vector(tmp_path / "a", "sql"))
    assert (entry.name, entry.version, entry.base, entry.byte_size) == ("sql", 1, "owner/base", 112)
    store.add(write_vector(tmp_path / "b", "japanese"))
    assert store.list().references == ("japanese@1", "sql@1")
    assert store.path("sql") == tmp_path / "store" / "vectors" / "sql" / "1"
    assert tree(store.path("sql")) == tree(tmp_path / "a")


def test_a_second_content_is_the_next_version_and_the_same_is_no_new_one(
    tmp_path: Path, store: alnico.Store
) -> None:
    store.add(write_vector(tmp_path / "a", value=1.0))
    assert store.add(write_vector(tmp_path / "b", value=2.0)).version == 2
    assert store.add(tmp_path / "a").version == 1
    assert store.list().references == ("sql@2",)
    assert store.list(all_versions=True).references == ("sql@2", "sql@1")
    assert tree(store.path("sql@1")) == tree(tmp_path / "a")


def test_a_wanted_version_is_taken_where_it_is_free(tmp_path: Path, store: alnico.Store) -> None:
    assert store.add(write_vector(tmp_path / "a", value=1.0), version=3).version == 3
    assert store.add(write_vector(tmp_path / "b", value=2.0), version=3).version == 4
    assert store.add(write_vector(tmp_path / "c", value=3.0), version=1).version == 1


def test_a_removed_version_gives_its_number_to_nobody(tmp_path: Path, store: alnico.Store) -> None:
    for i in (1, 2):
        store.add(write_vector(tmp_path / str(i), value=i))
    assert [e.version for e in store.remove("sql@2")] == [2]
    assert store.list(all_versions=True).references == ("sql@1",)
    assert store.add(write_vector(tmp_path / "3", value=3)).version == 3
    assert [e.version for e in store.remove("sql")] == [1, 3]
    assert len(store.list()) == 0
    with pytest.raises(ModelError, match="has no task vector 'sql'"):
        store.remove("sql")
    assert store.add(tmp_path / "1").version == 4


def test_a_damaged_version_can_be_removed_and_is_reported(tmp_path: Path, store: alnico.Store) -> None:
    store.add(write_vector(tmp_path / "a", "sql"))
    store.add(write_vector(tmp_path / "b", "good"))
    (store.path("sql") / "taskvector.json").write_text("{}")
    for _ in range(2):
        listed = store.list()
        assert listed.references == ("good@1",)
        assert [n for n in listed.notes if "format is None" in n]
    store.remove("sql")
    assert not store.list().notes


def test_files_that_are_not_the_manifests_are_not_added(tmp_path: Path, store: alnico.Store) -> None:
    folder = write_vector(tmp_path / "a")
    weights = bytearray((folder / "taskvector.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "taskvector.safetensors").write_bytes(weights)
    with pytest.raises(
        VerificationError, match=r"a/taskvector\.safetensors: has the SHA-256 .* the manifest says"
    ):
        store.add(folder)
    other = write_vector(tmp_path / "b")
    (other / "run.py").write_text("")
    with pytest.raises(VerificationError, match=r"b/run\.py: is not in the manifest"):
        store.add(other)
    (other / "run.py").unlink()
    (other / "taskvector.safetensors").unlink()
    with pytest.raises((VerificationError, AlnicoError), match=r"taskvector\.safetensors"):
        store.add(other)
    assert len(store.list()) == 0
    assert list((store.folder / "vectors").iterdir()) == list((store.folder / "unfinished").iterdir()) == []


def test_a_link_in_place_of_a_file_is_followed_by_nothing(tmp_path: Path, store: alnico.Store) -> None:
    folder = write_vector(tmp_path / "a")
    secret = tmp_path / "secret"
    os.rename(folder / "taskvector.safetensors", secret)
    os.symlink(secret, folder / "taskvector.safetensors")
    store.add(folder)
    assert not (store.path("sql") / "taskvector.safetensors").is_symlink()


def test_a_folder_that_is_something_else_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    photos = alnico.Store(tmp_path / "photos")
    uses: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (photos.list, ()),
        (photos.add, (write_vector(tmp_path / "a"),)),
        (photos.search, ("x",)),
        (photos.remove, ("sql",)),
        (photos.path, ("sql",)),
        (photos.verify, ()),
        (photos.update, ()),
    ]
    for use, arguments in uses:
        with pytest.raises(
            OutputError, match=r"photos: is not a store of task vectors, as it has no store\.json"
        ):
            use(*arguments)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_a_store_of_a_later_format_is_refused(tmp_path: Path, store: alnico.Store) -> None:
    store.add(write_vector(tmp_path / "a"))
    (store.folder / "store.json").write_text('{"format": "alnico store", "version": 2}')
    with pytest.raises(
        ModelError, match="has format 'alnico store' and version 2; this alnico reads version 1"
    ):
        store.list()


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, store: alnico.Store) -> None:
    store.add(write_vector(tmp_path / "a"))
    for name in ("..", "../sql", "sql/1", "", "sql@0", "sql@-1", "sql@1/.."):
        with pytest.raises(ModelError):
            store.path(name)
    manifest = json.loads((write_vector(tmp_path / "b") / "taskvector.json").read_text())
    (tmp_path / "b" / "taskvector.json").write_text(json.dumps({**manifest, "name": "../escaped"}))
    with pytest.raises(ModelError, match=r"name is '\.\./escaped'"):
        store.add(tmp_path / "b")


def test_two_writers_lose_nothing(tmp_path: Path, store: alnico.Store) -> None:
    """Several processes add versions of one name at once: each has its own number and its own content."""
    writers, each = 4, 6
    for w in range(writers):
        for i in range(each):
            write_vector(tmp_path / f"{w}-{i}", value=10 * w + i)
    code = (
        "import sys, alnico; from pathlib import Path; s = alnico.Store(sys.argv[1])\n"
        "for p in sys.argv[2:]: s.add(p); s.list()"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, store.folder, *(str(tmp_path / f"{w}-{i}") for i in range(each))]
        )
        for w in range(writers)
    ]
    assert [p.wait() for p in running] == [0] * writers
    assert len(store.list(all_versions=True)) == writers * each
    kept = {tree(store.path(f"sql@{v}"))["taskvector.safetensors"] for v in range(1, writers * each + 1)}
    assert kept == {
        tree(tmp_path / f"{w}-{i}")["taskvector.safetensors"] for w in range(writers) for i in range(each)
    }
    assert not list((store.folder / "unfinished").iterdir())


def test_threads_may_share_a_store(tmp_path: Path, store: alnico.Store) -> None:
    folders = [write_vector(tmp_path / str(i), f"v{i}") for i in range(6)]
    threads = [threading.Thread(target=store.add, args=(f,)) for f in folders]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(store.list()) == 6


def test_an_unfinished_vector_is_nowhere_and_goes_away(tmp_path: Path, store: alnico.Store) -> None:
    code = (
        "import os, signal, sys, alnico; s = alnico.Store(sys.argv[1])\n"
        "with s.new_folder() as new: new.mkdir(); (new / 'taskvector.json').write_text('{'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, store.folder], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((store.folder / "unfinished").iterdir())) == 1
    assert len(store.list()) == 0
    assert not store.list().notes
    with store.new_folder() as held:
        held.mkdir()
        store.add(write_vector(tmp_path / "a"))  # what another writer holds stays
        assert held.is_dir()
    assert not list((store.folder / "unfinished").iterdir())


def test_an_error_leaves_nothing(store: alnico.Store) -> None:
    def fail() -> None:
        with store.new_folder() as new:
            new.mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list((store.folder / "unfinished").iterdir())


def test_a_file_of_another_size_is_not_copied_first(tmp_path: Path, store: alnico.Store) -> None:
    folder = write_vector(tmp_path / "a")
    os.truncate(folder / "taskvector.safetensors", 1 << 42)
    with pytest.raises(VerificationError, match=r"has 4398046511104 bytes; the manifest says 112"):
        store.add(folder)
    manifest = json.loads((folder / "taskvector.json").read_text())
    manifest["files"]["taskvector.safetensors"]["size"] = 1 << 42
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    with pytest.raises(ResourceError, match=r"has 4398\.0 GB|4\.4 TB, and the disk of the store has"):
        store.add(folder)
    assert not list((store.folder / "unfinished").iterdir())


def test_a_home_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("~nosuchuser/store", Path("~nosuchuser/store")):
        with pytest.raises(ModelError, match="has no task vector"):
            alnico.Store(place).path("sql")
    with pytest.raises(AlnicoError, match="nosuchuser"):
        alnico.Store(tmp_path / "s").add("~nosuchuser/x")

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("ALNICO_STORE", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    with pytest.raises(ModelError, match="you have no home directory; expected one"):
        alnico.Store()


def test_a_store_is_asked_for_names_as_a_dict_is(tmp_path: Path) -> None:
    store = alnico.Store(tmp_path / "store")
    assert list(store) == []
    store.add(write_vector(tmp_path / "1", "sql", value=1))
    assert ("sql" in store, "sql@1" in store, "sql@2" in store, "../x" in store, 3 in store) == (
        True,
        True,
        False,
        False,
        False,
    )
    assert list(store) == ["sql"]
    with pytest.raises(ModelError, match="3 is not the name of a task vector"):
        store[3]  # type: ignore[index]


def test_an_empty_place_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: alnico.Store(""), lambda: alnico.equip("base", "sql", dry_run=True, store="")):
        with pytest.raises(
            ModelError, match=r"store is empty; expected a folder\. Leave it out for your own store"
        ):
            call()


def test_a_base_in_memory_cannot_be_verified(tmp_path: Path) -> None:
    store = alnico.Store(tmp_path / "store")
    store.add(write_vector(tmp_path / "1", "sql", value=1))
    with pytest.raises(ModelError, match="base is of type dict; expected the path or hub id of a model"):
        store.verify("sql", base={})  # type: ignore[arg-type]


def test_an_adapter_of_an_unknown_base_is_not_said_to_be_in_memory(
    tmp_path: Path, store: alnico.Store
) -> None:
    store.add(write_vector(tmp_path / "1", "sql", value=1, base={}))
    assert repr(store["sql"]) == "<task vector store:sql@1 of an unnamed base>"
    assert "of an unnamed base" in repr(store.show("sql"))
