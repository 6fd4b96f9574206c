"""Checks the requests that huggingface_hub makes for alnico, and the responses to them.

huggingface_hub knows the addresses, the token, the proxies and the layout of the cache. But it trusts the
hub: it reads responses of any length, names files after response headers, sends the token wherever a response
redirects it, and sleeps for as long as it is asked to. Hooks on its HTTP client check each exchange against
what alnico expects.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alnico.errors import HubError

T = TypeVar("T")

CONNECTIONS = 8
TIMEOUT = "ALNICO_HUB_TIMEOUT"
TIMEOUT_SECONDS = 30.0
"""A transfer fails if the server is silent, or slower than ``MIN_BYTES_PER_SECOND``, for this long."""
WAIT = "ALNICO_HUB_WAIT"
WAIT_SECONDS = 60.0
"""Total time during which a request is repeated while the hub says that it is busy."""
LONG_PAUSE_FACTOR = 5
"""One pause that the hub asks for may be this many times ``WAIT``: its rate limits are per five minutes."""
WRITE_TIMEOUTS = 4
"""Timeouts that a hub may take to answer a commit of many files."""
MIN_BYTES_PER_SECOND = 1024
"""Slowest speed of one connection."""
LONGEST_PAUSE = 16.0
LOGGED_PAUSE = 5.0
"""Shortest pause that is logged, in seconds."""
MAX_RESTARTS = 3
"""How often a transfer that was cut off is started again."""

MAX_RESPONSE_BYTES = 1 << 25
"""Largest JSON response: the list of a repository of 100,000 files takes about 30 MB."""
MAX_ERROR_BYTES = 1 << 16
"""Bytes that are read of the body of an error or a redirect."""

BUSY = (408, 429, 500, 502, 503, 504)
ETAG = re.compile(r"(?!\.)[\w.:+=@-]{1,200}", re.ASCII)
"""An ETag becomes the name of a file in the cache."""
SHA256 = re.compile(r"[0-9a-f]{64}")
XET = re.compile(r"[0-9a-fA-F]{64}")
NUMBER = re.compile(r"[0-9]{1,18}")
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:[0-9]{1,18}|\*)")
REQUESTED_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
OFFICIAL_HUBS = ("https://huggingface.co", "https://hf.co")
"""Mirrors redirect their clients to these, which may get the token too."""


class TransferStopped(Exception):
    """The transfer must stop: another request failed, or the user interrupted."""


class Busy(Exception):
    """The hub cannot answer now. ``pause`` is the number of seconds it asks to wait; 0 if it does not say."""

    def __init__(self, status: int, pause: float) -> None:
        super().__init__(f"status {status}")
        self.status, self.pause = status, pause


class SlowTransfer(HubError):
    """A body arrives more slowly than ``MIN_BYTES_PER_SECOND``."""


class Pauses:
    """How long to wait between the tries of a request: ``count`` failures so far, ``waited`` seconds of at most ``limit``.

    Each pause is as long as the server asks for (``Retry-After``), but at least 1, 2, 4, 8, 16, 16, ... seconds and up to a
    quarter more by chance, so that clients that failed together do not return together; proportionally less if ``WAIT``
    is shorter than its default. Errors: HubError for a ``WAIT`` that is no number of seconds.
    """

    def __init__(self) -> None:
        self.limit, self.waited, self.count = read_seconds(WAIT, WAIT_SECONDS), 0.0, 0
        self._has_waited_long = False

    def after(self, requested: float = 0.0) -> float | None:
        """Return the seconds to wait after a failure; None if the time is over. One pause that the server asks for may be
        longer than that."""
        self.count += 1
        own = min(2.0 ** min(self.count - 1, 9), LONGEST_PAUSE) * min(1.0, self.limit / WAIT_SECONDS)
        pause = max(own * random.uniform(1.0, 1.25), requested)
        if self.waited + pause > self.limit:
            if self._has_waited_long or not 0 < requested <= LONG_PAUSE_FACTOR * self.limit:
                return None
            self._has_waited_long = True
        self.waited += pause
        return pause


class Speed:
    """Measures how fast a body arrives, without the time between its pieces that the receiver takes."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._spent, self._received = timeout, 0.0, 0
        self._begin = time.monotonic()

    def wait(self) -> None:
        """Note that the receiver waits for the next piece."""
        self._begin = time.monotonic()

    def arrived(self, count: int) -> str | None:
        """Note ``count`` bytes. Returns what is wrong if they come too slowly."""
        self._spent += min(time.monotonic() - self._begin, self._timeout)
        self._received += count
        if self._spent < self._timeout:
            return None
        received, spent = self._received, self._spent
        self._received, self._spent = 0, 0.0
        if received >= MIN_BYTES_PER_SECOND * spent:
            return None
        return f"sent {received} bytes in {spent:.0f} s, which is too slow; expected {MIN_BYTES_PER_SECOND} bytes per second"


