"""Servers that are busy, break off, dawdle, lie and refuse: the bytes arrive, or one error names the object and shows no secret."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alnico.checkpoint.hub import find_repository
from alnico.checkpoint.network import TransferStopped
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.hub_folder import HubFolder
from alnico.checkpoint.remote.open_folder import open_remote_folder
from alnico.errors import AlnicoError, HubError, ModelError
from hub.stub import Hub
from hub.stub import serving as serving_hub
from s3_server import S3Server, set_aws
from web_server import WebServer, serving_folder

SIZE = 2_000_000
"""More than what is read whole from a server that takes no ranges."""
DATA = np.random.default_rng(0).bytes(SIZE)
SECRETS = ("alnicos-secret-key", "alnicos-session-token", "alnicos-password", "hf_secret")


@pytest.fixture(autouse=True)
def _impatient(impatient: None) -> None:
    """Half a second for timeouts, and almost no waiting."""


@pytest.fixture(params=["s3", "web"])
def server(request: pytest.FixtureRequest) -> WebServer:
    """A server with a.bin, which has DATA."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        request.getfixturevalue("monkeypatch").setenv("AWS_SESSION_TOKEN", "alnicos-session-token")
        s3.put("a.bin", DATA)
        s3.forget()
        return s3
    web: WebServer = request.getfixturevalue("web_server")
    (web.folder / "a.bin").write_bytes(DATA)
    return web


@pytest.fixture
def folder(server: WebServer) -> Iterator[RemoteFolder]:
    opened = open_remote_folder(server.url)
    yield opened
    opened.close()


def read(
    folder: RemoteFolder,
    offset: int = 0,
    count: int = SIZE,
    state: FileVersion | None = None,
    name: str = "a.bin",
) -> bytes:
    state = state or folder.state(name)
    assert state is not None
    buffer = bytearray(count)
    folder.read_into(name, offset, memoryview(buffer), state)
    return bytes(buffer)


def refused(call: Callable[[], object], kind: type[AlnicoError] = HubError, name: str = "a.bin") -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert name in text
    assert text.isprintable()
    assert len(caught.value.args) == 1
    assert len(text) < 700
    assert not any(secret in text for secret in SECRETS)
    assert (
        caught.value.__suppress_context__ or caught.value.__context__ is None
    )  # a traceback shows no errors of libraries, which may have secrets
    return text


# ---- faults that pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("status", {"status": 500, "times": 3}),
        ("status", {"status": 503, "times": 2, "code": "SlowDown"}),
        ("status", {"status": 503, "headers": {"Retry-After": "1"}}),
        ("status", {"status": 429}),
        ("status", {"status": 503, "methods": ("HEAD",), "times": 2}),
        ("reset", {"times": 2}),
        ("reset", {"share": 0}),
        ("reset", {"methods": ("HEAD",), "share": 0}),
        ("cut", {"times": 2}),
        ("cut", {"share": 0}),
        ("stall", {}),
        ("slow", {}),
    ],
)
def test_a_fault_that_passes_changes_no_byte(
    server: WebServer, folder: RemoteFolder, kind: str, settings: dict[str, Any]
) -> None:
    server.fail(kind, "a.bin", **settings)
    assert read(folder) == DATA
    assert len(server.failures) == settings.get("times", 1)


def test_what_arrived_is_not_asked_for_again(server: WebServer, folder: RemoteFolder) -> None:
    server.fail("cut", "a.bin", times=2)
    assert read(folder, 100, 1000) == DATA[100:1100]
    assert [range for method, name, range in server.requests if method == "GET"] == [
        "bytes=100-1099", "bytes=600-1099", "bytes=850-1099",
    ]  # fmt: skip


