"""Defines a folder at a URL as readers and writers of models see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class FileVersion:
    """One version of a remote file: its size in bytes, and the server's tag of its content; '' if it states none."""

    size: int
    tag: str


class RemoteFolder(Protocol):
    """Files below a URL. All methods are safe for threads.

    Requests are repeated with bounds while the server is busy or the connection breaks. Errors of all methods: HubError, which
    names the file, says what went wrong, and what to do.
    """

    @property
    def address(self) -> str:
        """The URL of the folder, for messages, locks and cards: without credentials."""
        ...

    @property
    def is_writable(self) -> bool: ...

    def names(self) -> list[str] | None:
        """The names of all files, relative to the folder, sorted; None if the server does not list files."""
        ...

    def state(self, name: str) -> FileVersion | None:
        """The present version of a file; None if there is no such file."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        """Fill ``buffer`` with a file's bytes from ``offset`` on, by one request for a range.

        Errors: ModelError if the file is no longer in ``state``.
        """
        ...

    def put(self, name: str, data: bytes) -> FileVersion:
        """Write a small file in one step."""
        ...

    def put_new(self, name: str, data: bytes) -> FileVersion | None:
        """Write a small file in one step if there is none; None if there is one, which may be of an earlier try of this call."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def start_upload(self, name: str) -> str:
        """Begin a file that is sent in parts and appears when it is completed. Returns the upload's id."""
        ...

    def upload_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        """Send part ``number``, from 1 on, again if it was sent before. Returns its tag. All parts but the last have the same
        size, of at least 5 MiB."""
        ...

    def uploaded_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        """The size and tag of each part that has arrived; None if there is no such upload."""
        ...

    def complete_upload(self, name: str, upload: str, tags: Mapping[int, str]) -> FileVersion:
        """Make the file out of its parts."""
        ...

    def abort_upload(self, name: str, upload: str) -> None:
        """Discard an upload and its parts, if it exists."""
        ...

    def close(self) -> None: ...
