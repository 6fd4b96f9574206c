"""Pairs the tensors of a base with those of the models, and names those that cannot be compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from alnico.analysis.files import OWN
from alnico.analysis.results import SUMMARY, AnalysedModel, Skipped
from alnico.checkpoint.renamed_model import RenamedModel
from alnico.checkpoint.source import Source, Tensor
from alnico.numerics.dtypes import MERGEABLE
from alnico.plan.families import group_of
from alnico.plan.job import Input, Job
from alnico.plan.layers import count_layers

RESERVED = (*OWN, f"{SUMMARY}.tmp")
"""Names in the folder of a report that are reserved for its files."""

MOST_SUBSPACE_ELEMENTS = 1 << 22
"""The largest matrix whose singular vectors are compared; it is kept in memory as float64."""


@dataclass(frozen=True)
class CommonTensor:
    """A tensor of the base with the matching tensors of the models.

    ``models`` are the positions of the models; ``job`` reads their tensors, the base last.

    ``group``, ``layer`` and ``module`` as in :class:`alnico.analysis.results.TensorScope`.
    """

    job: Job
    models: tuple[int, ...]
    group: str
    layer: int | None
    module: str

    def has_subspace(self, side: int) -> bool:
        """Check whether it is a matrix whose smaller side is at most ``side``."""
        shape = self.job.shape
        return (
            len(shape) == 2
            and 2 <= min(shape) <= side
            and self.job.elements <= MOST_SUBSPACE_ELEMENTS
            and len(self.models) > 1
        )


def pair_tensors(base: Source, models: Sequence[Source]) -> tuple[list[CommonTensor], list[Skipped]]:
    """Pair the tensors of a base with those of models, by name and shape; list the others with the reason."""
    pairs, skipped = [], []
    layers = count_layers(base.tensors)
    for name, tensor in base.tensors.items():
        if tensor.dtype not in MERGEABLE:
            skipped.append(Skipped(name, None, tensor.elements, f"its dtype is {tensor.dtype}"))
            continue
        fitting = []
        for position, model in enumerate(models):
            reason = _reason(tensor, model.tensors.get(name))
            if reason:
                skipped.append(Skipped(name, model.label, tensor.elements, reason))
            else:
                fitting.append(position)
        if fitting:
            inputs = tuple(_input(models[i].tensors[name], name, i) for i in fitting)
            job = Job(
                "mix",
                name,
                tensor.dtype,
                tensor.shape,
                tensor.elements,
                tensor.byte_size,
                inputs,
                _input(tensor, name, len(models)),
            )
            place = layers.place(name)
            layer, module = (place.layer, place.rest) if place is not None else (None, name)
            pairs.append(CommonTensor(job, tuple(fitting), group_of(name), layer, module))
    for model in models:
        skipped += [
            Skipped(name, model.label, tensor.elements, "the base has no such tensor")
            for name, tensor in model.tensors.items()
            if name not in base.tensors
        ]
    return pairs, skipped


def _reason(tensor: Tensor, other: Tensor | None) -> str:
    if other is None:
        return "the model has no such tensor"
    if other.dtype not in MERGEABLE:
        return f"its dtype is {other.dtype}"
    if tensor.shape != other.shape:
        return f"its shape is {other.shape}, in the base {tensor.shape}"
    return ""


def _input(tensor: Tensor, name: str, model: int) -> Input:
    return Input(model, name, tensor.dtype, tensor.byte_size)


def model_of(source: Source, name: str) -> AnalysedModel:
    layout = source.layout.title if isinstance(source, RenamedModel) else ""
    return AnalysedModel(
        name, source.label, source.origin.commit if source.origin is not None else None, layout
    )


def names_of(sources: Sequence[Source], given: Sequence[str] = ()) -> list[str]:
    """Return a short, unique name for each model, valid for a folder: as ``given``, or :func:`short_names`."""
    if not given:
        return short_names([source.label for source in sources])
    return _unique([re.sub(r"[^\w .()\[\]=,-]+", "-", name).strip(" .-") for name in given])


def _fold_name(name: str) -> str:
    """Normalise a name as file systems do that ignore case and accents' encoding."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def short_names(references: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model, valid for a folder: the last part of its path or id.

    Names that occur twice get numbers. A model with an adapter is named after the adapter; a file with a
    usual name after its folder; a model in memory has its label.

    >>> short_names(["runs/a/model.safetensors", "hub/a", "models[2]"])
    ['a', 'a-2', 'models[2]']
    """
    stems = []
    for reference in references:
        parts = [part for part in re.split(r"[/\\]", reference.split("+")[-1]) if part not in ("", ".", "..")]
        if len(parts) > 1 and re.fullmatch(r"(model|pytorch_model|adapter_model)\.[a-z]+", parts[-1]):
            parts.pop()
        last = re.sub(r"\.(safetensors|bin|pt|pth|ckpt)$", "", parts[-1] if parts else "model")
        stems.append(re.sub(r"[^\w.\[\]-]+", "-", last).strip(".-"))
    return _unique(stems)


def _unique(stems: Sequence[str]) -> list[str]:
    """Return the stems, cut to a length for folders; those that occur twice or are reserved get numbers."""
    names: list[str] = []
    taken = set(RESERVED)
    for stem in stems:
        stem = stem[:60] or "model"
        name, number = stem, 2
        while _fold_name(name) in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(_fold_name(name))
        names.append(name)
    return names
