"""Guards what huggingface_hub asks for alnico, and what it is answered.

huggingface_hub knows the addresses, the token, the proxies and the layout of the cache. It trusts the hub, and waits for
it: it reads answers of any length, writes files under names that a header gives, sends the token where an answer says, and
sleeps as long as it is told. Hooks on its HTTP client hold each exchange to what alnico expects of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
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
"""A server that is silent for this long, or slower than ``SLOWEST`` during it, is given up."""
WAIT = "ALNICO_HUB_WAIT"
WAIT_SECONDS = 60.0
"""How long a request is repeated, in all, while the hub says that it is busy."""
LONG = 5
"""Where the hub says how long, one pause may be this many times as long as all the others: its limits are those of five minutes."""
WRITES = 4
"""A hub may think about a commit of many files before it answers: for this many timeouts."""
SLOWEST = 1024
"""Bytes per second of one connection."""
LONGEST_PAUSE = 16.0
SAID = 5.0
"""A pause that is mentioned."""
CUT_OFF = 3
"""How often a transfer that broke off is begun again."""

ANSWER_BYTES = 1 << 25
"""Limit of a JSON answer: a repository of a hundred thousand files takes some 30 MB."""
ASIDE_BYTES = 1 << 16
"""What is read of an error's or a redirect's body."""

BUSY = (408, 429, 500, 502, 503, 504)
ETAG = re.compile(r"(?!\.)[\w.:+=@-]{1,200}", re.ASCII)
"""An ETag becomes the name of a file in the cache."""
SHA256 = re.compile(r"[0-9a-f]{64}")
XET = re.compile(r"[0-9a-fA-F]{64}")
NUMBER = re.compile(r"[0-9]{1,18}")
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:[0-9]{1,18}|\*)")
ASKED_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
HOMES = ("https://huggingface.co", "https://hf.co")
"""Where mirrors send their clients, and where the token belongs too."""


class Ended(Exception):
    """Another request has failed, or the user interrupts."""


class Busy(Exception):
    """The hub cannot answer now. ``pause`` is how many seconds it asks to wait; 0 where it does not say."""

    def __init__(self, status: int, pause: float) -> None:
        super().__init__(f"status {status}")
        self.status, self.pause = status, pause


@dataclass
class Exchange:
    """What is expected of the requests for one thing: the list of a model's files, or one file.

    ``limit`` bounds the body of an answer. ``size`` and ``commit``, where they are given, are what the headers of a file must say, and
    ``sha256`` what its content must have; ``is_proved`` says that the bytes that came have it.
    """

    label: str
    limit: float = math.inf
    size: int | None = None
    commit: str | None = None
    sha256: str | None = None
    is_upload: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    is_proved: bool = False
    has_arrived: bool = False
    is_waiting: bool = False
    silent: float = 0.0

    def error(self, text: str) -> HubError:
        return HubError(f"{self.label}: {text}")

    def arrived(self) -> None:
        """Note a sign of life. Errors: Ended."""
        self.has_arrived, self.silent = True, 0.0
        if self.stop.is_set():
            raise Ended


_exchange: ContextVar[Exchange | None] = ContextVar("alnico_exchange", default=None)
_uploads: list[Exchange] = []
"""Pushes that run: huggingface_hub uploads files in threads of its own, which the context does not reach."""


def seconds(name: str, default: float) -> float:
    """A number of seconds from the environment. Errors: HubError."""
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
def guarded(exchange: Exchange) -> Iterator[None]:
    """Hold the requests that huggingface_hub makes inside to ``exchange``."""
    _install()
    before = _exchange.set(exchange)
    if exchange.is_upload:
        _uploads.append(exchange)
    try:
        yield
    finally:
        exchange.is_waiting = False
        _exchange.reset(before)
        if exchange.is_upload:
            _uploads.remove(exchange)


def patiently(exchange: Exchange, call: Callable[[], T], *, tries: int = 1000) -> T:
    """Call until the hub is no longer busy, or the time for that is over.

    The pauses are what the hub asks for (``Retry-After``), at least 1, 2, 4, 8, 16, 16, ... seconds, and less where the whole time is. A transfer that broke off after it had begun is
    begun again some times. Errors: HubError; what ``call`` raises.
    """
    limit, waited, cuts, count, has_waited_long = seconds(WAIT, WAIT_SECONDS), 0.0, 0, 0, False
    while True:
        count += 1
        exchange.has_arrived = exchange.is_proved = False
        try:
            with guarded(exchange):
                return call()
        except Exception as error:
            busy, cut = _busy(error), _is_cut(error) and exchange.has_arrived and cuts < CUT_OFF
            if busy is None and not cut:
                raise
            pause = min(2.0 ** min(count - 1, 9), LONGEST_PAUSE) * min(1.0, limit / WAIT_SECONDS)
            if busy is not None:
                pause = max(pause, busy.pause)
                is_long = waited + pause > limit
                if (is_long and (has_waited_long or not 0 < busy.pause <= LONG * limit)) or count >= tries:
                    raise exchange.error(_gave_up(busy, count, waited, limit)) from None
                has_waited_long |= is_long
                if pause >= SAID:
                    logging.getLogger("huggingface_hub.alnico").warning(
                        "%s: the hub is busy (status %d); trying again in %.0f s",
                        exchange.label,
                        busy.status,
                        pause,
                    )
            cuts += cut
        if exchange.stop.wait(pause):
            raise Ended
        waited += pause


def _gave_up(busy: Busy, count: int, waited: float, limit: float) -> str:
    from huggingface_hub import constants

    times = "once" if count == 1 else f"{count} times in {waited:.0f} s"
    asks = (
        f" and asks to wait {busy.pause:.0f} s"
        if 0 < busy.pause < 1e9
        else " and asks to wait for ever"
        if busy.pause
        else ""
    )
    return (
        f"{constants.ENDPOINT} is busy: it answered with status {busy.status} {times}{asks}. Try again later; the same command goes on. "
        f"A larger {WAIT}, a number of seconds in the environment (now {limit:g}), waits longer."
    )


def _busy(error: BaseException | None) -> Busy | None:
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, Busy):
            return error
        if isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY:
            return Busy(error.response.status_code, _pause(error.response.headers))
        error = error.__cause__
    return None


def _is_cut(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}
    return bool(kinds & {"NetworkError", "RemoteProtocolError"}) and "ConnectError" not in kinds


def each(exchanges: Sequence[Exchange], calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls in a few threads, each with its exchange, and return what they return.

    The first error ends the others, and so does an interrupt; a thread that hangs is left behind. A server that is silent for twice the
    timeout, whatever it does to the connection meanwhile, is given up. Errors: HubError; what a call raises.
    """
    stop = threading.Event()
    timeout = seconds(TIMEOUT, TIMEOUT_SECONDS)
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
                future.set_result(patiently(exchange, call))
            except BaseException as error:
                future.set_exception(error)

    # Daemons: at its end, the interpreter would wait for threads of a pool, and so for a server that is slow.
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
            passed = min(time.monotonic() - begin, 2 * step)  # a process that was stopped has not waited
            for exchange in exchanges:
                exchange.silent = exchange.silent + passed if exchange.is_waiting else 0.0
                if exchange.silent > 2 * timeout:
                    raise exchange.error(
                        f"nothing came from the hub for {exchange.silent:.0f} s. Try again; what was fetched before is kept. A larger {TIMEOUT}, a "
                        f"number of seconds in the environment (now {timeout:g}), gives it more time."
                    )
        return [future.result() for future in futures]
    finally:
        stop.set()
        for thread in threads:
            thread.join(1.0 / len(threads))  # time to remove what is half fetched


