"""The ``search`` key of a recipe: what is sought, how, how long, and where trials are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from alnico.recipe import scalars
from alnico.recipe.context import holds_anchors
from alnico.recipe.load import read_source
from alnico.recipe.yaml_nodes import DOCUMENT_KEYS, Node, ParseContext, compose
from alnico.tune.search.samplers.registry import SAMPLERS
from alnico.tune.search.space import SearchSpace, read_space

KEYS = {
    "objective": "mean (of all tasks), a task's name, or a list of these: then the Pareto front is sought.",
    "sampler": "tpe, cmaes, nsga2, random, dirichlet or grid.",
    "trials": "How many recipes are tried, those of earlier runs among them.",
    "seed": "What the sampler draws from.",
    "storage": "Where trials are kept: an address of optuna such as sqlite:///study.db. Needs --allow-code.",
    "study": "The study's name in the storage; search if not given.",
    "tasks": "The file of tasks that are searched on.",
    "report": "A file of tasks that are reported on and never searched on; or `same`: the tasks searched on, which flatter.",
    "held_out": "The share of each task's examples that is kept from the search, for the report.",
    "timeout": "Seconds after which no trial begins.",
    "halving": "Trials that are behind on the first examples are given up: true, or fraction and keep.",
    "failures": "After so many failed trials in a row the search stops.",
    "population": "Trials in a generation of nsga2.",
    "concentration": "Of dirichlet: 1 is uniform, more keeps to equal weights, less goes to single models.",
}
"""The keys of ``search``."""

HALVING_KEYS = {
    "fraction": "The share of the examples that every trial is scored on.",
    "keep": "The share of trials that go on from one part to the next, which is 1 / keep as large.",
}

Objectives = tuple[str, ...]
SAME: Literal["same"] = "same"


@dataclass(frozen=True)
class Halving:
    """Successive halving over examples: Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943."""

    fraction: float = 0.25
    keep: float = 0.5

    def shares(self) -> tuple[float, ...]:
        """The parts of the examples, each holding the one before; the last is all.

        >>> Halving(0.25, 0.5).shares()
        (0.25, 0.5, 1.0)
        """
        found, share = [], self.fraction
        while share < 1 - 1e-9:
            found.append(share)
            share /= self.keep
        return (*found, 1.0)


@dataclass(frozen=True)
class SearchSettings:
    """How a search is done. ``tasks`` and ``report`` are paths as written, from the recipe's folder."""

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
        """What of it decides which recipes are tried and how they are scored."""
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

    The space is checked at its corners. Without ``allow_code`` a ``storage`` is a mistake: a database is opened or made wherever it says,
    with the drivers it names. Errors: RecipeError, with one line for every mistake.
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
    keys = {key: value for key, value in root.value.items() if not holds_anchors(key, value, DOCUMENT_KEYS)}
    settings = _settings(keys.pop("search", None), reading, allow_code)
    space = read_space(Node(keys, root.line), name, folder, reading)
    if reading.mistakes:
        raise reading.error()
    space.check()
    return space, settings


def _settings(node: Node | None, reading: ParseContext, allow_code: bool) -> SearchSettings:
    given: dict[str, Any] = {}
    if node is None:
        return SearchSettings()
    keys = scalars.mapping(node, "search", KEYS, "a mapping with at least tasks", reading)
    for key in ("storage", "study", "tasks", "report"):
        given[key] = scalars.text(keys.get(key), f"search.{key}", reading)
    if given["storage"] is not None and not allow_code:
        reading.wrong(
            keys["storage"].line,
            f"search.storage is {given['storage'][:100]!r}, a database that would be opened or made; expected none: without it trials are kept in "
            "the folder of --out. If you trust whoever wrote this file, say --allow-code (in Python allow_code=True).",
        )
    for key, least in (("trials", 1), ("failures", 1), ("population", 2)):
        given[key] = scalars.integer(keys.get(key), f"search.{key}", least, reading)
    for key, below in (("timeout", None), ("concentration", None), ("held_out", 1.0)):
        given[key] = _positive(keys.get(key), f"search.{key}", below, reading)
    given["seed"] = scalars.seed(keys.get("seed"), reading)
    for key, read in (("sampler", _sampler), ("objective", _objective), ("halving", _halving)):
        given[key] = read(keys[key], reading) if key in keys else None
    settings = SearchSettings(**{key: value for key, value in given.items() if value is not None})
    if settings.report is not None and settings.held_out is not None:
        reading.wrong(
            keys["held_out"].line,
            "search.report and search.held_out are both given; expected one of them. Remove one.",
        )
    if settings.halving is not None and len(settings.objective) > 1:
        reading.wrong(
            keys["halving"].line,
            f"search.halving gives up trials by one objective, and there are {len(settings.objective)}. Remove it, or objectives.",
        )
    return settings


def _positive(node: Node | None, where: str, below: float | None, reading: ParseContext) -> float | None:
    if node is None:
        return None
    number = scalars.finite_number(node, where, node.line, reading)
    if number is not None and (number <= 0 or (below is not None and number >= below)):
        wanted = "a number above 0" if below is None else f"a share above 0 and below {below:g}"
        reading.wrong(node.line, f"{where} is {number:g}; expected {wanted}.")
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
            "search.objective is empty or names one twice; expected mean, a task, or a list of them.",
        )
    return tuple(names) or ("mean",)


def _halving(node: Node, reading: ParseContext) -> Halving | None:
    if isinstance(node.value, bool):
        return Halving() if node.value else None
    keys = scalars.mapping(
        node, "search.halving", HALVING_KEYS, "true, or a mapping with fraction and keep", reading
    )
    given = Halving()
    for key in HALVING_KEYS:
        share = _positive(keys.get(key), f"search.halving.{key}", 1.0, reading)
        if share is not None:
            given = replace(given, **{key: share})
    return given
