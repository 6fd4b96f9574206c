"""Suggests a recipe for models of one base: analyzes them and applies the rules."""

from __future__ import annotations

import os
from pathlib import Path

from alnico.analysis.analyze import analyze
from alnico.analysis.plan_check import check_plan, recheck, relocate
from alnico.analysis.results import AnalysedModel, Analysis, read_analysis
from alnico.analysis.suggest_rules import Suggestion, nothing_left, suggest_recipe
from alnico.checkpoint.reference import Paths, path_list
from alnico.errors import AlnicoError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.run_options import DEFAULT_BUDGET_BYTES, Size


@counts_compiling
@ieee_arithmetic()
def suggest(
    models: Paths = (),
    *,
    base: str | os.PathLike[str] | None = None,
    analysis: Analysis | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = ".",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Suggestion:
    """Suggest a recipe for models of one base, with reasons: the rules of docs/choosing.md.

    The models are analyzed, except those that cannot be merged with the base. Give either ``base`` and
    ``models``, or ``analysis``.

    Options:
        models: Models: directories, files, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        analysis: A finished analysis to use instead of base and models: its folder.
        folder: Folder in which the recipe will be; paths in the recipe are relative to it.
    Errors: as for :func:`analyze`.
    """
    if (base is None or not models) if analysis is None else (base is not None or bool(models)):
        raise AlnicoError("suggest needs a base and models, or an analysis alone.")
    left_out: list[str] = []
    if analysis is not None:
        measured = analysis if isinstance(analysis, Analysis) else read_analysis(analysis)
        fits = recheck(measured, offline=offline)
    else:
        origin, *others = (
            AnalysedModel(os.fspath(m), os.fspath(m)) for m in (base or "", *path_list(models))
        )
        every = [check_plan(origin, other, offline=offline) for other in others]
        left_out = [
            f"{m.name} is left out: {f.refused}" for m, f in zip(others, every, strict=True) if f.refused
        ]
        fits = tuple(f for f in every if not f.refused)
        usable = [m.reference for m, f in zip(others, every, strict=True) if not f.refused]
        if not usable:
            return nothing_left(left_out)
        measured = analyze(
            usable, base=origin.reference, memory=memory, threads=threads, offline=offline, watch=watch
        )
    return suggest_recipe(relocate(measured, Path(folder)), fits, left_out=left_out)
