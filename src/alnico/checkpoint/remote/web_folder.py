"""A folder of a web server, read by ranges: ``https://`` and ``http://``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from alnico.checkpoint.network import (
    TIMEOUT,
    TIMEOUT_SECONDS,
    Exchange,
    guard_requests,
    read_seconds,
    web_client,
)
from alnico.checkpoint.remote.folder import FileVersion
from alnico.checkpoint.remote.ranges import (
    CONTENT_RANGE,
    bytes_to_skip,
    changed,
    check_name,
    checked_tag,
    condition_of,
    number_of_bytes,
    range_header,
)
from alnico.checkpoint.remote.read_only_folder import ReadOnlyFolder
from alnico.checkpoint.remote.retries import Again, again_after, httpx_kinds, repeat
from alnico.errors import HubError

NOT_THERE = (404, 410)
NO_HEAD = (403, 405, 501)
"""What servers answer that take no HEAD; some signed addresses are for GET only."""


class WebFolder(ReadOnlyFolder):
    """Files below an address of a web server, which does not list them. No credentials are sent."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Any = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._has_answered = False

    def names(self) -> None:
        """A web server does not list files."""
        return None

    def state(self, name: str) -> FileVersion | None:
        where = check_name(self.address, name)

        def ask() -> FileVersion | None:
            with self._request(where, "HEAD", name, {}) as response:
                if response.status_code in NOT_THERE:
                    return None
                if response.status_code not in NO_HEAD:
                    check_status(where, response.status_code)
                    found = _version(response)
                    if found is not None:
                        return found
            with self._request(where, "GET", name, {"Range": range_header(0, 1)}) as response:
                if response.status_code in NOT_THERE:
                    return None
                if response.status_code == 416:  # nothing has no first byte
                    return FileVersion(0, _tag(response.headers))
                check_status(where, response.status_code)
                found = _version(response)
            if found is None:
                raise HubError(
                    f"{where}: the server does not state the size of the file (Content-Length, Content-Range); expected one that "
                    "serves files as they are. Move the model to such a server, or download it and give its path."
                )
            return found

        return repeat(where, ask, self._stop)

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        where = check_name(self.address, name)
        done, total = 0, len(buffer)
        tag = condition_of(state)
        condition = {"If-Match": tag} if tag else {}

        def read_rest() -> None:
            nonlocal done
            first, count = offset + done, total - done
            headers = {"Range": range_header(first, count), **condition}
            with self._request(where, "GET", name, headers, state.size) as response:
                if response.status_code == 412:
                    raise changed(where, f"the server no longer has the version {state.tag[:60]}")
                if response.status_code == 416:
                    raise changed(where, f"it had {state.size} bytes, now it has fewer")
                if response.status_code in NOT_THERE:
                    raise changed(where, "it was removed")
                check_status(where, response.status_code)
                found = _version(response) or FileVersion(state.size, _tag(response.headers))
                skipped = bytes_to_skip(
                    where,
                    response.status_code,
                    response.headers.get("Content-Range"),
                    first,
                    count,
                    found,
                    state,
                )
                is_part = response.status_code == 206
                for chunk in response.iter_raw():
                    data = chunk[skipped:]
                    skipped -= min(skipped, len(chunk))
                    if is_part and len(data) > total - done:
                        raise HubError(
                            f"{where}: the server sent more than the {count} bytes from {first} on that were asked for. Try "
                            "again; check the server and the proxies before it."
                        )
                    data = data[: total - done]
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    if done == total and not is_part:
                        return  # the rest is not read
            if done < total:
                raise Again(f"cut off the connection after {done} of {total} bytes")

        if total:
            repeat(where, read_rest, self._stop)

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _cannot_write(self, name: str) -> HubError:
        return HubError(
            f"{self.address}: a web server can only be read; {name} was not written. Choose a folder, or a place that takes files, "
            "such as s3://."
        )

    @contextmanager
    def _request(
        self, where: str, method: str, name: str, headers: Mapping[str, str], limit: float = float("inf")
    ) -> Iterator[Any]:
        """Make one request, checked by the hooks of ``checkpoint/network.py``; the answer's body is not read yet.

        Errors: Again for what may pass; HubError.
        """
        exchange = Exchange(where, limit=limit, server=self.address, stop=self._stop)
        try:
            with guard_requests(exchange), self._opened().stream(
                method,
                f"{self.address}/{quote(name)}",
                headers=headers,
                timeout=read_seconds(TIMEOUT, TIMEOUT_SECONDS),
            ) as response:  # fmt: skip
                self._has_answered = True
                yield response
        except Again:
            raise
        except Exception as error:
            again = again_after(error, has_answered=self._has_answered)
            if again is not None:
                raise again from None
            raise web_error(where, error) from None

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = web_client()
                weakref.finalize(self, self._client.close)  # connections of a folder that nobody closes
            return self._client


def web_error(where: str, error: Exception) -> Exception:
    """Return what an error of the HTTP library means; the error itself if it is none of that library's."""
    kinds = httpx_kinds(error)
    if not kinds:
        return error
    name = type(error).__name__
    if "TooManyRedirects" in kinds:
        reason = "redirects in a circle"
    elif "UnsupportedProtocol" in kinds:
        reason = "redirects to an address that is neither http:// nor https://"
    elif "ConnectError" in kinds:
        reason = f"could not be reached ({name}: {str(error)[:120]})"
    else:
        reason = f"could not be reached ({name})"
    return HubError(
        f"{where}: the server {reason}. Check the URL, the connection and the proxies, and try again."
    )


def _version(response: Any) -> FileVersion | None:
    """Return the version that the headers of an answer state; None if they do not state the size."""
    headers = response.headers
    if response.status_code == 206:
        sent = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        size = number_of_bytes(sent[3]) if sent else None
    else:
        size = number_of_bytes(headers.get("Content-Length"))
    return None if size is None else FileVersion(size, _tag(headers))


def _tag(headers: Mapping[str, str]) -> str:
    """Return the ETag; without one, the time of the last change, which servers state by the second."""
    return checked_tag(headers.get("ETag")) or checked_tag(headers.get("Last-Modified"))


def check_status(where: str, status: int) -> None:
    if status in (401, 403, 407):
        raise HubError(
            f"{where}: the server refuses access (status {status}); expected a file that may be read without credentials, as "
            "alnico sends none to web servers. Ask who hosts it, or download the model and give its path."
        )
    if status not in (200, 206):
        raise HubError(
            f"{where}: the server answered with status {status}; expected the file. Check the URL, and try again later."
        )