@dataclass
class Exchange:
    """What alnico expects of the requests for one item: the list of a model's files, or one file.

    ``limit`` bounds the body of a response. ``size`` and ``commit``, if set, must match the headers of a
    file, and ``sha256`` its content; ``is_proved`` says that the received bytes have that hash. ``server`` is the
    address of a server that is not the hub; it gets no token.
    """

    label: str
    limit: float = math.inf
    size: int | None = None
    commit: str | None = None
    sha256: str | None = None
    is_upload: bool = False
    server: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    is_proved: bool = False
    has_arrived: bool = False
    is_waiting: bool = False
    silent: float = 0.0

    def error(self, text: str) -> HubError:
        return HubError(f"{self.label}: {text}")

    @property
    def home(self) -> str:
        """The address that the requests are for."""
        from huggingface_hub import constants

        return constants.ENDPOINT if self.server is None else self.server

    @property
    def who(self) -> str:
        return "the hub" if self.server is None else "the server"

    @property
    def setting(self) -> str:
        """What to check if the answers are not those of the right server."""
        return "HF_ENDPOINT" if self.server is None else "the address"

    def note_arrival(self) -> None:
        """Note that the server sent something. Errors: TransferStopped."""
        self.has_arrived, self.silent = True, 0.0
        if self.stop.is_set():
            raise TransferStopped


_exchange: ContextVar[Exchange | None] = ContextVar("alnico_exchange", default=None)
_uploads: list[Exchange] = []
"""Uploads in progress: huggingface_hub's threads for them do not see the context variable."""


def read_seconds(name: str, default: float) -> float:
    """Read a number of seconds from an environment variable. Errors: HubError."""
    text = os.environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise HubError(
            f"{name} is {text[:40]!r}; expected a number of seconds above 0. Correct it or unset it."
        )
    return value


@contextmanager
def guard_requests(exchange: Exchange) -> Iterator[None]:
    """Check the requests that huggingface_hub makes in this block against ``exchange``."""
    _install()
    token = _exchange.set(exchange)
    if exchange.is_upload:
        _uploads.append(exchange)
    try:
        yield
    finally:
        exchange.is_waiting = False
        _exchange.reset(token)
        if exchange.is_upload:
            _uploads.remove(exchange)


def call_with_retries(exchange: Exchange, call: Callable[[], T], *, tries: int = 1000) -> T:
    """Repeat a call while the hub is busy, for a limited time, with the pauses of :class:`Pauses`.

    A transfer that is cut off after it began is started again up to ``MAX_RESTARTS`` times.
    Errors: HubError; what ``call`` raises.
    """
    pauses, cuts = Pauses(), 0
    while True:
        exchange.has_arrived = exchange.is_proved = False
        try:
            with guard_requests(exchange):
                return call()
        except Exception as error:
            busy = busy_error(error)
            restarts = is_cut_off(error) and exchange.has_arrived and cuts < MAX_RESTARTS
            if busy is None and not restarts:
                raise
            waited = pauses.waited
            pause = pauses.after(0.0 if busy is None else busy.pause)
            if busy is not None:
                if pause is None or pauses.count >= tries:
                    raise exchange.error(
                        _busy_message(exchange.home, busy, pauses.count, waited, pauses.limit)
                    ) from None
                log_pause(exchange.label, f"{exchange.who} is busy (status {busy.status})", pause)
            elif pause is None:
                raise
            cuts += restarts
        if exchange.stop.wait(pause):
            raise TransferStopped


