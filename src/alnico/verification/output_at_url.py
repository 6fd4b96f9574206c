"""Shows a finished output at a URL as a folder of this machine, whose weights are read by ranges."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.header import MAX_HEADER_BYTES
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.remote.folder import FileVersion, RemoteFolder
from alnico.checkpoint.remote.open_folder import checked_url, open_remote_folder
from alnico.checkpoint.weight_files import is_inside
from alnico.errors import AlnicoError, ModelError, OutputError, UncheckedError
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
        if (lock := folder.state(LOCK)) is None:
            raise UncheckedError(
                f"{url}: could not check: it has no {LOCK}, which lists what must be there; expected the output of `alnico merge`. Check "
                "the URL."
            )
        (made / LOCK).write_bytes(read_whole(folder, LOCK, lock))
        names = folder.names()
        if names is None:  # a web server lists no files; the lock does
            names = [*(read_json(made / LOCK, is_ours=True).get("files") or ()), LOCK]
        for name, version in versions_of(folder, filter(is_inside, names)).items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(_content(folder, name, version))
            os.truncate(path, version.size)
    finally:
        folder.close()


def _content(folder: RemoteFolder, name: str, version: FileVersion) -> bytes:
    """All of a file, or the header of a file of weights."""
    if not name.endswith(".safetensors") or version.size < 8:
        return read_whole(folder, name, version)
    length = int.from_bytes(read_whole(folder, name, version, 8), "little")
    return read_whole(folder, name, version, 8 + min(length, MAX_HEADER_BYTES))
