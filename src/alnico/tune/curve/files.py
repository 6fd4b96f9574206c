"""Writes the files of a curve: its page, picture, table, data and best recipe."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alnico.analysis.page import has_report
from alnico.analysis.scores import Estimate
from alnico.checkpoint.output_path import result_folder
from alnico.checkpoint.overwrite import CURVE, is_curve
from alnico.errors import OutputError, visible
from alnico.folders import open_new, write_new
from alnico.tune.curve.result import Curve
from alnico.tune.search.files import spreadsheet_cell

POINTS, DATA, TABLE, BEST, PICTURE, PAGE = CURVE


def curve_folder(out: str | os.PathLike[str]) -> Path:
    """Create the folder of a curve, or reuse it. Errors: OutputError for a folder with other files."""
    return result_folder(out, "a curve", is_curve)


def write_curve(curve: Curve, folder: Path, *, is_on_disk: bool) -> None:
    """Write ``curve.json`` and ``curve.csv``; ``best.yml`` if all models are on disk; with [report] the page and the picture.

    Errors: OutputError.
    """
    from alnico.tune.curve.page import curve_page
    from alnico.tune.curve.picture import write_picture

    try:
        write_new(folder / DATA, json.dumps(curve.data(), indent=1) + "\n")
        _write_table(folder / TABLE, curve)
        for name in (BEST, PICTURE, PAGE):
            (folder / name).unlink(missing_ok=True)
        if is_on_disk:
            write_new(folder / BEST, f"# {_best_line(curve)}\n{curve.recipe(folder)}")
        if has_report():
            write_new(folder / PAGE, curve_page(curve).encode("utf-8", "replace").decode("utf-8"))
            write_picture(curve, folder / PICTURE)
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). Make room or choose another folder."
        ) from None


def _best_line(curve: Curve) -> str:
    best = curve.best
    value = best.on(curve.objective).value
    return (
        f"The best of a curve of {len(curve.points)} points, {curve.place(best.scales)}: {visible(curve.objective)} "
        f"{value:.6g} on the tasks it was chosen by."
    )


def _write_table(path: Path, curve: Curve) -> None:
    names = [task.name for task in curve.tasks]
    has_mean = curve.points[0].mean is not None
    word = "t" if curve.kind == "path" else "scale"
    scales = [word] if len(curve.axes) == 1 else [f"{word} {i + 1}" for i in range(len(curve.axes))]
    heads = ["model", *scales]
    for name in [*names, "mean"] if has_mean else names:
        heads += [name, f"{name} low", f"{name} high"]
    with open_new(path) as file:
        writer = csv.writer(file)
        writer.writerow(map(spreadsheet_cell, heads))
        for model in curve.lines:
            cells = _cells(model.scores, model.mean if has_mean else None)
            writer.writerow(map(spreadsheet_cell, [model.reference, *([""] * len(scales)), *cells]))
        for point in curve.points:
            writer.writerow(
                map(spreadsheet_cell, ["merge", *point.scales, *_cells(point.scores, point.mean)])
            )


def _cells(scores: Mapping[str, Estimate], mean: Estimate | None) -> Iterator[Any]:
    for estimate in (*scores.values(), *([mean] if mean is not None else [])):
        yield from ("" if v is None else v for v in (estimate.value, estimate.low, estimate.high))
