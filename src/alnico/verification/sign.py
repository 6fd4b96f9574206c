"""Signs a finished merge, or a stored task vector."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.file_arguments import merge_path
from alnico.checkpoint.lineage import LOCK
from alnico.checkpoint.signatures import sign as sign_folder
from alnico.checkpoint.task_vectors.manifest import MANIFEST
from alnico.checkpoint.task_vectors.stored_vector import open_vector
from alnico.verification.replan import ReplanOptions
from alnico.verification.verify import check_output


def sign(out: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Sign a finished merge or task vector as OpenSSF model-signing does; return the path of ``model.sig``.

    A merge is first checked against its lock, a task vector against its manifest. Needs the extra ``[sign]``.

    Options:
        out: The directory of a finished merge or of a task vector.
        key: Private key (a PEM file of the curve P-256, P-384 or P-521).
    Errors: those of :func:`verify`, except for files that the lock does not list; ModelError for a task vector whose files are not
        those of its manifest; UncheckedError for an unusable key.
    """
    folder = Path(merge_path(out, "sign"))
    # A folder that may not be read is neither: its check gives the error.
    if os.path.isfile(folder / MANIFEST) and not os.path.exists(folder / LOCK):
        with open_vector(folder) as vector:
            vector.check_files()
    else:
        check_output(folder, ReplanOptions())
    return sign_folder(folder, Path(key))
