"""A folder of this machine in the place of a store at a URL, to which a process can be killed writing: its state stays.

    places = DiskStore(tmp_path / "store", before=lambda operation, name: ...)
    monkeypatch.setattr(remote_target, "open_remote_folder", places.open)
    ... s3://bucket/NAME is the folder tmp_path / "store" / NAME ...

``before`` is called before each operation, and may end the process or raise. Uploads are in ``.uploads`` of the store.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import HubError

BUCKET = "s3://bucket/"


class DiskStore:
    def __init__(self, root: Path, before: Callable[[str, str], None] | None = None) -> None:
        self.root = root
        self.before = before
        self.done: list[tuple[str, str]] = []
        """The operations, with the names of their files, in order."""
        self.lock = threading.Lock()
        for folder in (".uploads", ".tags"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def open(self, url: str) -> DiskFolder:
        assert url.startswith(BUCKET)
        return DiskFolder(self, url)

    def uploads(self) -> list[Path]:
        return list((self.root / ".uploads").iterdir())


def tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class DiskFolder:
    is_writable = True

    def __init__(self, store: DiskStore, url: str) -> None:
        self.address = url
        self._store = store
        self._folder = store.root / url.removeprefix(BUCKET)

    def _does(self, operation: str, name: str = "") -> None:
        with self._store.lock:
            self._store.done.append((operation, name))
            if self._store.before is not None:
                self._store.before(operation, name)

    def names(self) -> list[str] | None:
        self._does("names")
        return sorted(p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*") if p.is_file())

    def state(self, name: str) -> FileVersion | None:
        self._does("state", name)
        path = self._folder / name
        if not path.is_file():
            return None
        data = path.read_bytes()
        # As S3's, the tag of a file that was sent in parts is made of the parts' tags.
        of_parts = self._tag_file(name)
        kept = of_parts.read_text().split() if of_parts.exists() else ["", ""]
        return FileVersion(len(data), kept[1] if kept[0] == tag_of(data) else tag_of(data))

    def _tag_file(self, name: str) -> Path:
        return self._store.root / ".tags" / tag_of(f"{self.address}/{name}".encode()).strip('"')

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        self._does("read", name)
        buffer[:] = (self._folder / name).read_bytes()[offset : offset + len(buffer)]

    def _write(self, name: str, data: bytes) -> FileVersion:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(path, data)
        return FileVersion(len(data), tag_of(data))

    def _replace(self, path: Path, data: bytes) -> None:
        """In one step: another thread may end the process."""
        new = self._store.root / ".uploads" / f"put-{secrets.token_hex(8)}"
        new.write_bytes(data)
        os.replace(new, path)

    def put(self, name: str, data: bytes) -> FileVersion:
        self._does("put", name)
        self._tag_file(name).unlink(missing_ok=True)
        return self._write(name, data)

    def delete(self, name: str) -> None:
        self._does("delete", name)
        (self._folder / name).unlink(missing_ok=True)

    def _parts(self, upload: str) -> Path:
        return self._store.root / ".uploads" / upload

    def start_upload(self, name: str) -> str:
        self._does("start", name)
        upload = secrets.token_hex(8)
        self._parts(upload).mkdir()
        return upload

    def upload_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        self._does("part", name)
        if not self._parts(upload).exists():
            raise HubError(f"{self.address}/{name}: the upload is not there. Run the command again.")
        (self._parts(upload) / str(number)).write_bytes(data)
        return tag_of(bytes(data))

    def uploaded_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]] | None:
        self._does("list", name)
        if not self._parts(upload).exists():
            return None
        found = {int(p.name): p.read_bytes() for p in self._parts(upload).iterdir()}
        return {number: (len(data), tag_of(data)) for number, data in found.items()}

    def complete_upload(self, name: str, upload: str, tags: Mapping[int, str]) -> FileVersion:
        self._does("complete", name)
        if not self._parts(upload).exists():
            raise HubError(f"{self.address}/{name}: the upload is not there. Run the command again.")
        parts = {number: (self._parts(upload) / str(number)).read_bytes() for number in sorted(tags)}
        assert {number: tag_of(data) for number, data in parts.items()} == dict(tags)
        data = b"".join(parts.values())
        joined = b"".join(bytes.fromhex(tag_of(part).strip('"')) for part in parts.values())
        tag = f'"{hashlib.md5(joined).hexdigest()}-{len(parts)}"'
        self._replace(self._tag_file(name), f"{tag_of(data)} {tag}".encode())
        self._write(name, data)
        version = FileVersion(len(data), tag)
        shutil.rmtree(self._parts(upload))
        return version

    def abort_upload(self, name: str, upload: str) -> None:
        self._does("abort", name)
        shutil.rmtree(self._parts(upload), ignore_errors=True)

    def close(self) -> None:
        pass
