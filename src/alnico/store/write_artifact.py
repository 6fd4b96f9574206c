"""Writes the files of a stored task vector next to its folder, which appears when all of it is on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from alnico.checkpoint.durable import copy_file, rename_new, sync_directory, sync_tree, write_file
from alnico.checkpoint.files import file_sha256
from alnico.checkpoint.lora_adapter import CONFIG, WEIGHTS
from alnico.checkpoint.output_path import PART, check_empty, check_publishable
from alnico.checkpoint.shards import indices_of, split_into_shards
from alnico.checkpoint.task_vectors.manifest import MANIFEST, StoredFile
from alnico.checkpoint.writer import OutputFiles
from alnico.errors import OutputError, RunError
from alnico.folders import make_folder
from alnico.lora.writer import OutputAdapter
from alnico.output.staging import Hold
from alnico.store.encoders.encoded import SpooledPart
from alnico.store.spool import Spool

STEM = "taskvector"
METADATA: Mapping[str, str] = {"format": "pt"}
COPIED_BYTES = 1 << 20

SpooledParts = Mapping[str, SpooledPart]
"""Stored tensors by their names in a file."""


class ArtifactFolder:
    """A folder that is being made next to its name. Made by :func:`new_artifact`; everything is written below ``path``."""

    def __init__(self, hold: Hold, path: Path) -> None:
        self._hold = hold
        self.path = path

    def write_tensors(self, parts: SpooledParts, spool: Spool, max_shard_bytes: int) -> None:
        """Write tensors into one file, or into shards with an index; nothing where there are none."""
        if parts:
            self._write(parts, spool, max_shard_bytes, None)

    def write_adapter(self, parts: SpooledParts, spool: Spool, adapter: OutputAdapter) -> None:
        """Write factors as an adapter of PEFT, with its config."""
        self._write(parts, spool, 1, WEIGHTS[0])
        self.write_text(CONFIG, config_text(adapter))

    def _write(self, parts: SpooledParts, spool: Spool, max_shard_bytes: int, single: str | None) -> None:
        described = [(name, part.dtype, part.shape) for name, part in parts.items()]
        shards = split_into_shards(described, max_shard_bytes, single, STEM, metadata=METADATA)
        files = OutputFiles(self.path, shards, self._hold.folder)
        try:
            for name, part in parts.items():
                for first in range(0, part.size, COPIED_BYTES):
                    data = spool.read(part.place + first, min(COPIED_BYTES, part.size - first))
                    files.write(name, first, memoryview(data))
            files.finish()
        finally:
            files.close()
        for name, text in indices_of(shards).items():
            self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file. Errors: RunError."""
        write_file(self.path / name, text, self._hold.folder, is_new=True)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file. Errors: RunError."""
        try:
            copy_file(source, self.path / name, self._hold.folder)
        except OSError as error:
            raise RunError(
                f"{source}: cannot be copied ({error.strerror}). Make room or check the disk."
            ) from None

    def files(self) -> dict[str, StoredFile]:
        """Return all files but the manifest, with their hashes."""
        names = sorted(p.name for p in self.path.iterdir() if p.name != MANIFEST)
        return {n: StoredFile((self.path / n).stat().st_size, file_sha256(self.path / n)) for n in names}


@contextmanager
def new_artifact(folder: Path) -> Iterator[tuple[ArtifactFolder, Callable[[], None]]]:
    """Hold a private folder next to ``folder``, and a function that gives what is in it this name, in one step.

    Without the call, or after an error, nothing is left. Errors: OutputError for a folder that exists and is not empty; RunError.
    """
    check_publishable(folder)
    check_empty(folder)
    with Hold(folder.parent / f".{folder.name}{PART}", folder) as hold:
        inner = hold.path / "vector"

        def publish() -> None:
            sync_tree(inner, hold.folder)
            hold.check_still_there()
            try:
                if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                    folder.rmdir()
                rename_new(inner, folder, hold.folder)
            except FileExistsError:
                raise OutputError(
                    f"{folder}: was created meanwhile; expected a new folder. Choose another, or remove it."
                ) from None
            except OSError as error:
                raise RunError(
                    f"{folder}: the finished task vector could not be renamed ({error.strerror}). Check the disk."
                ) from None
            sync_directory(folder.parent)

        try:
            hold.folder.remove_contents(lambda name: name == "lock")
            make_folder(inner, hold.folder)
            yield ArtifactFolder(hold, inner), publish
        except OSError as error:
            raise RunError(
                f"{folder}: cannot be written ({error.strerror}). Make room or check the disk."
            ) from None
        finally:
            with suppress(OSError):
                hold.remove()


def config_text(adapter: OutputAdapter) -> str:
    """Return the text of ``adapter_config.json``."""
    return json.dumps(adapter.config(), indent=2, sort_keys=True) + "\n"
