"""A hub that lies, dawdles, breaks off, or wants the token: an error with exit code 13, nothing outside of the cache, no waiting without end."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import alnico
from alnico.checkpoint import hub as hub_room
from alnico.errors import HubError, ModelError
from hub.stub import Hub, serving
from made import save_model

Run = Callable[..., tuple[int, str, str]]
Tamper = Callable[[Any], bool]
ODD: list[Any] = [
    None, True, False, 0, -1, 3.5, 1e308, float("inf"), float("nan"), 10**30, "", "3", "../../evil", "/etc/evil", "..\\evil", "a\nb",
    "\x1b[2J", "\0", "\ud800", "x" * 1_000_000, ".", "a//b", [], {}, [1], {"a": 1}, [[["deep"]]],
]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with two models, a client of little patience, and a look at what was written at the end."""
    from huggingface_hub import constants

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "0.5")
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.3")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    with serving(tmp_path / "home", monkeypatch) as running:
        for name in ("a", "b"):
            running.add(
                f"org/{name}",
                save_model(
                    Path(name),
                    {"w": ("F32", np.arange(9000, dtype=np.float32).reshape(90, 100))},
                    {"x": "y" * 900},
                ),
            )
        Path("r.yml").write_text("merge_method: linear\nmodels: [org/a, org/b]\n")
        yield running
    assert {p.name for p in tmp_path.iterdir()} <= {"work", "home"}
    assert {p.name for p in (tmp_path / "home").glob("*")} <= {"hub", "xet"}
    assert not any("evil" in p.name for p in tmp_path.rglob("*"))
    assert not any(r.token for r in running.requests if r.host == "store")


def said(call: Callable[[], object]) -> str:
    with pytest.raises(HubError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("org/a")
    assert "hf_secret" not in text
    assert text.isprintable()
    assert len(text) < 1500
    return text


def tried(call: Callable[[], object]) -> str:
    """What a HubError says; nothing where there is none."""
    try:
        call()
    except HubError as error:
        text = str(error)
    else:
        return ""
    assert text.startswith("org/a: ")
    assert text.isprintable()
    return text


def is_listing(request: Any) -> bool:
    return request.path.startswith("/api/models/")


def listing(hub: Hub, name: str = "org/a") -> dict[str, Any]:
    files = hub.files(name)
    siblings = [
        {
            "rfilename": n,
            "size": len(d),
            "blobId": "0",
            "lfs": {"sha256": "0" * 64, "size": len(d), "pointerSize": 1},
        }
        for n, d in files.items()
    ]
    return {
        "id": name,
        "sha": hub.repos[name].refs["main"],
        "private": False,
        "gated": False,
        "siblings": siblings,
        "tags": [],
    }


def nodes(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*way, key))


def replaced(value: Any, way: tuple[Any, ...], other: Any) -> Any:
    if not way:
        return other
    copy = value.copy()
    copy[way[0]] = replaced(value[way[0]], way[1:], other)
    return copy


# ---- odd answers ------------------------------------------------------------------------------------------------------


def test_an_answer_of_odd_types_is_an_error_of_the_hub_or_means_nothing(hub: Hub) -> None:
    whole = listing(hub)
    whole["siblings"] = whole["siblings"][:1]
    answer = b""
    hub.tamper = lambda request: is_listing(request) and request.answer(200, answer) is None
    refused, harmless, sizes = 0, set(), []
    for way in nodes(whole):
        for odd in ODD:
            answer = json.dumps(replaced(whole, way, odd)).encode()
            if text := tried(lambda: sizes.append(hub_room._fetch_listing("org/a", "org/a", "main").sizes)):
                assert len(text) < 500
                refused += 1
            else:
                assert all(type(size) is int and size >= 0 for size in sizes[-1].values())
                harmless.add(way)
    assert refused > 80
    assert () not in harmless
    assert ("sha",) not in harmless
    assert ("siblings", 0, "lfs", "sha256") not in harmless


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"id": "org/a", "sha"',
        b"\xff\xfe",
        b"[1]",
        b"9" * 5000,
        b'"text"',
        b"null",
    ],
    ids=lambda b: repr(b[:8]),
)
@pytest.mark.parametrize("status", [200, 404, 418, 500])
def test_an_answer_that_is_no_object_is_an_error_of_the_hub(hub: Hub, body: bytes, status: int) -> None:
    hub.tamper = lambda request: is_listing(request) and request.answer(status, body) is None
    said(lambda: alnico.open_model("org/a"))