def log_pause(label: str, reason: str, pause: float) -> None:
    """Log a pause that somebody who watches would wonder about."""
    if pause >= LOGGED_PAUSE:
        logging.getLogger("huggingface_hub.alnico").warning(
            "%s: %s; trying again in %.0f s", label, reason, pause
        )


def _busy_message(address: str, busy: Busy, count: int, waited: float, limit: float) -> str:
    times = "once" if count == 1 else f"{count} times in {waited:.0f} s"
    request = ""
    if busy.pause:
        duration = f"{busy.pause:.0f} s" if 0 < busy.pause < 1e9 else "forever"
        request = f" and asks to wait {duration}"
    return (
        f"{address} is busy: it answered with status {busy.status} {times}{request}. "
        "Try again later; the same command resumes. "
        f"To wait longer, set the environment variable {WAIT} to more seconds (now {limit:g})."
    )


def busy_error(error: BaseException | None) -> Busy | None:
    """Return what an error says of a server that is busy; None for other errors."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, Busy):
            return error
        if isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY:
            return Busy(error.response.status_code, requested_pause(error.response.headers))
        error = error.__cause__
    return None


def is_cut_off(error: BaseException) -> bool:
    """Does an error of httpx say that a connection broke, after it was made?"""
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}
    return bool(kinds & {"NetworkError", "RemoteProtocolError"}) and "ConnectError" not in kinds


def call_all(exchanges: Sequence[Exchange], calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls in a few threads, each with its exchange, and return their results.

    The first error or an interrupt stops the others; a thread that hangs is abandoned. A server that sends
    nothing for twice the timeout is an error, even if it keeps the connection alive.
    Errors: HubError; what a call raises.
    """
    stop = threading.Event()
    timeout = read_seconds(TIMEOUT, TIMEOUT_SECONDS)
    work: queue.SimpleQueue[tuple[Future[T], Exchange, Callable[[], T]]] = queue.SimpleQueue()
    futures: list[Future[T]] = []
    for exchange, call in zip(exchanges, calls, strict=True):
        exchange.stop = stop
        futures.append(Future())
        work.put((futures[-1], exchange, call))

    def run() -> None:
        while not stop.is_set():
            try:
                future, exchange, call = work.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(call_with_retries(exchange, call))
            except BaseException as error:
                future.set_exception(error)

    # Daemon threads: at exit the interpreter would wait for the threads of a pool, and so for a slow server.
    threads = [
        threading.Thread(target=run, name="alnico-hub", daemon=True)
        for _ in range(min(len(calls), CONNECTIONS))
    ]
    for thread in threads:
        thread.start()
    step = min(0.5, timeout / 4)
    try:
        pending = set(futures)
        while pending:
            begin = time.monotonic()
            done, pending = wait(pending, step, FIRST_EXCEPTION)
            for future in done:
                future.result()
            passed = min(
                time.monotonic() - begin, 2 * step
            )  # time during which the process was stopped does not count
            for exchange in exchanges:
                exchange.silent = exchange.silent + passed if exchange.is_waiting else 0.0
                if exchange.silent > 2 * timeout:
                    raise exchange.error(
                        f"{exchange.who} sent nothing for {exchange.silent:.0f} s. {_retry_hint(timeout)}"
                    )
        return [future.result() for future in futures]
    finally:
        stop.set()
        for thread in threads:
            thread.join(1.0 / len(threads))  # time to remove partial files


