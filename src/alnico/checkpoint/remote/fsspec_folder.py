"""A folder of a file system of fsspec (``gs://``, ``memory://``, ...): read by ranges, written whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alnico.checkpoint.remote.folder import FileVersion
from alnico.checkpoint.remote.ranges import (
    MAX_LISTED,
    changed,
    check_name,
    check_same,
    checked_tag,
    is_plain_name,
)
from alnico.errors import AlnicoError, HubError

TAGS = ("ETag", "etag", "e_tag", "md5Hash", "checksum", "version_id", "mtime", "LastModified", "last_modified", "updated", "modified", "created")  # fmt: skip
"""Keys under which file systems describe the version of a file, the best first."""
FOLDERLESS = {"gs", "gcs", "s3", "s3a", "abfs", "az"}
UPLOAD = re.compile(r"alnico-upload-[0-9a-f]{32}")
COPY_BYTES = 8 << 20


class FsspecFolder:
    """Files below an address of fsspec. Credentials and endpoints are those of the package behind it.

    fsspec has neither conditional reads nor uploads in parts. So a file is described again after each read, and the parts
    of an upload are kept in a folder for temporary files of this machine (TMPDIR) until the file is sent whole.
    """

    is_writable = True

    def __init__(self, address: str) -> None:
        self.address = address
        scheme = address.partition("://")[0]
        try:
            import fsspec

            self._system, root = fsspec.core.url_to_fs(
                address, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            raise HubError(
                f"{address}: {scheme}:// cannot be opened ({' '.join(str(error).split())[:100]}); expected the package of fsspec "
                "for it. Install that package."
            ) from None
        except ValueError as error:
            raise HubError(
                f"{address}: {scheme}:// is no file system that fsspec knows ({str(error)[:80]}). Check the URL."
            ) from None
        except Exception as error:  # some connect at once, and each library raises errors of its own
            raise HubError(
                f"{address}: could not be opened ({_reason(error)}). Check the URL, your credentials and the connection, and "
                "try again."
            ) from None
        self._root = str(root).rstrip("/")

    def names(self) -> list[str]:
        with self._errors(self.address, "listed"):
            try:
                found = self._system.find(self._root)
            except FileNotFoundError:
                return []
        if len(found) > MAX_LISTED:
            raise HubError(
                f"{self.address}: has more than {MAX_LISTED} files; expected the folder of a model. Check the URL."
            )
        prefix = f"{self._root.strip('/')}/"
        paths = (str(path).strip("/") for path in found)
        names = {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}
        return sorted(filter(is_plain_name, names))

    def state(self, name: str) -> FileVersion | None:
        where = check_name(self.address, name)
        with self._errors(where, "described"):
            try:
                described = self._system.info(self._place(name))
            except FileNotFoundError:
                return None
            if described.get("type") != "file":
                return None
            size = described.get("size")
        if not isinstance(size, int) or size < 0:
            raise HubError(
                f"{where}: its file system does not state its size ({str(size)[:40]!r}); expected a number of bytes. Download the "
                "model and give its path."
            )
        stated = next((described[key] for key in TAGS if described.get(key)), "")
        return FileVersion(size, checked_tag(str(stated)))

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        where = check_name(self.address, name)
        with self._errors(where, "read"):
            try:
                data = self._system.cat_file(self._place(name), start=offset, end=offset + len(buffer))
            except FileNotFoundError:
                raise changed(where, "it was removed") from None
        found = self.state(name)
        if found is None:
            raise changed(where, "it was removed")
        check_same(where, found, state)
        if len(data) != len(buffer):
            raise HubError(
                f"{where}: {len(data)} bytes arrived from {offset} on; expected {len(buffer)}. Try again."
            )
        buffer[:] = data

    def put(self, name: str, data: bytes) -> FileVersion:
        where, place = check_name(self.address, name), self._place(name)
        with self._errors(where, "written"):
            self._make_folder(place)
            self._system.pipe_file(place, data)
        return self._written(where, name, len(data))

    def put_new(self, name: str, data: bytes) -> FileVersion | None:
        where, place = check_name(self.address, name), self._place(name)
        with self._errors(where, "written"):
            self._make_folder(place)
            try:
                # Not all file systems know the mode.
                if self._system.exists(place):
                    return None
                self._system.pipe_file(place, data, mode="create")
            except FileExistsError:
                return None
        return self._written(where, name, len(data))

    def delete(self, name: str) -> None:
        where = check_name(self.address, name)
        with self._errors(where, "removed"):
            try:
                self._system.rm_file(self._place(name))
            except FileNotFoundError:
                return

    def start_upload(self, name: str) -> str:
        where = check_name(self.address, name)
        upload = f"alnico-upload-{secrets.token_hex(16)}"
        with self._errors(where, "kept in TMPDIR"):
            (Path(tempfile.gettempdir()) / upload).mkdir(0o700)
        return upload

    def upload_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        where = check_name(self.address, name)
        folder = _upload_folder(upload)
        if folder is None:
            raise _no_upload(where, upload)
        with self._errors(where, "kept in TMPDIR"):
            temporary = folder / f"{threading.get_ident()}.tmp"
            temporary.write_bytes(data)
            os.replace(temporary, folder / f"{number}.part")
        return str(len(data))

    def uploaded_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        folder = _upload_folder(upload)
        if folder is None:
            return None
        sizes = {int(path.stem): path.stat().st_size for path in folder.glob("*.part")}
        return {number: (size, str(size)) for number, size in sorted(sizes.items())}

    def complete_upload(self, name: str, upload: str, tags: Mapping[int, str]) -> FileVersion:
        where, place = check_name(self.address, name), self._place(name)
        there = self.uploaded_parts(name, upload)
        folder = _upload_folder(upload)
        if (
            there is None
            or folder is None
            or any(there.get(number, (0, ""))[1] != tag for number, tag in tags.items())
        ):
            raise _no_upload(where, upload)
        with self._errors(where, "written"):
            self._make_folder(place)
            with self._system.open(place, "wb") as target:
                for number in sorted(tags):
                    with open(folder / f"{number}.part", "rb") as part:
                        shutil.copyfileobj(part, target, COPY_BYTES)
        found = self._written(where, name, sum(there[number][0] for number in tags))
        self.abort_upload(name, upload)
        return found

    def abort_upload(self, name: str, upload: str) -> None:
        folder = _upload_folder(upload)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        pass

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_folder(self, place: str) -> None:
        """Make the folder of a file, where the file system has folders."""
        protocols = self._system.protocol
        if not FOLDERLESS & ({protocols} if isinstance(protocols, str) else set(protocols)):
            self._system.makedirs(place.rpartition("/")[0], exist_ok=True)

    def _written(self, where: str, name: str, size: int) -> FileVersion:
        """Describe a file that was written just now. Errors: HubError if it is not there as it was sent."""
        found = self.state(name)
        if found is None or found.size != size:
            raise HubError(
                f"{where}: has {'no' if found is None else found.size} bytes after it was written; expected {size}. Try again."
            )
        return found

    @contextmanager
    def _errors(self, where: str, verb: str) -> Iterator[None]:
        """Turn what the libraries raise into a HubError: each raises errors of its own, whose texts may have credentials."""
        try:
            yield
        except AlnicoError:
            raise
        except Exception as error:
            raise HubError(
                f"{where}: could not be {verb} ({_reason(error)}). Check the URL, your "
                "credentials and the connection, and try again."
            ) from None


def _reason(error: Exception) -> str:
    """Say what an error is. Texts of libraries may have credentials, those of the system have none."""
    text = error.strerror if isinstance(error, OSError) else None
    return type(error).__name__ + (f": {text[:80]}" if text else "")


def _upload_folder(upload: str) -> Path | None:
    """Return the folder of an upload of this user; None if there is none."""
    folder = Path(tempfile.gettempdir()) / upload
    if not UPLOAD.fullmatch(upload) or folder.is_symlink() or not folder.is_dir():
        return None
    return folder if folder.stat().st_uid == os.geteuid() else None


def _no_upload(where: str, upload: str) -> HubError:
    return HubError(
        f"{where}: the parts of the upload {upload[:60]!r} are not all in the folder for temporary files "
        f"({tempfile.gettempdir()}); expected those that were sent. Run the same command again."
    )