COMMANDS = [
    ("plan", "r.yml"),
    ("merge", "r.yml", "out"),
    ("inspect", "org/a"),
    ("diff", "org/a", "org/a@other"),
    ("analyze", "org/b", "--base", "org/a"),
    ("merge", "adapters.yml", "out"),
    ("merge", "donor.yml", "out"),
    ("lora", "extract", "org/a", "org/b", "lora", "--rank", "2"),
    ("suggest", "org/b", "--base", "org/a"),
]


@pytest.mark.parametrize("odd", [{"size": "17"}, {"sha": 5}, {"sha": "../../../evil"}], ids=str)
def test_every_command_refuses_an_odd_answer(hub: Hub, run: Run, odd: dict[str, Any]) -> None:
    Path("adapters.yml").write_text("merge_method: linear\nmodels: [a+org/a, b]\n")
    Path("donor.yml").write_text("merge_method: linear\nmodels: [a, b]\ntokenizer_source: org/a\n")
    whole = listing(hub)
    if set(odd) & set(whole):
        whole |= odd
    else:
        whole["siblings"][0] |= odd
    hub.tamper = lambda request: is_listing(request) and request.say(whole) is None
    for words in COMMANDS:
        code, stdout, stderr = run(*words)
        assert (code, stdout) == (13, ""), (words, stdout, stderr)
        assert "the hub's answer has" in stderr


