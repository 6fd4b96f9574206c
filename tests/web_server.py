"""A web server of a folder in this process, with ranges and ETags, which logs what was asked and fails as it is told.

    def test_a_busy_server_is_asked_again(web_server: WebServer) -> None:   # fixture in remote_fixtures.py
        (web_server.folder / "a.bin").write_bytes(b"12345678")
        web_server.fail("status", "*.bin", status=503, times=2)             # the next two requests of such files
        ... read web_server.url + "/a.bin" ...
        assert web_server.reads_of("a.bin") == [(0, 8)]                     # first byte and count of each answer to a GET
        assert web_server.failures == ["status", "status"]                  # what was used up

``fail`` takes a kind of ``FAULTS`` and its settings. ``s3_server.S3Server`` is the same over an S3-compatible server.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FAULTS = {
    "status": "answers with `status`, and with `headers`, such as Retry-After",
    "reset": "sends `share` (0.5) of the body, nothing of an answer without one, and resets the connection",
    "cut": "sends `share` (0.5) of the body and closes the connection as if all were sent",
    "stall": "sends `share` (0.5) of the body and then nothing until the client goes or the server ends",
    "slow": "sends the body byte by byte, one each `pause` (0.05) seconds, until the client goes",
    "wrong range": "answers with a Content-Range that is 1 byte further on than what was asked for",
    "odd range": "answers with the Content-Range `text`",
    "whole": "ignores the range: sends the whole file with status 200",
    "longer": "sends `count` (1000) bytes more than asked for",
    "size": "states a size of the whole file that is `count` (1000) bytes too large",
    "no ETag": "sends neither ETag nor Last-Modified",
    "ETag": "sends the ETag `text`",
    "expired": "refuses credentials as expired (S3: status 400 and ExpiredToken)",
    "denied": "refuses access: status 403 (S3: AccessDenied)",
    "redirect": "redirects to `to`; to itself, in a circle, without it",
    "call": "calls `function()` first, then answers as usual",
}


@dataclass
class Fault:
    kind: str
    names: str
    methods: tuple[str, ...]
    times: float
    skip: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class QuietServer(ThreadingHTTPServer):
    request_queue_size = 128
    """With the 5 of the library, connections that come at once wait for seconds."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class WebServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = QuietServer(("127.0.0.1", 0), _handler(self))
        self.url = self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Behave as a new server."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.sent: dict[str, int] = {}
        """Bytes that were sent of each path."""
        self.reads: list[tuple[str, int, int]] = []
        """Path, first byte and count of bytes of each answer to a GET that has bytes of a file; those of a fault too."""
        self.takes_ranges = self.takes_head = True
        self.tamper: Callable[[Any], bool] | None = None
        """Called with each request's handler; True if it has answered."""
        self.faults: list[Fault] = []
        self.failures: list[str] = []
        """Kinds of the faults that were met, in order."""

    def fail(
        self,
        kind: str,
        names: str = "*",
        *,
        methods: tuple[str, ...] = ("GET",),
        times: float = 1,
        skip: int = 0,
        **settings: Any,
    ) -> None:
        """Answer the next ``times`` requests of files whose path matches ``names``, after ``skip`` of them, with a fault.
        ``times=math.inf`` for all."""
        assert kind in FAULTS, kind
        self.faults.append(Fault(kind, names, methods, times, skip, settings))

    def reads_of(self, name: str) -> list[tuple[int, int]]:
        """First byte and count of each answer to a GET of a file, in order of the bytes."""
        return sorted((first, count) for path, first, count in self.reads if path == name)

    def name_of(self, path: str) -> str:
        """The name of a file, which faults and logs use, in the path of a request."""
        return path

    def respond(self, request: Any, path: str) -> Answer:
        """What a working server answers."""
        file = self.folder / path
        if request.command not in ("GET", "HEAD"):
            return Answer(405)
        if request.command == "HEAD" and not self.takes_head:
            return Answer(405)
        if not file.is_file():
            return Answer(404, b"not here")
        body = file.read_bytes()
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        headers = {
            "ETag": tag,
            "Last-Modified": formatdate(file.stat().st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if request.headers.get("If-Match", tag) != tag:
            return Answer(412, b"", headers)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not wanted or not self.takes_ranges or request.headers.get("If-Range", tag) != tag:
            return Answer(200, body, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
        if first >= len(body):
            return Answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        return Answer(
            206, body[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
        )

    def refuse(self, status: int, code: str) -> Answer:
        return Answer(status, code.encode())

    def take_fault(self, method: str, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if method in fault.methods and fnmatch.fnmatch(name, fault.names) and fault.times > 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    self.failures.append(fault.kind)
                    return fault
        return None

    def log(self, name: str, first: int, count: int) -> None:
        with self.lock:
            self.sent[name] = self.sent.get(name, 0) + count
            self.reads.append((name, first, count))


@contextmanager
def serving(web: WebServer) -> Iterator[WebServer]:
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        web.server.shutdown()
        web.server.server_close()


@contextmanager
def serving_folder(folder: Path) -> Iterator[WebServer]:
    with serving(WebServer(folder)) as web:
        yield web


def _handler(web: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                try:
                    self.wfile.write(body)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True

        def break_off(
            self, body: bytes, stated: int, headers: dict[str, str] | None = None, status: int = 200
        ) -> None:
            """Send less than was stated, and close the connection."""
            self.answer(status, body, {"Content-Length": str(stated), **(headers or {})})
            self.close_connection = True

        def part(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
            """What is to be answered of a file: the status, the bytes that were asked for, and the headers."""
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not wanted or not web.takes_ranges:
                return 200, body, {}
            first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
            return 206, body[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(body)}"}

        def do(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            name = web.name_of(path)
            web.requests.append((self.command, name, self.headers.get("Range")))
            if web.tamper is not None and web.tamper(self):
                return
            fault = web.take_fault(self.command, name)
            answer = self.failed(fault, path) if fault is not None else web.respond(self, path)
            if answer is None:
                return
            if self.command == "GET" and answer.status in (200, 206):
                begin = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
                count = (
                    len(answer.body)
                    if fault is None or fault.kind not in ("reset", "cut", "stall", "slow")
                    else 0
                )
                web.log(name, int(begin[1]) if begin else 0, count)
            if fault is None or fault.kind not in ("reset", "cut", "stall", "slow"):
                return self.answer(answer.status, answer.body, answer.headers)
            self.sent_badly(fault, answer)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

        def failed(self, fault: Fault, path: str) -> Answer | None:
            """The answer that a fault makes of the right one, before it is sent."""
            settings = fault.settings
            if fault.kind == "status":
                self.skip_body()
                refused = web.refuse(settings["status"], settings.get("code", "InternalError"))
                return Answer(refused.status, refused.body, refused.headers | settings.get("headers", {}))
            if fault.kind in ("expired", "denied"):
                self.skip_body()
                return (
                    web.refuse(400, "ExpiredToken")
                    if fault.kind == "expired"
                    else web.refuse(403, "AccessDenied")
                )
            if fault.kind == "redirect":
                self.skip_body()
                return Answer(302, b"", {"Location": settings.get("to", self.path)})
            if fault.kind == "call":
                settings["function"]()
            if fault.kind == "whole":
                del self.headers["Range"]
            answer = web.respond(self, path)
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
            first, last, size = (
                map(int, span.groups()) if span else (0, len(answer.body) - 1, len(answer.body))
            )
            if fault.kind == "wrong range":
                answer.headers["Content-Range"] = f"bytes {first + 1}-{last + 1}/{size}"
            elif fault.kind == "odd range":
                answer.headers["Content-Range"] = settings["text"]
            elif fault.kind == "longer":
                answer.body += b"x" * settings.get("count", 1000)
            elif fault.kind == "size":
                size += settings.get("count", 1000)
                if span:
                    answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
                else:
                    answer.headers["Content-Length"] = str(size)
                    self.close_connection = True
            elif fault.kind == "no ETag":
                answer.headers = {
                    k: v for k, v in answer.headers.items() if k.lower() not in ("etag", "last-modified")
                }
            elif fault.kind == "ETag":
                answer.headers = {k: v for k, v in answer.headers.items() if k.lower() != "etag"}
                answer.headers["ETag"] = settings["text"]
            return answer

        def sent_badly(self, fault: Fault, answer: Answer) -> None:
            """Send a right answer, but not all of it, or not at once."""
            self.close_connection = True
            head = answer.body[: int(len(answer.body) * fault.settings.get("share", 0.5))]
            with contextlib.suppress(OSError):
                if fault.kind == "slow":
                    self.answer(
                        answer.status, b"", {"Content-Length": str(len(answer.body))} | answer.headers
                    )
                    for byte in answer.body:
                        self.wfile.write(bytes([byte]))
                        if web.ended.wait(fault.settings.get("pause", 0.05)):
                            return
                    return
                if answer.body and self.command != "HEAD":  # an answer without a body would be whole
                    self.answer(
                        answer.status, head, {"Content-Length": str(len(answer.body))} | answer.headers
                    )
                if fault.kind == "stall":
                    begin = time.monotonic()
                    self.connection.settimeout(0.05)
                    while not web.ended.is_set() and time.monotonic() - begin < 60:
                        with contextlib.suppress(TimeoutError):
                            if not self.connection.recv(1):
                                return
                if fault.kind == "reset":  # closing with what the kernel has to linger over 0 s sends RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()

        def skip_body(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))

    return Handler
