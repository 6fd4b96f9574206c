"""Opens what trainers leave: folders of shards, files of one rank, and parts of a checkpoint (``PATH@PART``)."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.reference import split_part
from alnico.checkpoint.sidecars import check_kinds
from alnico.checkpoint.training.recognise import LOCAL_FILE, is_rank_file, training_folder
from alnico.checkpoint.training.sharded_model import ShardedModel
from alnico.errors import ModelError

NEMO = ".nemo"


def open_trained(label: str) -> ShardedModel | FileModel | None:
    """Open a trainer's checkpoint on this machine; None for anything else. Readers are imported only where they are used.

    Errors: ModelError for one file of many, and as the readers do.
    """
    path, part = split_part(label) or (label, "")
    location = Path(os.path.expanduser(path))
    if location.is_dir():
        found = training_folder(location)
        if found is None:
            return None
        check_kinds(found.folder)
        if found.kind == "local":
            _refuse_local(label)
        if found.kind == "distributed":
            from alnico.checkpoint.training.distributed_checkpoint import open_distributed_checkpoint

            return open_distributed_checkpoint(label, found.folder, part)
        if found.kind == "ranks":
            from alnico.checkpoint.training.rank_files import open_rank_files

            return open_rank_files(label, found.folder, part)
        if found.kind == "universal":
            from alnico.checkpoint.training.universal_checkpoint import open_universal

            return open_universal(label, found.folder, part)
        if found.kind == "storage":
            from alnico.checkpoint.training.storage_shards import open_storage_shards

            return open_storage_shards(label, found.folder, part)
        from alnico.checkpoint.training.optimizer_partitions import open_partitions

        return open_partitions(label, found.folder, part)
    if LOCAL_FILE.fullmatch(location.name) and location.is_file():
        _refuse_local(label)
    if location.is_file() and is_rank_file(location.name):
        raise ModelError(
            f"{label}: is a part that one rank saved; expected the parts of all ranks. Give the folder that it is in: "
            f"{location.parent}."
        )
    if location.suffix == NEMO and location.is_file():
        from alnico.checkpoint.training.nemo_archive import open_nemo

        return open_nemo(label, location)
    if part:
        from alnico.checkpoint.pickles import open_pickle

        return FileModel(label, Path(f"{location}@{part}"), [open_pickle(location, part)])
    return None


def _refuse_local(label: str) -> None:
    """Refuse what FSDP's LOCAL_STATE_DICT leaves. Errors: ModelError."""
    raise ModelError(
        f"{label}: holds the flat parameters of each rank of FSDP (LOCAL_STATE_DICT), which do not say what they are made of; expected "
        "tensors by name. Save the model with SHARDED_STATE_DICT or FULL_STATE_DICT."
    )
