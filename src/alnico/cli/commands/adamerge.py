"""``alnico adamerge``: coefficients of task vectors, learned from inputs without labels."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from alnico.cli.command import CommandCall, command
from alnico.cli.options import JSON, QUIET, REQUIRED, VERBOSE, Flag
from alnico.cli.printing import Page, page, recipe_page, say
from alnico.tune.adamerge import ENTRIES, AdaMergingResult, group_of

COLUMN = 10
"""Room for the name of a model."""


@command(
    "alnico.adamerge",
    fills=("inputs", "names"),
    tasks=Flag(metavar="FILE", default=REQUIRED),
    out=Flag(also=("-o",), is_file=True),
    clamp=Flag(spelled=("--clamp/--no-clamp",), switch=(None, "auto")),
    json=JSON,
    quiet=QUIET,
    verbose=VERBOSE,
)
def run(call: CommandCall) -> None:
    is_silent, out = call.is_quiet or call.is_json, call["out"]
    result = call.invoke()
    call.note(note_lines(result, call["tasks"]))
    call.show(
        result.data,
        lambda: recipe_page(result.recipe) if out is None else coefficients_text(result, call.verbose),
        besides=out,
        indent=None,
        even_quiet=out is None,
    )
    if out is not None:
        say(f"written: {out} and its course", is_silent)


def note_lines(result: AdaMergingResult, tasks: str) -> list[str]:
    """What the coefficients were learned on, and which of them were not."""
    inputs = ", ".join(f"{count} of {task}" for task, count in result.used.items())
    lines = [
        f"learned on inputs of {tasks}, without labels ({inputs}); a score on them is too high, use other examples."
    ]
    if result.fixed:
        lines.append(
            f"{len(result.fixed)} of {len(result.groups)} coefficients per model kept their initial values, as no input depends on them: "
            f"{', '.join(result.fixed[:3])}{', ...' if len(result.fixed) > 3 else ''}."
        )
    if result.left_out:
        first, why = next(iter(result.left_out.items()))
        lines.append(
            f"{len(result.left_out)} tensors do not affect the entropy and are merged with the coefficient of their group: {first} ({why})"
            f"{' and others' if len(result.left_out) > 1 else ''}."
        )
    return lines


def coefficients_text(result: AdaMergingResult, verbose: int) -> Page:
    """A table: a row for each group, or the means of layers where each tensor has its own (with ``verbose`` every tensor)."""
    rows = dict(zip(result.groups, result.coefficients, strict=True))
    what: str = result.per
    if result.per == "tensor" and not verbose:
        what, layers = "mean of", dict[str, list[np.ndarray]]()
        for group, row in rows.items():
            layers.setdefault(group_of(group, "layer"), []).append(row)
        rows = {layer: np.mean(parts, axis=0) for layer, parts in layers.items()}
    width = max(len(what), *map(len, rows)) if rows else len(what)
    names = [PurePath(model).name[-COLUMN:] for model in result.models]
    lines = [f"{what:{width}}  {'  '.join(f'{name:>{COLUMN}}' for name in names)}"]
    lines += [
        f"{group:{width}}  {'  '.join(f'{value:{COLUMN}.4f}' for value in row)}"
        for group, row in rows.items()
    ]
    part = "task vector" if result.method == ENTRIES else "part of the merge"
    lines += ["", f"A coefficient is the share of a model's {part} that the merge adds to the base."]
    return page(lines)
