"""Folders at URLs of every kind: what is written is read back, versions are told apart, and uploads appear when they are complete."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.hub_folder import HubFolder
from alnico.checkpoint.remote.open_folder import checked_url, is_url, open_remote_folder
from alnico.errors import HubError, ModelError
from hub.stub import serving as serving_hub

if TYPE_CHECKING:
    from s3_server import S3Server
    from web_server import WebServer

DATA = np.random.default_rng(0).bytes(100_000)
PART = 5 << 20


@pytest.fixture(autouse=True)
def _impatient(impatient: None) -> None:
    """No test waits long for a server that fails by mistake."""


def read(folder: RemoteFolder, name: str, offset: int = 0, count: int | None = None) -> bytes:
    state = folder.state(name)
    assert state is not None
    buffer = bytearray(state.size - offset if count is None else count)
    folder.read_into(name, offset, memoryview(buffer), state)
    return bytes(buffer)


@pytest.fixture(params=["s3", "memory"])
def writable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteFolder]:
    """An empty folder that takes files."""
    if request.param == "s3":
        url = f"{request.getfixturevalue('s3_server').url}/model"
    else:
        url = f"memory://{tmp_path.name}/model"
    folder = open_remote_folder(url)
    yield folder
    folder.close()


@pytest.fixture(params=["s3", "memory", "web", "hub"])
def filled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteFolder]:
    """A folder with a.bin, which has DATA, an empty file, and side/b c.json."""
    files = {"a.bin": DATA, "empty": b"", "side/b c%41.json": b"{}"}
    folder: RemoteFolder
    if request.param == "hub":
        from alnico.checkpoint.hub import find_repository

        with serving_hub(tmp_path / "home", monkeypatch) as hub:
            hub.add("org/a", files)
            folder = HubFolder(find_repository("org/a", offline=False))
            yield folder
            assert all(r.token is None for r in hub.requests if r.host == "store")
            assert not list((tmp_path / "home").rglob("blobs/*"))
        return
    if request.param == "web":
        server = request.getfixturevalue("web_server")
        for name, data in files.items():
            (server.folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (server.folder / "model" / name).write_bytes(data)
        folder = open_remote_folder(f"{server.url}/model/")
    else:
        if request.param == "s3":
            folder = open_remote_folder(f"{request.getfixturevalue('s3_server').url}/model")
        else:
            folder = open_remote_folder(f"memory://{tmp_path.name}/model")
        for name, data in files.items():
            folder.put(name, data)
    yield folder
    folder.close()


def test_parts_of_files_are_read_as_they_are(filled: RemoteFolder) -> None:
    assert read(filled, "a.bin") == DATA
    assert read(filled, "a.bin", 12_345, 678) == DATA[12_345 : 12_345 + 678]
    assert read(filled, "a.bin", len(DATA) - 1) == DATA[-1:]
    assert read(filled, "a.bin", 50, 0) == b""
    assert read(filled, "empty") == b""
    assert read(filled, "side/b c%41.json") == b"{}"
    assert filled.state("side") is None
    assert filled.state("absent") is None
    assert filled.names() in (None, ["a.bin", "empty", "side/b c%41.json"])


def test_many_threads_read_at_once(filled: RemoteFolder) -> None:
    state = filled.state("a.bin")
    assert state is not None
    result, size = bytearray(len(DATA)), 5_000
    errors: list[BaseException] = []

    def read_some(first: int) -> None:
        try:
            for offset in range(first * size, len(DATA), 8 * size):
                filled.read_into("a.bin", offset, memoryview(result)[offset : offset + size], state)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read_some, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert result == DATA


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "a//b", "", ".", "a\nb", "side/../../a"])
def test_no_name_leads_out_of_the_folder(filled: RemoteFolder, name: str) -> None:
    with pytest.raises(ModelError, match="is not the name of a file below it"):
        filled.state(name)


def test_small_files_are_written_replaced_and_removed(writable: RemoteFolder) -> None:
    assert writable.names() == []
    assert writable.state("x/config.json") is None
    first = writable.put("x/config.json", b"one")
    assert first == writable.state("x/config.json")
    assert first.tag
    second = writable.put("x/config.json", b"two")
    assert (second.size, second.tag == first.tag) == (3, False)
    assert read(writable, "x/config.json") == b"two"
    with pytest.raises(ModelError, match="changed while it was read"):
        writable.read_into("x/config.json", 0, memoryview(bytearray(3)), first)
    assert writable.put_new("x/config.json", b"new") is None
    assert read(writable, "x/config.json") == b"two"
    new = writable.put_new("x/other.json", b"new")
    assert new == writable.state("x/other.json")
    writable.delete("x/other.json")
    writable.delete("x/config.json")
    writable.delete("x/config.json")
    assert writable.names() == []
    with pytest.raises(ModelError, match=r"changed while it was read: .*(removed|no longer has)"):
        writable.read_into("x/config.json", 0, memoryview(bytearray(3)), second)


def test_an_upload_appears_when_it_is_complete(writable: RemoteFolder) -> None:
    parts = {1: np.random.default_rng(1).bytes(PART), 2: b"end"}
    upload = writable.start_upload("model.safetensors")
    assert writable.uploaded_parts("model.safetensors", upload) == {}
    tags = {2: writable.upload_part("model.safetensors", upload, 2, memoryview(parts[2]))}
    writable.upload_part("model.safetensors", upload, 1, memoryview(bytes(PART)))
    tags[1] = writable.upload_part(
        "model.safetensors", upload, 1, memoryview(np.frombuffer(parts[1], np.uint8))
    )  # again
    assert writable.uploaded_parts("model.safetensors", upload) == {1: (PART, tags[1]), 2: (3, tags[2])}
    assert writable.names() == []
    done = writable.complete_upload("model.safetensors", upload, tags)
    assert done == writable.state("model.safetensors")
    assert done.size == PART + 3
    assert read(writable, "model.safetensors") == parts[1] + parts[2]
    assert writable.uploaded_parts("model.safetensors", upload) is None


def test_an_upload_is_discarded(writable: RemoteFolder) -> None:
    upload = writable.start_upload("a")
    writable.upload_part("a", upload, 1, memoryview(b"data"))
    writable.abort_upload("a", upload)
    writable.abort_upload("a", upload)
    assert writable.uploaded_parts("a", upload) is None
    assert writable.names() == []
    with pytest.raises(HubError, match="Run the same command again"):
        writable.complete_upload("a", upload, {1: '"0cc175b9c0f1b6a831c399e269772661"'})
    assert writable.uploaded_parts("a", "../../etc") is None


def test_what_can_only_be_read_says_so(web_server: WebServer) -> None:
    folder = open_remote_folder(web_server.url)
    for call in (
        lambda: folder.put("a", b""), lambda: folder.delete("a"), lambda: folder.start_upload("a"),
        lambda: folder.upload_part("a", "b", 1, memoryview(b"")), lambda: folder.uploaded_parts("a", "b"),
        lambda: folder.complete_upload("a", "b", {}), lambda: folder.abort_upload("a", "b"),
    ):  # fmt: skip
        with pytest.raises(HubError, match="can only be read"):
            call()  # type: ignore[no-untyped-call]
    assert not folder.is_writable
    assert web_server.requests == []


def test_a_bucket_is_a_folder_and_its_list_has_pages(s3_server: S3Server) -> None:
    for name in ("a", "b/c", "b/d/e", "folder/"):
        s3_server.put(f"m/{name}", b"1")
    s3_server.put("mm/x", b"1")
    folder = open_remote_folder(f"{s3_server.url}/m")
    real = folder._once  # type: ignore[attr-defined]
    folder._once = lambda where, method, **more: real(
        where, method, **more, **({"MaxKeys": 1} if "list" in method else {})
    )  # type: ignore[attr-defined]
    assert folder.names() == ["a", "b/c", "b/d/e"]
    assert f"{s3_server.prefix}m/b/c" in (open_remote_folder("s3://bucket").names() or [])


def test_names_that_lead_elsewhere_are_not_listed(s3_server: S3Server) -> None:
    for name in ("good", "../evil", "a/../../evil", "a//b", "x\ty", "/etc/passwd"):
        s3_server.put(f"m/{name}", b"1")
    assert open_remote_folder(f"{s3_server.url}/m").names() == ["good"]


def test_a_completion_whose_answer_was_lost_is_not_an_error(s3_server: S3Server) -> None:
    folder = open_remote_folder(f"{s3_server.url}/m")
    upload = folder.start_upload("a")
    tags = {1: folder.upload_part("a", upload, 1, memoryview(b"data"))}
    s3_server.fail("reset", "m/a", methods=("POST",), share=0)
    assert folder.complete_upload("a", upload, tags).size == 4
    assert folder.complete_upload("a", upload, tags).size == 4  # after a kill before the journal knew
    s3_server.put("m/a", b"other")
    with pytest.raises(HubError, match="not there as it was sent"):
        folder.complete_upload("a", upload, tags)


def test_a_version_without_a_tag_is_told_by_its_size(web_server: WebServer) -> None:
    (web_server.folder / "a").write_bytes(b"12345")
    folder = open_remote_folder(web_server.url)
    web_server.fail("no ETag", methods=("HEAD", "GET"), times=9)
    state = folder.state("a")
    assert state == FileVersion(5, "")
    assert read(folder, "a") == b"12345"
    (web_server.folder / "a").write_bytes(b"1234")
    with pytest.raises(ModelError, match="it had 5 bytes, now it has 4 bytes"):
        folder.read_into("a", 0, memoryview(bytearray(4)), state)
    with pytest.raises(ModelError, match="it had 5 bytes, now it has fewer"):
        folder.read_into("a", 4, memoryview(bytearray(1)), state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://key:hidden@bucket/m", "has a user or a password"),
        ("s3://key:hid/den@bucket/m", "has a user or a password"),
        ("s3://key:123/hidden@bucket/m", "has a user or a password"),
        ("https://me:hidden@host/m", "has a user or a password"),
        ("https://hidden@host/m", "has a user or a password"),
        ("https://host:hidden/m", "cannot be read"),
        ("https://[hidden/m", "cannot be read"),
        ("https://host/m?X-Amz-Signature=hidden", "has a query or a fragment"),
        ("s3://bucket/m#hidden", "has a query or a fragment"),
        ("https://host/hf_" + "hidden" * 6 + "/m", "has what looks like a token"),
        ("https://hf_" + "hidden" * 6 + "/m?x", "has what looks like a token"),
        ("s3://AKIAHIDDENHIDDENHIDD/m", "has what looks like a token"),
        ("file:///srv/m", "Write '/srv/m'"),
        ("simplecache::s3://bucket/m", "is not a URL"),
        ("zip://a::s3://bucket/m", "cannot be read"),
        ("s3://bucket/a::b", "has '::'"),
        ("s3://bucket/a\nb", "control character"),
        ("s3:///m", "where the bucket is expected"),
        ("s3://bucket:80/m", "where the bucket is expected"),
        ("https:///m", "has no name of a server"),
        ("https://host/a/../b", "an empty part, '.' or '..'"),
        ("s3://bucket/a//b", "an empty part, '.' or '..'"),
        ("https://host/" + "x" * 2000, "longer than 2000"),
    ],
)
def test_urls_that_hide_something_are_refused_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        checked_url(text)
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value).lower()
    assert len(caught.value.args) == 1
    with pytest.raises(ModelError):
        open_remote_folder(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S3://Bucket/Model/", "s3://Bucket/Model"),
        ("s3a://bucket", "s3://bucket"),
        ("s3://bucket/model@v1", "s3://bucket/model@v1"),
        ("HTTPS://Example.ORG:8080/A/", "https://example.org:8080/A"),
        ("http://[::1]:80/m", "http://[::1]:80/m"),
        ("memory://x/y", "memory://x/y"),
    ],
)
def test_a_url_has_one_spelling(text: str, expected: str) -> None:
    assert is_url(text)
    assert checked_url(text) == expected == checked_url(expected)
