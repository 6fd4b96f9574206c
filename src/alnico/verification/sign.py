"""Signs a finished merge."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.signatures import sign as sign_folder
from alnico.verification.replan import ReplanOptions
from alnico.verification.verify import check_output


def sign(out: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Sign a finished merge as OpenSSF model-signing does; return the path of ``model.sig``.

    The merge is first checked against its lock. Needs the extra ``[sign]``.

    Options:
        out: The directory of a finished merge.
        key: Private key (a PEM file of the curve P-256, P-384 or P-521).
    Errors: those of :func:`verify`, except for files that the lock does not list; UncheckedError for an
        unusable key.
    """
    folder = Path(merge_path(out, "sign"))
    check_output(folder, ReplanOptions())
    return sign_folder(folder, Path(key))
