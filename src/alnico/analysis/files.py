"""Writes the files of an analysis: summary.json, and tables and a summary for each model."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from alnico.analysis.results import (
    LEVELS,
    SUMMARY,
    Analysis,
    DeltaStatistics,
    Pair,
    ScopeStatistics,
    TensorScope,
)
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.output_path import result_folder
from alnico.errors import ModelError, OutputError
from alnico.folders import open_new, write_new

STATISTICS = "per_param_stats.csv"
COSINES = "pairwise_cosines.csv"
MOVERS = {"top50_by_l2.csv": "l2", "top50_by_maxabs.csv": "max_abs"}
TOP = 50
PAGE = "report.html"
PICTURE = "group_l2_bar.png"
MAP = "map.png"

OWN = (COSINES, PAGE, MAP, "retention.json", "retention.csv", SUMMARY)
"""All files of the folder of an analysis; the summary is written last."""

OF_MODEL = (STATISTICS, *MOVERS, PICTURE, SUMMARY)
"""All files of a model's folder in it."""

_PLACE = ("tensor", "group", "layer", "module", "dtype", "shape")
_NUMBERS = (
    "elements", "l2", "l1", "relative_l2", "relative_l1", "max_abs", "mean", "std", "skewness", "excess_kurtosis", "unchanged",
    "effective_sparsity",
)  # fmt: skip
_OF_PAIRS = (
    "cosine",
    "distance",
    "sign_conflict",
    "weighted_sign_conflict",
    "top_overlap",
    "top_sign_conflict",
)


def report_folder(out: str | os.PathLike[str], is_half_written: bool = False) -> Path:
    """Create the folder of a report.

    An older analysis in it is replaced, also an incomplete one (``is_half_written``). Errors: OutputError for
    a file of that name, a folder with other files, and a folder that is not writable.
    """
    return result_folder(out, "an analysis", lambda folder: is_half_written or _older(folder) is not None)


def _older(folder: Path) -> list[str] | None:
    """Return the names of the models of an analysis in a folder; None if there is no analysis."""
    try:
        data = read_json(folder / SUMMARY)
        names = [str(model["name"]) for model in data["models"]] if "quantile_error" in data else None
    except (ModelError, KeyError, TypeError):
        return None
    return names


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write the numbers of an analysis; ``summary.json`` is written last, so it marks a complete analysis.

    Only the files of an older analysis are removed. Errors: OutputError, also if the folder of a model has
    other files.
    """
    try:
        for model in analysis.models:
            own = folder / model.name
            if own.is_symlink():
                raise OutputError(
                    f"{own}: is a link; the tables of {model.name} go into a folder of that name. Choose a "
                    "new folder, or remove it."
                )
            if own.exists() and not (own.is_dir() and all(path.name in OF_MODEL for path in own.iterdir())):
                raise OutputError(
                    f"{own}: contains files that are not from an analysis; the tables of {model.name} go "
                    "there. Choose a new folder."
                )
        _remove(folder)
        for index, model in enumerate(analysis.models):
            own = folder / model.name
            own.mkdir(exist_ok=True)
            changed = [(t, c) for t in analysis.tensors if (c := t.changes[index]) is not None]
            _table(own / STATISTICS, changed)
            for name, key in MOVERS.items():
                _table(own / name, sorted(changed, key=lambda item: -getattr(item[1], key))[:TOP])
            write_new(own / SUMMARY, json.dumps(_of_model(analysis, index), indent=1) + "\n")
        _pairs(folder / COSINES, analysis)
        whole = folder / (SUMMARY + ".tmp")
        write_new(whole, json.dumps(analysis.data()) + "\n")
        os.replace(whole, folder / SUMMARY)  # readers see the whole file, an older one, or none
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). Make room or choose another "
            "folder."
        ) from None


def _remove(folder: Path) -> None:
    """Remove the files of an older analysis, and the folders of its models if they are then empty."""
    for name in _older(folder) or []:
        own = folder / name
        # Anyone may have written the summary.
        if name and Path(name).name == name != ".." and own.is_dir() and not own.is_symlink():
            for file in OF_MODEL:
                (own / file).unlink(missing_ok=True)
            if not any(own.iterdir()):
                own.rmdir()
    for file in OWN:
        (folder / file).unlink(missing_ok=True)


def _of_model(analysis: Analysis, index: int) -> dict[str, Any]:
    model = analysis.models[index]
    whole = analysis.whole.changes[index]
    assert whole is not None
    skipped = [s for s in analysis.skipped if s.model in (None, model.reference)]

    def changes(scopes: Iterable[tuple[str, ScopeStatistics]]) -> dict[str, Any]:
        return {name: vars(c) for name, scope in scopes if (c := scope.changes[index]) is not None}

    return {
        "model": model.reference,
        "base": analysis.base.reference,
        "global_l2": whole.l2,
        "global_l1": whole.l1,
        "n_params_considered": whole.elements,
        "skipped_params": [{"name": s.tensor, "elements": s.elements, "reason": s.reason} for s in skipped],
        "whole": vars(whole),
        "groups": changes(analysis.groups.items()),
        "layers": changes((str(number), scope) for number, scope in analysis.layers.items()),
    }


def _table(path: Path, rows: Sequence[tuple[TensorScope, DeltaStatistics]]) -> None:
    columns: dict[str, Callable[[TensorScope, DeltaStatistics], Any]] = {
        name: _number(name) for name in _NUMBERS
    }
    columns |= {f"q{level * 100:g}": _quantile(place) for place, level in enumerate(LEVELS)}
    with open_new(path) as file:
        writer = csv.writer(file)
        writer.writerow([*_PLACE, *columns])
        for tensor, change in rows:
            shape = "x".join(map(str, tensor.shape))
            place = (
                tensor.name,
                tensor.group,
                "" if tensor.layer is None else tensor.layer,
                tensor.module,
                tensor.dtype,
                shape,
            )
            writer.writerow(
                [*map(_safe, place), *(_text(value(tensor, change)) for value in columns.values())]
            )


def _number(name: str) -> Callable[[TensorScope, DeltaStatistics], Any]:
    return lambda _, change: getattr(change, name)


def _quantile(place: int) -> Callable[[TensorScope, DeltaStatistics], Any]:
    return lambda _, change: change.quantiles[place]


def _pairs(path: Path, analysis: Analysis) -> None:
    scopes = [("whole", "", analysis.whole), *(("group", name, s) for name, s in analysis.groups.items())]
    scopes += [("layer", str(number), s) for number, s in analysis.layers.items()]
    with open_new(path) as file:
        writer = csv.writer(file)
        writer.writerow(["scope", "name", "model", "other", *_OF_PAIRS, "subspace_left", "subspace_right"])
        for kind, name, scope in scopes:
            for pair in scope.pairs:
                models = (analysis.models[i].name for i in pair.models)
                writer.writerow([kind, name, *map(_safe, models), *map(_text, _of_pair(pair))])


def _of_pair(pair: Pair) -> list[float | None]:
    sides = [None, None] if pair.subspace is None else [pair.subspace.left, pair.subspace.right]
    return [*(getattr(pair, name) for name in _OF_PAIRS), *sides]


def _safe(value: Any) -> Any:
    """A name that a spreadsheet does not take for a formula."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def _text(value: float | int | None) -> str:
    return "" if value is None else repr(value)