def _retry_hint(timeout: float) -> str:
    return (
        "Try again; complete downloads are kept. "
        f"To allow more time, set the environment variable {TIMEOUT} to more seconds (now {timeout:g})."
    )


def web_client() -> Any:
    """Return an HTTP client for servers that are not the hub: of the library that huggingface_hub uses, without its
    token and its offline mode, checked by the same hooks. Errors: HubError for proxies that cannot be used."""
    from huggingface_hub.utils import get_session

    try:
        return _add_hooks(type(get_session())(follow_redirects=True, max_redirects=5))
    except (ValueError, ImportError) as error:
        raise HubError(
            f"no connection can be made ({type(error).__name__}). "
            "Check the proxies in the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)."
        ) from None


def _install() -> None:
    """Add the hooks to the clients that huggingface_hub makes; they ignore requests that are not alnico's."""
    from huggingface_hub.utils import _http

    with _http._CLIENT_LOCK:
        make = _http._GLOBAL_CLIENT_FACTORY
        if getattr(make, "is_alnicos", False):
            return

        def make_hooked() -> Any:
            try:
                client = make()
            except Exception as error:  # from httpx: an invalid proxy address, a package that a proxy needs
                if _current_exchange() is None:
                    raise
                reason = " ".join(str(error).split())[:200]
                reason = type(error).__name__ if "@" in reason else reason  # it may contain a password
                raise HubError(
                    f"no connection can be made ({reason}). "
                    "Check the proxies in the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)."
                ) from None
            return _add_hooks(client)

        make_hooked.is_alnicos = True  # type: ignore[attr-defined]
        # Not with set_client_factory, which closes the current client: other threads may be using it.
        _http._GLOBAL_CLIENT_FACTORY = make_hooked
        if _http._GLOBAL_CLIENT is not None:
            _add_hooks(_http._GLOBAL_CLIENT)


def _add_hooks(client: Any) -> Any:
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _check_request],
        "response": [*hooks["response"], _check_response],
    }
    return client


def _current_exchange() -> Exchange | None:
    return _exchange.get() or (_uploads[-1] if _uploads else None)


def _check_request(request: Any) -> None:
    """Check a request before it is sent; redirects are requests too."""
    exchange = _current_exchange()
    if exchange is None:
        return
    if exchange.stop.is_set():
        raise TransferStopped
    url, home = urlsplit(str(request.url)), urlsplit(exchange.home)
    if home.scheme == "https" and url.scheme != "https":
        raise exchange.error(
            f"{exchange.who} redirects to {_origin(url)}, which is not encrypted; expected https, as in "
            f"{exchange.home}. Check {exchange.setting}."
        )
    if "Authorization" in request.headers and not any(
        _is_same_origin(url, urlsplit(hub)) for hub in (exchange.home, *OFFICIAL_HUBS)
    ):
        raise exchange.error(
            f"the hub's answer would send your token to {_origin(url)}; expected {exchange.home}. "
            "Nothing was sent there. Check HF_ENDPOINT."
        )
    is_write = exchange.is_upload and request.method not in ("GET", "HEAD")
    default = read_seconds(TIMEOUT, TIMEOUT_SECONDS) * (WRITE_TIMEOUTS if is_write else 1)
    timeouts = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: default if timeouts.get(kind) is None else timeouts[kind]
        for kind in ("connect", "read", "write", "pool")
    }
    request.headers["Accept-Encoding"] = "identity"
    if not exchange.is_waiting:
        exchange.is_waiting, exchange.silent = True, 0.0


def _origin(url: Any) -> str:
    return repr(f"{url.scheme}://{url.netloc.rpartition('@')[2]}"[:100])


