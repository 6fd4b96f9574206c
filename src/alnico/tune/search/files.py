"""Writes the files of a search: the best recipes, all trials, the report and the page."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from alnico.analysis.page import has_report
from alnico.checkpoint.output_path import result_folder
from alnico.checkpoint.overwrite import is_search
from alnico.errors import OutputError, visible
from alnico.folders import open_new, write_new
from alnico.recipe.reference import relative_reference, replace_references, resolve_reference
from alnico.recipe.schema import Recipe
from alnico.tune.search.page import search_page
from alnico.tune.search.result import SearchResult
from alnico.tune.search.samplers.request import Trial

STUDY, BEST, TABLE, RESULT, PAGE = "study.db", "best.yml", "trials.csv", "search.json", "search.html"

OLDER = re.compile(r"best(-\d+)?\.yml")
"""Matches the names of recipes that a search writes."""


def search_folder(out: str | os.PathLike[str]) -> Path:
    """Create the folder of a search, or reuse it. Errors: OutputError for a folder with other files."""
    folder = result_folder(out, "a search", is_search)
    if (folder / STUDY).is_symlink():  # SQLite would follow it
        raise OutputError(
            f"{folder / STUDY}: is a link; expected the study of a search. Choose a new folder, or remove it."
        )
    return folder


def write_search(result: SearchResult, folder: Path) -> tuple[Path, ...]:
    """Write the files of a search, replacing those of an earlier run; returns the paths of the recipes.

    ``best.yml``, or ``best-1.yml`` and so on for the points of a Pareto front; ``trials.csv``, ``search.json``, and ``search.html``
    if the extra [report] is installed. Errors: OutputError.
    """
    names = [BEST] if len(result.best) == 1 else [f"best-{i + 1}.yml" for i in range(len(result.best))]
    try:
        for old in folder.iterdir():
            if OLDER.fullmatch(old.name):
                old.unlink()
        for name, recipe, trial in zip(names, result.recipes, result.best, strict=True):
            write_new(folder / name, _headed(result, trial) + relocate(recipe, folder, result.objects).text)
        _table(folder / TABLE, result)
        write_new(folder / RESULT, json.dumps(result.data(), indent=1) + "\n")
        (folder / PAGE).unlink(missing_ok=True)
        if has_report():
            write_new(folder / PAGE, search_page(result))
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). Make room or choose another "
            "folder."
        ) from None
    return tuple(folder / name for name in names)


def _headed(result: SearchResult, trial: Trial) -> str:
    values = ", ".join(
        f"{visible(o.name)} {v:.6g}" for o, v in zip(result.objectives, trial.values, strict=True)
    )
    head = f"# Trial {trial.number} of {len(result.trials)} of a search: {values} on the search examples.\n"
    if result.objects:
        head += f"# In memory, so this recipe cannot be merged from files: {', '.join(map(visible, result.objects))}.\n"
    return head


def relocate(recipe: Recipe, folder: Path, objects: Collection[str] = ()) -> Recipe:
    """Return the recipe with relative model paths rewritten for ``folder``. ``objects`` are labels, not paths."""
    there = {
        r: relative_reference(resolve_reference(r, recipe.folder), folder)
        for r in recipe.references
        if r not in objects
    }
    return replace_references(recipe, {old: new for old, new in there.items() if old != new})


def _table(path: Path, result: SearchResult) -> None:
    objectives = [o.name for o in result.objectives]
    tasks = list(dict.fromkeys(name for t in result.trials for name, _ in t.scores))
    with open_new(path) as file:
        writer = csv.writer(file)
        writer.writerow(
            map(
                spreadsheet_cell,
                [
                    "trial",
                    "state",
                    "seconds",
                    *objectives,
                    *(f"task {n}" for n in tasks),
                    *result.dimensions,
                    "reason",
                ],
            )
        )
        for trial in result.trials:
            values: Sequence[Any] = trial.values or [""] * len(objectives)
            scores = dict(trial.scores)
            row = [
                trial.number,
                trial.state,
                trial.seconds or "",
                *values,
                *(scores.get(n, "") for n in tasks),
            ]
            writer.writerow(
                map(
                    spreadsheet_cell,
                    [*row, *(trial.point.get(n, "") for n in result.dimensions), trial.reason],
                )
            )


def spreadsheet_cell(value: Any) -> Any:
    """Escape text that a spreadsheet would read as a formula; write numbers with all digits."""
    if isinstance(value, float):
        return repr(value)
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )
