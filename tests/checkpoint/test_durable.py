"""What is brought to the disk is all of it, or an error says what is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alnico.checkpoint.durable import sync_tree
from alnico.errors import RunError
from os_calls import Call, watched


def test_a_folder_that_cannot_be_listed_is_not_taken_for_synced(tmp_path: Path) -> None:
    def fails(call: Call, make: Callable[[], Any]) -> Any:
        if call.name == "scandir":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return make()

    with watched(tmp_path, fails), pytest.raises(RunError) as caught:
        sync_tree(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path.resolve()}: cannot be written (Input/output error). "
        "Make room or check the disk; the same command resumes the merge."
    )
