"""A folder of this machine, or one that is mounted, as a place for a remote store (``file://`` or a path)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from alnico.checkpoint.durable import copy_file, sync_directory, sync_file, write_file
from alnico.checkpoint.files import check_inside, files_below, open_binary
from alnico.errors import HubError
from alnico.folders import make_folders
from alnico.store.remotes.remote_files import MAX_LISTED, PIECE_BYTES

TEMPORARY = ".alnico-"
"""How files begin that are being written. They are not listed."""


class FolderFiles:
    """Files in a folder. Each gets its name when it is complete."""

    is_writable = True

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    def size(self, path: str, expected: int | None = None) -> int | None:
        place = self.folder / path
        try:
            return place.stat().st_size if place.is_file() else None
        except OSError as error:
            raise self._error(path, error) from None

    def files(self, folder: str) -> list[str]:
        try:
            found = files_below(self.folder / folder, MAX_LISTED) if (self.folder / folder).is_dir() else []
        except OSError as error:
            raise self._error(folder, error) from None
        return [p.relative_to(self.folder).as_posix() for p in found if not p.name.startswith(TEMPORARY)]

    def read(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        place = self.folder / path
        check_inside(place, self.folder)
        try:
            with open_binary(place) as file:
                file.seek(offset)
                while size > 0 and (data := file.read(min(size, PIECE_BYTES))):
                    size -= len(data)
                    yield data
        except OSError as error:
            raise self._error(path, error) from None

    def write(self, path: str, data: bytes, *, is_new: bool = False) -> bool:
        temporary = self._temporary(path)
        try:
            write_file(temporary, data, is_new=True)
            if is_new:
                try:
                    os.link(temporary, self.folder / path)
                except FileExistsError:
                    return False
            else:
                os.replace(temporary, self.folder / path)
            sync_directory((self.folder / path).parent)
        except OSError as error:
            raise self._error(path, error) from None
        finally:
            with suppress(OSError):
                temporary.unlink()
        return True

    def send(self, path: str, source: Path) -> None:
        temporary = self._temporary(path)
        try:
            copy_file(source, temporary)
            sync_file(temporary)
            os.replace(temporary, self.folder / path)
            sync_directory((self.folder / path).parent)
        except OSError as error:
            raise self._error(path, error) from None
        finally:
            with suppress(OSError):
                temporary.unlink()

    def close(self) -> None:
        pass

    def _temporary(self, path: str) -> Path:
        """Return the path of a new file next to where a file will be. Errors: HubError."""
        folder = (self.folder / path).parent
        try:
            make_folders(folder, self.folder)
        except OSError as error:
            raise self._error(path, error) from None
        return folder / f"{TEMPORARY}{secrets.token_hex(8)}"

    def _error(self, path: str, error: OSError) -> HubError:
        return HubError(
            f"{self.address}: {path} could not be read or written ({error.strerror or type(error).__name__}). "
            "Check the address, and whether you may write there."
        )
