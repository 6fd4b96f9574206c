"""Searching a store: what is found is what a plain loop over the manifests finds, and a damaged index changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_vectors import write_vector

import alnico
from alnico.errors import AlnicoError, ModelError
from alnico.store.entry import Entry

TASKS = ("sql", "math", "chat")
LANGUAGES = ("ja", "de")
LICENCES = ("mit", "apache-2.0", None)
BASES = ("owner/base", "owner/other", None)
WORDS = ("writes", "queries", "Japanese", "café", "re-ranked", "step")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[alnico.Store, list[dict[str, Any]]]:
    """A store of 60 vectors of random descriptions, and what their manifests say."""
    folder, draw = tmp_path_factory.mktemp("many"), random.Random(7)
    store = alnico.Store(folder / "store")
    said = []
    for i in range(60):
        own = {
            "description": " ".join(draw.sample(WORDS, draw.randrange(4))),
            "tasks": draw.sample(TASKS, draw.randrange(3)),
            "languages": draw.sample(LANGUAGES, draw.randrange(2)),
            "licence": draw.choice(LICENCES),
            "base": {"id": draw.choice(BASES)},
        }
        store.add(write_vector(folder / str(i), f"v{i:02}", value=i, **own))
        said.append({"name": f"v{i:02}", **own})
    return store, said


def words_of(said: dict[str, Any]) -> list[str]:
    fields = [said["name"], said["description"], *said["tasks"], *said["languages"], said["base"]["id"] or ""]
    plain = " ".join(fields).lower().replace("é", "e")
    return re.findall(r"[a-z0-9]+", plain)


@pytest.mark.parametrize(
    "text", ["", "que", "QUERIES writes", "cafe", "Café", "re-ranked", "base", "sql ja", "v1", "none"]
)
@pytest.mark.parametrize(
    "filters", [{}, {"task": "MATH"}, {"language": "ja"}, {"licence": "MIT"}, {"base": "Owner/Base"}]
)
def test_a_search_finds_what_a_loop_finds(
    made: tuple[alnico.Store, list[dict[str, Any]]], text: str, filters: dict[str, str]
) -> None:
    store, said = made
    typed = re.findall(r"[a-z0-9]+", text.lower().replace("é", "e"))
    expected = {
        s["name"]
        for s in said
        if all(any(w.startswith(t) for w in words_of(s)) for t in typed)
        and ("task" not in filters or "math" in s["tasks"])
        and ("language" not in filters or "ja" in s["languages"])
        and ("licence" not in filters or s["licence"] == "mit")
        and ("base" not in filters or s["base"]["id"] == "owner/base")
    }
    search: Any = store.search
    found = search(text, limit=100, **filters)
    assert {v.entry.name for v in found} == expected
    assert found.total == len(expected)


def test_text_is_never_an_operator(made: tuple[alnico.Store, list[dict[str, Any]]]) -> None:
    store, _ = made
    for text in (
        '"',
        "NEAR(a",
        "name:sql",
        "a OR b",
        "*",
        "(",
        "-sql",
        "^",
        "a\0b",
        "'; DROP TABLE vectors; --",
        "{",
        "\ud800",
    ):
        store.search(text)
    assert len(store.list()) == 60


def test_the_limit_is_told(made: tuple[alnico.Store, list[dict[str, Any]]]) -> None:
    store, _ = made
    found = store.search(limit=5)
    assert (len(found), found.total) == (5, 60)
    with pytest.raises(AlnicoError, match="limit is 0"):
        store.search(limit=0)


def test_a_base_that_is_a_path_is_found_by_its_weights(tmp_path: Path) -> None:
    """The root hash is computed here from its definition."""
    import hashlib

    from small_vectors import safetensors_bytes

    model = tmp_path / "renamed"
    model.mkdir()
    lines = []
    for i in (1, 2):
        data = safetensors_bytes({f"w{i}": ("F32", [2], bytes([i] * 8))})
        name = f"model-0000{i}-of-00002.safetensors"
        (model / name).write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {len(data)}  {name}\n")
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "config.json").write_text("{}")
    root = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    store = alnico.Store(tmp_path / "store")
    store.add(write_vector(tmp_path / "a", "mine", base={"id": "somebody/else", "root": root}))
    store.add(write_vector(tmp_path / "b", "other", base={"id": "renamed", "root": "c" * 64}))
    store.add(write_vector(tmp_path / "c", "memory", base={"id": "renamed"}))
    assert store.search(base=model).references == ("memory@1", "mine@1")


@pytest.fixture
def small(tmp_path: Path) -> alnico.Store:
    store = alnico.Store(tmp_path / "store")
    for i in range(3):
        store.add(write_vector(tmp_path / str(i), f"v{i}", value=i))
    assert store.list().references == ("v0@1", "v1@1", "v2@1")
    return store


def damaged(store: alnico.Store, how: str) -> None:
    path = store.folder / "index.sqlite"
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a database, but long enough to be read as one" * 100)
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "cut":
        os.truncate(path, 5000)
    elif how == "later":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 999")
        database.close()
    elif how == "other tables":
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE vectors (a)")
            database.execute("PRAGMA user_version = 2")
        database.close()
    elif how == "line":
        with sqlite3.connect(path) as database:
            database.execute("UPDATE vectors SET line = '{' WHERE name = 'v1'")
        database.close()
    elif how == "link":
        path.unlink()
        path.symlink_to(store.folder.parent / "elsewhere")
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "zeros", "cut", "later", "other tables", "line", "link", "folder"]
)
def test_a_damaged_index_is_made_again(small: alnico.Store, how: str) -> None:
    damaged(small, how)
    for _ in range(2):
        assert small.list().references == ("v0@1", "v1@1", "v2@1")
        assert small.search("v1").references == ("v1@1",)
    assert not (small.folder.parent / "elsewhere").exists()


def test_every_byte_of_the_index_may_be_damaged(small: alnico.Store) -> None:
    """A page at a time is overwritten: the answer stays the same."""
    path = small.folder / "index.sqlite"
    for offset in range(0, path.stat().st_size, 2048):
        content = bytearray(path.read_bytes())
        content[offset : offset + 64] = bytes(x ^ 0xA5 for x in content[offset : offset + 64])
        path.write_bytes(content)
        assert small.list().references == ("v0@1", "v1@1", "v2@1"), offset


def test_what_others_copied_into_the_folders_is_found(small: alnico.Store, tmp_path: Path) -> None:
    write_vector(small.folder / "vectors" / "copied" / "1", "copied")
    write_vector(small.folder / "vectors" / "v0" / "7", "v0", value=9)
    assert small.list().references == ("copied@1", "v0@7", "v1@1", "v2@1")
    os.rename(small.folder / "vectors" / "copied", tmp_path / "away")
    assert small.list().references == ("v0@7", "v1@1", "v2@1")
    write_vector(small.folder / "vectors" / "liar" / "1", "v0")
    listed = small.list()
    assert listed.references == ("v0@7", "v1@1", "v2@1")
    assert "liar/1: its manifest says that it is 'v0'" in listed.notes[0]


def test_a_store_whose_index_cannot_be_written_is_read(
    small: alnico.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(small, "missing")
    connect = sqlite3.connect

    def connect_in_memory(path: object, *more: Any, **options: Any) -> sqlite3.Connection:
        if path != ":memory:":
            raise sqlite3.OperationalError("unable to open database file")
        made: sqlite3.Connection = connect(":memory:", *more, **options)
        return made

    monkeypatch.setattr(sqlite3, "connect", connect_in_memory)
    assert small.list().references == ("v0@1", "v1@1", "v2@1")
    assert small.search("v2").references == ("v2@1",)
    assert not (small.folder / "index.sqlite").exists()


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    store = alnico.Store(tmp_path / "store")
    entry = Entry("odd", 1, "0" * 64, 1, description="a \ud800 b", tasks=("\ud800",))
    store.local.note_entries("s3://odd", [entry])
    (found,) = store.search("odd")
    assert found.entry.description == "a \ud800 b"


def test_several_processes_make_the_index_at_once(small: alnico.Store) -> None:
    import subprocess
    import sys

    code = "import sys, alnico; print(*alnico.Store(sys.argv[1]).list().references)"
    for how in ("missing", "text"):
        damaged(small, how)
        running = [
            subprocess.Popen([sys.executable, "-c", code, small.folder], stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        assert [p.communicate()[0] for p in running] == ["v0@1 v1@1 v2@1\n"] * 4
        assert [p.returncode for p in running] == [0] * 4


def test_a_busy_index_is_an_error_that_says_so(small: alnico.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from alnico.store import index

    monkeypatch.setattr(index, "WAIT_SECONDS", 0.05)
    other = sqlite3.connect(small.folder / "index.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert len(small.list()) == 3  # nothing changed, so nothing is written
        write_vector(small.folder / "vectors" / "new" / "1", "new")
        with pytest.raises(ModelError, match="another process has been writing it"):
            small.list()
    finally:
        other.close()
    assert len(small.list()) == 4


def test_results_show_themselves(made: tuple[alnico.Store, list[dict[str, Any]]]) -> None:
    store, _ = made
    found = store.search("queries", limit=3)
    assert repr(found).startswith(f"<{found.total} task vectors in {store.folder}: searched: queries; v")
    assert "<table" in found._repr_html_()
    assert [v["reference"] for v in found.data()["vectors"]] == list(found.references)
    assert json.loads(json.dumps(found.data())) == found.data()
    assert list(itertools.chain(found)) == [found[i] for i in range(3)]


def test_words_without_spaces_are_found_inside(tmp_path: Path) -> None:
    store = alnico.Store(tmp_path / "store")
    store.add(write_vector(tmp_path / "a", "ja", description="日本語のベクトル, हिन्दी में, ภาษาไทย"))
    store.add(write_vector(tmp_path / "b", "de", description="Vektor für Deutsch"))
    for text in ("ベクトル", "日本語 ベクトル", "語の", "हिन्दी", "ไทย", "ja ベクトル"):
        assert store.search(text).references == ("ja@1",), text
    for text in ("ベクトル de", "漢字", "***", "- -"):
        assert store.search(text).references == (), text
    assert store.search("Deutsch ***").references == ("de@1",)


def test_likeness_is_the_cosine_of_the_differences(tmp_path: Path) -> None:
    """Task vectors of known cosines, from numpy, are sorted by them; each estimate is within four standard errors."""
    random = np.random.default_rng(3)
    base = {f"w{i}": random.standard_normal((64, 256)).astype(np.float32) for i in range(12)}
    own = {n: random.standard_normal(v.shape) for n, v in base.items()}
    other = {n: random.standard_normal(v.shape) for n, v in base.items()}
    store, cosines = (
        alnico.Store(tmp_path / "store"),
        {"near": 0.8, "half": 0.5, "none": 0.0, "against": -0.6},
    )
    for name, c in {"me": 1.0, **cosines}.items():
        mixed = {n: c * own[n] + (1 - c * c) ** 0.5 * other[n] for n in base}
        store.create(
            {n: (base[n] + 0.01 * mixed[n]).astype(np.float32) for n in base}, base, name, exact=True
        )
    store.create(
        dict(base), {n: v + 1 for n, v in base.items()}, "elsewhere", exact=True, base_id="another/base"
    )
    found = store.search(like="me")
    assert [v.entry.name for v in found] == ["near", "half", "none", "against"]
    for v in found:
        assert v.cosine is not None
        assert v.cosine_error is not None
        assert 0 < v.cosine_error < 0.1
        assert abs(v.cosine - cosines[v.entry.name]) < 4 * v.cosine_error
    assert store.search(like=os.fspath(store.path("me"))).references == found.references
    assert [v.entry.name for v in store.search(like="me", limit=2)] == ["near", "half"]
    assert found.data()["vectors"][0]["cosine"] == found[0].cosine


def test_a_change_within_a_step_of_the_clock_is_seen(small: alnico.Store) -> None:
    """A version that appears at the time, by the file system, that the index has already seen."""
    folder = small.folder / "vectors" / "v0"
    before = folder.stat()
    write_vector(folder / "2", "v0", value=9)
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert small.list().references == ("v0@2", "v1@1", "v2@1")