@pytest.mark.parametrize("status", [200, 404])
def test_headers_of_odd_values_write_nothing_outside_of_the_cache(
    hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    odd = [
        "",
        "x",
        "-1",
        "1e3",
        "9" * 40,
        "../../../evil",
        "/etc/evil",
        "..",
        '"../../evil"',
        "evil\x1b[2J",
        "W/",
        "a/b",
        "y" * 5000,
    ]
    sent: dict[str, str] = {}

    def tamper(request: Any) -> bool:
        if "/resolve/" not in request.path:
            return False
        headers = {"ETag": '"5"', "X-Repo-Commit": hub.repos["org/a"].refs["main"]}
        if status == 404:
            headers["X-Error-Code"] = "EntryNotFound"
        request.answer(status, hub.files("org/a")["config.json"], headers | sent)
        return True

    repository = hub_room._find_on_hub("org/a", "org/a", "main", Path(hub.cache) / "models--org--a")
    hub.tamper = tamper
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    names = (
        "ETag",
        "X-Linked-ETag",
        "X-Linked-Size",
        "X-Repo-Commit",
        "Content-Range",
        "Location",
        "Link",
        "X-Xet-Hash",
        "Retry-After",
    )
    for name, value in itertools.product(names, odd):
        sent.clear()
        sent[name] = value
        if name == "X-Xet-Hash":
            sent["X-Xet-Refresh-Route"] = f"{hub.url}/nowhere"
        tried(lambda: repository.fetch(["config.json"]))
        (repository.folder / "config.json").unlink(missing_ok=True)
    blobs = {p.name for p in Path(hub.cache).rglob("*") if p.is_file()}
    assert not any(name.startswith(("..", "etc")) for name in blobs)


def test_the_answer_for_another_commit_than_the_recipe_names_is_refused(hub: Hub) -> None:
    hub.tamper = lambda request: is_listing(request) and request.say(listing(hub)) is None
    assert "the hub answers for commit" in said(lambda: alnico.open_model(f"org/a@{'0' * 40}"))


# ---- endless, large, slow ---------------------------------------------------------------------------------------------


def endless(
    request: Any,
    status: int = 200,
    headers: dict[str, str] | None = None,
    *,
    pause: float = 0.0,
    chunk: bytes = b"x" * 65536,
) -> bool:
    """Answer without end, until the client goes."""
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Connection", "close")
    request.end_headers()
    request.close_connection = True
    try:
        while request.command != "HEAD":
            request.wfile.write(chunk)
            time.sleep(pause)
    except OSError:
        pass
    return True


@pytest.mark.parametrize("status", [200, 302, 404, 418])
def test_an_endless_answer_ends(hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_room, "MAX_RESPONSE_BYTES", 1 << 20)
    hub.tamper = lambda request: (
        is_listing(request)
        and endless(request, status, {"Location": "/api/models/x"} if status == 302 else {})
    )
    said(lambda: alnico.open_model("org/a"))


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip"])
@pytest.mark.parametrize("status", [200, 404])
def test_a_packed_answer_is_not_unpacked(hub: Hub, encoding: str, status: int) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    hub.tamper = lambda request: (
        is_listing(request) and request.answer(status, bomb, {"Content-Encoding": encoding}) is None
    )
    text = said(lambda: alnico.open_model("org/a"))
    assert status != 200 or "is encoded as" in text


def weights_from_store(request: Any) -> bool:
    return bool(request.host == "store" and request.command == "GET" and not request.headers.get("Range"))


def test_a_weight_file_without_end_stops_at_its_size(hub: Hub, run: Run) -> None:
    sent = 0

    def tamper(request: Any) -> bool:
        nonlocal sent
        if weights_from_store(request):
            endless(request)
            sent += 1
            return True
        return False

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 13
    assert "model.safetensors: the hub's answer is longer than the" in stderr
    hub.tamper = None
    assert run("merge", "r.yml", "out")[0] == 0


@pytest.mark.parametrize("where", ["list", "config", "header", "weights"])
def test_a_body_that_trickles_is_given_up(hub: Hub, run: Run, where: str) -> None:
    def tamper(request: Any) -> bool:
        is_it = {
            "list": is_listing(request),
            "config": "/resolve/" in request.path
            and request.path.endswith("config.json")
            and request.command == "GET",
            "header": request.host == "store" and bool(request.headers.get("Range")),
            "weights": weights_from_store(request),
        }[where]
        if not is_it:
            return False
        found = request.headers.get("Range", "bytes=0-7").removeprefix("bytes=")
        headers = {"Content-Range": f"bytes {found}/99999"} if request.headers.get("Range") else {}
        return endless(request, 206 if headers else 200, headers, pause=0.1, chunk=b"\0")

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 13
    assert "too slow" in stderr or "cut off" in stderr or "sent nothing" in stderr
    assert "ALNICO_HUB_TIMEOUT" in stderr


@pytest.mark.parametrize(
    ("first", "then"), [(b"HTTP/1.1 200 OK\r\nX-A: ", b"a"), (b"", b"HTTP/1.1 102 Processing\r\n\r\n")]
)
def test_headers_that_trickle_are_given_up(hub: Hub, first: bytes, then: bytes) -> None:
    def tamper(request: Any) -> bool:
        try:
            request.wfile.write(first)
            while True:
                request.wfile.write(then)
                time.sleep(0.1)
        except OSError:
            request.close_connection = True
        return True

    hub.tamper = tamper
    assert "the hub sent nothing for" in said(lambda: alnico.open_model("org/a"))


def test_headers_of_a_megabyte_are_refused(hub: Hub) -> None:
    hub.tamper = lambda request: request.answer(200, b"{}", {"X-A": "a" * (1 << 20)}) is None
    said(lambda: alnico.open_model("org/a"))


def test_a_model_of_many_large_configs_is_not_fetched_to_be_looked_at(hub: Hub) -> None:
    hub.size_lies = {f"{i}.json": 190_000_000 for i in range(6)}
    hub.add("org/a", hub.files("org/a") | dict.fromkeys(hub.size_lies, b"{}"))
    with pytest.raises(
        ModelError,
        match=r"^org/a: the 7 files that are read while planning \(.*\) have 1\.1 GB in total; expected at most 1\.1 GB",
    ):
        alnico.open_model("org/a")
    assert not any("/resolve/" in r.path for r in hub.requests)


# ---- another part, another content -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "bytes 5-12/99999",
        "bytes 0-99999/99999",
        "bytes */99999",
        "",
        "bytes=0-7",
        "bytes -1-7/9",
        "bytes 0-\u0667/9",
    ],
)
def test_another_part_than_was_asked_for_is_refused(hub: Hub, part: str) -> None:
    def tamper(request: Any) -> bool:
        if request.host == "store" and request.headers.get("Range"):
            headers = (
                {"Content-Range": part.encode().decode("latin-1")}
                if part
                else {"Content-Type": "multipart/byteranges; boundary=x"}
            )
            request.answer_raw(206, b"\x08" + b"\0" * 7, headers)
            return True
        return False

    hub.tamper = tamper
    assert "expected the requested part" in said(lambda: alnico.open_model("org/a"))


