"""A folder of this machine in the place of one at a URL: counts what is read, and fails as it is told.

def test_it(elsewhere: Elsewhere) -> None:      # fixture: s3://bucket/NAME is the folder elsewhere.root / NAME
    ... open "s3://bucket/base" ...
    assert elsewhere.reads["base/model.safetensors"] == [(0, 8), ...]
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alnico.checkpoint.remote.folder import FileVersion
from alnico.errors import ModelError

ADDRESS = "s3://bucket"


class Elsewhere:
    """The folders at ``s3://bucket``, below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reads: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.lists_files = True
        self.before_read: Callable[[str, int, int], None] | None = None
        self._lock = threading.Lock()

    def open(self, url: str) -> Any:
        return _Folder(self, url)

    def note(self, name: str, offset: int, size: int) -> None:
        with self._lock:
            self.reads[name].append((offset, size))

    def weight_bytes(self) -> dict[str, int]:
        """Bytes read of each weight file behind its header."""
        found = {}
        for name, reads in self.reads.items():
            if name.endswith(".safetensors"):
                with open(self.root / name, "rb") as file:
                    begin = 8 + int.from_bytes(file.read(8), "little")
                found[name] = sum(size for offset, size in reads if offset >= begin)
        return found


class _Folder:
    is_writable = False

    def __init__(self, elsewhere: Elsewhere, url: str) -> None:
        self.address = url
        self._all = elsewhere
        self._name = url.removeprefix(ADDRESS).strip("/")
        self._folder = elsewhere.root / self._name

    def names(self) -> list[str] | None:
        if not self._all.lists_files:
            return None
        files = [p for p in self._folder.rglob("*") if p.is_file()] if self._folder.is_dir() else []
        return sorted(p.relative_to(self._folder).as_posix() for p in files)

    def state(self, name: str) -> FileVersion | None:
        path = self._folder / name
        if not path.is_file():
            return None
        status = path.stat()
        return FileVersion(status.st_size, f"written at {status.st_mtime_ns}")

    def read_into(self, name: str, offset: int, buffer: memoryview, state: FileVersion) -> None:
        full = f"{self._name}/{name}"
        if self._all.before_read is not None:
            self._all.before_read(full, offset, len(buffer))
        if self.state(name) != state:
            raise ModelError(f"{self.address}/{name}: was changed.")
        with open(self._folder / name, "rb") as file:
            file.seek(offset)
            assert file.readinto(buffer) == len(buffer)
        self._all.note(full, offset, len(buffer))

    def close(self) -> None:
        pass
