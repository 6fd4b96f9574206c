"""A store and its remotes: pushing, pulling, what is remembered of them, and what an update tells."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from small_vectors import write_vector

import alnico
from alnico.errors import AlnicoError, HubError, ModelError

BASE = {"id": "owner/base"}
"""Without a revision: an update does not ask the hub about it."""


@pytest.fixture
def here(tmp_path: Path) -> alnico.Store:
    store = alnico.Store(tmp_path / "here")
    store.add(write_vector(tmp_path / "a", "sql", value=1, tasks=["sql"], base=BASE))
    store.add(write_vector(tmp_path / "b", "sql", value=2, tasks=["sql"], base=BASE))
    store.add(write_vector(tmp_path / "c", "ja", value=3, languages=["ja"], base=BASE))
    return store


@pytest.fixture
def there(tmp_path: Path) -> alnico.Store:
    return alnico.Store(tmp_path / "there")


def test_what_one_pushes_the_other_pulls(tmp_path: Path, here: alnico.Store, there: alnico.Store) -> None:
    remote = os.fspath(tmp_path / "remote")
    here.push("sql@2", remote)
    entry = there.pull("sql", source=remote)
    assert (entry.name, entry.version) == ("sql", 2)  # the number that it has there
    files = sorted(p.name for p in there.path("sql").iterdir())
    assert files == ["taskvector.json", "taskvector.safetensors"]
    for name in files:
        assert (there.path("sql") / name).read_bytes() == (here.path("sql@2") / name).read_bytes()
    assert there.pull("sql@2", source=remote).version == 2  # again: nothing new
    assert there.list(all_versions=True).references == ("sql@2",)
    assert there.show("sql").origin == {"source": remote, "reference": "sql", "name": "sql", "version": 2}
    there.verify()


def test_a_taken_number_gets_the_next(tmp_path: Path, here: alnico.Store, there: alnico.Store) -> None:
    remote = os.fspath(tmp_path / "remote")
    here.push("sql@1", remote)
    there.add(write_vector(tmp_path / "own", "sql", value=9))
    assert there.pull("sql@1", source=remote).version == 2
    assert there.show("sql@2").origin["version"] == 1


def test_a_search_covers_the_remotes_one_knows(
    tmp_path: Path, here: alnico.Store, there: alnico.Store
) -> None:
    remote = os.fspath(tmp_path / "remote")
    here.push("sql", remote)
    here.push("ja", remote)
    there.pull("ja", source=remote)
    found = there.search()
    assert [(v.reference, v.source) for v in found] == [("ja@1", ""), ("sql@2", remote)]
    assert [(v.reference, v.source) for v in there.search(task="sql")] == [("sql@2", remote)]
    assert there.list().references == ("ja@1",)
    shutil.rmtree(remote)  # what it had is known without it, and after the index is gone
    (there.folder / "index.sqlite").unlink()
    assert there.search(task="sql").references == ("sql@2",)
    assert there.pull("ja", offline=True).version == 1


def test_a_name_is_pulled_from_the_remote_that_has_it(
    tmp_path: Path, here: alnico.Store, there: alnico.Store
) -> None:
    one, two = os.fspath(tmp_path / "one"), os.fspath(tmp_path / "two")
    here.push("sql@1", one)
    here.push("ja", two)
    here.push("sql@2", two)
    with pytest.raises(ModelError, match="sql: no remote of this store had it when they were last asked"):
        there.pull("sql")
    there.pull("ja", source=two)
    assert there.pull("sql").version == 2
    there.pull("sql@1", source=one)
    with pytest.raises(ModelError, match=r"sql: 2 remotes have it: .*one, .*two; expected one"):
        there.pull("sql")


def test_an_update_tells_what_is_new(tmp_path: Path, here: alnico.Store, there: alnico.Store) -> None:
    remote = os.fspath(tmp_path / "remote")
    here.push("sql@1", remote)
    there.pull("sql", source=remote)
    nothing = there.update()
    assert [(r.address, r.vectors, r.new, r.problem) for r in nothing.remotes] == [(remote, 1, (), "")]
    assert nothing.newer == ()
    alnico.Store(tmp_path / "here").push("sql@2", remote)
    alnico.Store(tmp_path / "here").push("ja", remote)
    update = there.update()
    assert update.remotes[0].new == ("ja@1", "sql@2")
    assert update.newer == (
        f"sql@1 was pulled as sql@1 from {remote}, which has sql@2 now: `alnico store pull sql@2 --from {remote}`.",
    )
    assert "sql@2 now" in repr(update)
    assert "<table" in update._repr_html_()
    assert json.loads(json.dumps(update.data())) == update.data()
    there.pull("sql", source=remote)
    assert there.update().newer == ()


def test_a_remote_that_does_not_answer_keeps_what_it_had(
    tmp_path: Path, here: alnico.Store, there: alnico.Store
) -> None:
    one, two = os.fspath(tmp_path / "one"), os.fspath(tmp_path / "two")
    here.push("sql", one)
    here.push("ja", two)
    there.pull("sql", source=one)
    there.pull("ja", source=two)
    (Path(one) / "index.jsonl").write_text("<html>")
    states = {r.address: r for r in there.update().remotes}
    assert "is a page (HTML or XML)" in states[one].problem
    assert not states[two].problem
    there.remove("sql")  # what is here is listed once
    assert {v.reference for v in there.search() if v.source == one} == {"sql@2"}
    (Path(two) / "index.jsonl").unlink()
    with pytest.raises(HubError, match=r"(?s)one: .*\n.*two"):
        there.update()


def test_a_store_of_an_address_reads_and_writes_the_remote(tmp_path: Path, here: alnico.Store) -> None:
    address = (tmp_path / "remote").as_uri()
    through = alnico.Store(address, folder=here.folder)
    assert through.push("sql") == here.push("sql", address)
    mine = alnico.Store(address, folder=tmp_path / "mine")
    assert len(mine.list(offline=True)) == 0
    assert [(v.reference, v.source) for v in mine.list()] == [("sql@2", address)]
    assert mine.pull("sql").version == 2
    assert alnico.Store(tmp_path / "mine").list().references == ("sql@2",)
    assert [v.reference for v in mine.list(offline=True)] == ["sql@2"]
    with pytest.raises(HubError, match="nothing: has no index"):
        alnico.Store((tmp_path / "nothing").as_uri(), folder=tmp_path / "mine").search("x")
    with pytest.raises(ModelError, match="expected one of them"):
        alnico.Store(tmp_path / "mine", folder=tmp_path)


def test_a_slash_at_the_end_makes_no_second_remote(
    tmp_path: Path, here: alnico.Store, there: alnico.Store
) -> None:
    address = (tmp_path / "remote").as_uri()
    assert here.push("sql", f"{address}/") == f"{address}/sql@2"
    there.pull("sql", source=f"{address}//")
    there.pull("sql", source=address)
    assert [state.address for state in there.update().remotes] == [address]
    assert there.pull("sql").version == 2


def test_a_push_without_a_place_is_an_error(here: alnico.Store) -> None:
    with pytest.raises(AlnicoError, match="sql: no remote is given"):
        here.push("sql")


def test_a_pull_that_fails_leaves_nothing(tmp_path: Path, here: alnico.Store, there: alnico.Store) -> None:
    remote = tmp_path / "remote"
    here.push("sql@1", os.fspath(remote))
    for file in remote.rglob("*"):
        if file.is_file() and file.parts[-3] == "objects":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    with pytest.raises(AlnicoError, match="SHA-256"):
        there.pull("sql", source=os.fspath(remote))
    assert len(there.list()) == 0
    assert list((there.folder / "vectors").iterdir()) == list((there.folder / "unfinished").iterdir()) == []


def test_a_damaged_list_of_a_remote_is_told(tmp_path: Path, here: alnico.Store, there: alnico.Store) -> None:
    remote = os.fspath(tmp_path / "remote")
    here.push("sql", remote)
    there.pull("sql", source=remote)
    (file,) = (there.folder / "remotes").iterdir()
    for text in ("", "{}", "[" * 100_000, '{"address": 3}', '{"address": "x"}\n{"name": "../x"}'):
        file.write_text(text)
        found = there.search()
        assert [v.source for v in found] == [""]
        assert os.fspath(file) in found.notes[0]
    there.local.forget_remote(remote)
    file.unlink(missing_ok=True)
    assert not there.search().notes


@pytest.mark.parametrize("begin", ["update", "search", "list", "pull"])
def test_the_first_thing_with_a_new_folder_may_be_a_remote(
    tmp_path: Path, here: alnico.Store, begin: str
) -> None:
    remote = (tmp_path / "remote").as_uri()
    here.push("sql", remote)
    new = alnico.Store(remote, folder=tmp_path / "new")
    if begin == "pull":
        new.pull("sql")
    else:
        getattr(new, begin)()
    assert new.pull("sql").name == "sql"
    assert alnico.Store(tmp_path / "new").list().references == ("sql@2",)


def test_a_folder_that_is_a_store_gets_the_vector_as_its_own(
    tmp_path: Path, here: alnico.Store, there: alnico.Store
) -> None:
    there.add(write_vector(tmp_path / "own", "own", value=4))
    assert here.push("sql@1", os.fspath(there.folder)) == f"{there.folder}/sql@1"
    there.verify()
    assert there.list().references == ("own@1", "sql@1")
    assert not (there.folder / "index.jsonl").exists()
    assert here.pull("own", source=os.fspath(there.folder)).name == "own"
    here.verify("own")
    assert here.show("own").origin["source"] == os.fspath(there.folder)
    there.add(write_vector(tmp_path / "newer", "own", value=5))
    assert "own@2" in repr(here.update().newer)


def test_a_published_folder_is_opened_as_a_remote(tmp_path: Path, here: alnico.Store) -> None:
    here.push("sql", os.fspath(tmp_path / "public"))
    published = alnico.Store(tmp_path / "public", folder=tmp_path / "new")
    assert published.address == os.fspath(tmp_path / "public")
    assert published.search(task="sql").references == ("sql@2",)
    assert sorted(p.name for p in (tmp_path / "public").iterdir()) == ["index.jsonl", "objects", "vectors"]