def test_weights_with_another_hash_are_refused_and_not_kept(hub: Hub, run: Run) -> None:
    right = hub.files("org/a")["model.safetensors"]

    def tamper(request: Any) -> bool:
        if weights_from_store(request) and hub.repos["org/a"].refs["main"] in request.path:
            request.answer(200, right[:-1] + b"\7")
            return True
        return False

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 13
    assert "org/a: model.safetensors: arrived with sha256" in stderr
    hub.tamper = None
    assert run("merge", "r.yml", "out")[0] == 0


def test_a_blob_that_lies_in_the_cache_under_the_right_hash_is_read_before_it_is_used(
    hub: Hub, run: Run
) -> None:
    import hashlib

    data = hub.files("org/a")["model.safetensors"]
    blob = Path(hub.cache) / "models--org--a" / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data[:-1] + b"\7")
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 13
    assert "arrived with sha256" in stderr
    assert run("merge", "r.yml", "out")[0] == 0


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_of_another_size_in_the_cache_is_named(hub: Hub, run: Run, file: str) -> None:
    assert run("merge", "r.yml", "out")[0] == 0
    found = Path(hub.cache, "models--org--a", "snapshots", hub.repos["org/a"].refs["main"], file).resolve()
    whole = found.read_bytes()
    found.write_bytes(whole[:-3])
    code, _, stderr = run("merge", "r.yml", "out2")
    assert code == 13
    assert f"{file} has {len(whole) - 3} bytes in the cache; the hub states {len(whole)}" in stderr
    assert f"remove {found}" in stderr
    found.unlink()
    assert run("merge", "r.yml", "out2")[0] == 0


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_of_the_cache_is_not_carried_off(
    hub: Hub, run: Run, offline: bool, kind: str, tmp_path: Path
) -> None:
    hub.add("org/a", hub.files("org/a") | {"LICENSE": b"free"})
    assert run("merge", "r.yml", "out")[0] == 0
    (tmp_path / "work/key").write_text("mine")
    place = Path(hub.cache, "models--org--a", "snapshots", hub.repos["org/a"].refs["main"], "LICENSE")
    place.unlink()
    if kind == "link":
        place.symlink_to(tmp_path / "work/key")
    else:
        os.mkfifo(place)
    code, _, stderr = run("merge", "r.yml", "out2", *(["--offline"] if offline else []))
    assert code == 13
    assert "expected a file of the cache" in stderr
    assert not Path("out2/LICENSE").exists()


def test_blobs_that_we_keep_on_another_disk_are_used(hub: Hub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "work/disk").mkdir()
    folder = Path(hub.cache, "models--org--a")
    folder.mkdir(parents=True)
    (folder / "blobs").symlink_to(tmp_path / "work/disk")
    assert run("merge", "r.yml", "out")[0] == 0
    assert run("merge", "r.yml", "out2", "--offline")[0] == 0


