"""Refuses folders that are not complete outputs: the lock says what must be there."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.output_path import refuse_url_path
from alnico.errors import OutputError
from alnico.output.lock import describe_tensor, differing_tensors, read_lock
from alnico.output.staging import PartDirectory


def check_finished(folder: Path) -> None:
    """Refuse a folder that is not a complete output of alnico: it must hold every tensor of the lock, and no
    other.

    Headers are read, tensors are not. Errors: OutputError; ModelError for files that are not a model.
    """
    check_folder(folder)
    if not (folder / LOCK).is_file():
        raise OutputError(f"{folder}: has no {LOCK}, expected the output of `alnico merge`. Check the path.")
    lock = read_lock(folder)
    with open_model(folder) as model:
        differing = differing_tensors(lock, model.tensors)
        if differing:
            name = differing[0]
            raise OutputError(
                f"{folder}: {name} is {describe_tensor(model.tensors.get(name))} in the weights and "
                f"{describe_tensor(lock.tensors.get(name))} in {LOCK}; they must be of one merge. Merge again."
            )


def check_folder(folder: Path) -> None:
    """Refuse a path that is not the directory of a finished merge. Errors: OutputError."""
    refuse_url_path(folder)
    try:
        os.stat(folder / LOCK)
    except PermissionError as error:
        raise OutputError(
            f"{folder}: cannot be read ({error.strerror}); expected the output of `alnico merge`. Check its permissions."
        ) from None
    except OSError:  # the checks below say why
        pass
    if not os.path.isdir(folder):
        if os.path.isfile(folder):
            raise OutputError(
                f"{folder}: is one file, expected the directory of a finished merge. Merge into a directory."
            )
        if os.path.lexists(PartDirectory(folder).path):
            raise OutputError(
                f"{folder}: the merge is unfinished, expected a finished one. Run the same `alnico merge` again first."
            )
        advice = suggestion(folder, "Check the path.", accepts=Path.is_dir)
        raise OutputError(f"{folder}: no such directory; expected the output of `alnico merge`. {advice}")


def local_paths(folder: Path) -> list[str]:
    """List the paths on this disk in the lock of a finished merge: models that are not from the hub, and
    statistics."""
    if not os.path.isfile(folder / LOCK):
        return []
    labels = [
        entry.label for entry in read_lock(folder).inputs if len(entry.commits) < len(entry.label.split("+"))
    ]
    return [label for label in labels if "/" in label]
