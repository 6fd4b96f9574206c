"""Makes the planned output of one stage an input of the next, before it exists."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from alnico.checkpoint.sidecars import copy_side_files
from alnico.checkpoint.source import Origin, TensorSpec
from alnico.errors import AlnicoError
from alnico.folders import temporary_files
from alnico.plan.job import Plan


class PlannedModel:
    """A :class:`Source` with the headers and side files of a plan's output, but without values."""

    origin: Origin | None = None
    held_bytes = reading_bytes = 0

    def __init__(self, label: str, plan: Plan) -> None:
        self.label = label
        self.tensors: Mapping[str, TensorSpec] = {
            j.name: TensorSpec(j.dtype, j.shape, j.dtype) for j in plan.jobs
        }
        self.config: Mapping[str, Any] = plan.config
        self.made_from = plan.models
        self.directory: Path | None = plan.sources[plan.donor].directory
        self._remove: Callable[[], Any] | None = None
        if self.directory is not None and (plan.files or plan.left):
            with temporary_files():
                folder = Path(tempfile.mkdtemp(prefix="alnico-"))
                self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                copy_side_files(self.directory, folder, plan.left | set(plan.files))
                for name, data in plan.files.items():
                    (folder / name).write_bytes(data)
            self.directory = folder

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        pass

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AlnicoError(f"{self.label}: {name} cannot be read before it is merged.")

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        if self._remove is not None:
            self._remove()
