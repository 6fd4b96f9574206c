"""Uploads a finished merge to the hub."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.hub import upload
from alnico.output.validate import check_finished


def push(
    out: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    quiet: bool = False,
) -> str:
    """Upload a finished merge to the hub as one commit, and return its address.

    Options:
        out: The directory of a finished merge.
        name: The model on the hub, owner/name; it is created if it does not exist.
        private: Create the repository as private.
        branch: Branch to commit to; default: main.
        message: Message of the commit.
        quiet: Draw no progress bars.
    Errors: ModelError and OutputError for a directory that is not a finished merge, HubError.
    """
    folder = Path(merge_path(out, "push"))
    check_finished(folder)
    title = message or f"Merge with alnico: {folder.resolve().name}"
    return upload(folder, name, private=private, branch=branch, message=title, quiet=quiet)
