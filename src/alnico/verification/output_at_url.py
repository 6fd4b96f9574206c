"""Shows a finished output at a URL as a folder of this machine, whose weights are read by ranges."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.header import MAX_HEADER_BYTES
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.open_folder import checked_url, open_remote_folder
from alnico.checkpoint.remote.remote_weights import pieces_of
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import AlnicoError, ModelError, OutputError, UncheckedError
from alnico.output.lock import read_lock
from alnico.output.remote_target import read_whole, versions_of
from alnico.run_options import Access


@contextmanager
def output_at_url(text: str, access: Access) -> Iterator[tuple[Path, str, FileModel]]:
    """Give a temporary folder with the files of an output, its URL, and the model whose tensors are read there.

    Files of weights have their header and size in the folder, and no bytes of tensors. Errors in the block name the URL.
    Errors: OutputError, UncheckedError, HubError.
    """
    try:
        url = checked_url(text)
    except ModelError as error:
        raise OutputError(f"the output: {error}") from None
    if access.offline:
        raise UncheckedError(f"{url}: could not check: alnico is offline. Leave --offline out.")
    with tempfile.TemporaryDirectory(prefix="alnico-") as made:
        folder = Path(made)
        try:
            _fill(folder, url)
            with open_model(url, access=access, may_be_adapter=True) as model:
                assert isinstance(model, FileModel)
                yield folder, url, model
        except AlnicoError as error:
            error.args = tuple(str(line).replace(made, url) for line in error.args)
            raise


def _fill(made: Path, url: str) -> None:
    folder = open_remote_folder(url)
    try:
        version = folder.state(LOCK)
        if version is None:
            raise UncheckedError(
                f"{url}: could not check: it has no {LOCK}, which lists what must be there; expected the output of `alnico merge`. Check "
                "the URL."
            )
        _copy(folder, LOCK, version, version.size, made)
        listed = read_lock(made).files
        names = folder.names()
        if names is None:  # a web server lists no files; the lock does
            names = list(listed or ())
        for name, version in versions_of(folder, filter(is_inside, names)).items():
            if name != LOCK:
                is_ours = listed is None or name in listed
                _copy(folder, name, version, _read_bytes(folder, name, version) if is_ours else 0, made)
    finally:
        folder.close()


def _copy(folder: RemoteFolder, name: str, version: FileVersion, count: int, made: Path) -> None:
    """Make a file of the size of one at a URL, with its first ``count`` bytes."""
    path = made / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start, stop in pieces_of(count):
            data = bytearray(stop - start)
            folder.read_into(name, start, memoryview(data), version)
            file.write(data)
    os.truncate(path, version.size)


def _read_bytes(folder: RemoteFolder, name: str, version: FileVersion) -> int:
    """How many bytes of a file are read: all, or the header of a file of weights."""
    if not name.endswith(".safetensors") or version.size < 8:
        return version.size
    length = int.from_bytes(read_whole(folder, name, version, 8), "little")
    return min(8 + min(length, MAX_HEADER_BYTES), version.size)