# ---- redirects, and the token -----------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Another server; what it is asked, and with which token."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append((self.command, self.headers.get("Authorization")))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_PUT = do_HEAD = do_GET

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://localhost:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("what", ["list", "head", "weights", "xet"])
def test_the_token_goes_to_no_other_host(
    hub: Hub, run: Run, elsewhere: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", what != "xet")
    url, asked = elsewhere

    def tamper(request: Any) -> bool:
        if what == "list" and is_listing(request):
            request.answer(307, b"", {"Location": f"{url}/x"})
        elif what == "head" and "/resolve/" in request.path and request.path.endswith("config.json"):
            request.answer(
                302,
                b"",
                {"Location": f"{url}/x", "ETag": '"5"', "X-Repo-Commit": hub.repos["org/a"].refs["main"]},
            )
        elif what == "weights" and request.host == "store":
            request.answer(302, b"", {"Location": f"{url}/x"})
        elif what == "xet" and "/resolve/" in request.path and request.command == "HEAD":
            commit = request.path.split("/")[4]
            name = request.path.split("/resolve/")[0].strip("/")
            data = hub.files(name)[request.path.rsplit("/", 1)[1]]
            headers = {
                "ETag": '"5"',
                "X-Repo-Commit": commit,
                "X-Xet-Hash": "a" * 64,
                "X-Xet-Refresh-Route": f"{url}/token",
            }
            request.answer(200, data, headers | {"Link": f'<{url}/token>; rel="xet-auth"'})
        else:
            return False
        return True

    hub.tamper = tamper
    code, stdout, stderr = run("merge", "r.yml", "out")
    assert code == 13, stderr
    assert "hf_secret" not in stdout + stderr
    assert {token for _, token in asked} <= {None}


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://x/y",
        "http://[",
        "gopher:x",
        "//",
        "http://\x7f",
        "/api/models/org/a/loop",
        "data:,{}",
    ],
)
def test_a_redirect_to_no_place_is_an_error(hub: Hub, target: str) -> None:
    hub.tamper = lambda request: request.answer(302, b"", {"Location": target}) is None
    said(lambda: alnico.open_model("org/a"))


def test_a_hub_of_https_sends_to_nothing_that_is_not_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    client = pytest.importorskip("httpx2", reason="of huggingface_hub 2")
    asked = []

    def answer(request: Any) -> Any:
        asked.append((str(request.url), request.headers.get("authorization")))
        return client.Response(302, headers={"Location": "http://169.254.169.254/latest/meta-data"})

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.set_client_factory(
        lambda: client.Client(transport=client.MockTransport(answer), follow_redirects=True)
    )
    try:
        assert "not encrypted" in said(lambda: alnico.open_model("org/a"))
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert [urlsplit(url).scheme for url, _ in asked] == ["https"]


