"""Writes a task vector as safetensors: next to its name first, and renamed when complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from alnico.output.disk_space import check_output_place, check_space, needed_files
from alnico.output.lock import describe_files, format_json
from alnico.output.staging import PartDirectory
from alnico.plan.job import Job
from alnico.values.differences import Differences
from alnico.values.operands import Term


def write_task_vector(
    differences: Differences,
    terms: Sequence[Term],
    target: Path,
    max_shard_bytes: int,
    overwrite: Replace,
) -> None:
    """Write the tensors of the only task vector of ``differences``. Errors: OutputError, RunError; those of reading."""
    jobs = {job.name: job for job in differences.stored}
    single = target.name if target.suffix == ".safetensors" else None
    described = [
        {"coefficient": c, "model": model.name, **({} if base.is_nothing else {"base": base.name})}
        for c, model, base in terms
    ]
    base = next((base.name for *_, base in terms if not base.is_nothing), "")
    shards = split_into_shards(
        [(name, differences.dtype(job), job.shape) for name, job in jobs.items()],
        max_shard_bytes,
        single,
        metadata=task_vector_metadata(base, json.dumps(described), __version__),
    )
    check_output_place(target, needed_files(differences.plan.sources), overwrite)
    check_space(target, sum(shard.byte_size for shard in shards))
    differences.fetch()
    with PartDirectory(target) as part:
        part.remove_contents()
        try:
            make_folder(part.model, part.folder)
            files = OutputFiles(part.model, shards, part.folder)
            try:
                digests = {name: _write_tensor(differences, job, files) for name, job in jobs.items()}
                files.sync()
                files.finish()
            finally:
                files.close()
            if single is None:
                _finish_folder(part, shards, differences, digests, described)
            sync_directory(part.model, part.folder)
        except OSError as error:
            part.remove()
            raise RunError(
                f"{target}: cannot be written ({error.strerror}). Make room or check the disk."
            ) from None
        except BaseException:
            part.remove()
            raise
        part.publish(single, overwrite)


def _write_tensor(differences: Differences, job: Job, files: OutputFiles) -> str:
    """Write one tensor and return its hash."""
    dtype = differences.dtype(job)
    digest = TensorDigest(dtype, job.shape, job.elements * (8 if dtype == "F64" else 4))
    hasher = PieceHasher(digest, 0)

    def put(offset: int, raw: np.ndarray) -> None:
        hasher.update(memoryview(raw))
        files.write(job.name, offset, memoryview(raw))

    differences.write(job, put)
    hasher.finish()
    return digest.result()


def _finish_folder(
    part: PartDirectory,
    shards: Sequence[OutputShard],
    differences: Differences,
    digests: dict[str, str],
    described: Sequence[Any],
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
        "options": {"terms": described},
        "inputs": [],
        "output": {
            job.name: {
                "dtype": differences.dtype(job),
                "shape": list(job.shape),
                "digest": digests[job.name],
            }
            for job in differences.stored
        },
        "files": describe_files(part.model, written),
    }
    write_file(part.model / LOCK, format_json(lock) + "\n", part.folder)
    sync_tree(part.model, part.folder)
