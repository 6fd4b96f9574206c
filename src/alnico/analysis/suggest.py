"""Suggests a recipe for models of one base: analyzes them and applies the rules."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from alnico.analysis.measure import analyze_sources
from alnico.analysis.plan_check import InMemory, check_plan, recheck, relocate
from alnico.analysis.results import AnalysedModel, Analysis, read_analysis
from alnico.analysis.suggest_rules import Fit, Suggestion, nothing_left, reference, suggest_recipe
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import unwrap
from alnico.errors import AlnicoError
from alnico.events import Watcher
from alnico.kernels.clock import counts_compiling
from alnico.models.open_models import AnyModel, AnyModels, name_model, name_models, open_sources
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.recipe.load import load_recipe
from alnico.run_options import DEFAULT_BUDGET_BYTES, RunOptions, Size


@counts_compiling
@ieee_arithmetic()
def suggest(
    models: AnyModels = (),
    *,
    base: AnyModel | None = None,
    analysis: Analysis | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = ".",
    memory: Size = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    offline: bool = False,
    watch: Watcher | None = None,
) -> Suggestion:
    """Suggest a recipe for models of one base, with reasons: the rules of docs/choosing.md.

    The models are analyzed, except those that cannot be merged with the base. Give either ``base`` and
    ``models``, or ``analysis``. Both may also be in memory, of every kind that :func:`alnico.merge_models`
    takes; ``suggestion.merge()`` merges them, and also models on disk, without writing files.

    Options:
        models: Models: directories, files, URLs, or owner/name@revision on the hub.
        base: The model that the others were tuned from.
        analysis: A finished analysis to use instead of base and models: its folder.
        folder: Folder in which the recipe will be; paths in the recipe are relative to it.
    Errors: as for :func:`analyze`.
    """
    run = RunOptions.of(memory=memory, threads=threads, offline=offline, watch=watch)
    has_models = not isinstance(models, (list, tuple)) or bool(models)
    if (base is None or not has_models) if analysis is None else (base is not None or has_models):
        raise AlnicoError("suggest needs a base and models, or an analysis alone.")
    if analysis is not None:
        measured = analysis if isinstance(analysis, Analysis) else read_analysis(analysis)
        return _suggestion(measured, recheck(measured, offline=offline), folder)
    named = name_models(models)
    base_label = name_model(base, "base", named)
    with ExitStack() as opened:
        sources = open_sources([(base_label, base), *named.items()], base=base, access=run.access)
        for source in sources:
            opened.enter_context(closing(source))
        in_memory = {s.label: s for s in sources if isinstance(unwrap(s), MemoryModel)}
        origin, *others = (AnalysedModel(label, label) for label in (base_label, *named))
        every = [check_plan(origin, other, in_memory, offline=offline) for other in others]
        left_out = [
            f"{m.name} is left out: {f.refused}" for m, f in zip(others, every, strict=True) if f.refused
        ]
        usable = [s for s, f in zip(sources[1:], every, strict=True) if not f.refused]
        if not usable:
            return nothing_left(left_out)
        measured = analyze_sources(sources[0], usable, run=run)
        fits = [f for f in every if not f.refused]
        return _suggestion(measured, fits, folder, left_out, in_memory, {base_label: base, **named})


def _suggestion(
    analysis: Analysis,
    fits: Sequence[Fit],
    folder: str | os.PathLike[str],
    left_out: Sequence[str] = (),
    in_memory: InMemory = MappingProxyType({}),
    models: Mapping[str, Any] = MappingProxyType({}),
) -> Suggestion:
    """Suggest a recipe whose paths are relative to ``folder``, with the models by their names in it."""
    moved = relocate(analysis, Path(folder), in_memory)
    suggestion = suggest_recipe(moved, fits, left_out=left_out, in_memory=in_memory)
    if suggestion.recipe is None:
        return suggestion
    before, after = ((a.base, *a.models) for a in (analysis, moved))
    recipe = yaml.safe_load(suggestion.recipe)
    used = [recipe["base_model"], *load_recipe(recipe).references]  # the base first, as the module to copy
    by_name = {
        reference(new): models.get(old.reference, reference(old)) if old.commit is None else reference(old)
        for new, old in zip(after, before, strict=True)
    }
    return dataclasses.replace(suggestion, models={name: by_name[name] for name in used if name in by_name})
