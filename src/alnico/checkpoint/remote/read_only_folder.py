"""Refuses to write into a folder at a URL that is only read."""

from __future__ import annotations

from collections.abc import Mapping

from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import HubError


class ReadOnlyFolder:
    """The half of a :class:`alnico.checkpoint.remote.folder.RemoteFolder` that writes, where nothing can be written."""

    is_writable = False

    def _cannot_write(self, name: str) -> HubError:
        """Say why a file is not written, and what to do."""
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> FileVersion:
        raise self._cannot_write(name)

    def put_new(self, name: str, data: bytes) -> FileVersion | None:
        raise self._cannot_write(name)

    def delete(self, name: str) -> None:
        raise self._cannot_write(name)

    def start_upload(self, name: str) -> str:
        raise self._cannot_write(name)

    def upload_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        raise self._cannot_write(name)

    def uploaded_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        raise self._cannot_write(name)

    def complete_upload(self, name: str, upload: str, tags: Mapping[int, str]) -> FileVersion:
        raise self._cannot_write(name)

    def abort_upload(self, name: str, upload: str) -> None:
        raise self._cannot_write(name)
