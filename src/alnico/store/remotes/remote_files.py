"""Says what a place must do to hold a store of task vectors: list files, read parts of them, and write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

MAX_LISTED = 1_000_000
"""Most files that are listed of a remote store."""

PIECE_BYTES = 8 << 20
"""Bytes that are read and written at a time."""


class RemoteFiles(Protocol):
    """Files under relative paths such as ``objects/ab/abcd``.

    ``address`` is how the caller names it, ``is_writable`` whether it takes files. Errors of all functions: HubError.
    """

    address: str
    is_writable: bool

    def size(self, path: str, expected: int | None = None) -> int | None:
        """Return the bytes of a file; None if there is none. A size other than ``expected`` may be an error."""

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, sorted; none if there is no folder."""

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        """Yield the bytes of a file from ``offset`` on, up to ``size`` of them in all. Errors: HubError, also without the file."""

    def write(self, path: str, data: bytes, *, is_new: bool = False) -> bool:
        """Write a small file in one step; with ``is_new`` only if there is none: False says that there was one."""

    def send(self, path: str, source: Path) -> None:
        """Write a file from one of this machine. If this is killed, the file has another size, or does not exist."""

    def close(self) -> None:
        """Close what is open."""
