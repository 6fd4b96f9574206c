"""Decides whether a merge may be written to a URL, and where its unfinished work is kept on this machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alnico.checkpoint.header import MAX_HEADER_BYTES
from alnico.checkpoint.output_path import OTHER_FORMATS, SHOWN, Replace
from alnico.checkpoint.overwrite import foreign_entries
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.open_folder import WEB, checked_url, intended_url, is_url, open_remote_folder
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import ModelError, OutputError
from alnico.folders import cache_path
from alnico.run_options import checked_folder
from alnico.threads import Crew

MARKER = ".alnico-publishing"
"""The file that is in a folder at a URL while a model is published there: the id of the run that does so."""

READ_FILES = (".json", ".yml", ".yaml", ".jsonl", ".db")
"""Endings of the files that are looked into to learn what wrote them."""

MOST_READ_BYTES = 256 << 20
MOST_FILES = 10_000
"""A folder of more files counts as no model."""

CONNECTIONS = 8
"""Requests at a time."""


@dataclass(frozen=True)
class RemoteTarget:
    """A folder, or one file, at a URL, as the output of a merge. ``work`` is the folder of this machine for unfinished work of
    all outputs at URLs."""

    url: str
    work: Path

    @property
    def single_file(self) -> str | None:
        """The name of the one output file; None for a folder."""
        name = self.url.rpartition("/")[2]
        return name if name.endswith(".safetensors") else None

    @property
    def folder_url(self) -> str:
        return self.url if self.single_file is None else self.url.rpartition("/")[0]

    @property
    def unfinished(self) -> Path:
        """The folder of this machine for its unfinished work."""
        return self.work / hashlib.sha256(self.url.encode()).hexdigest()[:32]

    def child(self, name: str) -> RemoteTarget:
        return RemoteTarget(f"{self.url}/{name}", self.work)

    def __str__(self) -> str:
        return self.url


def output_place(
    out: str | os.PathLike[str], work_dir: str | os.PathLike[str] | None = None
) -> Path | RemoteTarget:
    """Return the path or the URL that an output goes to. ``work_dir`` is the folder for unfinished work of outputs at URLs; default: in
    alnico's cache.

    Errors: OutputError for a URL that cannot be written, or that has credentials in it.
    """
    text = os.fspath(out)
    if not is_url(text):
        if (intended := intended_url(text)) is not None:
            raise OutputError(
                f"{text}: is neither a URL nor a path; a URL has two slashes, and is text, not a Path. Write {intended}, or ./{text} "
                "for a folder of this machine."
            )
        return Path(text)
    try:
        url = checked_url(text)
    except ModelError as error:
        raise OutputError(f"the output: {error}") from None
    scheme, _, rest = url.partition("://")
    if scheme in WEB:
        raise OutputError(
            f"{url}: {scheme}:// is read only; expected a folder of this machine, or a URL that can be written, such as s3://bucket/model. "
            "Choose another output."
        )
    name = PurePosixPath(rest).name
    if not name or "/" not in rest:
        raise OutputError(
            f"{url}: is a whole bucket; expected a folder in it, such as {url}/merged. Choose another output."
        )
    if PurePosixPath(name).suffix.casefold() in OTHER_FORMATS:
        raise OutputError(
            f"{url}: ends in {PurePosixPath(name).suffix}, but alnico writes safetensors only; expected a folder or a name that ends "
            "in .safetensors. Choose another output."
        )
    try:
        work = checked_folder(work_dir, "--work-dir") or cache_path("uploads")
    except RuntimeError:
        raise OutputError(
            f"{url}: the unfinished output is kept on this machine, and there is no home directory for it. Name a folder with --work-dir."
        ) from None
    return RemoteTarget(url, work)


@contextmanager
def opened_target(target: RemoteTarget) -> Iterator[RemoteFolder]:
    """Open the folder that a target is in, until the block ends. Errors: OutputError if it cannot be written; HubError."""
    folder = open_remote_folder(target.folder_url)
    try:
        if not folder.is_writable:
            raise OutputError(
                f"{target}: cannot be written; expected a URL such as s3://bucket/model. Choose another output."
            )
        yield folder
    finally:
        folder.close()


def files_at(folder: RemoteFolder, target: RemoteTarget) -> dict[str, FileVersion]:
    """Return the versions of the files that are at a target now. Errors: OutputError if the server does not list files; HubError."""
    if target.single_file is not None:
        version = folder.state(target.single_file)
        return {} if version is None else {target.single_file: version}
    names = folder.names()
    if names is None:
        raise OutputError(
            f"{target}: the server does not list files, so that nobody knows what is there; expected one that does. Choose another output."
        )
    return versions_of(folder, names)


def versions_of(folder: RemoteFolder, names: Iterable[str]) -> dict[str, FileVersion]:
    """Return the versions of files that exist, several at a time. Errors: HubError."""
    found: dict[str, FileVersion] = {}

    def ask(name: str) -> None:
        version = folder.state(name)
        if version is not None:
            found[name] = version

    names = sorted(names)
    with Crew(min(CONNECTIONS, max(len(names), 1))) as crew:
        crew.run([(ask, (name,)) for name in names])
    return {name: found[name] for name in names if name in found}


def check_inputs_elsewhere(target: RemoteTarget, references: Iterable[str]) -> None:
    """Refuse a target that is, contains, or lies in one of the inputs at URLs. Errors: OutputError."""
    for reference in references:
        for text in _urls_in(reference):
            if text == target.url or text.startswith(f"{target.url}/") or target.url.startswith(f"{text}/"):
                raise OutputError(
                    f"{target}: is one of the inputs, contains it or lies in it ({text}); expected a separate folder. Choose another "
                    "output."
                )


def _urls_in(reference: str) -> Iterator[str]:
    """The URLs that a reference to a model is made of: a base and its adapters."""
    for part in reference.split("+"):
        url = part.rpartition("*")[2]
        if is_url(url):
            try:
                yield checked_url(url)
            except ModelError:  # whoever opens it refuses it
                continue


def check_replaceable_at(
    folder: RemoteFolder, target: RemoteTarget, files: Mapping[str, FileVersion], overwrite: Replace
) -> None:
    """Refuse a target that is occupied by what may not be replaced, as :func:`alnico.checkpoint.output_path.check_replaceable`.

    Errors: OutputError; HubError.
    """
    if not files:
        return
    if not overwrite:
        raise OutputError(
            f"{target}: exists and is not empty; expected a new or empty folder. "
            "Choose another output, or use --overwrite (in Python overwrite=True)."
        )
    if overwrite != "anything" and (names := _foreign_files(folder, target, files)):
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        problem = (
            "is a file that is not part of a model"
            if target.single_file
            else f"holds {shown}, not part of a model"
        )
        raise OutputError(
            f"{target}: {problem}; --overwrite replaces only models and alnico's own output. "
            "Choose another output, or use --overwrite-anything (in Python overwrite_anything=True) to remove everything there."
        )


def _foreign_files(folder: RemoteFolder, target: RemoteTarget, files: Mapping[str, FileVersion]) -> list[str]:
    """Name the files that are not part of a model or of alnico's output: as for a folder on the disk with files of these names, of
    which the ones that tell what wrote them have their content, and all others have none."""
    names = [name for name in files if name != MARKER]
    if len(names) > MOST_FILES or not names:
        return names
    with tempfile.TemporaryDirectory(prefix="alnico-") as made:
        for name in names:
            path = Path(made, name)
            if not is_inside(name):
                return [name]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_content(folder, name, files[name], target.single_file is not None))
            except OSError:  # a name that no disk has, or a file where a folder is
                return [name]
        try:
            return foreign_entries(Path(made) if target.single_file is None else Path(made, names[0]))
        except OSError:
            return names


def _content(folder: RemoteFolder, name: str, version: FileVersion, is_single: bool) -> bytes:
    """What a file holds, as far as it tells what wrote it."""
    if is_single:
        return _header(folder, name, version)
    if version.size > MOST_READ_BYTES or not name.endswith(READ_FILES):
        return b""
    return read_whole(folder, name, version)


def _header(folder: RemoteFolder, name: str, version: FileVersion) -> bytes:
    """The header of a file of weights, followed by zeros up to at most the size of a small file; something else for other files."""
    length = read_whole(folder, name, version, 8)
    size = 8 + int.from_bytes(length, "little") if len(length) == 8 else 0
    if not version.size:
        return b""
    if size > min(version.size, MAX_HEADER_BYTES):
        return b"no header"
    return read_whole(folder, name, version, size)


def read_whole(folder: RemoteFolder, name: str, version: FileVersion, most_bytes: int | None = None) -> bytes:
    """Read a file, or its first bytes. Errors: HubError; ModelError if it changes meanwhile."""
    size = version.size if most_bytes is None else min(version.size, most_bytes)
    data = bytearray(size)
    if size:
        folder.read_into(name, 0, memoryview(data), version)
    return bytes(data)
