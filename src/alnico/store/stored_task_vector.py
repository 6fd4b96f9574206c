"""Task vectors of a store as values: sums with models and other task vectors, computed only when needed."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.checkpoint.task_vectors.manifest import Manifest, read_manifest
from alnico.notebook import ResultTable, never_fails, result_html
from alnico.numerics.sizes import format_size
from alnico.values.operands import NOTHING, stored_operand
from alnico.values.task_vector import TaskVector


class StoredTaskVector(TaskVector):
    """A task vector in a folder with ``taskvector.json``: what ``store["sql"]`` returns.

    It is a :class:`alnico.TaskVector`: ``base + 0.7 * store["sql"]`` is a lazy model, on every kind of base. A base that is
    not the one that the vector was made of is refused when its tensors are read. ``label`` is the vector's name in
    messages, such as ``store:sql@2``; ``folder`` has its files, which are never changed.

    Errors: ModelError for a folder without a manifest, or with one that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], label: str = "") -> None:
        self.folder = Path(folder)
        self.label = label or os.fspath(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self._terms = {(stored_operand(os.fspath(self.folder)), NOTHING): 1.0}
        self._missing = None

    @property
    def name(self) -> str:
        return self.manifest.name

    def __repr__(self) -> str:
        return f"<task vector {self.label} of {self.manifest.base.id or 'a model in memory'}>"

    @never_fails
    def _repr_html_(self) -> str:
        manifest = self.manifest
        return result_html(
            f"Task vector {self.label}",
            ResultTable(("encoding", "tensors"), sorted(_counts(manifest).items())),
            manifest.description,
            facts=[
                ("base", manifest.base.id),
                ("size", format_size(manifest.byte_size)),
                ("error", manifest.error),
                ("suggested scale", manifest.scale.suggested),
            ],
        )


def _counts(manifest: Manifest) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in manifest.tensors.values():
        counts[tensor.encoding] = counts.get(tensor.encoding, 0) + 1
    return counts
