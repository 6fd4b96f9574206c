"""Reads what ``TaskVector.save`` and ``TaskVector.compress`` write as stored task vectors, which have no hashes."""

from __future__ import annotations

import re
from pathlib import Path

from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.lora_adapter import CONFIG
from alnico.checkpoint.task_vector_file import LEFT, RIGHT, base_in_header, is_compressed, is_task_vector_file
from alnico.checkpoint.task_vectors.manifest import MAX_WORD, Manifest, ModelIdentity, TensorEntry
from alnico.checkpoint.weight_files import _shard_paths
from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES


def is_saved_difference(path: Path) -> bool:
    """Do the headers at a path, of a file or of the files of a folder, say that they are a task vector? Errors: OSError."""
    if not (path.is_dir() or path.suffix == ".safetensors") or (path / CONFIG).exists():
        return False
    try:
        files = open_saved(str(path), path)
    except ModelError:
        return False  # whatever it is, its reader says what is wrong with it
    try:
        return is_task_vector_file(files)
    finally:
        files.close()


def open_saved(label: str, path: Path) -> FileModel:
    """Open the files of a saved task vector. Errors: ModelError."""
    paths = _shard_paths(path, False) if path.is_dir() else [path]
    return FileModel(label, path, [open_shard(one) for one in paths])


def manifest_of(files: FileModel) -> Manifest:
    """Describe the tensors of a saved task vector, compressed or not. Errors: ModelError."""
    entries: dict[str, TensorEntry] = {}
    for name, tensor in files.tensors.items():
        if DTYPES[tensor.dtype].kind != "float":
            raise ModelError(
                f"{files.label}: {name} is {tensor.dtype}; expected floating-point differences in a task vector. Save it again."
            )
        if is_compressed(files) and name.endswith((LEFT, RIGHT)):
            whole = name.removesuffix(LEFT).removesuffix(RIGHT)
            if whole not in entries:
                entries[whole] = _factored(files, whole)
        else:
            entries[name] = TensorEntry(
                "difference",
                tensor.dtype,
                tensor.shape,
                stored={"values": name},
                byte_size=tensor.byte_size,
            )
    title = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", Path(files.label).stem).strip("-._") or "difference"
    base = base_in_header(files)[:MAX_WORD] or None
    return Manifest(title[:96], ModelIdentity(id=base), ModelIdentity(), entries)


def _factored(files: FileModel, name: str) -> TensorEntry:
    left, right = files.tensors.get(name + LEFT), files.tensors.get(name + RIGHT)
    if left is None or right is None or name in files.tensors or len(left.shape) not in (2, 3):
        raise ModelError(
            f"{files.label}: {name} has not two factors, of (rows, k) and (k, columns); expected both, and not the whole tensor. "
            "Compress it again."
        )
    shape = left.shape[:-1] + right.shape[len(left.shape) - 1 :]
    return TensorEntry(
        "low_rank",
        left.dtype,
        shape,
        stored={"left": name + LEFT, "right": name + RIGHT},
        byte_size=left.byte_size + right.byte_size,
    )
