"""Stores elsewhere that lie, dawdle and break off, and transfers that are killed: one clear error, and nothing in its place."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alnico.checkpoint import network
from alnico.errors import AlnicoError, HubError, ModelError, ResourceError
from alnico.store import cache as cache_file
from alnico.store.cache import DownloadCache
from alnico.store.pull import pull_vector
from alnico.store.push import push_vector
from alnico.store.remotes import file_remote
from alnico.store.remotes.folder import FolderFiles
from alnico.store.remotes.open_remote import open_remote
from store.made_artifacts import contents, made_entry, make_artifact
from web_server import WebServer, serving_folder

SIZE = 1 << 18


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, a client of little patience, and a look at what was left at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALNICO_STORE", str(tmp_path / "own"))
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "0.5")
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.3")
    yield
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name or p.name.endswith(".alnico-part")]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = make_artifact(tmp_path / "a", size=SIZE)
    push_vector(folder, made_entry(folder), "served")
    return tmp_path / "served"


@pytest.fixture
def web(served: Path) -> Iterator[WebServer]:
    with serving_folder(served) as running:
        yield running


def the_object(served: Path) -> Path:
    (path,) = served.glob("objects/*/*")
    return path


def refused(source: str, kind: type[AlnicoError] = HubError) -> str:
    with pytest.raises(kind) as caught:
        pull_vector("sql", Path("b"), source=source)
    assert not Path("b").exists()
    text = str(caught.value)
    assert text.isprintable()
    assert len(caught.value.args) == 1
    assert "sql" in text or source in text
    return text


def change_index(
    served: Path, change: Callable[[dict[str, Any]], object], *, also_entry: bool = True
) -> None:
    line = json.loads((served / "index.jsonl").read_text())
    change(line)
    (served / "index.jsonl").write_text(json.dumps(line) + "\n")
    if also_entry:
        (served / "vectors/sql/1/entry.json").write_text(json.dumps(line) + "\n")


# ---- what is served is not what is declared ---------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["folder", "web"])
def test_a_flipped_bit_is_found_and_removed(served: Path, web: WebServer, over: str) -> None:
    data = bytearray(the_object(served).read_bytes())
    data[len(data) // 2] ^= 1
    the_object(served).write_bytes(data)
    text = refused(web.url if over == "web" else str(served))
    assert "arrived with SHA-256" in text
    assert "do not use this task vector" in text
    assert not list(Path("own/cache/objects").rglob(the_object(served).name))
    assert not list(Path("own/cache/parts").iterdir())


@pytest.mark.parametrize("over", ["folder", "web"])
def test_a_truncated_part_is_refused_before_the_download(served: Path, web: WebServer, over: str) -> None:
    the_object(served).write_bytes(the_object(served).read_bytes()[:-1])
    text = refused(web.url if over == "web" else str(served))
    assert "bytes" in text
    assert not web.sent.get(the_object(served).relative_to(served).as_posix())


def test_a_missing_part_is_refused(served: Path, web: WebServer) -> None:
    the_object(served).unlink()
    assert "is not there, though the store lists it" in refused(web.url)


def test_terabytes_are_refused_before_anything_is_asked_for(served: Path, web: WebServer) -> None:
    change_index(served, lambda e: e["files"]["taskvector.safetensors"].update(size=1 << 50))
    text = refused(web.url, ResourceError)
    assert "its files have 1125.9 TB" in text
    assert "Nothing was downloaded" in text
    assert not any("objects" in path for _, path, _ in web.requests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(name="../evil"), "the name is '../evil'"),
        (lambda e: e.update(name=".."), "the name is '..'"),
        (
            lambda e: e["files"].update({"../evil": {"size": 1, "sha256": "0" * 64}}),
            "a file is called '../evil'",
        ),
        (
            lambda e: e["files"].update({"taskvector.json": {"size": 1, "sha256": "0" * 64}}),
            "a file is called",
        ),
        (lambda e: e["files"]["taskvector.safetensors"].update(sha256="https://evil"), "the sha256 of"),
        (lambda e: e["files"]["taskvector.safetensors"].update(url="https://evil"), "url"),
        (lambda e: e.update(address="https://evil"), "address"),
        (lambda e: e.update(version=0), "version is 0"),
        (lambda e: e.update(version=1.5), "version is 1.5"),
        (lambda e: e.update(manifest_bytes=-1), "manifest_bytes is -1"),
        (lambda e: e.update(norm=float("nan")), "norm is not a finite number"),
        (lambda e: e.update(tasks=[1]), "tasks and languages are not all text"),
        (lambda e: e.update(encodings=5), "encodings are not counts"),
        (lambda e: e.update(description="\ud800"), "not text"),
        (lambda e: e.update(description="x" * 2_000_000), "longer than 1000000 characters"),
    ],
)
def test_an_entry_that_lies_or_points_elsewhere_is_refused_with_its_line(
    served: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_index(served, change)
    text = refused(str(served), ModelError)
    assert text.startswith(f"{served}: index.jsonl:1: ")
    assert message in text


def test_an_index_that_is_something_else_is_refused(served: Path, web: WebServer) -> None:
    line = (served / "index.jsonl").read_text()
    for data, message in (
        (b"<!doctype html><p>Sign in", "is a page (HTML or XML), not an index"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1]\n", "is not an entry of an index"),
        (b"{" * 100_000, "is not an entry of an index"),
        (line.encode() * 2, "index.jsonl:2: sql@1 is there twice"),
    ):
        (served / "index.jsonl").write_bytes(data)
        assert message in refused(web.url, ModelError)
    (served / "index.jsonl").unlink()
    assert "has no index.jsonl; expected a store of task vectors" in refused(web.url)


def test_a_manifest_that_is_not_that_of_the_index_is_refused(served: Path) -> None:
    manifest = served / "vectors/sql/1/taskvector.json"
    good = manifest.read_text()
    manifest.write_text(good.replace("org/base", "org/evil"))
    assert "arrived with SHA-256" in refused(str(served))
    change_index(served, lambda e: e.update(licence="mit"))
    manifest.write_text(good)
    assert "licence is None; index.jsonl says 'mit'" in refused(str(served), ModelError)


def test_an_index_and_the_entry_of_a_version_must_agree(served: Path) -> None:
    change_index(served, lambda e: e.update(sha256="1" * 64), also_entry=False)
    assert "index.jsonl says sql@1 with 111111111111" in refused(str(served), ModelError)


def test_a_link_out_of_a_folder_is_refused(served: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(the_object(served).read_bytes())
    the_object(served).unlink()
    (place,) = served.glob("objects/*")
    (place / hashlib.sha256(secret.read_bytes()).hexdigest()).symlink_to(secret)
    assert "outside" in refused(str(served), ModelError)


# ---- servers that misbehave -------------------------------------------------------------------------------------------


def for_objects(answer: Callable[[Any], object]) -> Callable[[Any], bool]:
    def tamper(request: Any) -> bool:
        if "/objects/" not in request.path or request.command == "HEAD":
            return False
        answer(request)
        return True

    return tamper


def test_an_endless_answer_ends(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_remote, "MAX_INDEX_BYTES", 1 << 20)

    def endless(request: Any) -> bool:
        if request.command == "HEAD":
            return False
        request.send_response(200)
        request.end_headers()
        request.close_connection = True
        try:
            while True:
                request.wfile.write(b" " * (1 << 16))
        except OSError:
            return True

    web.tamper = endless
    assert "longer than the expected 1048577 bytes" in refused(web.url)
    web.tamper = for_objects(endless)
    assert "longer than the expected" in refused(web.url)
    assert sum(p.stat().st_size for p in Path("own/cache").rglob("*") if p.is_file()) < 1 << 20


def test_a_slow_and_a_silent_server_are_left(served: Path, web: WebServer) -> None:
    def drip(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(the_object(served).stat().st_size))
        request.end_headers()
        request.close_connection = True
        try:
            for _ in range(40):
                request.wfile.write(b"\0")
                request.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    web.tamper = for_objects(drip)
    assert "which is too slow" in refused(web.url)
    web.tamper = for_objects(lambda _: time.sleep(3))
    assert "sent nothing" in refused(web.url) or "could not be reached" in refused(web.url)


def test_a_connection_that_breaks_is_resumed_where_it_broke(served: Path, web: WebServer) -> None:
    path = the_object(served).relative_to(served).as_posix()
    cuts = iter([100_000, 50_000])

    def cut(request: Any) -> bool:
        if "/objects/" not in request.path or request.command == "HEAD" or (most := next(cuts, None)) is None:
            return False
        status, body, headers = request.part(the_object(served).read_bytes())
        web.sent[path] = web.sent.get(path, 0) + most
        request.break_off(body[:most], len(body), headers, status)
        return True

    web.tamper = cut
    pull_vector("sql", Path("b"), source=web.url)
    assert contents(Path("b")) == contents(Path("a"))
    assert web.sent[path] == the_object(served).stat().st_size
    assert [r for _, p, r in web.requests if p == path and r] == [
        f"bytes=100000-{the_object(served).stat().st_size - 1}",
        f"bytes=150000-{the_object(served).stat().st_size - 1}",
    ]


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(served: Path, web: WebServer) -> None:
    cuts = iter([100_000])
    web.takes_ranges = False

    def cut(request: Any) -> bool:
        if "/objects/" not in request.path or request.command == "HEAD" or (most := next(cuts, None)) is None:
            return False
        body = the_object(served).read_bytes()
        request.break_off(body[:most], len(body))
        return True

    web.tamper = cut
    pull_vector("sql", Path("b"), source=web.url)
    assert contents(Path("b")) == contents(Path("a"))


def test_a_busy_server_is_asked_again_and_then_left(web: WebServer) -> None:
    busy = iter([503, 429])

    def first_busy(request: Any) -> bool:
        status = next(busy, None)
        return status is not None and request.answer(status) is None

    web.tamper = first_busy
    pull_vector("sql", Path("c"), source=web.url)
    web.tamper = lambda request: request.answer(503, b"", {"Retry-After": "3"}) is None
    assert "is busy: it answered with status 503" in refused(web.url)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("ftp://127.0.0.1/evil", "neither http:// nor https://"),
        ("file:///etc/passwd", "neither http:// nor https://"),
        ("/index.jsonl", "redirects in a circle"),
    ],
)
def test_a_redirect_to_elsewhere_is_refused(web: WebServer, to: str, message: str) -> None:
    web.tamper = lambda request: request.answer(302, b"", {"Location": to}) is None
    assert message in refused(web.url)


def test_a_redirect_from_https_to_http_is_refused() -> None:
    exchange = network.Exchange("x", server="https://example.org/vectors")
    request = SimpleNamespace(
        url="http://example.org/vectors/index.jsonl", headers={}, method="GET", extensions={}
    )
    with (
        network.guard_requests(exchange),
        pytest.raises(HubError, match="which is not encrypted; expected https"),
    ):
        network._check_request(request)


def test_other_statuses_say_what_they_are(web: WebServer) -> None:
    for status, message in ((401, "refuses access"), (418, "answered with status 418")):
        web.tamper = lambda request, status=status: request.answer(status, b"no") is None
        assert message in refused(web.url)


def test_no_token_goes_to_a_server_that_is_not_the_hub(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = []
    web.tamper = lambda request: seen.append(str(request.headers)) is not None
    pull_vector("sql", Path("c"), source=web.url)
    assert seen
    assert not any("hf_secret" in text or "uthorization" in text for text in seen)


@pytest.mark.parametrize(
    "address",
    ["https://user:secret@host/x", "https:///x", "https://host/x?token=secret", "file://host/x", "s3://key:secret@bucket/x",
     "simplecache::s3://bucket/x", "nothing://x", "https://[::1/x"],
)  # fmt: skip
def test_odd_addresses_are_refused_without_their_secrets(address: str) -> None:
    with pytest.raises(AlnicoError) as caught:
        open_remote(address).entries()
    assert "secret" not in str(caught.value)


# ---- transfers that are killed, and several at once -------------------------------------------------------------------


def test_a_file_system_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        HubError, match=r"gs:// cannot be opened .*gcsfs.*; expected the package of fsspec for it"
    ):
        open_remote("gs://bucket/vectors")


def test_a_file_system_that_cannot_be_opened_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port at which nothing answers any more
        port = server.getsockname()[1]
    with pytest.raises(
        HubError,
        match=rf"ftp://127.0.0.1:{port}/vectors: could not be opened \(ConnectionRefusedError: .*Check the",
    ):
        open_remote(f"ftp://127.0.0.1:{port}/vectors")


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def test_a_push_that_was_killed_at_any_step_is_finished_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_artifact(Path("a"))
    (folder / "model.sig").write_text("{}")
    other = make_artifact(Path("c"), "other", 1)
    push_vector(folder, made_entry(folder), "whole")
    write, send = FolderFiles.write, FolderFiles.send
    steps = [0]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: FolderFiles, path: str, *words: Any, **more: Any) -> Any:
            steps[0] -= 1
            if steps[0] == 0:
                raise Killed(path)
            return function(self, path, *words, **more)

        return call

    killed = 0
    for step in range(1, 10):
        place = f"remote-{step}"
        steps[0] = step
        with monkeypatch.context() as patch:
            patch.setattr(FolderFiles, "write", dying(write))
            patch.setattr(FolderFiles, "send", dying(send))
            try:
                push_vector(folder, made_entry(folder), place)
            except Killed:
                killed += 1
        if step % 2:  # another one pushes meanwhile
            push_vector(other, made_entry(other), place)
        for entry in open_remote(place).entries() if Path(place, "index.jsonl").is_file() else []:
            pull_vector(f"{entry.name}@{entry.version}", Path(f"p-{step}-{entry.name}"), source=place)
        assert push_vector(folder, made_entry(folder), place) == f"{place}/sql@1"
        push_vector(other, made_entry(other), place)
        push_vector(other, made_entry(other), f"whole-{step}")
        push_vector(folder, made_entry(folder), f"whole-{step}")
        assert contents(Path(place)) == contents(Path(f"whole-{step}"))
    assert killed == 5


def test_two_pushes_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step of one push, a whole other push happens."""
    folder = make_artifact(Path("a"))
    folders = [make_artifact(Path(f"o{i}"), "sql" if i % 2 else f"o{i}", 10 + i) for i in range(16)]
    others, is_inside = iter(folders), [False]

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            if not is_inside[0] and (other := next(others, None)) is not None:
                is_inside[0] = True
                push_vector(other, made_entry(other), "remote")
                is_inside[0] = False
            return function(*words, **more)

        return call

    for name in ("size", "files", "write", "send"):
        monkeypatch.setattr(FolderFiles, name, interrupted(getattr(FolderFiles, name)))
    push_vector(folder, made_entry(folder), "remote")
    assert next(others, None) is None
    entries = open_remote("remote").entries()
    assert {e.sha256 for e in entries} == {made_entry(f).sha256 for f in (folder, *folders)}
    assert sorted(e.version for e in entries if e.name == "sql") == list(range(1, 10))


