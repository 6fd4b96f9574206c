"""Writes a task vector as safetensors: next to its name first, and renamed when complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from alnico._version import __version__
from alnico.checkpoint.durable import sync_directory, sync_tree, write_file
from alnico.checkpoint.file_model import open_shard
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.output_path import Replace
from alnico.checkpoint.shards import OutputShard, indices_of, split_into_shards
from alnico.checkpoint.task_vector_file import TASK_VECTOR, task_vector_metadata
from alnico.checkpoint.writer import OutputFiles
from alnico.errors import RunError
from alnico.folders import make_folder
from alnico.kernels.constants import ARITHMETIC
from alnico.numerics.digest import HASH, PieceHasher, TensorDigest
from alnico.numerics.dtypes import DTYPES
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.lock import describe_files, format_json
from alnico.output.staging import PartDirectory
from alnico.values.differences import Differences
from alnico.values.operands import Term

StoredTensor = tuple[str, str, tuple[int, ...]]
"""The name, dtype and shape of a tensor in a file."""

Put = Callable[[int, np.ndarray], None]
"""Receives the place of bytes in a tensor, and the bytes, in order."""


class TaskVectorFiles:
    """The files of one task vector, saved whole or compressed.

    ``compressed`` says what was kept of a compressed one, and ``options`` the same as data for the lock.
    """

    def __init__(
        self,
        target: Path,
        terms: Sequence[Term],
        max_shard_bytes: int,
        compressed: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.target = target
        self.single = target.name if target.suffix == ".safetensors" else None
        self._described = [
            {"coefficient": c, "model": model.name, **({} if base.is_nothing else {"base": base.name})}
            for c, model, base in terms
        ]
        base = next((base.name for *_, base in terms if not base.is_nothing), "")
        self._metadata = task_vector_metadata(base, json.dumps(self._described), __version__, compressed)
        self._max_shard_bytes = max_shard_bytes
        self._options = dict(options or {})

    def check_room(
        self, differences: Differences, tensors: Sequence[StoredTensor], overwrite: Replace
    ) -> None:
        """Refuse a target that cannot take these tensors. Errors: OutputError, ResourceError."""
        check_output_place(self.target, needed_files(differences.plan.sources), overwrite)
        check_space(self.target, sum(shard.byte_size for shard in self._shards(tensors)))

    def _shards(self, tensors: Sequence[StoredTensor]) -> tuple[OutputShard, ...]:
        return split_into_shards(list(tensors), self._max_shard_bytes, self.single, metadata=self._metadata)

    @contextmanager
    def part(self, overwrite: Replace) -> Iterator[PartDirectory]:
        """Hold an empty folder next to the target; what :meth:`write` left there gets the target's name. After an error
        it is removed. Errors: RunError."""
        with PartDirectory(self.target) as part:
            part.remove_contents()
            try:
                yield part
            except OSError as error:
                part.remove()
                raise RunError(
                    f"{self.target}: cannot be written ({error.strerror}). Make room or check the disk."
                ) from None
            except BaseException:
                part.remove()
                raise
            part.publish(self.single, overwrite)

    def write(
        self, part: PartDirectory, tensors: Sequence[StoredTensor], write: Callable[[str, Put], None]
    ) -> None:
        """Write all tensors: ``write`` passes the bytes of the tensor of a name."""
        shards = self._shards(tensors)
        make_folder(part.model, part.folder)
        files = OutputFiles(part.model, shards, part.folder)
        digests = {}
        try:
            for name, dtype, shape in tensors:
                size = int(np.prod(shape, dtype=object)) * DTYPES[dtype].bytes
                hasher = PieceHasher(digest := TensorDigest(dtype, shape, size), 0)

                def put(offset: int, raw: np.ndarray, name: str = name, hasher: PieceHasher = hasher) -> None:
                    hasher.update(memoryview(raw))
                    files.write(name, offset, memoryview(raw))

                write(name, put)
                hasher.finish()
                digests[name] = digest.result()
            files.sync()
            files.finish()
        finally:
            files.close()
        if self.single is None:
            self._finish_folder(part, shards, tensors, digests)
        sync_directory(part.model, part.folder)

    def _finish_folder(
        self,
        part: PartDirectory,
        shards: Sequence[OutputShard],
        tensors: Sequence[StoredTensor],
        digests: Mapping[str, str],
    ) -> None:
        """Write the index and the lock, which has the hashes of tensors and files."""
        for name, text in indices_of(shards).items():
            write_file(part.model / name, text, part.folder)
        written = [open_shard(part.model / shard.name) for shard in shards]
        lock = {
            "alnico": __version__,
            "arithmetic": ARITHMETIC,
            "hash": HASH,
            "do": TASK_VECTOR,
            "options": {"terms": self._described, **self._options},
            "inputs": [],
            "output": {
                name: {"dtype": dtype, "shape": list(shape), "digest": digests[name]}
                for name, dtype, shape in tensors
            },
            "files": describe_files(part.model, written),
        }
        write_file(part.model / LOCK, format_json(lock) + "\n", part.folder)
        sync_tree(part.model, part.folder)


def write_task_vector(
    differences: Differences,
    terms: Sequence[Term],
    target: Path,
    max_shard_bytes: int,
    overwrite: Replace,
) -> None:
    """Write the tensors of the only task vector of ``differences``. Errors: OutputError, RunError; those of reading."""
    jobs = {job.name: job for job in differences.stored}
    files = TaskVectorFiles(target, terms, max_shard_bytes)
    tensors = [(name, differences.dtype(job), job.shape) for name, job in jobs.items()]
    files.check_room(differences, tensors, overwrite)
    differences.fetch()
    with files.part(overwrite) as part:
        files.write(part, tensors, lambda name, put: differences.write(jobs[name], put))