def _is_same_origin(url: Any, hub: Any) -> bool:
    """Is it the hub's origin, or the same host with https instead of http?"""
    ports = {"http": 80, "https": 443}
    target, own = ((u.scheme, u.port or ports.get(u.scheme)) for u in (url, hub))
    return url.hostname == hub.hostname and (
        target == own or (target == ("https", 443) and own == ("http", 80))
    )


def _check_response(response: Any) -> None:
    """Check a response before its body is read, and limit the body."""
    exchange = _current_exchange()
    if exchange is None:
        return
    exchange.note_arrival()
    status, headers = response.status_code, response.headers
    for name in ("Location", "Link", "X-Error-Message", "X-HF-Warning"):
        if CONTROLS.search(headers.get(name, "")):
            if not name.startswith("X-"):
                raise exchange.error(
                    f"{exchange.who}'s answer has control characters in its header {name}. "
                    f"Check {exchange.setting}."
                )
            del headers[name]  # huggingface_hub would print it
    if status in BUSY:
        pause = requested_pause(headers)
        if not exchange.is_upload:
            raise Busy(status, pause)
        # While uploading, huggingface_hub repeats the failed part of a file, and sleeps as long as these say.
        for name in ("Retry-After", "RateLimit"):
            if name in headers and not pause <= LONGEST_PAUSE:
                del headers[name]
    is_file = exchange.size is not None and "X-Xet-Access-Token" not in headers
    if is_file:
        _check_file(exchange, response)
    if status == 206:
        _check_part(exchange, response)
    is_body = 200 <= status < 300
    if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        if is_body and response.request.method != "HEAD":
            raise exchange.error(
                f"{exchange.who}'s answer is encoded as {headers['Content-Encoding'][:40]!r}; expected plain bytes, "
                f"as requested. Check {exchange.setting} and your proxies."
            )
        del headers["Content-Encoding"]  # the text of an error is not worth decoding
    if response.request.method != "HEAD" and not response.is_closed:
        response.stream = _bounded_stream(exchange, response, is_body, is_file)
    else:
        exchange.is_waiting = False


def _check_file(exchange: Exchange, response: Any) -> None:
    """Compare the headers that describe a file with the hub's list of files."""
    headers = response.headers
    commit = headers.get("X-Repo-Commit", exchange.commit)
    if commit != exchange.commit:
        raise exchange.error(
            f"the hub's answer is for commit {commit[:60]!r}; expected {exchange.commit}. "
            "Try again; check HF_ENDPOINT."
        )
    if response.status_code >= 400:
        return
    if exchange.server is not None:
        text = headers.get("Content-Length")
        if response.status_code == 200 and text is not None and text != str(exchange.size):
            raise exchange.error(
                f"the server's answer has {text[:40]!r} bytes (Content-Length); expected {exchange.size}. The file was "
                "changed, or the address is not that of the right server. Try again; check the address."
            )
        return
    for name in ("ETag", "X-Linked-ETag") if response.request.method == "HEAD" else ():
        if (etag := headers.get(name)) is not None and not ETAG.fullmatch(etag.lstrip("W/").strip('"')):
            raise exchange.error(
                f"the hub's answer has {name} {etag[:60]!r}; expected the hash of a file. Check HF_ENDPOINT."
            )
    if not XET.fullmatch(headers.get("X-Xet-Hash", "0" * 64)):
        raise exchange.error(
            f"the hub's answer has X-Xet-Hash {headers['X-Xet-Hash'][:60]!r}; expected a hash. Check "
            "HF_ENDPOINT."
        )
    sizes = ["X-Linked-Size"] + ["Content-Length"] * (response.status_code == 200)
    for name in sizes:
        text = headers.get(name)
        if text is not None and not (NUMBER.fullmatch(text) and int(text) == exchange.size):
            raise exchange.error(
                f"the hub's answer has size {text[:40]!r} ({name}); its list of files states "
                f"{exchange.size}. The model was changed, or the server is not a hub. Try again; check "
                "HF_ENDPOINT."
            )
    linked = headers.get("X-Linked-ETag", "").strip('"')
    if exchange.sha256 is None and SHA256.fullmatch(linked):
        exchange.sha256 = linked


