"""What is compared with what: the tensors that base and models have in common, and those that they have not."""

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
"""Names in the folder of a report that no model's folder can have."""

MOST_SUBSPACE_ELEMENTS = 1 << 22
"""Most elements of a matrix whose singular vectors are compared: it is held in float64."""


@dataclass(frozen=True)
class CommonTensor:
    """A tensor of the base with those of the models that fit it: ``models`` are their positions, ``job`` reads them, the base last.

    ``group``, ``layer`` and ``module`` as in :class:`alnico.analysis.results.TensorScope`.
    """

    job: Job
    models: tuple[int, ...]
    group: str
    layer: int | None
    module: str

    def has_subspace(self, side: int) -> bool:
        """Is it a matrix whose smaller side is at most ``side``?"""
        shape = self.job.shape
        return (
            len(shape) == 2
            and 2 <= min(shape) <= side
            and self.job.elements <= MOST_SUBSPACE_ELEMENTS
            and len(self.models) > 1
        )


def subjects_of(base: Source, models: Sequence[Source]) -> tuple[list[CommonTensor], list[Skipped]]:
    """Pair the tensors of a base with those of models, by name and shape; what cannot be compared is named with its reason."""
    subjects, skipped = [], []
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
            subjects.append(CommonTensor(job, tuple(fitting), group_of(name), layer, module))
    for model in models:
        skipped += [
            Skipped(name, model.label, tensor.elements, "the base has no such tensor")
            for name, tensor in model.tensors.items()
            if name not in base.tensors
        ]
    return subjects, skipped


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


def named(sources: Sequence[Source]) -> list[str]:
    """A short name for each model, none that of a file of a report; see :func:`short_names`."""
    return short_names([source.label for source in sources])


def _folded(name: str) -> str:
    """A name as file systems compare it that know no case, and one spelling of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def short_names(references: Sequence[str]) -> list[str]:
    """A short name for each model, fit for a folder: the last part of its path or id, with a number where two would have one.

    Of a model with an adapter, the adapter's; of a file, its folder's where the file has the usual name.

    >>> short_names(["runs/a/model.safetensors", "hub/a", "b"])
    ['a', 'a-2', 'b']
    """
    found: list[str] = []
    taken = set(RESERVED)
    for reference in references:
        parts = [part for part in re.split(r"[/\\]", reference.split("+")[-1]) if part not in ("", ".", "..")]
        if len(parts) > 1 and re.fullmatch(r"(model|pytorch_model|adapter_model)\.[a-z]+", parts[-1]):
            parts.pop()
        short = re.sub(
            r"[^\w.-]+", "-", re.sub(r"\.(safetensors|bin|pt|pth|ckpt)$", "", parts[-1] if parts else "model")
        ).strip(".-")
        stem = short[:60] or "model"
        name, number = stem, 2
        while _folded(name) in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(_folded(name))
        found.append(name)
    return found
