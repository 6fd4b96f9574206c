"""A folder at a URL as a place for a remote store: ``s3://``, ``gs://``, ``hf://buckets/`` and others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alnico.checkpoint.files import open_binary
from alnico.checkpoint.remote.folder import RemoteFolder
from alnico.checkpoint.remote.multipart import MAX_PARTS, send_in_parts
from alnico.checkpoint.remote.open_folder import open_remote_folder
from alnico.errors import HubError
from alnico.store.remotes.remote_files import PIECE_BYTES


class RemoteFolderFiles:
    """Files of a folder that is written. Large ones are sent in parts, and appear when they are complete."""

    def __init__(self, folder: RemoteFolder) -> None:
        self.address, self.is_writable = folder.address, folder.is_writable
        self._folder = folder

    def size(self, path: str, expected: int | None = None) -> int | None:
        state = self._folder.state(path)
        return None if state is None else state.size

    def files(self, folder: str) -> list[str]:
        inside = open_remote_folder(f"{self.address}/{folder}")
        try:
            return [f"{folder}/{name}" for name in inside.names() or ()]
        finally:
            inside.close()

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        state = self._folder.state(path)
        if state is None:
            raise HubError(f"{self.address}: {path} is not there; expected a file. Try again.")
        end = min(offset + size, state.size)
        while offset < end:
            data = bytearray(min(PIECE_BYTES, end - offset))
            self._folder.read_into(path, offset, memoryview(data), state)
            offset += len(data)
            yield bytes(data)

    def write(self, path: str, data: bytes, *, is_new: bool = False) -> bool:
        return (self._folder.put_new if is_new else self._folder.put)(path, data) is not None

    def send(self, path: str, source: Path) -> None:
        size = source.stat().st_size
        part = max(PIECE_BYTES, -(-size // MAX_PARTS))
        with open_binary(source) as file:
            if size <= part:
                self._folder.put(path, file.read())
                return
            upload = self._folder.start_upload(path)
            try:
                send_in_parts(self._folder, path, upload, file, part)
            except BaseException:
                self._folder.abort_upload(path, upload)
                raise

    def close(self) -> None:
        self._folder.close()