def test_pushers_in_threads_lose_nothing() -> None:
    folders = [make_artifact(Path(f"v{i}"), f"v{i % 3}", i) for i in range(9)]
    failures: list[BaseException] = []

    def push_some(mine: list[Path]) -> None:
        try:
            for folder in mine:
                push_vector(folder, made_entry(folder), "remote")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=push_some, args=(folders[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {e.sha256 for e in open_remote("remote").entries()} == {made_entry(f).sha256 for f in folders}


PULL = """
import sys
from pathlib import Path
from alnico.store.pull import pull_vector
pull_vector("sql", Path("b"), source=sys.argv[1])
"""


def test_a_pull_that_was_killed_shows_nothing_and_is_resumed(
    served: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = the_object(served).relative_to(served).as_posix()
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "60")
    arrived = threading.Event()

    def stall(request: Any) -> None:
        body = the_object(served).read_bytes()
        request.answer(200, body[:200_000], {"Content-Length": str(len(body))})
        arrived.set()
        time.sleep(2)
        request.close_connection = True

    web.tamper = for_objects(stall)
    process = subprocess.Popen([sys.executable, "-c", PULL, web.url])
    assert arrived.wait(60)
    part = Path("own/cache/parts") / the_object(served).name
    while not (part.is_file() and part.stat().st_size >= 200_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("b").exists()
    web.tamper = None
    pull_vector("sql", Path("b"), source=web.url)
    assert contents(Path("b")) == contents(Path("a"))
    assert web.sent[path] == the_object(served).stat().st_size - 200_000


# ---- the cache --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_of_the_cache_is_downloaded_again(served: Path) -> None:
    pull_vector("sql", Path("b"), source=str(served), cache=DownloadCache(Path("kept")))
    (kept,) = Path("kept/objects").rglob(the_object(served).name)
    os.chmod(kept, 0o644)
    kept.unlink()
    kept.write_bytes(b"\0" * the_object(served).stat().st_size)
    pull_vector("sql", Path("c"), source=str(served), cache=DownloadCache(Path("kept")))
    assert contents(Path("c")) == contents(Path("a"))


def test_a_part_with_wrong_bytes_is_started_again(served: Path) -> None:
    part = Path("own/cache/parts") / the_object(served).name
    part.parent.mkdir(parents=True)
    part.write_bytes(b"wrong" * 1000)
    pull_vector("sql", Path("b"), source=str(served))
    assert contents(Path("b")) == contents(Path("a"))
    assert not part.exists()


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_least_recently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = DownloadCache(tmp_path / "kept")
    for i in range(4):
        folder = make_artifact(Path(f"v{i}"), f"v{i}", i, 1 << 16)
        push_vector(folder, made_entry(folder), "remote")
        pulled = pull_vector(f"v{i}", Path(f"p{i}"), source="remote", cache=kept)
        for path in pulled.iterdir():  # as if the store were on another disk: the cache holds the only copy
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        for path in kept.folder.glob("objects/*/*"):
            if path.name in (f.sha256 for f in made_entry(folder).files.values()):
                os.utime(path, (1000 + i, 1000 + i))
    size = made_entry(Path("v0")).files["taskvector.safetensors"].size
    monkeypatch.setenv("ALNICO_STORE_CACHE", str(2 * size + 20_000))
    kept.whole(made_entry(Path("v0")).files["taskvector.safetensors"])  # used now
    kept.trim()
    there = [
        i
        for i in range(4)
        if kept.whole(made_entry(Path(f"v{i}")).files["taskvector.safetensors"]) is not None
    ]
    assert there == [0, 3]
    monkeypatch.setenv("ALNICO_STORE_CACHE", "0")
    kept.trim()
    assert not list(kept.folder.glob("objects/*/*"))
    monkeypatch.setenv("ALNICO_STORE_CACHE", "much")
    with pytest.raises(AlnicoError, match="ALNICO_STORE_CACHE is 'much'; expected a size"):
        cache_file.cache_limit()


def test_a_full_disk_is_told_before_anything_is_downloaded(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert "100 B left; expected room for all of them" in refused(str(served), ResourceError)