# ---- faults that do not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("status", {"status": 500}, "is busy (status 500"),
        ("status", {"status": 503, "headers": {"Retry-After": "1000"}}, "asks to wait 1000 s"),
        ("reset", {"share": 0}, "cut off the connection"),
        ("cut", {"share": 0}, "cut off the connection"),
        ("stall", {"share": 0}, "sent nothing for 0.5 s"),
        ("slow", {}, "too slow"),
    ],
)
def test_a_fault_that_stays_is_an_error_after_some_tries(
    server: WebServer, folder: RemoteFolder, kind: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.1")
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "0.1" if kind in ("stall", "slow") else "1")
    message = message.replace("0.5", "0.1")
    server.fail(kind, "a.bin", times=math.inf, **settings)
    text = refused(lambda: read(folder))
    assert message in text
    assert "Try again later; the same command resumes." in text
    assert "ALNICO_HUB_WAIT" in text
    assert 1 <= len(server.failures) <= 8


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (
            "wrong range",
            {},
            HubError,
            "sent 'bytes 11-110/2000000'; expected the requested part ('bytes=10-109')",
        ),
        ("odd range", {"text": "bytes */2000000"}, HubError, "sent 'bytes */2000000'"),
        ("odd range", {"text": "bytes 10-109"}, HubError, "sent 'bytes 10-109'"),
        ("odd range", {"text": "bytes 10-" + "9" * 400}, HubError, "sent 'bytes 10-9"),
        ("odd range", {"text": ""}, HubError, "sent ''"),
        ("odd range", {"text": "bytes 10-50/2000000"}, HubError, "sent 'bytes 10-50/2000000'"),
        ("longer", {}, HubError, "more than the 100 bytes from 10 on that were asked for"),
        ("longer", {"count": 3 * SIZE}, HubError, ""),
        ("size", {}, ModelError, "it had 2000000 bytes and the tag"),
        ("whole", {}, HubError, "sends the whole file, of 2.0 MB, where a part is asked for"),
        ("ETag", {"text": '"other"'}, ModelError, 'now it has 2000000 bytes and the tag "other"'),
        ("status", {"status": 404, "code": "NoSuchKey"}, ModelError, "it was removed"),
        ("status", {"status": 416, "code": "InvalidRange"}, ModelError, "changed while it was read"),
        ("status", {"status": 418, "code": "Teapot"}, HubError, "418"),
        ("redirect", {}, HubError, ""),
        ("redirect", {"to": "ftp://elsewhere/a.bin"}, HubError, ""),
        ("denied", {}, HubError, "access"),
        ("expired", {}, HubError, ""),
    ],
)
def test_a_lie_or_a_refusal_is_one_error_at_once(
    server: WebServer, folder: RemoteFolder, kind: str, settings: dict[str, Any], error: type[AlnicoError], message: str
) -> None:  # fmt: skip
    state = folder.state("a.bin")
    server.fail(kind, "a.bin", times=math.inf, **settings)
    text = refused(lambda: read(folder, 10, 100, state), error)
    assert message in text
    assert len(server.failures) <= (6 if kind == "redirect" else 1)


def test_a_small_file_is_read_from_a_server_without_ranges(server: WebServer) -> None:
    if isinstance(server, S3Server):
        server.put("small", DATA[:1000])
    else:
        (server.folder / "small").write_bytes(DATA[:1000])
    folder = open_remote_folder(server.url)
    state = folder.state("small")
    assert state is not None
    server.fail("whole", "small", times=math.inf)
    buffer = bytearray(100)
    folder.read_into("small", 500, memoryview(buffer), state)
    assert buffer == DATA[500:600]
    server.fail("whole", "a.bin", times=math.inf)
    assert read(folder) == DATA  # all of it is asked for


def test_an_object_that_is_replaced_between_two_requests_is_noticed(
    server: WebServer, folder: RemoteFolder
) -> None:
    state = folder.state("a.bin")
    other = bytes(SIZE)

    def replace() -> None:
        if isinstance(server, S3Server):
            server.put("a.bin", other)
        else:
            (server.folder / "a.bin").write_bytes(other)

    assert read(folder, 0, 100, state) == DATA[:100]
    server.fail("cut", "a.bin")
    server.fail("call", "a.bin", skip=0, function=replace)
    text = refused(lambda: read(folder, 0, SIZE, state), ModelError)
    assert "changed while it was read" in text
    assert server.failures == ["cut", "call"]