def _check_part(exchange: Exchange, response: Any) -> None:
    headers = response.headers
    sent = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    requested = REQUESTED_RANGE.fullmatch(response.request.headers.get("Range", ""))
    if (
        not sent
        or not requested
        or int(sent[1]) != int(requested[1])
        or not int(sent[1]) <= int(sent[2]) <= int(requested[2] or 10**18)
    ):
        raise exchange.error(
            f"{exchange.who} sent {headers.get('Content-Range', 'a part without Content-Range')[:60]!r}; expected "
            f"the requested part ({response.request.headers.get('Range', 'the whole file')!r}). Try again; "
            f"check {exchange.setting}."
        )


def check_sha256(exchange: Exchange, sha256: str) -> None:
    """Refuse a file whose content has another hash than the hub's list states. Errors: HubError."""
    if sha256 != exchange.sha256:
        raise exchange.error(
            f"arrived with sha256 {sha256}; {exchange.who} states {exchange.sha256}. It was damaged during the "
            "transfer and was deleted. Try again."
        )
    exchange.is_proved = True


def _bounded_stream(exchange: Exchange, response: Any, is_body: bool, is_file: bool) -> Any:
    """Return a response's stream that raises if too many bytes come, or if they come too slowly."""
    base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "SyncByteStream")
    inner, timeout = response.stream, read_seconds(TIMEOUT, TIMEOUT_SECONDS)
    is_whole = is_body and is_file and response.status_code == 200 and exchange.sha256 is not None
    limit = exchange.limit if is_file or exchange.size is None else MAX_RESPONSE_BYTES

    class BoundedStream(base):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            if is_body:
                yield from self.body()
                return
            error_body = bytearray()
            for chunk in inner:
                exchange.note_arrival()
                error_body += chunk
                if len(error_body) > MAX_ERROR_BYTES:
                    break
            exchange.is_waiting = False
            yield _readable_error(bytes(error_body[:MAX_ERROR_BYTES]))

        def body(self) -> Iterator[bytes]:
            total, speed = 0, Speed(timeout)
            digest = hashlib.sha256() if is_whole else None
            for chunk in inner:
                exchange.note_arrival()
                total += len(chunk)
                slow = speed.arrived(len(chunk))
                if total > limit:
                    raise exchange.error(
                        f"{exchange.who}'s answer is longer than the expected {limit} bytes. Try again; check "
                        f"{exchange.setting}."
                    )
                if slow is not None:
                    raise SlowTransfer(f"{exchange.label}: {exchange.who} {slow}. {_retry_hint(timeout)}")
                if digest:
                    digest.update(chunk)
                yield chunk
                speed.wait()
            exchange.is_waiting = False
            if digest and total == exchange.size:
                check_sha256(exchange, digest.hexdigest())

        def close(self) -> None:
            exchange.is_waiting = False
            inner.close()

    return BoundedStream()


def _readable_error(body: bytes) -> bytes:
    """Return the body of an error as huggingface_hub can read it: JSON must be an object of strings."""
    try:
        error = json.loads(body)
    except ValueError:
        return body
    except RecursionError:
        return b"{}"
    texts = (
        {key: text for key, text in error.items() if isinstance(text, str)} if isinstance(error, dict) else {}
    )
    return json.dumps(texts).encode()


def requested_pause(headers: Mapping[str, str]) -> float:
    """Return the seconds that a response asks to wait, by the hub's clock; 0 if it does not say."""
    limits = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,9})\b", headers.get("RateLimit", ""))
    text = headers.get("Retry-After", "").strip()
    if limits:
        return float(limits[1])
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 10 else math.inf
    try:
        return max(
            0.0,
            (parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("Date", ""))).total_seconds(),
        )
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0.0
