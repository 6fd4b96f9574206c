"""Reads the ``search`` key of a recipe: objective, sampler, limits and storage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from alnico.recipe import scalars
from alnico.recipe.load import SEARCH_KEYS, read_source
from alnico.recipe.misspelt_keys import correct_keys
from alnico.recipe.yaml_nodes import DOCUMENT_KEYS, Node, ParseContext, compose, holds_anchors
from alnico.tune.search.samplers.registry import SAMPLERS
from alnico.tune.search.space import SearchSpace, read_space

KEYS = {
    "objective": "mean (of all tasks), the name of a task, or a list of these to find the Pareto front.",
    "sampler": "tpe, cmaes, nsga2, random, dirichlet or grid.",
    "trials": "The number of recipes to try, including those of earlier runs.",
    "seed": "The seed of the sampler.",
    "storage": "Where trials are stored: an optuna address such as sqlite:///study.db. Needs --allow-code.",
    "study": "The name of the study in the storage; default search.",
    "tasks": "The tasks file that the search optimises.",
    "report": "A tasks file used only for the report, never for the search; or `same` for the search tasks, whose scores are optimistic.",
    "held_out": "The share of each task's examples that is reserved for the report.",
    "timeout": "Seconds after which no new trial starts.",
    "halving": "Stops trials that score worse on the first examples: true, or fraction and keep.",
    "failures": "The search stops after this many failed trials in a row.",
    "population": "The number of trials in a generation of nsga2.",
    "concentration": "For dirichlet: 1 is uniform, larger favours equal weights, smaller favours single models.",
}
"""The keys of ``search``."""

HALVING_KEYS = {
    "fraction": "The share of the examples that every trial is scored on first.",
    "keep": "The share of trials that continue to the next part, which is 1 / keep times as large.",
}

Objectives = tuple[str, ...]
SAME: Literal["same"] = "same"


@dataclass(frozen=True)
class Halving:
    """Successive halving over examples: Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943."""

    fraction: float = 0.25
    keep: float = 0.5

    def shares(self) -> tuple[float, ...]:
        """Return the growing parts of the examples; each contains the previous one, and the last is all.

        >>> Halving(0.25, 0.5).shares()
        (0.25, 0.5, 1.0)
        """
        shares, share = [], self.fraction
        while share < 1 - 1e-9:
            shares.append(share)
            share /= self.keep
        return (*shares, 1.0)


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search. ``tasks`` and ``report`` are paths as written, relative to the recipe's folder."""

    objective: Objectives = ("mean",)
    sampler: str = "tpe"
    trials: int = 100
    seed: int = 0
    storage: str | None = None
    study: str = "search"
    tasks: str | None = None
    report: str | None = None
    held_out: float | None = None
    timeout: float | None = None
    halving: Halving | None = None
    failures: int = 5
    population: int = 20
    concentration: float = 1.0

    def data(self) -> dict[str, Any]:
        """Return the settings that decide which recipes are tried and how they are scored."""
        halving = None if self.halving is None else [self.halving.fraction, self.halving.keep]
        own = {"nsga2": self.population, "dirichlet": self.concentration}.get(self.sampler)
        return {
            "objective": list(self.objective), "sampler": [self.sampler, own], "seed": self.seed, "held_out": self.held_out,
            "halving": halving,
        }  # fmt: skip


def read_search(
    source: str | os.PathLike[str] | Mapping[str, Any], *, allow_code: bool = False
) -> tuple[SearchSpace, SearchSettings]:
    """Read a recipe with values to search, from a YAML file, YAML text with a line break, or a mapping.

    The space is checked at its corners. Without ``allow_code`` a ``storage`` is a mistake, because it opens or creates
    any database with any driver. Errors: RecipeError, with one line per mistake.
    """
    text, name, folder, has_lines = read_source(source, "search")
    reading = ParseContext(name, has_lines)
    documents = compose(text, reading)
    if len(documents) > 1:
        reading.broken(
            documents[1].root.line,
            "a second document begins; expected one recipe. Search one stage at a time.",
        )
    if reading.is_broken or reading.mistakes:
        raise reading.error()
    root = documents[0].root
    if not isinstance(root.value, dict):
        reading.wrong(root.line, f"is {root.kind}; expected a mapping with at least merge_method and models.")
        raise reading.error()
    root = correct_keys(root, reading, SEARCH_KEYS)
    keys = {key: value for key, value in root.value.items() if not holds_anchors(key, value, DOCUMENT_KEYS)}
    settings = _settings(keys.pop("search", None), reading, allow_code)
    if "checkpoints" in keys:  # listed once: the run may go on during the search
        from alnico.recipe.checkpoints import with_models

        keys = with_models(keys, folder, reading)
    space = read_space(Node(keys, root.line), name, folder, reading)
    if reading.mistakes:
        raise reading.error()
    space.check()
    return space, settings


