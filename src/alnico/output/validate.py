"""Is a directory a finished merge? Its lock says what must be there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.open_model import open_model
from alnico.errors import OutputError
from alnico.output.lock import read_lock
from alnico.output.staging import PartDirectory


def check_finished(folder: Path) -> None:
    """Refuse what is no complete output of alnico: every tensor of the lock must be there, and no other.

    Headers are read, tensors are not. Errors: OutputError; ModelError for files that are no model.
    """
    check_folder(folder)
    if not (folder / LOCK).is_file():
        raise OutputError(f"{folder}: has no {LOCK}, expected the output of `alnico merge`. Check the path.")
    planned = {name: (tensor.dtype, tensor.shape) for name, tensor in read_lock(folder).tensors.items()}
    with open_model(folder) as model:
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in model.tensors.items()}
    if found != planned:
        name = next(n for n in sorted({**planned, **found}) if planned.get(n) != found.get(n))
        raise OutputError(
            f"{folder}: {name} is {_shown(found.get(name))} in the weights and {_shown(planned.get(name))} in {LOCK}; "
            "they must be of one merge. Merge again."
        )


def check_folder(folder: Path) -> None:
    """Refuse what is no directory of a merge that was finished. Errors: OutputError."""
    try:
        os.stat(folder / LOCK)
    except PermissionError as error:
        raise OutputError(
            f"{folder}: cannot be read ({error.strerror}); expected the output of `alnico merge`. Check its permissions."
        ) from None
    except OSError:  # told apart by what follows
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
        raise OutputError(
            f"{folder}: no such directory; expected the output of `alnico merge`. Check the path."
        )


def local_paths(folder: Path) -> list[str]:
    """The paths of this disk that a finished merge names: its models that are not from the hub, and statistics."""
    if not os.path.isfile(folder / LOCK):
        return []
    named = [
        given.label for given in read_lock(folder).inputs if len(given.commits) < len(given.label.split("+"))
    ]
    return [name for name in named if "/" in name]


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {json.dumps(entry[1])}"
