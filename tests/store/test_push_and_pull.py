"""``alnico store push`` and ``store pull``: what is said, and what is in the store afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import alnico
from alnico.errors import ModelError
from hub.stub import Hub, serving
from store.made_artifacts import contents, digest, made_entry, make_artifact
from web_server import serving_folder

# huggingface_hub itself hands files to httpx in a way that httpx discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "mine"))
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "5")
    with serving(tmp_path / "home", monkeypatch) as running:
        yield running


@pytest.fixture
def sql() -> Path:
    """A task vector that is in the store."""
    folder = make_artifact(Path("a"), base={"id": None})
    alnico.Store().add(folder)
    return folder


def test_a_push_prints_the_address_and_a_pull_the_name(
    sql: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("store", "push", "sql", "./remote") == (0, f"{Path('remote').absolute()}/sql@1\n", "sending 1 file to "
        f"{Path('remote').absolute()}, {size_text(sql)}\n")  # fmt: skip
    assert (
        run("store", "push", "sql@1", "./remote", "--json")[1]
        == json.dumps({"address": f"{Path('remote').absolute()}/sql@1"}, indent=1) + "\n"
    )
    with serving_folder(Path("remote")) as web:
        monkeypatch.setenv("ALNICO_STORE", str(Path("yours").absolute()))
        assert run("store", "pull", "sql", "--from", web.url, "--quiet") == (0, "", "")
        code, out, _ = run("store", "pull", f"{web.url}/sql@1", "--json")
    assert (code, json.loads(out)["name"], json.loads(out)["notes"]) == (0, "sql", [])
    assert contents(alnico.Store().path("sql")) == contents(sql)
    assert run("store", "pull", "sql", "--offline")[:2] == (0, "pulled sql@1\n")  # the remote is known
    code, out, err = run("store", "pull", "nothing", "--from", "./remote")
    assert (code, out) == (13, "")
    assert "has no task vector 'nothing'" in err


def size_text(folder: Path) -> str:
    return f"{(folder / 'taskvector.safetensors').stat().st_size / 1000:.1f} kB"


def test_a_pull_from_the_hub_tells_that_the_base_was_changed(hub: Hub, run: Run) -> None:
    old = hub.add("org/base", {"config.json": b"{}"})
    folder = make_artifact(Path("a"), base={"id": "org/base", "revision": old})
    alnico.Store().add(folder)
    assert run("store", "push", "sql", "hf:me/sql", "-m", "Mine")[:2] == (0, f"{hub.url}/me/sql\n")
    assert "note" not in run("store", "pull", "me/sql")[2]
    new = hub.add("org/base", {"config.json": b"{} "})
    code, out, err = run("store", "pull", "me/sql")
    assert (code, out) == (0, "pulled sql@1\n")
    assert f"note: org/base is at revision {new[:12]} now; the task vector was made of {old[:12]}." in err


def test_a_push_without_network_or_to_a_web_server_is_refused(sql: Path, run: Run) -> None:
    assert sql.is_dir()
    code, out, err = run("store", "push", "sql", "https://example.org/vectors")
    assert (code, out) == (13, "")
    assert "can only be read; expected a place that takes files" in err
    code, out, err = run("store", "push", "sql", "./remote", "--private")
    assert (code, out) == (13, "")
    assert "Leave --private out" in err


def test_a_manifest_that_lies_about_its_tensors_is_not_pulled(run: Run) -> None:
    folder = make_artifact(Path("a"))
    manifest = json.loads((folder / "taskvector.json").read_text())
    manifest["tensors"]["w"]["shape"] = [1 << 40]
    (folder / "taskvector.json").write_text(json.dumps(manifest))
    from alnico.store.push import push_vector

    push_vector(folder, made_entry(folder), "remote")
    with pytest.raises(ModelError, match=r"remote: sql/taskvector\.json: w .*expected I64"):
        alnico.Store().pull("sql", source="remote")
    assert len(alnico.Store().list()) == 0
    assert run("store", "pull", "sql", "--from", "remote")[0] == 4


def test_the_digest_of_the_tests_is_that_of_the_format() -> None:
    import numpy as np

    assert (
        digest(np.zeros(1, np.float32), "F32")[:8] == "5539e0b7"
    )  # numerics/digest.py has it from the format