def test_a_small_file_of_a_server_without_ranges_is_still_of_one_version(web_server: WebServer) -> None:
    (web_server.folder / "a.bin").write_bytes(DATA[:1000])
    web_server.takes_ranges = False
    folder = open_remote_folder(web_server.url)
    state = folder.state("a.bin")
    assert read(folder, 500, 100, state) == DATA[500:600]
    web_server.fail("ETag", text='"other"')
    refused(lambda: read(folder, 500, 100, state), ModelError)


@pytest.mark.slow
def test_faults_while_writing_pass(s3_server: S3Server) -> None:
    folder = open_remote_folder(s3_server.url)
    writes = ("PUT", "POST", "DELETE")
    for kind, settings in (
        ("status", {"status": 503, "code": "SlowDown"}),
        ("status", {"status": 500, "code": "InternalError"}),
        ("reset", {"share": 0}),
        ("cut", {"share": 0}),
        ("stall", {"share": 0}),
    ):
        for name in ("config.json", "model"):
            s3_server.fail(kind, name, methods=writes, times=2, **settings)
        assert folder.put("config.json", b"{}").size == 2
        upload = folder.start_upload("model")
        tags = {n: folder.upload_part("model", upload, n, memoryview(DATA * (4 - n))) for n in (1, 2)}
        s3_server.fail(kind, "model", methods=writes, **settings)
        assert folder.complete_upload("model", upload, tags).size == 5 * SIZE
        assert s3_server.read("config.json") == b"{}"
        assert s3_server.read("model") == DATA * 5
        folder.delete("model")
        assert [(f.kind, f.names, f.times) for f in s3_server.faults if f.times] == []
    folder.close()


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_list_that_is_cut_off_is_no_shorter_list(s3_server: S3Server, share: float) -> None:
    names = [f"m/{n}" for n in range(20)]
    for name in names:
        s3_server.put(name, b"1")
    folder = open_remote_folder(s3_server.url)
    s3_server.fail("cut", times=2, share=share)
    assert folder.names() == sorted(names)
    assert s3_server.failures == ["cut", "cut"]
    s3_server.fail("cut", times=math.inf, share=share)
    assert "cut off the connection" in refused(folder.names, name=s3_server.url)
    folder.close()


def test_a_part_that_the_server_refuses_is_named(s3_server: S3Server) -> None:
    folder = open_remote_folder(s3_server.url)
    upload = folder.start_upload("a.bin")
    s3_server.fail("denied", methods=("PUT",))
    text = refused(lambda: folder.upload_part("a.bin", upload, 7, memoryview(b"1")))
    assert "a.bin (part 7): " in text
    s3_server.fail("status", methods=("PUT",), status=503, times=math.inf)
    assert "a.bin (part 7): the server is busy" in refused(
        lambda: folder.upload_part("a.bin", upload, 7, memoryview(b"1"))
    )
    folder.close()


def test_a_size_that_no_file_has_is_no_size(web_server: WebServer) -> None:
    (web_server.folder / "a.bin").write_bytes(b"1")
    folder = open_remote_folder(web_server.url)
    for length in ("-1", "9" * 30, "1e3", ""):
        web_server.tamper = lambda request, length=length: request.answer(
            200, b"", {"Content-Length": length, "Content-Range": "bytes 0-0/*"}
        ) is None  # fmt: skip
        refused(lambda: folder.state("a.bin"))


