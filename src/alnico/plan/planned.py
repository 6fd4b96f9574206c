"""The output of a plan as an input of another one: what is known of a model that is not made yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.hub import Repository
from alnico.errors import AlnicoError
from alnico.plan.job import Plan


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be there."""

    dtype: str
    shape: tuple[int, ...]
    elements: int
    byte_size: int

    @property
    def nominal(self) -> str:
        return self.dtype


class PlannedModel:
    """A :class:`Source` with the headers of a plan's output and nothing to read yet."""

    origin: Repository | None = None
    held_bytes = reading_bytes = 0

    def __init__(self, label: str, plan: Plan) -> None:
        self.label = label
        self.tensors: Mapping[str, PlannedTensor] = {
            j.name: PlannedTensor(j.dtype, j.shape, j.elements, j.byte_size) for j in plan.jobs
        }
        self.config: Mapping[str, Any] = plan.config
        self.directory: Path | None = plan.sources[plan.donor].directory

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        pass

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AlnicoError(f"{self.label}: {name} cannot be read before it is made.")

    def identity(self) -> list[dict[str, Any]]:
        return []

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        pass
