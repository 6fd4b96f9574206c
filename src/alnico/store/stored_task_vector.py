"""Task vectors of a store as values: sums with models and other task vectors, computed only when needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alnico.checkpoint.task_vectors.manifest import Manifest, read_manifest
from alnico.errors import AlnicoError
from alnico.notebook import ResultTable, never_fails, result_html
from alnico.numerics.numbers import finite_number
from alnico.numerics.sizes import format_size
from alnico.store.module_equipment import ModuleEquipment, VectorOnModule, equip_module, unequip_module
from alnico.store.sketch import Interference, interference
from alnico.values.operands import NOTHING, stored_operand
from alnico.values.task_vector import TaskVector, checked_missing


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

    def equip(
        self,
        module: Any,
        weight: float | None = None,
        *,
        allow_base_mismatch: bool = False,
        missing: str | None = None,
    ) -> ModuleEquipment:
        """Put the vector on a module, in place: ``module + weight * vector``, after the vectors that it has.

        The tensors that it changes are kept in memory, so that :meth:`unequip` gives their bits back; the result says how
        many bytes. The bits are those of equipping the base's files with the same vectors, in the module's dtype. Vectors can be taken off in any
        order.

        Options:
            module: The base as a module, with the values of its files; also loaded in float32 from files of 16 bits.
            weight: The coefficient; default: the one that the vector suggests.
            allow_base_mismatch: Put a vector of differences on a module that is not the base it was made of.
            missing: ``drop`` leaves out tensors that the module lacks, such as a head; default: they are an error.
        Errors: AlnicoError for a vector that is on the module already, and for what is no module; MismatchError for another
            base, with the tensors, and for a module that was changed since it was equipped. After an error the module is
            as before.
        """
        scale = self.manifest.scale.suggested if weight is None else finite_number(weight, "weight")
        chosen = checked_missing(missing)
        return equip_module(
            module, VectorOnModule(self._place, self.label, scale, allow_base_mismatch, chosen)
        )

    def unequip(self, module: Any) -> ModuleEquipment:
        """Take the vector off a module, in place. Without any vector left, the module has the base's bits again.

        Errors: AlnicoError for a vector that is not on the module; MismatchError for a module that was changed since it was
            equipped, for example by training: the change would be lost.
        """
        return unequip_module(module, self._place, self.label)

    def interference(self, other: StoredTaskVector) -> Interference:
        """Estimate how this vector and another of the same base meet, from the sketches in their manifests.

        ``cosine`` and ``cosine_error`` are about all tensors together; ``sign_conflict`` is the share of entries whose signs
        differ. :meth:`cosine` is exact, and reads both.

        Errors: AlnicoError for something that is no stored task vector.
        """
        if not isinstance(other, StoredTaskVector):
            raise AlnicoError(
                f'interference: the other is of type {type(other).__name__}; expected a stored task vector. Pass store["NAME"], '
                "or use .cosine(other), which reads both."
            )
        return interference(self.manifest, other.manifest)

    @property
    def _place(self) -> str:
        return os.path.realpath(self.folder)

    def __repr__(self) -> str:
        return f"<task vector {self.label} of {self.manifest.base.id or 'an unnamed base'}>"

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
