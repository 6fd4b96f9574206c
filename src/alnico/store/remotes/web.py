"""A web server of static files as a place for a remote store, to read only: ``https://`` and ``http://``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alnico.checkpoint.network import TIMEOUT, TIMEOUT_SECONDS, is_cut_off, read_seconds, web_client
from alnico.checkpoint.remote.web_folder import check_status, web_error
from alnico.errors import HubError


class WebFiles:
    """Files below an address. Each request is checked by the hooks of ``checkpoint/network.py``."""

    is_writable = False

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Any = None

    def size(self, path: str, expected: int | None = None) -> int | None:
        with self._errors(path):
            response = self._opened().head(self._url(path), timeout=_seconds())
            if response.status_code in (404, 410):
                return None
            if response.status_code in (403, 405, 501):  # servers that answer no HEAD
                return self._size_by_get(path, expected)
            check_status(f"{self.address}: {path}", response.status_code)
            length = response.headers.get("Content-Length", "")
            return (
                int(length) if length.isdecimal() and len(length) < 19 else self._size_by_get(path, expected)
            )

    def _size_by_get(self, path: str, expected: int | None) -> int | None:
        """Return the size that a whole answer has; where it does not say, the expected one, or 0 if none is known."""
        with self._opened().stream("GET", self._url(path), timeout=_seconds()) as response:
            if response.status_code in (404, 410):
                return None
            check_status(f"{self.address}: {path}", response.status_code)
            length = response.headers.get("Content-Length", "")
            return int(length) if length.isdecimal() and len(length) < 19 else expected or 0

    def files(self, folder: str) -> list[str]:
        raise HubError(
            f"{self.address}: a web server does not list files; expected a place that does. Use its index."
        )

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"} if offset else {}
        with (
            self._errors(path),
            self._opened().stream("GET", self._url(path), headers=headers, timeout=_seconds()) as response,
        ):
            check_status(f"{self.address}: {path}", response.status_code)
            skipped = 0 if response.status_code == 206 else offset
            for chunk in response.iter_raw():
                data = chunk[skipped:][:size]
                skipped -= min(skipped, len(chunk))
                size -= len(data)
                if data:
                    yield data
                if not size:
                    return

    def write(self, path: str, data: bytes, *, is_new: bool = False) -> bool:
        raise HubError(f"{self.address}: can only be read; {path} was not written. Push to another place.")

    def send(self, path: str, source: Path) -> None:
        raise HubError(f"{self.address}: can only be read; {path} was not written. Push to another place.")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _opened(self) -> Any:
        if self._client is None:
            self._client = web_client()
        return self._client

    def _url(self, path: str) -> str:
        return f"{self.address.rstrip('/')}/{quote(path)}"

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn errors of the connection into a HubError; those that are tried again pass."""
        try:
            yield
        except Exception as error:
            if is_cut_off(error):
                raise
            raise web_error(f"{self.address}: {path}", error) from None


def _seconds() -> float:
    return read_seconds(TIMEOUT, TIMEOUT_SECONDS)