def _settings(node: Node | None, reading: ParseContext, allow_code: bool) -> SearchSettings:
    values: dict[str, Any] = {}
    if node is None:
        return SearchSettings()
    keys = scalars.mapping(node, "search", KEYS, "a mapping with at least tasks", reading)
    for key in ("storage", "study", "tasks", "report"):
        values[key] = scalars.text(keys.get(key), f"search.{key}", reading)
    if values["storage"] is not None and not allow_code:
        reading.wrong(
            keys["storage"].line,
            f"search.storage is {values['storage'][:100]!r}, a database that would be opened or created; "
            "expected none: without it trials are stored in the folder of --out. If you trust the author of "
            "this file, use --allow-code (in Python allow_code=True).",
        )
    for key, least in (("trials", 1), ("failures", 1), ("population", 2)):
        values[key] = scalars.integer(keys.get(key), f"search.{key}", least, reading)
    for key, below in (("timeout", None), ("concentration", None), ("held_out", 1.0)):
        values[key] = _positive(keys.get(key), f"search.{key}", below, reading)
    values["seed"] = scalars.seed(keys.get("seed"), reading)
    for key, read in (("sampler", _sampler), ("objective", _objective), ("halving", _halving)):
        values[key] = read(keys[key], reading) if key in keys else None
    settings = SearchSettings(**{key: value for key, value in values.items() if value is not None})
    if settings.report is not None and settings.held_out is not None:
        reading.wrong(
            keys["held_out"].line,
            "search.report and search.held_out are both given; expected one of them. Remove one.",
        )
    if settings.halving is not None and len(settings.objective) > 1:
        reading.wrong(
            keys["halving"].line,
            f"search.halving compares trials by one objective, and there are {len(settings.objective)}. "
            "Remove it, or objectives.",
        )
    return settings


def _positive(node: Node | None, where: str, below: float | None, reading: ParseContext) -> float | None:
    if node is None:
        return None
    number = scalars.finite_number(node, where, node.line, reading)
    if number is not None and (number <= 0 or (below is not None and number >= below)):
        expected = "a number above 0" if below is None else f"a share above 0 and below {below:g}"
        reading.wrong(node.line, f"{where} is {number:g}; expected {expected}.")
        return None
    return number


def _sampler(node: Node, reading: ParseContext) -> str | None:
    if node.value in list(SAMPLERS):
        return str(node.value)
    reading.wrong(node.line, f"search.sampler is {node.kind}; expected one of {', '.join(SAMPLERS)}.")
    return None


def _objective(node: Node, reading: ParseContext) -> Objectives:
    listed = node.value if isinstance(node.value, list) else [node]
    names = [n for item in listed if (n := scalars.text(item, "search.objective", reading)) is not None]
    if not listed or len(set(names)) < len(names):
        reading.wrong(
            node.line,
            "search.objective is empty or lists a name twice; expected mean, a task, or a list of them.",
        )
    return tuple(names) or ("mean",)


def _halving(node: Node, reading: ParseContext) -> Halving | None:
    if isinstance(node.value, bool):
        return Halving() if node.value else None
    keys = scalars.mapping(
        node, "search.halving", HALVING_KEYS, "true, or a mapping with fraction and keep", reading
    )
    halving = Halving()
    for key in HALVING_KEYS:
        share = _positive(keys.get(key), f"search.halving.{key}", 1.0, reading)
        if share is not None:
            halving = replace(halving, **{key: share})
    return halving