def test_a_server_without_head_is_asked_for_one_byte(web_server: WebServer) -> None:
    (web_server.folder / "a.bin").write_bytes(DATA)
    (web_server.folder / "empty").write_bytes(b"")
    web_server.takes_head = False
    folder = open_remote_folder(web_server.url)
    assert read(folder) == DATA
    assert folder.state("empty") is not None
    assert folder.state("absent") is None
    assert web_server.reads_of("a.bin") == [(0, 1), (0, SIZE)]


# ---- redirects ----------------------------------------------------------------------------------------------------------


def test_a_redirect_to_another_host_is_followed_without_credentials(
    web_server: WebServer, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.bin").write_bytes(DATA)
    with serving_folder(tmp_path / "other") as other:
        seen: list[str] = []
        other.tamper = lambda request: seen.append(str(request.headers)) is not None
        web_server.fail("redirect", methods=("HEAD", "GET"), times=math.inf, to=f"{other.url}/a.bin")
        folder = open_remote_folder(web_server.url)
        assert read(folder, 5, 10) == DATA[5:15]
        assert seen
        assert not any("authorization" in headers.lower() or "cookie" in headers.lower() for headers in seen)


# ---- S3's errors --------------------------------------------------------------------------------------------------------


def test_expired_credentials_are_named_also_where_only_the_version_is_asked_for(s3_server: S3Server) -> None:
    s3_server.put("a.bin", DATA)
    folder = open_remote_folder(s3_server.url)
    s3_server.fail("expired", methods=("HEAD", "GET", "PUT", "POST"), times=math.inf)
    for call in (
        lambda: folder.state("a.bin"),
        lambda: folder.put("a.bin", b""),
        lambda: folder.start_upload("a.bin"),
        lambda: read(folder, state=FileVersion(SIZE, "")),
    ):
        text = refused(call)
        assert "the credentials have expired (ExpiredToken). Refresh them" in text
    refused(folder.names, name=s3_server.url)
    assert (
        len(s3_server.failures) == 7
    )  # one each, and a HEAD that says no reason, after which botocore asks for the region


def test_denied_access_names_the_right_that_is_missing(s3_server: S3Server) -> None:
    folder = open_remote_folder(s3_server.url)
    s3_server.fail("denied", methods=("HEAD", "GET", "PUT", "POST", "DELETE"), times=math.inf)
    for call, right in (
        (lambda: folder.state("a.bin"), "s3:GetObject"),
        (lambda: folder.put("a.bin", b""), "s3:PutObject"),
        (lambda: folder.delete("a.bin"), "s3:DeleteObject"),
        (lambda: folder.start_upload("a.bin"), "s3:PutObject"),
        (lambda: folder.upload_part("a.bin", "x", 1, memoryview(b"1")), "s3:PutObject"),
        (lambda: folder.uploaded_parts("a.bin", "x"), "s3:ListMultipartUploadParts"),
        (lambda: folder.abort_upload("a.bin", "x"), "s3:AbortMultipartUpload"),
    ):
        assert f"denies access (AccessDenied); expected the right {right} in the bucket 'bucket'" in refused(
            call
        )
    assert "s3:ListBucket" in refused(folder.names, name=s3_server.url)


@pytest.mark.usefixtures("s3_server")
def test_a_bucket_that_is_not_there_is_no_absent_file() -> None:
    folder = open_remote_folder("s3://no-such-bucket/m")
    for call in (lambda: folder.state("a.bin"), lambda: folder.put("a.bin", b"")):
        assert "has no bucket 'no-such-bucket' (NoSuchBucket). Check the URL" in refused(call)
    assert "has no bucket" in refused(folder.names, name="s3://no-such-bucket/m")


def test_a_server_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = refused(lambda: open_remote_folder("s3://bucket/m").state("a.bin"))
    assert "http://127.0.0.1:9 could not be reached (EndpointConnectionError)" in text
    text = refused(lambda: open_remote_folder("http://127.0.0.1:9/m").state("a.bin"))
    assert "could not be reached (ConnectError" in text


@pytest.mark.parametrize("kind", ["s3", "web"])
def test_a_server_that_goes_in_the_middle_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A web server can answer what S3 is asked when files are read."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.bin").write_bytes(DATA)
    with serving_folder(tmp_path) as web:
        set_aws(monkeypatch, web.url)
        folder = open_remote_folder("s3://bucket" if kind == "s3" else f"{web.url}/bucket")
        state = folder.state("a.bin")
        assert read(folder, state=state) == DATA
        web.fail("reset", share=0)  # the open connection's thread outlives the server
    text = refused(lambda: read(folder, state=state))
    assert "does not answer" in text
    assert "7 times in" in text
    folder.close()


