"""Unties the models of a merge where one of them has a head of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from alnico.checkpoint.duplicate_tensors import find_original
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.tied_weights import tied_copies
from alnico.checkpoint.untied_model import UntiedModel
from alnico.plan import families
from alnico.plan.planned_model import PlannedModel


def untie_heads(sources: Sequence[Source], donor: int) -> list[Source]:
    """Give every model a head of its own where the donor's config ties a head that another model has of its
    own.

    The output has the donor's config. If that ties the head to the embedding, a head that was trained by
    itself would be left out, or ignored when the output is loaded. Tied models are then read as models that
    store their head, which equals their embedding, and the config says that it is not tied. A head that its own
    model's config ties, or that has the bytes of its embedding, is none of its own. Reads the head and the
    embedding of models that store both and tie neither.
    """
    stored = dict.fromkeys(name for source in sources for name in source.tensors)
    own = [
        head
        for head, embedding in _ties(sources[donor], stored).items()
        if any(_has_own(source, head, embedding) for source in sources)
    ]
    result: list[Source] = []
    for source in sources:
        tied = {head: embedding for head, embedding in _ties(source, own).items() if head in own}
        result.append(UntiedModel(source, tied) if tied else source)
    return result


def _ties(source: Source, heads: Collection[str]) -> dict[str, str]:
    """Map the tensors that a model's config ties to an embedding to that embedding."""
    named = [head for head in heads if head.endswith(tuple(families.TIED))]
    return {
        **families.tied_heads(source.config, source.tensors, named),
        **tied_copies(source.config, source.tensors),
    }


def _has_own(source: Source, head: str, embedding: str) -> bool:
    """Does a model store a head whose values are not those of its embedding, and does its config agree?"""
    if head not in source.tensors or head in _ties(source, [head]):
        return False
    return has_own_values(source, head, embedding)


def has_own_values(source: Source, head: str, embedding: str) -> bool:
    """Do the stored values of a head differ from those of the embedding? The output of a stage that is not merged yet
    counts as one whose values do."""
    if embedding not in source.tensors or isinstance(unwrap(source), PlannedModel):
        return True
    return find_original(source, head, [embedding]) is None
