"""Reads the weights of a NeMo archive, a tar file with ``model_weights.ckpt``, in their place."""

from __future__ import annotations

import itertools
import os
import tarfile
from pathlib import Path, PurePosixPath

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.file_part import part_of_file
from alnico.checkpoint.files import open_to_read
from alnico.checkpoint.pickles import damage_refused, load_pickle_inside, select_tensors, shard_of
from alnico.errors import ModelError

WEIGHTS = "model_weights.ckpt"
MAX_MEMBERS = 10_000
"""Most files of an archive that are looked at."""


def open_nemo(label: str, path: Path) -> FileModel:
    """Open a NeMo archive; reads the list of its files and the pickle, not the tensors. Nothing is unpacked.

    Errors: ModelError for a compressed archive, one without ``model_weights.ckpt``, and the parts of several devices.
    """
    descriptor = open_to_read(path)
    where = f"{path}: {WEIGHTS}"
    try:
        begin, size = _weights_in(descriptor, path)
        loaded = load_pickle_inside(descriptor, begin, size, where, os.fstat(descriptor).st_size)
        with damage_refused(where):
            tensors, notes = select_tensors(loaded.value, where)
        shard = shard_of(path, loaded, tensors, notes)
    finally:
        os.close(descriptor)
    return FileModel(label, path, [shard])


def _weights_in(descriptor: int, path: Path) -> tuple[int, int]:
    """Where the weights begin in an archive, and their bytes. Errors: ModelError."""
    names = []
    try:
        with tarfile.open(
            fileobj=part_of_file(descriptor, 0, os.fstat(descriptor).st_size), mode="r:"
        ) as archive:
            for member in itertools.islice(archive, MAX_MEMBERS):
                name = PurePosixPath(member.name)
                if member.isreg() and name.name == WEIGHTS and not member.issparse() and len(name.parts) == 1:
                    return member.offset_data, member.size
                names.append(member.name)
    except Exception as error:  # a damaged or compressed file may cause any error
        names = [f"it is no plain tar file: {str(error)[:80]}"]
    raise ModelError(
        f"{path}: has no {WEIGHTS} at its top ({', '.join(n[:40] for n in names[:4]) or 'it is empty'}); expected a NeMo archive of one "
        "device that is not compressed. Unpack it, and give the checkpoint inside."
    )