@pytest.mark.parametrize(
    "text", ['W/"weak"', "plain", '"' + "x" * 500 + '"', "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_a_tag_that_is_no_strong_one_is_compared_here(
    server: WebServer, folder: RemoteFolder, text: str
) -> None:
    server.fail("ETag", methods=("HEAD", "GET"), times=2, text=text)
    state = folder.state("a.bin")
    assert state is not None
    assert read(folder, 10, 100, state) == DATA[10:110]
    if len(text) < 300:
        refused(lambda: read(folder, 10, 100, state), ModelError)


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"AWS_PROFILE": "nobody"}, "AWS's files have no profile 'nobody'"),
        (
            {"AWS_ENDPOINT_URL": "http://me:alnicos-password@127.0.0.1:9"},
            "http://127.0.0.1:9 could not be reached",
        ),
        ({"AWS_ENDPOINT_URL": "alnicos-password"}, "AWS_ENDPOINT_URL is not the address of a server"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "the credentials cannot be used (PartialCredentialsError)"),
        ({"AWS_ACCESS_KEY_ID": "alnicos-password\n"}, ""),
        ({"HTTP_PROXY": "http://me:alnicos-password@127.0.0.1:9", "NO_PROXY": ""}, "(ProxyConnectionError)"),
    ],
)
def test_settings_that_cannot_be_used_are_named_without_secrets(
    settings: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    try:
        assert message in refused(lambda: open_remote_folder("s3://bucket/m").put("a.bin", b""))
    except pytest.fail.Exception:
        assert not message  # moto takes any key


def test_without_credentials_requests_are_not_signed(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.put("a.bin", DATA)
    s3_server.client.put_object_acl(Bucket="bucket", Key=f"{s3_server.prefix}a.bin", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    seen: list[str] = []
    s3_server.tamper = lambda request: seen.append(str(request.headers)) is not None
    folder = open_remote_folder(s3_server.url)
    assert read(folder) == DATA
    assert not any("authorization" in headers.lower() for headers in seen)
    s3_server.fail("denied", times=math.inf)
    assert "denies access without credentials (AccessDenied); none were found" in refused(
        lambda: read(folder)
    )


def test_a_server_that_repeats_the_token_in_its_error_is_not_repeated(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "alnicos-session-token")

    def repeat(request: Any) -> bool:
        request.skip_body()
        token = request.headers["X-Amz-Security-Token"]
        request.answer(400, f"<Error><Code>{token}</Code><Message>{token}</Message></Error>".encode())
        return True

    s3_server.tamper = repeat
    folder = open_remote_folder(s3_server.url)
    assert "refuses the request (400)" in refused(lambda: folder.put("a.bin", b""))


@pytest.mark.parametrize("body", [b"<html>", b"", b"{}", b"\xff\xfe", b"<a>" * 5000])
@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_server_that_is_not_s3_is_one_error(s3_server: S3Server, body: bytes, status: int) -> None:
    s3_server.tamper = lambda request: request.answer(status, body) is None
    folder = open_remote_folder(s3_server.url)
    refused(lambda: read(folder, state=FileVersion(SIZE, "")), AlnicoError)
    refused(folder.names, name=s3_server.url)
    refused(lambda: folder.start_upload("a.bin"))


def test_the_package_that_s3_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    text = refused(lambda: open_remote_folder("s3://bucket/m"), name="s3://bucket/m")
    assert "s3:// needs botocore" in text
    assert "Run: pip install" in text
    assert "[remote]" in text


def test_schemes_that_nobody_knows_are_named() -> None:
    assert "is no file system that fsspec knows" in refused(
        lambda: open_remote_folder("nosuch://a/b"), name="nosuch://a/b"
    )
    with pytest.raises(HubError, match="expected the package of fsspec for it"):
        open_remote_folder("dropbox://a/b")


# ---- the hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(tmp_path / "home", monkeypatch) as running:
        running.add("org/a", {"a.safetensors": DATA})
        yield running
        assert not any(r.token for r in running.requests if r.host == "store")
        assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.parent.name != "refs"]


def test_faults_of_the_hub_pass_or_are_one_error(hub: Hub) -> None:
    name = "a.safetensors"
    folder = HubFolder(find_repository("org/a", offline=False))
    met: list[str | None] = []

    def fail_thrice(request: Any) -> bool:
        if request.host != "store":
            return False
        met.append(request.headers["Range"])
        if len(met) == 1:
            request.answer_raw(503, b"", {"Retry-After": "0"})
        elif len(met) < 4:
            first, body = [(0, DATA[:500]), (500, b"")][len(met) - 2]
            stated = {
                "Content-Length": str(SIZE - first),
                "Content-Range": f"bytes {first}-{SIZE - 1}/{SIZE}",
            }
            request.answer_raw(206, body, stated)
            request.close_connection = True
        return 1 <= len(met) < 4

    hub.tamper = fail_thrice
    assert read(folder, name=name) == DATA
    assert met == [f"bytes={first}-{SIZE - 1}" for first in (0, 0, 500, 500)]
    hub.tamper = lambda request: request.host == "store" and request.answer_raw(503, b"", {}) is None
    assert "org/a: a.safetensors: the server is busy (status 503)" in refused(
        lambda: read(folder, name=name), name=name
    )
    hub.tamper = lambda request: request.host == "store" and request.answer_raw(403, b"", {}) is None
    assert "refuses access (status 403)" in refused(lambda: read(folder, name=name), name="org/a")
    hub.tamper, hub.takes_ranges = None, False
    assert read(folder, 1000, 10, name=name) == DATA[1000:1010]
    text = refused(lambda: read(folder, 1_500_000, 10, name=name), name=name)
    assert "sends the whole file where the part from 1500000 on" in text


# ---- interrupts ---------------------------------------------------------------------------------------------------------


def test_closing_a_folder_ends_its_waits(
    server: WebServer, folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALNICO_HUB_WAIT", "1000")
    state = folder.state("a.bin")
    server.fail("status", "a.bin", status=503, times=math.inf, headers={"Retry-After": "500"})
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            read(folder, state=state)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not server.failures:
        time.sleep(0.01)
    folder.close()
    thread.join(10)
    assert isinstance(ended[0], TransferStopped)


WAITING = """
import sys
from alnico.checkpoint.remote.folder import FileVersion
from alnico.checkpoint.remote.open_folder import open_remote_folder
open_remote_folder(sys.argv[1]).read_into("a.bin", 0, memoryview(bytearray(10)), FileVersion(2000000, ""))
"""


@pytest.mark.parametrize(("server", "kind"), [("s3", "stall"), ("web", "status")], indirect=["server"])
def test_an_interrupt_ends_a_wait(server: WebServer, kind: str) -> None:
    server.fail(kind, "a.bin", times=math.inf, status=503, headers={"Retry-After": "500"})
    environment = os.environ | {"ALNICO_HUB_WAIT": "1000", "ALNICO_HUB_TIMEOUT": "1000"}
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING, server.url], env=environment, stderr=subprocess.PIPE
    )
    while not server.failures and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, text = child.communicate(timeout=20)
    assert b"KeyboardInterrupt" in text