def _install() -> None:
    """Give the clients that huggingface_hub makes in this process the hooks. They leave alone what is not alnico's."""
    from huggingface_hub.utils import _http

    with _http._CLIENT_LOCK:
        make = _http._GLOBAL_CLIENT_FACTORY
        if getattr(make, "is_alnicos", False):
            return

        def made() -> Any:
            try:
                client = make()
            except (
                Exception
            ) as error:  # of httpx: an address of a proxy that is none, a package that a proxy needs
                if _present() is None:
                    raise
                why = " ".join(str(error).split())[:200]
                why = type(error).__name__ if "@" in why else why  # which may be a password
                raise HubError(
                    f"no connection can be made ({why}). Check the proxies in the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)."
                ) from None
            return _hooked(client)

        made.is_alnicos = True  # type: ignore[attr-defined]
        # Not by set_client_factory, which closes the present client: others may be in the midst of a request.
        _http._GLOBAL_CLIENT_FACTORY = made
        if _http._GLOBAL_CLIENT is not None:
            _hooked(_http._GLOBAL_CLIENT)


def _hooked(client: Any) -> Any:
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _asks], "response": [*hooks["response"], _answers]}
    return client


def _present() -> Exchange | None:
    return _exchange.get() or (_uploads[-1] if _uploads else None)


