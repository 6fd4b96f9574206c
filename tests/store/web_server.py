"""A web server of a folder in this process, which takes ranges, can break off, lie and redirect, and logs what was asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class WebServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.sent: dict[str, int] = {}
        """Bytes that were sent of each path."""
        self.takes_ranges = self.takes_head = True
        self.tamper: Callable[[Any], bool] | None = None
        """Called with each request's handler; True if it has answered."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def serving_folder(folder: Path) -> Iterator[WebServer]:
    web = WebServer(folder)
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.server.shutdown()
        web.server.server_close()


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
            if self.command == "GET":
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

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path).lstrip("/")
            web.requests.append((self.command, path, self.headers.get("Range")))
            if web.tamper is not None and web.tamper(self):
                return
            if self.command == "HEAD" and not web.takes_head:
                return self.answer(405)
            file = web.folder / path
            if not file.is_file():
                return self.answer(404, b"not here")
            status, body, headers = self.part(file.read_bytes())
            web.sent[path] = web.sent.get(path, 0) + (len(body) if self.command == "GET" else 0)
            self.answer(status, body, headers)
            return None

    return Handler
