"""Finds the recipe keys that a model needs to merge with its base, by planning from headers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alnico.analysis.results import AnalysedModel, Analysis
from alnico.analysis.suggest_rules import Fit, reference
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.reference import is_path, split_adapter
from alnico.checkpoint.source import Source
from alnico.errors import HubError, MismatchError, ModelError
from alnico.plan.build import build_plan
from alnico.plan.compatibility import FEW
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import relative_reference
from alnico.run_options import Access, RunOptions
from alnico.vocabulary.compare import difference, read_vocabulary
from alnico.vocabulary.tables import find_tables

RecipeKeys = dict[str, Any]
InMemory = Mapping[str, Source]
"""Models in memory by their labels; others are opened by their references."""


def check_plan(
    base: AnalysedModel,
    model: AnalysedModel,
    in_memory: InMemory = MappingProxyType({}),
    *,
    offline: bool = False,
) -> Fit:
    """Plan the model with its base, adding keys until the plan succeeds.

    The keys tried are: a union of vocabularies, or the base's without padding; the base's tensor where only a
    few have another shape; ``missing: copy`` where only a few are missing. Errors: ModelError, HubError for
    models that cannot be opened.
    """
    is_adapter = model.reference not in in_memory and split_adapter(model.reference, is_path) is not None
    names = reference(base), reference(model)

    def open_one(name: str) -> Source:
        return in_memory[name] if name in in_memory else open_model(name, access=Access(offline))

    def refusal_of(keys: RecipeKeys) -> str:
        """Return why the plan of the base and the model fails; empty if it succeeds."""
        recipe = {"merge_method": "task_arithmetic", "base_model": names[0], "models": [names[1]], **keys}
        try:
            plan = build_plan(
                load_recipe(recipe),
                run=RunOptions(offline=offline),
                open_source=open_one if in_memory.keys() & set(names) else None,
            )
        except MismatchError as error:
            return str(error)
        for source in plan.sources:
            source.close()
        return ""

    refusal = refusal_of({}) if names[0] != names[1] else ""
    if not refusal:
        return Fit(is_adapter)
    ways = _ways(*map(open_one, names))
    for count in range(1, len(ways) + 1):
        for chosen in combinations(ways, count):
            keys: RecipeKeys = {name: value for keys, _ in chosen for name, value in keys.items()}
            if not refusal_of(keys):
                return Fit(is_adapter, keys, "; ".join(why for _, why in chosen) + ".")
    return Fit(is_adapter, refused=refusal.partition("\n")[0])


def _ways(base: Source, model: Source) -> list[tuple[RecipeKeys, str]]:
    """Return keys that may make two models fit, each with the reason; closes the models."""
    try:
        ways = [_vocabulary(base, model)]
        most = FEW * max(len(base.tensors), len(model.tensors))
        others = [
            n for n, t in base.tensors.items() if n in model.tensors and model.tensors[n].shape != t.shape
        ]
        tables = {*find_tables(base).rows, *find_tables(model).rows}
        others = [n for n in others if n not in tables]
        if 0 < len(others) <= most:
            rules = [{"filter": f"={n}", "merge_method": "passthrough", "model": "base"} for n in others]
            ways.append(({"methods": rules}, f"{_some(others)}: another shape, taken from the base"))
        absent = [*(base.tensors.keys() ^ model.tensors.keys())]
        if 0 < len(absent) <= most:
            ways.append(({"missing": "copy"}, f"{_some(sorted(absent))}: in only one of the two, copied"))
        return ways
    finally:
        base.close()
        model.close()


def _vocabulary(base: Source, model: Source) -> tuple[RecipeKeys, str]:
    ours, theirs = (read_vocabulary(s.directory) for s in (base, model))
    mismatch = difference(ours, theirs) if ours is not None and theirs is not None else None
    if ours is not None and theirs is not None and mismatch is None and ours.size == theirs.size:
        return {
            "tokenizer": {"source": "base"}
        }, "its vocabulary is the base's with another number of rows: the rows of tokens are merged"
    return {
        "tokenizer_source": "union"
    }, f"its vocabulary is not the base's ({mismatch or 'other tokens'}): the output has the tokens of all"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def recheck(
    analysis: Analysis, in_memory: InMemory = MappingProxyType({}), *, offline: bool = False
) -> tuple[Fit, ...]:
    """Check the models of an earlier analysis again; a model that cannot be opened is reported as unknown."""

    def check(model: AnalysedModel) -> Fit:
        try:
            return check_plan(analysis.base, model, in_memory, offline=offline)
        except (ModelError, HubError) as error:
            return Fit(note=f"it is not known whether its vocabulary fits. {error}")

    return tuple(check(model) for model in analysis.models)


def relocate(analysis: Analysis, folder: Path, in_memory: InMemory = MappingProxyType({})) -> Analysis:
    """Return the analysis with relative model paths rewritten for ``folder``; labels stay as they are."""
    base, *models = (
        m
        if m.reference in in_memory
        else dataclasses.replace(m, reference=relative_reference(m.reference, folder))
        for m in (analysis.base, *analysis.models)
    )
    return dataclasses.replace(analysis, base=base, models=tuple(models))
