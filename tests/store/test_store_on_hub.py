"""The store and the hub: searching it, taking in what was found, and telling of new commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import alnico
from alnico.errors import AlnicoError, ModelError
from hub.stub import Hub, serving
from store.made_artifacts import make_artifact
from store.test_hub_vectors import adapter

# huggingface_hub itself hands files to httpx in a way that httpx discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "own"))
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "5")
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


def test_what_the_hub_has_is_found_beside_what_is_here_and_taken_in(hub: Hub, run: Run) -> None:
    commit = hub.add("you/sql-lora", adapter(Path("lora")))
    store = alnico.Store()
    store.add(make_artifact(Path("a"), "mine", base={"id": "org/base"}))
    assert store.search(base="org/base").references == ("mine@1",)
    found = store.search(base="org/base", hub=True)
    assert [(v.reference, v.source) for v in found] == [("mine@1", ""), (f"you/sql-lora@{commit}", "the hub")]
    code, text, _ = run("store", "search", "--hub", "--base", "org/base")
    assert code == 0
    assert f"you/sql-lora@{commit}"[:57] in text
    entry = store.pull(found[1].reference)
    assert (entry.name, entry.version, entry.kind, entry.base) == ("sql-lora", 1, "adapter", "org/base")
    assert store.show("sql-lora").origin == {
        "source": "you/sql-lora",
        "reference": f"you/sql-lora@{commit}",
        "name": "sql-lora",
        "version": 1,
    }
    assert store.search(base="org/base").references == ("mine@1", "sql-lora@1")
    store.verify()


def test_a_new_commit_of_a_vector_or_a_base_is_told(hub: Hub) -> None:
    first = hub.add("org/base", {"config.json": b"{}"})
    store = alnico.Store()
    store.add(make_artifact(Path("a"), base={"id": "org/base", "revision": first}))
    store.push("sql", "hf:me/sql")
    yours = alnico.Store(Path("yours"))
    yours.pull("me/sql")
    assert (yours.update().newer, yours.update().moved) == ((), ())
    store.add(make_artifact(Path("b"), seed=1, base={"id": "org/base", "revision": first}))
    store.push("sql", "hf:me/sql")
    second = hub.add("org/base", {"config.json": b"{} "})
    update = yours.update()
    assert update.newer == (
        "sql@1 was pulled as sql@1 from me/sql, which has other content under this name now: `alnico store pull me/sql`.",
    )
    assert len(update.moved) == 1
    assert update.moved[0].startswith(f"sql@1: org/base is at revision {second[:12]} now")
    assert yours.pull("me/sql").version == 2
    assert yours.update().newer == ()


def test_a_base_that_the_hub_does_not_answer_about_is_told(hub: Hub) -> None:
    store = alnico.Store()
    store.add(make_artifact(Path("a"), base={"id": "org/gone", "revision": "a" * 40}))
    update = store.update()
    assert update.moved == (f"sql@1: org/gone: {hub.url} did not say whether it has a new revision.",)
    assert store.update(offline=True).moved == ()


def test_a_search_of_the_hub_needs_an_id_and_the_network(hub: Hub) -> None:
    store = alnico.Store()
    (Path("base")).mkdir()
    with pytest.raises(ModelError):
        store.search(base="base", hub=True)
    with pytest.raises(AlnicoError, match="hub and offline are both given"):
        store.search(base="org/base", hub=True, offline=True)
    store.add(make_artifact(Path("a")))
    with pytest.raises(AlnicoError, match="like and hub are both given"):
        store.search(like="sql", hub=True)
    assert hub.url
