"""Checks what servers answer to a request for a range of a file."""

from __future__ import annotations

import re

from alnico.checkpoint.network import CONTROLS
from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import HubError, ModelError
from alnico.numerics.sizes import format_size

CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
NUMBER = re.compile(r"[0-9]{1,18}")
MAX_WHOLE_BYTES = 1 << 20
"""Largest file that is read whole for a part of it, from a server that takes no ranges."""
MAX_LISTED = 1_000_000
"""Most files of a folder that are listed."""
MAX_TAG = 300


def range_header(offset: int, count: int) -> str:
    """Return the value of the header Range for ``count`` bytes.

    >>> range_header(10, 5)
    'bytes=10-14'
    """
    return f"bytes={offset}-{offset + count - 1}"


def is_plain_name(name: str) -> bool:
    """Is it the name of a file below a folder, which means the same to all servers and to this machine?

    >>> [is_plain_name(name) for name in ("a/b.json", "", "/a", "a/", "a//b", "a/../b", "./a", "a\\nb")]
    [True, False, False, False, False, False, False, False]
    """
    is_text = not CONTROLS.search(name) and "\t" not in name and "\\" not in name
    return is_text and not {"", ".", ".."} & set(name.split("/"))


def check_name(address: str, name: str) -> str:
    """Return where a file is, for messages. Errors: ModelError for a name that leads out of its folder."""
    if not is_plain_name(name):
        raise ModelError(
            f"{address}: {name[:200]!r} is not the name of a file below it; expected parts between slashes, none of them empty or "
            "'..'. Check who names it: an index, or another file of the model."
        )
    return f"{address}/{name}"


def number_of_bytes(text: str | None) -> int | None:
    """Return what a header states; None if it states no number.

    >>> number_of_bytes("12"), number_of_bytes("-1"), number_of_bytes(None)
    (12, None, None)
    """
    return int(text) if text is not None and NUMBER.fullmatch(text) else None


def checked_tag(text: str | None) -> str:
    """Return the tag that a server states of a version; '' if there is none, or one that cannot be written into a lock."""
    text = text or ""
    return text if text.isascii() and text.isprintable() and len(text) <= MAX_TAG else ""


def condition_of(state: FileVersion) -> str | None:
    """Return the tag for the condition If-Match; None for one that no server compares, as it is weak (RFC 9110, 13.1.1).

    >>> condition_of(FileVersion(3, '"abc"')), condition_of(FileVersion(3, 'W/"abc"'))
    ('"abc"', None)
    """
    return state.tag if state.tag.startswith('"') else None


def check_same(where: str, found: FileVersion, state: FileVersion) -> None:
    """Refuse another version of a file than the one that is read. Errors: ModelError."""
    if found.size != state.size or (found.tag and state.tag and found.tag != state.tag):
        raise changed(where, f"it had {_described(state)}, now it has {_described(found)}")


def changed(where: str, what: str) -> ModelError:
    """Return the error for a file that is no longer as it was when the run began."""
    return ModelError(
        f"{where}: changed while it was read: {what}. Expected a file that stays as it is during a run. Run again when it "
        "is no longer written."
    )


def bytes_to_skip(
    where: str,
    status: int,
    content_range: str | None,
    offset: int,
    count: int,
    found: FileVersion,
    state: FileVersion,
) -> int:
    """Return how many bytes of an answer come before the wanted ones.

    ``found`` is the version that the answer's headers state, its size that of the whole file. Errors: ModelError for
    another version than ``state``; HubError for another part than was asked for, and for a large file that is sent whole.
    """
    if status == 206:
        sent = CONTENT_RANGE.fullmatch(content_range or "")
        if not sent or (int(sent[1]), int(sent[2])) != (offset, offset + count - 1):
            raise HubError(
                f"{where}: the server sent {(content_range or '')[:60]!r}; expected the requested part "
                f"({range_header(offset, count)!r}). Try again; check the server and the proxies before it."
            )
        check_same(where, found, state)
        return 0
    check_same(where, found, state)
    if count < state.size and state.size > MAX_WHOLE_BYTES:
        raise HubError(
            f"{where}: the server sends the whole file, of {format_size(state.size)}, where a part is asked for; expected one that "
            "takes ranges (status 206). Move the model to such a server, or download it and give its path."
        )
    return offset


def _described(state: FileVersion) -> str:
    return f"{state.size} bytes" + (f" and the tag {state.tag[:60]}" if state.tag else "")
