"""What was merged from the hub is verified against the commits in the lock, whatever the branch has become."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import alnico
from alnico.errors import UncheckedError
from hub.stub import Hub, serving
from made import family, model_bytes

RECIPE = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": ["org/one@main", "local/tuned-1"],
    "parameters": {"density": 0.5},
}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "home", monkeypatch) as running:
        base, tuned = family(Path("local"), 3)
        for name, folder in (("org/base", base), ("org/one", tuned[0])):
            running.add(name, folder)
        yield running


def test_the_commits_of_the_lock_are_read_and_merged_again(hub: Hub) -> None:
    alnico.merge(RECIPE, "out")
    hub.add("org/one", Path("local/tuned-2"))  # the branch goes on
    assert alnico.verify("out", against_inputs=True).recomputed.tensors == 20
    alnico.reproduce("out", "new")
    ours, theirs = model_bytes(Path("out")), model_bytes(Path("new"))
    assert ours.pop("alnico.lock.json") != theirs.pop(
        "alnico.lock.json"
    )  # the recipe names the commit, the first named the branch
    assert ours == theirs
    assert alnico.verify("new", against_inputs=True, offline=True).recomputed.tensors == 20


def test_a_model_of_the_hub_may_have_been_downloaded(hub: Hub) -> None:
    alnico.merge(RECIPE, "out")
    places = {"org/base": "local/base", "org/one@main": "local/tuned-0"}
    hub.repos.clear()
    assert alnico.verify("out", against_inputs=True, inputs=places).recomputed.tensors == 20


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(hub: Hub) -> None:
    alnico.merge(RECIPE, "out")
    Path("local/tuned-1").rename("gone")
    hub.add("local/tuned-1", Path("gone"))
    hub.requests.clear()
    with pytest.raises(
        UncheckedError, match=r"^out: could not check against its inputs: local/tuned-1 is neither here"
    ):
        alnico.verify("out", against_inputs=True)
    assert hub.requests == []
