"""Stores elsewhere: pushed to and pulled from folders, S3, other file systems and web servers, whole and unchanged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.checkpoint.remote.open_folder import open_remote_folder
from alnico.errors import HubError, ModelError
from alnico.store.cache import DownloadCache
from alnico.store.pull import pull_vector, split_reference
from alnico.store.push import push_vector
from alnico.store.remotes.open_remote import open_remote
from alnico.store.remotes.remote_folder_files import RemoteFolderFiles
from s3_server import S3Server
from store.made_artifacts import contents, made_entry, make_artifact
from web_server import WebServer, serving_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DownloadCache:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "own"))
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "5")
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.3")
    return DownloadCache(tmp_path / "own" / "cache")


@pytest.fixture(params=["path", "file", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address that takes files and is empty."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_server').url}/vectors"
    if request.param == "memory":
        return f"memory://{tmp_path.name}/vectors"
    return str(tmp_path / "remote") if request.param == "path" else f"file://{tmp_path}/remote"


def push(folder: Path, to: str, version: int = 1) -> str:
    return push_vector(folder, made_entry(folder, version), to)


def test_what_was_pushed_is_pulled_unchanged_from_every_kind_of_place(place: str) -> None:
    folder = make_artifact(Path("a"), training="ten steps", tasks=["sql"], chat_template=None)
    assert push(folder, place) == f"{place}/sql@1"
    assert pull_vector("sql", Path("b"), source=place) == Path("b")
    assert contents(Path("b")) == contents(folder)
    assert pull_vector(f"{place}/sql@1", Path("c")) == Path("c")
    assert contents(Path("c")) == contents(folder)


def test_the_index_lists_what_the_manifests_say(place: str) -> None:
    push(make_artifact(Path("a"), tasks=["sql"], licence="mit", description="Tables & joins"), place)
    push(make_artifact(Path("b"), "japanese", 1, languages=["ja"]), place)
    first, second = open_remote(place).entries()
    assert (second.name, second.tasks, second.licence, second.description) == (
        "sql",
        ("sql",),
        "mit",
        "Tables & joins",
    )
    assert (first.name, first.languages, first.version) == ("japanese", ("ja",), 1)
    assert first.byte_size == (Path("b") / "taskvector.safetensors").stat().st_size


def test_versions_are_kept_and_chosen(place: str) -> None:
    first, second = make_artifact(Path("a")), make_artifact(Path("b"), seed=1)
    assert push(first, place) == f"{place}/sql@1"
    assert push(second, place) == f"{place}/sql@2"
    assert push(first, place, version=7) == f"{place}/sql@1"  # it is there already
    assert push(make_artifact(Path("c"), seed=2), place, version=9) == f"{place}/sql@9"
    assert contents(pull_vector("sql@1", Path("p1"), source=place)) == contents(first)
    assert contents(pull_vector("sql@2", Path("p2"), source=place)) == contents(second)
    assert contents(pull_vector("sql", Path("p9"), source=place)) == contents(Path("c"))
    with pytest.raises(HubError, match=r"no version 3 of 'sql'; expected one of 1, 2, 9"):
        pull_vector("sql@3", Path("p3"), source=place)
    with pytest.raises(HubError, match=r"no task vector 'sqll'. Did you mean sql\?"):
        pull_vector("sqll", Path("p3"), source=place)
    assert not Path("p3").exists()


def test_a_pulled_vector_is_had_without_network(place: str) -> None:
    folder = make_artifact(Path("a"))
    push(folder, place)
    with pytest.raises(HubError, match="is not in the cache"):
        pull_vector("sql", Path("b"), source=f"{place}-other", offline=True)
    pull_vector("sql", Path("b"), source=place)
    remote = Path(place.removeprefix("file://"))
    if remote.is_dir():
        remote.rename("gone")
    assert contents(pull_vector("sql", Path("c"), source=place, offline=True)) == contents(folder)


def test_a_signature_travels_with_the_vector_also_when_it_comes_later(place: str) -> None:
    folder = make_artifact(Path("a"))
    push(folder, place)
    (folder / "model.sig").write_text(json.dumps({"signed": "yes"}))
    push(folder, place)
    assert contents(pull_vector("sql", Path("b"), source=place)) == contents(folder)


def test_two_pushers_cannot_both_take_a_version(s3_server: S3Server, tmp_path: Path) -> None:
    for url in (s3_server.url, f"memory://{tmp_path.name}/two"):
        files = RemoteFolderFiles(open_remote_folder(url))
        assert files.write("vectors/sql/1/taskvector.json", b"first", is_new=True)
        assert not files.write("vectors/sql/1/taskvector.json", b"second", is_new=True)
        assert b"".join(files.read("vectors/sql/1/taskvector.json", 0, 100)) == b"first"
        assert files.files("vectors") == ["vectors/sql/1/taskvector.json"]
        assert files.files("nothing") == []
        files.close()


def test_a_large_file_is_sent_in_parts(s3_server: S3Server, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((8 << 20) + 5)
    (tmp_path / "large").write_bytes(data)
    files = RemoteFolderFiles(open_remote_folder(s3_server.url))
    files.send("objects/large", tmp_path / "large")
    assert s3_server.read("objects/large") == data
    assert b"".join(files.read("objects/large", 3, 1 << 30)) == data[3:]
    s3_server.fail("denied", methods=("PUT",), times=math.inf)
    with pytest.raises(HubError, match="s3:PutObject"):
        files.send("objects/other", tmp_path / "large")
    assert s3_server.uploads() == []
    files.close()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    push(make_artifact(tmp_path / "a", size=1 << 18), "served")
    with serving_folder(tmp_path / "served") as running:
        yield running


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_any_web_server_of_files_will_do(web: WebServer, ranges: bool, head: bool) -> None:
    web.takes_ranges, web.takes_head = ranges, head
    assert contents(pull_vector("sql", Path("b"), source=web.url)) == contents(Path("a"))
    assert contents(pull_vector(f"{web.url}/sql@1", Path("c"))) == contents(Path("a"))
    with pytest.raises(HubError, match="can only be read"):
        push(Path("a"), web.url)


def test_another_local_store_is_pulled_from_and_not_pushed_to() -> None:
    made = make_artifact(Path("a"))
    alnico.Store("theirs").add(made)
    entry = alnico.Store("mine").pull("theirs/sql")
    assert contents(alnico.Store("mine").path("sql")) == contents(made)
    assert not os.path.samefile(
        alnico.Store("mine").path("sql") / "taskvector.json",
        alnico.Store("theirs").path("sql") / "taskvector.json",
    )
    assert open_remote("theirs").entries() == [entry]
    with pytest.raises(HubError, match="is the store of somebody on this machine"):
        push(made, "theirs")
    (alnico.Store("theirs").path("sql") / "taskvector.safetensors").write_bytes(b"0")
    with pytest.raises(ModelError, match="is not the file that the manifest names"):
        pull_vector("theirs/sql", Path("b"))
    assert not Path("b").exists()


def test_a_name_alone_says_what_is_missing() -> None:
    with pytest.raises(ModelError, match="does not say where it is"):
        split_reference("sql")