def _asks(request: Any) -> None:
    """Look at a request before it is sent, redirected ones included."""
    exchange = _present()
    if exchange is None:
        return
    if exchange.stop.is_set():
        raise Ended
    from huggingface_hub import constants

    url, home = urlsplit(str(request.url)), urlsplit(constants.ENDPOINT)
    if home.scheme == "https" and url.scheme != "https":
        raise exchange.error(
            f"the hub sends to {_place(url)}, which is not encrypted; expected https as of {constants.ENDPOINT}. Check HF_ENDPOINT."
        )
    if "Authorization" in request.headers and not any(
        _is_same(url, urlsplit(at)) for at in (constants.ENDPOINT, *HOMES)
    ):
        raise exchange.error(
            f"the hub's answer would send your token to {_place(url)}; expected {constants.ENDPOINT}. Nothing was sent there. Check HF_ENDPOINT."
        )
    slow = seconds(TIMEOUT, TIMEOUT_SECONDS) * (
        WRITES if exchange.is_upload and request.method not in ("GET", "HEAD") else 1
    )
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: slow if given.get(kind) is None else given[kind]
        for kind in ("connect", "read", "write", "pool")
    }
    request.headers["Accept-Encoding"] = "identity"
    if not exchange.is_waiting:
        exchange.is_waiting, exchange.silent = True, 0.0


def _place(url: Any) -> str:
    return repr(f"{url.scheme}://{url.netloc.rpartition('@')[2]}"[:100])


def _is_same(url: Any, home: Any) -> bool:
    """The same origin, or the same host by https."""
    ports = {"http": 80, "https": 443}
    there, here = ((u.scheme, u.port or ports.get(u.scheme)) for u in (url, home))
    return url.hostname == home.hostname and (
        there == here or (there == ("https", 443) and here == ("http", 80))
    )


def _answers(response: Any) -> None:
    """Look at an answer before its body is read, and bound the body."""
    exchange = _present()
    if exchange is None:
        return
    exchange.arrived()
    status, headers = response.status_code, response.headers
    for name in ("Location", "Link", "X-Error-Message", "X-HF-Warning"):
        if CONTROLS.search(headers.get(name, "")):
            if not name.startswith("X-"):
                raise exchange.error(
                    f"the hub's answer has control characters in its header {name}. Check HF_ENDPOINT."
                )
            del headers[name]  # a text that huggingface_hub would show
    if status in BUSY:
        pause = _pause(headers)
        if not exchange.is_upload:
            raise Busy(status, pause)
        # While uploading, huggingface_hub repeats the part of a file that failed, and sleeps as long as it is told.
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
                f"the hub's answer is encoded as {headers['Content-Encoding'][:40]!r}; expected plain bytes, as they were asked for. Check "
                "HF_ENDPOINT and what proxies do."
            )
        del headers["Content-Encoding"]  # what an error says is not worth unpacking
    if response.request.method != "HEAD" and not response.is_closed:
        response.stream = _bounded(exchange, response, is_body, is_file)
    else:
        exchange.is_waiting = False


def _check_file(exchange: Exchange, response: Any) -> None:
    """Hold headers that describe a file against what the list of files said."""
    headers = response.headers
    commit = headers.get("X-Repo-Commit", exchange.commit)
    if commit != exchange.commit:
        raise exchange.error(
            f"the hub's answer is of the commit {commit[:60]!r}; expected {exchange.commit}. Try again; check HF_ENDPOINT."
        )
    if response.status_code >= 400:
        return
    for name in ("ETag", "X-Linked-ETag") if response.request.method == "HEAD" else ():
        if (etag := headers.get(name)) is not None and not ETAG.fullmatch(etag.lstrip("W/").strip('"')):
            raise exchange.error(
                f"the hub's answer has the {name} {etag[:60]!r}; expected the hash of a file. Check HF_ENDPOINT."
            )
    if not XET.fullmatch(headers.get("X-Xet-Hash", "0" * 64)):
        raise exchange.error(
            f"the hub's answer has the X-Xet-Hash {headers['X-Xet-Hash'][:60]!r}; expected a hash. Check HF_ENDPOINT."
        )
    sizes = ["X-Linked-Size"] + ["Content-Length"] * (response.status_code == 200)
    for name in sizes:
        text = headers.get(name)
        if text is not None and not (NUMBER.fullmatch(text) and int(text) == exchange.size):
            raise exchange.error(
                f"the hub's answer has the size {text[:40]!r} ({name}); the list of its files says {exchange.size}. The model was changed, or the "
                "hub is not one. Try again; check HF_ENDPOINT."
            )
    linked = headers.get("X-Linked-ETag", "").strip('"')
    if exchange.sha256 is None and SHA256.fullmatch(linked):
        exchange.sha256 = linked