# ---- busy, broken off, not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "status"),
    [
        ("list", 429),
        ("list", 500),
        ("list", 502),
        ("list", 504),
        ("head", 429),
        ("head", 503),
        ("get", 503),
        ("store", 429),
    ],
)
def test_a_busy_hub_is_asked_again_and_then_given_up(hub: Hub, run: Run, status: int, where: str) -> None:
    count, times = 0, 99

    def tamper(request: Any) -> bool:
        nonlocal count
        is_config = "/resolve/" in request.path and request.path.endswith("config.json")
        is_it = {
            "list": is_listing(request),
            "head": is_config and request.command == "HEAD",
            "get": is_config and request.command == "GET",
            "store": request.host == "store",
        }[where]
        if not is_it or count >= times:
            return False
        count += 1
        request.answer(status, b"[1]", {"X-Error-Message": "come back"})
        return True

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 13
    assert f"is busy: it answered with status {status} 7 times in" in stderr
    assert "To wait longer, set the environment variable ALNICO_HUB_WAIT to more seconds (now 0.3)." in stderr
    count, times = 0, 2
    assert run("merge", "r.yml", "out")[0] == 0


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Retry-After": "3600"}, "once and asks to wait 3600 s"),
        ({"Retry-After": "9" * 400}, "once and asks to wait forever"),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT", "Date": "Wed, 21 Oct 2099 06:28:00 GMT"}, "once and asks to wait 3600 s"),
        ({"Retry-After": "Wed, 21 Oct 1999 07:28:00 GMT", "Date": "Wed, 21 Oct 2099 06:28:00 GMT"}, "7 times in"),
        ({"Retry-After": "-5"}, "7 times in"),
        ({"Retry-After": "soon"}, "7 times in"),
        ({"Retry-After": "0"}, "7 times in"),
        ({"Retry-After": "1e9"}, "7 times in"),
        ({"Retry-After": "1"}, "2 times in 1 s and asks to wait 1 s"),
        ({"RateLimit": '"api";r=0;t=299'}, "once and asks to wait 299 s"),
    ],
)  # fmt: skip
def test_what_a_busy_hub_asks_to_wait_is_kept_to_a_bound(
    hub: Hub, headers: dict[str, str], words: str
) -> None:
    hub.tamper = lambda request: request.answer_raw(429, b"{}", headers) is None
    assert words in said(lambda: alnico.open_model("org/a"))


