"""Reads weights of files at a URL by ranges, in the versions that their headers were read in."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from alnico.checkpoint.remote.download_cache import PieceFiles
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.sidecars import is_carried, module_folders
from alnico.errors import ModelError
from alnico.folders import temporary_files

if TYPE_CHECKING:
    from alnico.checkpoint.header import TensorInfo
    from alnico.checkpoint.source import Source

PIECE_BYTES = 4 << 20
"""Bytes of a tensor that are requested at once where it is read ahead or kept; the last piece of a tensor is shorter."""


class Ahead(Protocol):
    """Reads tensors before they are needed; see :mod:`alnico.engine.reading_ahead`."""

    def read_into(self, model: Source, name: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from what was read ahead; False if the tensor is none of those. Errors: those of reading."""
        ...


class RemoteWeights:
    """The weight files of a model at a URL, and a private folder with its side files.

    ``versions`` are those of all files that were read, by name. ``names`` are all files of the model. ``is_whole``: the weight
    files are in the private folder, too. ``kept`` keeps pieces for later runs.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        directory: Path,
        names: Iterable[str],
        *,
        kept: PieceFiles | None = None,
        is_whole: bool = False,
        owns_directory: bool = True,
    ) -> None:
        self.folder = folder
        self.directory = directory
        self.names = list(names)
        self.versions: dict[str, FileVersion] = {}
        self.is_whole = is_whole
        self.ahead: Ahead | None = None
        self._kept = kept
        # Also for a model that nobody closes.
        self._remove = (
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True) if owns_directory else None
        )

    @property
    def address(self) -> str:
        """The URL of the folder."""
        return self.folder.address

    def version(self, file: str) -> FileVersion | None:
        """The version that a file had when it was first asked for; None if there is no such file. Errors: HubError."""
        if file not in self.versions:
            state = self.folder.state(file)
            if state is None:
                return None
            self.versions[file] = state
        return self.versions[file]

    def request(self, file: str, offset: int, buffer: memoryview) -> None:
        """Request the bytes of a file. Errors: HubError; ModelError if the file has changed."""
        if len(buffer):
            self.folder.read_into(file, offset, buffer, self.versions[file])

    def piece(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a piece that is kept, or request it. Errors: as :meth:`request`."""
        version = self.versions[file]
        if self._kept is None or not version.tag:
            self.request(file, offset, buffer)
            return
        place = f"{self.address}/{file}"
        if not self._kept.get(place, version, offset, buffer):
            self.request(file, offset, buffer)
            self._kept.put(place, version, offset, buffer)

    def read_into(self, file: str, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of a tensor from ``offset`` on. Errors: as :meth:`request`."""
        if self._kept is None or not self.versions[file].tag:
            self.request(file, tensor.begin + offset, buffer)
            return
        for start, stop in pieces_of(tensor.byte_size):
            first, last = max(start, offset), min(stop, offset + len(buffer))
            if first >= last:
                continue
            target = buffer[first - offset : last - offset]
            if (first, last) == (start, stop):
                self.piece(file, tensor.begin + start, target)
            else:
                whole = memoryview(bytearray(stop - start))
                self.piece(file, tensor.begin + start, whole)
                target[:] = whole[first - start : last - start]

    def absent(self) -> dict[str, int]:
        """Side files that a merge copies and that are not in the private folder yet, with their sizes in bytes."""
        modules = module_folders(self.directory)
        carried = [f for f in self.names if is_carried(PurePosixPath(f), modules)]
        sizes = {f: self.version(f) for f in carried if not (self.directory / f).exists()}
        return {f: state.size for f, state in sizes.items() if state is not None}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Copy whole files into the private folder. Errors: HubError, ModelError; RunError if there is no room."""
        for file in files:
            version = self.version(file)
            if version is None:
                raise ModelError(
                    f"{self.address}/{file}: is no longer there; expected the file that was listed. Try again."
                )
            path = self.directory / file
            with temporary_files():
                path.parent.mkdir(parents=True, exist_ok=True)
            buffer = memoryview(bytearray(min(version.size, PIECE_BYTES)))
            with temporary_files(), open(path, "xb") as out:
                try:
                    for start, stop in pieces_of(version.size):
                        part = buffer[: stop - start]
                        self.request(file, start, part)
                        out.write(part)
                        if report is not None:
                            report(len(part))
                    out.flush()
                except BaseException:  # a part of a file would count as the file
                    path.unlink(missing_ok=True)
                    raise

    def refuse_changed(self) -> None:
        """Refuse files that have changed since they were first read. Errors: ModelError, HubError."""
        for file, version in self.versions.items():
            state = self.folder.state(file)
            if state != version:
                what = (
                    "is no longer there"
                    if state is None
                    else f"had {version.size} bytes and the tag {version.tag or 'none'!r}, now {state.size} and {state.tag or 'none'!r}"
                )
                raise ModelError(
                    f"{self.address}/{file}: was changed while it was read ({what}); expected the file that was planned with. "
                    "Run the command again when nobody writes the file."
                )

    def identity(self, file: str) -> Mapping[str, Any]:
        """What identifies a file: its URL, and the server's tag of its content."""
        return {"url": f"{self.address}/{file}", "tag": self.versions[file].tag}

    @property
    def has_tags(self) -> bool:
        """Does the server state tags, so that a later run can tell whether the files are still the same?"""
        return all(version.tag for version in self.versions.values())

    def close(self) -> None:
        self.folder.close()
        if self._remove is not None:
            self._remove()


def pieces_of(byte_size: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor, or a file, into pieces: the first byte of each, and the one after its last."""
    return ((start, min(start + PIECE_BYTES, byte_size)) for start in range(0, byte_size, PIECE_BYTES))


_asked: ContextVar[list[tuple[Source, str]] | None] = ContextVar("asked", default=None)


def note_asked(model: Source, tensors: Iterable[str]) -> None:
    """Note the tensors of a remote model that :func:`remote_tensors` asks for."""
    if (found := _asked.get()) is not None:
        found += [(model, name) for name in tensors]


def remote_tensors(source: Source, tensors: Iterable[str]) -> list[tuple[Source, str]]:
    """The tensors of models at URLs that a source reads for its own ``tensors``, each once.

    Whatever computes tensors of others says in :meth:`Source.absent` which ones it needs.
    """
    with _asking() as found:
        source.absent(list(tensors), False)
    return list(dict.fromkeys(found))


@contextmanager
def _asking() -> Iterator[list[tuple[Source, str]]]:
    found: list[tuple[Source, str]] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def remote_models(sources: Iterable[Source]) -> list[Source]:
    """The models at URLs among the models that sources are made of, each once."""
    found: dict[Source, None] = {}
    for source in sources:
        for model, _ in remote_tensors(source, source.tensors):
            found[model] = None
    return list(found)
