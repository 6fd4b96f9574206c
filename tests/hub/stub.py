"""A hub in this process: the few addresses that huggingface_hub asks, served from memory, with a log of every request.

Weights are served as the real hub serves them: by a redirect to another host (another port here), which takes ranges.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest
import yaml

Files = dict[str, bytes]


@dataclass
class Repo:
    """``commits`` maps a commit to its files, ``refs`` a branch to its commit."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    host: str
    """``hub``, or ``store`` where the weights are."""
    method: str
    path: str
    range: str | None
    token: str | None
    first: int
    sent: int


class Hub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploads: Files = {}
        self.downloads: dict[str, int] = {}
        """How often a model was downloaded, as a search says."""
        self.requests: list[Request] = []
        self.takes_ranges = True
        self.cache = ""
        self.size_lies: dict[str, int] = {}
        self.tamper: Callable[[Any], bool] | None = None
        """Called with each request's handler (``host``, ``command``, ``path``, ``say``, ``answer``, ``wfile``); True if it has answered."""
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, host)) for host in ("hub", "store")
        ]
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def add(self, name: str, files: Files | Path, branch: str = "main") -> str:
        """Commit files (or a folder) to a branch; returns the commit."""
        if isinstance(files, Path):
            files = {
                p.relative_to(files).as_posix(): p.read_bytes()
                for p in sorted(files.rglob("*"))
                if p.is_file()
            }
        repo = self.repos.setdefault(name, Repo())
        parent = repo.refs.get(branch, "")
        digest = hashlib.sha1(
            parent.encode() + b"".join(n.encode() + data for n, data in sorted(files.items()))
        )
        repo.commits[digest.hexdigest()] = dict(files)
        repo.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def files(self, name: str, branch: str = "main") -> Files:
        repo = self.repos[name]
        return repo.commits[repo.refs[branch]]

    def listed(self, name: str) -> dict[str, Any]:
        """What a search says of a model: its tags, some of which the real hub derives from the card, as here."""
        card = self.files(name).get("README.md", b"").decode()
        front = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        bases = front.get("base_model", [])
        bases = bases if isinstance(bases, list) else [bases]
        tags = [*front.get("tags", [])] + [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{r}:{base}" for r in [front.get("base_model_relation")] if r for base in bases]
        tags += [f"license:{front['license']}"] if "license" in front else []
        languages = front.get("language", [])
        tags += languages if isinstance(languages, list) else [languages]
        counts = {"downloads": self.downloads.get(name, 0), "likes": 0}
        return {"id": name, "sha": self.repos[name].refs["main"], "tags": tags, "cardData": front, **counts}

    def weight_bytes(self) -> int:
        """Bytes of tensors (not of headers) that were sent."""
        total = 0
        for request in self.requests:
            data = next(
                (
                    f[n]
                    for r in self.repos.values()
                    for f in r.commits.values()
                    for n in f
                    if request.path.endswith(n)
                ),
                b"",
            )
            if request.method == "GET" and request.path.endswith(".safetensors"):
                begin = 8 + int.from_bytes(data[:8], "little")
                total += max(0, request.first + request.sent - max(begin, request.first))
        return total

    @contextmanager
    def running(self) -> Iterator[Hub]:
        threads = [
            threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            for s in self.servers
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server in self.servers:
                server.shutdown()
                server.server_close()


@contextmanager
def serving(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that this process takes for the real one, with a cache of its own and the token ``hf_secret``."""
    from huggingface_hub import close_session, constants

    hub = Hub()
    hub.cache = str(home / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub.running():
        yield hub
        close_session()


def _handler(hub: Hub, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        @property
        def host(self) -> str:
            return host

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            first = 0
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            headers = dict(headers or {})
            if status == 200 and wanted and hub.takes_ranges:
                first = int(wanted[1])
                last = min(int(wanted[2] or len(body) - 1), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, body[first : last + 1]
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            token = self.headers.get("Authorization")
            sent = 0 if self.command == "HEAD" else len(body)
            request = Request(
                host, self.command, unquote(self.path), self.headers.get("Range"), token, first, sent
            )
            hub.requests.append(request)  # before the body: whoever has read all of it may look here at once
            if sent:
                try:
                    self.wfile.write(body)
                except OSError:  # the client has what it wants
                    hub.requests[hub.requests.index(request)] = dataclasses.replace(request, sent=0)
                    self.close_connection = True

        def answer_raw(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            """Answer with these headers alone, without a date and what a range would want."""
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def say(self, data: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.tamper is not None and hub.tamper(self):
                return
            if host == "store":
                _, commit, file = path.split("/", 2)
                self.answer(
                    200, next(r.commits[commit][file] for r in hub.repos.values() if commit in r.commits)
                )
                return
            if path == "/api/models":
                return self.search()
            resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/(.+)|/tree/([^/]+)/?.*)?", path)
            name = resolve[1] if resolve else api[1] if api else ""
            repo = hub.repos.get(name)
            if repo is None or (repo.private and not self.headers.get("Authorization")):
                return self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
            revision = resolve[2] if resolve else (api[3] or api[4] or "main") if api else "main"
            commit = repo.refs.get(revision, revision)
            if commit not in repo.commits and not (api and not api[2]):
                return self.refuse(404, "RevisionNotFound")
            files = repo.commits.get(commit, {})
            if api and api[4]:
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                return self.say(entries)
            if api:
                sizes = {n: hub.size_lies.get(n, len(d)) for n, d in files.items()}
                siblings = [{"rfilename": n, "size": size, "blobId": "0"} for n, size in sizes.items()]
                return self.say(
                    {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
                )
            assert resolve
            if repo.gated:
                return self.refuse(403, "GatedRepo")
            if resolve[3] not in files:
                return self.refuse(404, "EntryNotFound")
            data = files[resolve[3]]
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if resolve[3].endswith(".safetensors"):
                headers |= {"Location": f"{hub.store}/{commit}/{resolve[3]}", "X-Linked-Size": str(len(data))}
                headers["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
                return self.answer(302, b"", headers)
            self.answer(200, data, headers)
            return None

        def search(self) -> None:
            """List the models that have all tags of ``filter``, in pages of at most ``limit``."""
            asked = parse_qs(urlsplit(self.path).query)
            found = [
                entry
                for name in sorted(hub.repos, key=lambda n: (-hub.downloads.get(n, 0), n))
                if not hub.repos[name].private
                and set(asked.get("filter", [])) <= set((entry := hub.listed(name))["tags"])
                and asked.get("search", [""])[0].lower() in name.lower()
            ]
            start, count = int(asked.get("cursor", ["0"])[0]), int(asked.get("limit", ["1000"])[0])
            headers = {"Content-Type": "application/json"}
            if start + count < len(found):
                rest = urlencode({**asked, "cursor": start + count}, doseq=True)
                headers["Link"] = f'<{hub.url}/api/models?{rest}>; rel="next"'
            self.answer(200, json.dumps(found[start : start + count]).encode(), headers)

        def do_PUT(self) -> None:
            if hub.tamper is not None and hub.tamper(self):
                return
            hub.uploads[self.path.rsplit("/", 1)[1]] = self.body()
            self.answer(200)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def do_POST(self) -> None:
            if hub.tamper is not None and hub.tamper(self):
                return
            body, path = self.body(), unquote(urlsplit(self.path).path)
            if not self.headers.get("Authorization"):
                return self.refuse(401, "")
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if asked["organization"] == "stranger":
                    return self.refuse(403, "")
                if asked["organization"] == "ghost":
                    return self.say({"url": f"{hub.url}/{name}", "name": name})
                exists = name in hub.repos
                if not exists:
                    private = asked.get("private") is True or asked.get("visibility") == "private"
                    hub.repos[name] = Repo(private=private)
                    hub.add(name, {".gitattributes": b""})
                return self.say({"url": f"{hub.url}/{name}", "name": name}, 409 if exists else 200)
            if path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {
                        "oid": o["oid"],
                        "size": o["size"],
                        "actions": {"upload": {"href": f"{hub.store}/upload/{o['oid']}"}},
                    }
                    for o in json.loads(body)["objects"]
                ]
                return self.say({"transfer": "basic", "objects": objects})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
            assert found, path
            name, verb, branch = found.groups()
            repo = hub.repos[name]
            if verb == "branch":
                repo.refs.setdefault(branch, repo.refs["main"])
                return self.say({})
            if branch not in repo.refs:
                return self.refuse(404, "RevisionNotFound")
            if verb == "preupload":
                paths = [f["path"] for f in json.loads(body)["files"]]
                modes = {p: "lfs" if p.endswith(".safetensors") else "regular" for p in paths}
                return self.say(
                    {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]}
                )
            files = dict(hub.files(name, branch))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repo.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
                else:
                    assert line["key"] == "deletedFile"
                    del files[value["path"]]
            commit = hub.add(name, files, branch)
            return self.say({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

    return Handler