@pytest.mark.parametrize("name", ["ALNICO_HUB_WAIT", "ALNICO_HUB_TIMEOUT"])
@pytest.mark.parametrize("value", ["-1", "0", "soon", "nan", "inf", "1e9"])
@pytest.mark.usefixtures("hub")
def test_a_time_that_is_none_is_named(
    run: Run, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code, _, stderr = run("inspect", "org/a")
    assert code == 13
    assert f"{name} is {value!r}; expected a number of seconds above 0" in stderr


@pytest.mark.parametrize(("status", "words"), [(401, "refuses access (status 401)"), (403, "refuses access"), (404, "status 404"), (410, "status 410"), (451, "status 451")])  # fmt: skip
def test_refusals_are_told_apart_and_not_repeated(hub: Hub, status: int, words: str) -> None:
    count = 0

    def tamper(request: Any) -> bool:
        nonlocal count
        count += 1
        request.answer(status, b'{"error": "\x1b[2Jgone"}')
        return True

    hub.tamper = tamper
    assert words in said(lambda: alnico.open_model("org/a"))
    assert count == 1


@pytest.mark.parametrize("kind", ["reset", "closed"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_connection_that_breaks_in_the_middle_of_a_file(
    hub: Hub, run: Run, kind: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import struct

    monkeypatch.setattr(time, "sleep", lambda _: None)
    count = 0

    def tamper(request: Any) -> bool:
        nonlocal count
        if (
            request.host != "store"
            or request.command != "GET"
            or count >= times
            or request.headers.get("Range", "") in ("bytes=0-7",)
        ):
            return False
        if request.headers.get("Range", "").endswith("-") is False and request.headers.get("Range"):
            return False
        count += 1
        data = hub.files("org/a")["model.safetensors"]
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:5000])
        request.wfile.flush()
        if kind == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.close_connection = True
        request.connection.close()
        return True

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == (0 if times == 1 else 13), stderr
    hub.tamper = None
    assert run("merge", "r.yml", "out", "--overwrite")[0] == 0
    assert not list(Path(hub.cache).rglob("*.incomplete"))


def test_names_and_proxies_that_lead_nowhere(hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    for endpoint in ("http://nowhere.invalid", "nowhere", "file:///etc", "http://[", "http://x:99999999"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert run("inspect", "org/a")[0] == 13, endpoint
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for proxy in ("nonsense://x:y", "http://[", "socks9://x", "http://127.0.0.1:1"):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "")
        close_session()
        assert run("inspect", "org/a")[0] == 13, proxy
    monkeypatch.delenv("HTTP_PROXY")
    close_session()


@pytest.mark.parametrize("token", ["hf_\x01secret", "hf_ secret\ttoken", "hf_secrét", "hf_" + "s" * 100_000])
@pytest.mark.usefixtures("hub")
def test_a_token_that_cannot_be_sent_is_not_shown(
    run: Run, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, stdout, stderr = run("inspect", "org/a")
    assert code in (0, 13)
    assert "secr" not in stdout + stderr
    assert "ssss" not in stdout + stderr


def test_an_interrupt_ends_the_waiting_for_a_hub(hub: Hub) -> None:
    import signal

    arrived = threading.Event()

    def tamper(request: Any) -> bool:
        arrived.set()
        request.answer(503, b"", {"Retry-After": "50"})
        return True

    hub.tamper = tamper
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": "house",
        "ALNICO_HUB_WAIT": "100",
        "HF_HUB_OFFLINE": "0",
    }
    words = [sys.executable, "-m", "alnico", "merge", "r.yml", "out"]
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert arrived.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.usefixtures("hub")
def test_two_processes_fetch_one_model_at_once() -> None:
    found: list[object] = []

    def merge(out: str) -> None:
        try:
            found.append(
                alnico.merge({"merge_method": "linear", "models": ["org/a", "org/b"]}, out).path.name
            )
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=merge, args=(f"out{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, found)) == ["out0", "out1", "out2"]


def test_a_commit_that_vanishes_is_told(hub: Hub) -> None:
    with alnico.open_model("org/a") as model:
        hub.repos["org/a"].commits.clear()
        said(lambda: model.read("w"))


def test_the_ways_of_the_real_hub_are_taken(hub: Hub, run: Run) -> None:
    """Small files by a relative redirect with weak ETags, keys and headers that nobody needs, a rate limit that is not reached."""
    limits = {
        "RateLimit": '"api";r=480;t=100',
        "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        "X-HF-Warning": "topic; use less",
    }

    def tamper(request: Any) -> bool:
        parts = request.path.split("/")
        if is_listing(request):
            whole = listing(hub, "/".join(parts[3:5])) | {
                "gated": "manual",
                "cardData": {"a": 1},
                "usedStorage": 10**15,
                "spaces": [],
            }
            for entry in whole["siblings"]:
                del entry["lfs"]
            request.answer(200, json.dumps(whole).encode(), limits)
        elif parts[1] == "org" and request.path.endswith("config.json"):
            data = hub.files("/".join(parts[1:3]))["config.json"]
            headers = {
                "ETag": 'W/"abc-5"',
                "X-Repo-Commit": parts[4],
                "X-Linked-Size": str(len(data)),
                "Location": f"/cached{request.path}",
            }
            request.answer(307, b"Temporary Redirect", headers | limits)
        elif request.path.startswith("/cached/"):
            data = hub.files("/".join(parts[2:4]))["config.json"]
            request.answer(200, data, {"ETag": 'W/"abc-5"', "X-Repo-Commit": parts[5]} | limits)
        else:
            return False
        return True

    hub.tamper = tamper
    code, _, stderr = run("merge", "r.yml", "out")
    assert code == 0, stderr


@pytest.mark.usefixtures("hub")
def test_the_client_of_others_is_not_closed() -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http, get_session

    set_client_factory(_http.default_client_factory)
    client = get_session()
    alnico.open_model("org/a").close()
    assert get_session() is client
    assert not client.is_closed
    alnico.open_model("org/b").close()
    assert len(client.event_hooks["response"]) == 1


@pytest.mark.usefixtures("hub")
def test_requests_of_others_in_the_process_are_left_alone(elsewhere: Any) -> None:
    from huggingface_hub.utils import get_session

    alnico.open_model("org/a").close()
    url, asked = elsewhere
    assert get_session().get(url, headers={"Authorization": "Bearer mine"}).status_code == 200
    assert asked == [("GET", "Bearer mine")]