def _check_part(exchange: Exchange, response: Any) -> None:
    headers = response.headers
    found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    asked = ASKED_RANGE.fullmatch(response.request.headers.get("Range", ""))
    if (
        not found
        or not asked
        or int(found[1]) != int(asked[1])
        or not int(found[1]) <= int(found[2]) <= int(asked[2] or 10**18)
    ):
        raise exchange.error(
            f"the hub sent another part ({headers.get('Content-Range', 'without Content-Range')[:60]!r}) than was asked for "
            f"({response.request.headers.get('Range', 'the whole file')!r}). Try again; check HF_ENDPOINT."
        )


def check_sha256(exchange: Exchange, found: str) -> None:
    """Errors: HubError where a file's content is another than the hub's list says."""
    if found != exchange.sha256:
        raise exchange.error(
            f"arrived with the sha256 {found}; the hub says {exchange.sha256}. It was damaged on the way; nothing of it is kept. Try again."
        )
    exchange.is_proved = True


def _bounded(exchange: Exchange, response: Any, is_body: bool, is_file: bool) -> Any:
    """The stream of an answer, which ends the transfer at what may come, and when it hardly comes."""
    base = next(kind for kind in type(response.stream).__mro__ if kind.__name__ == "SyncByteStream")
    inner, timeout = response.stream, seconds(TIMEOUT, TIMEOUT_SECONDS)
    is_whole = is_body and is_file and response.status_code == 200 and exchange.sha256 is not None
    limit = exchange.limit if is_file or exchange.size is None else ANSWER_BYTES

    class Bounded(base):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            if is_body:
                yield from self.body()
                return
            said = bytearray()
            for chunk in inner:
                exchange.arrived()
                said += chunk
                if len(said) > ASIDE_BYTES:
                    break
            exchange.is_waiting = False
            yield _said(bytes(said[:ASIDE_BYTES]))

        def body(self) -> Iterator[bytes]:
            total, spent, came = 0, 0.0, 0
            digest = hashlib.sha256() if is_whole else None
            begin = time.monotonic()
            for chunk in inner:
                exchange.arrived()
                spent, came, total = (
                    spent + min(time.monotonic() - begin, timeout),
                    came + len(chunk),
                    total + len(chunk),
                )
                if total > limit:
                    raise exchange.error(
                        f"the hub's answer is longer than the {limit} bytes that were expected. Try again; check HF_ENDPOINT."
                    )
                if spent >= timeout:
                    if came < SLOWEST * spent:
                        raise exchange.error(
                            f"the hub sent {came} bytes in {spent:.0f} s, which is too slow; expected {SLOWEST} bytes a second. Try again; what was "
                            f"fetched before is kept. A larger {TIMEOUT}, a number of seconds in the environment (now {timeout:g}), gives it more time."
                        )
                    spent, came = 0.0, 0
                if digest:
                    digest.update(chunk)
                yield chunk
                begin = time.monotonic()
            exchange.is_waiting = False
            if digest and total == exchange.size:
                check_sha256(exchange, digest.hexdigest())

        def close(self) -> None:
            exchange.is_waiting = False
            inner.close()

    return Bounded()


def _said(body: bytes) -> bytes:
    """What the body of an error says, in a form that huggingface_hub can read: it takes JSON to be an object of texts."""
    try:
        told = json.loads(body)
    except ValueError:
        return body
    except RecursionError:
        return b"{}"
    return json.dumps(
        {key: value for key, value in told.items() if isinstance(value, str)}
        if isinstance(told, dict)
        else {}
    ).encode()


def _pause(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: a number or a date, which is held against the hub's own clock; 0 if it does not say."""
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
