"""Recognises files that hold a task vector: a header says so, and no model is opened from them."""

from __future__ import annotations

from collections.abc import Mapping

from alnico.checkpoint.source import Model, Source
from alnico.errors import ModelError

KIND, BASE, TERMS = "alnico.kind", "alnico.base", "alnico.terms"
"""Keys of a header's metadata: what the file is, the base of the first term, and all terms as JSON."""

COMPRESSED = "alnico.compressed"
"""Key of the metadata of a compressed task vector: what was kept, for people."""

LEFT, RIGHT = ":left", ":right"
"""Endings of the names of two factors of a matrix in a compressed task vector.

``left`` is (rows, k) and ``right`` (k, columns), or (k, ...) of a convolution kernel; of a stack of matrices ``left`` is
(stack, rows, k) and ``right`` (stack, k, columns).
"""

TASK_VECTOR = "task vector"


def task_vector_metadata(base: str, terms: str, version: str, compressed: str = "") -> Mapping[str, str]:
    """Return the metadata of each file of a task vector. ``compressed`` says what was kept of a compressed one."""
    metadata = {"format": "pt", KIND: TASK_VECTOR, BASE: base, TERMS: terms, "alnico": version}
    return {**metadata, COMPRESSED: compressed} if compressed else metadata


def is_task_vector_file(model: Source) -> bool:
    """Do the headers of a model's files say that it is a task vector?"""
    return any(s.header.metadata.get(KIND) == TASK_VECTOR for s in getattr(model, "shards", ()))


def is_compressed(model: Source) -> bool:
    """Do the headers of a task vector say that it is compressed?"""
    return any(COMPRESSED in s.header.metadata for s in getattr(model, "shards", ()))


def base_in_header(model: Source) -> str:
    """Return the base that the header of a task vector names; empty if none does."""
    shards = getattr(model, "shards", ())
    return next((s.header.metadata[BASE] for s in shards if BASE in s.header.metadata), "")


def refuse_task_vector(model: Model) -> None:
    """Refuse a task vector where a model is expected. Errors: ModelError."""
    if is_task_vector_file(model):
        base = base_in_header(model)
        raise ModelError(
            f"{model.label}: is a task vector{f' of {base}' if base else ''}, a difference of models; expected a "
            f"whole model. Put it on its base: alnico.TaskVector.load({model.label!r}).on(base)."
        )
