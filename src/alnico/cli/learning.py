"""Learned coefficients and their course, as text for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

import numpy as np

from alnico.cli.printing import Page, page, say
from alnico.tune.adamerge import AdaMergingResult, LearningStep, group_of

TOLD = 20
"""Steps of a course that are told, about."""

COLUMN = 10
"""Room for the name of a model."""


def step_watch(steps: int) -> Callable[[LearningStep], None]:
    """Print some of the steps to stderr, evenly spread, and the last."""
    every = max(1, steps // TOLD)

    def watch(step: LearningStep) -> None:
        if step.number % every == 0 or step.number in (1, steps):
            losses = "  ".join(f"{task} {loss:.3f}" for task, loss in step.losses.items())
            say(f"step {step.number}/{steps}  entropy {step.loss:.4f}  {losses}")

    return watch


def note_lines(found: AdaMergingResult, tasks: str) -> list[str]:
    """What the coefficients were learned on, and which of them were not."""
    inputs = ", ".join(f"{task} {count}" for task, count in found.used.items())
    lines = [
        f"note: learned on inputs of {tasks}, without labels ({inputs}); a score on them is no honest one, take other examples."
    ]
    if found.fixed:
        lines.append(
            f"note: {len(found.fixed)} of {len(found.groups)} coefficients a model stayed as they began, as no input depends on them: "
            f"{', '.join(found.fixed[:3])}{', ...' if len(found.fixed) > 3 else ''}."
        )
    if found.left_out:
        first, why = next(iter(found.left_out.items()))
        lines.append(
            f"note: {len(found.left_out)} tensors have no part in the entropy and are merged as the model began: {first} ({why})"
            f"{' and others' if len(found.left_out) > 1 else ''}."
        )
    return lines


def coefficients_text(found: AdaMergingResult, verbose: int) -> Page:
    """A table: a row for each group, or the means of layers where each tensor has its own (with ``verbose`` every tensor)."""
    rows = dict(zip(found.groups, found.coefficients, strict=True))
    what: str = found.per
    if found.per == "tensor" and not verbose:
        what, layers = "mean of", dict[str, list[np.ndarray]]()
        for group, row in rows.items():
            layers.setdefault(group_of(group, "layer"), []).append(row)
        rows = {layer: np.mean(parts, axis=0) for layer, parts in layers.items()}
    width = max(len(what), *map(len, rows)) if rows else len(what)
    names = [PurePath(model).name[-COLUMN:] for model in found.models]
    lines = [f"{what:{width}}  {'  '.join(f'{name:>{COLUMN}}' for name in names)}"]
    lines += [
        f"{group:{width}}  {'  '.join(f'{value:{COLUMN}.4f}' for value in row)}"
        for group, row in rows.items()
    ]
    return page(lines)
