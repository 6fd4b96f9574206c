"""The local store: adding, listing, removing, and what is left when a writer is killed."""

from __future__ import annotations

from pathlib import Path

from small_vectors import write_vector

import alnico


def test_what_is_added_is_listed_and_found(tmp_path: Path) -> None:
    store = alnico.Store(tmp_path / "store")
    assert len(store.list()) == 0
    entry = store.add(write_vector(tmp_path / "a", "sql", tasks=["sql"], description="Writes queries."))
    assert (entry.name, entry.version) == ("sql", 1)
    store.add(write_vector(tmp_path / "b", "japanese", languages=["ja"]))
    assert store.list().references == ("japanese@1", "sql@1")
    assert store.search("quer").references == ("sql@1",)
    assert store.search(task="SQL").references == ("sql@1",)
    assert store.search(language="ja").references == ("japanese@1",)
    assert store.search(base="owner/base").references == ("japanese@1", "sql@1")
    assert store.search(base="owner/other").references == ()
    assert store.path("sql") == tmp_path / "store" / "vectors" / "sql" / "1"
