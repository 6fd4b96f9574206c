"""Which specialists are merged together: all four, fewer, and in other shapes."""

from __future__ import annotations

from quality_decoder.bench import Models
from quality_decoder.questions import QUESTIONS
from quality_decoder.variants import VARIANTS
from quality_decoder.ways import ARITHMETIC, TSV, Way

ALL = Models(tuple(QUESTIONS))
FEWER = tuple(Models(tasks) for tasks in (("bbc", "senti"), ("senti", "wnlex")))
SHAPES = tuple(Models(ALL.tasks, name) for name in VARIANTS)
WAYS_OF_SETS: tuple[Way, ...] = (ARITHMETIC, TSV)


def name_of(models: Models) -> str:
    """Return what a set is called in tables."""
    if models.variant:
        return VARIANTS[models.variant].words
    return ", ".join(models.tasks)
