"""alnico merges neural networks in weight space.

>>> import alnico
>>> alnico.methods()["ties"].summary
'Trim each task vector, elect a sign for each parameter, average the entries that agree with it.'

The names below are the public interface; see docs/python.md for what is stable. Importing this package loads neither
numba nor torch nor numpy.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

TYPE_CHECKING = False  # as type checkers know it: importing typing takes half of the time until Ctrl-C is looked after

if TYPE_CHECKING:
    from typing import Any

    from alnico import errors, lora
    from alnico.analysis.diff import Difference
    from alnico.analysis.kept import Kept
    from alnico.analysis.results import Analysis, read_analysis
    from alnico.analysis.suggest import Suggestion
    from alnico.api import (
        adamerge,
        analyze,
        compare,
        diff,
        evaluate,
        fisher_statistics,
        gram_statistics,
        load_recipe,
        merge,
        merge_all,
        merge_models,
        merge_state_dicts,
        methods,
        open,
        plan,
        plan_all,
        push,
        reproduce,
        search,
        sign,
        soup,
        suggest,
        verify,
        weights,
    )  # fmt: skip
    from alnico.checkpoint.model import Model
    from alnico.engine.reproduce import Reproduction
    from alnico.engine.run import Result
    from alnico.engine.verify import Verification
    from alnico.engine.weigh import Weights
    from alnico.methods.base import Merge, Method, method
    from alnico.plan.job import Plan
    from alnico.recipe.schema import Recipe
    from alnico.tune.adamerging import Learned
    from alnico.tune.recalibrate import recalibrate_batchnorm
    from alnico.tune.scorecard import Scorecard
    from alnico.tune.search_result import SearchResult
    from alnico.tune.soup import Soup
    from alnico.values.scales import ScaleSearch, search_scales
    from alnico.values.task_vector import LazyModel, TaskVector

_PLACES = {
    "merge": "alnico.api",
    "merge_all": "alnico.api",
    "merge_models": "alnico.api",
    "merge_state_dicts": "alnico.api",
    "plan": "alnico.api",
    "plan_all": "alnico.api",
    "load_recipe": "alnico.api",
    "open": "alnico.api",
    "push": "alnico.api",
    "reproduce": "alnico.api",
    "sign": "alnico.api",
    "verify": "alnico.api",
    "adamerge": "alnico.api",
    "analyze": "alnico.api",
    "compare": "alnico.api",
    "diff": "alnico.api",
    "evaluate": "alnico.api",
    "fisher_statistics": "alnico.api",
    "gram_statistics": "alnico.api",
    "search": "alnico.api",
    "soup": "alnico.api",
    "suggest": "alnico.api",
    "weights": "alnico.api",
    "methods": "alnico.api",
    "recalibrate_batchnorm": "alnico.tune.recalibrate",
    "Soup": "alnico.tune.soup",
    "Recipe": "alnico.recipe.schema",
    "Plan": "alnico.plan.job",
    "ScaleSearch": "alnico.values.scales",
    "search_scales": "alnico.values.scales",
    "LazyModel": "alnico.values.task_vector",
    "TaskVector": "alnico.values.task_vector",
    "Reproduction": "alnico.engine.reproduce",
    "Result": "alnico.engine.run",
    "Verification": "alnico.engine.verify",
    "Weights": "alnico.engine.weigh",
    "Analysis": "alnico.analysis.results",
    "Learned": "alnico.tune.adamerging",
    "SearchResult": "alnico.tune.search_result",
    "Suggestion": "alnico.analysis.suggest",
    "read_analysis": "alnico.analysis.results",
    "Scorecard": "alnico.tune.scorecard",
    "Difference": "alnico.analysis.diff",
    "Kept": "alnico.analysis.kept",
    "Model": "alnico.checkpoint.model",
    "Method": "alnico.methods.base",
    "Merge": "alnico.methods.base",
    "method": "alnico.methods.base",
}

_ROOMS = ("errors", "lora")
"""Packages that are public as they are."""

__all__ = [
    "Analysis", "Difference", "Kept", "LazyModel", "Learned", "Merge", "Method", "Model", "Plan", "Recipe", "Reproduction", "Result",
    "ScaleSearch", "Scorecard", "SearchResult", "Soup", "Suggestion", "TaskVector", "Verification", "Weights", "__version__", "adamerge", "analyze", "compare", "diff",
    "errors", "evaluate", "fisher_statistics", "gram_statistics", "load_recipe", "lora", "merge", "merge_all", "merge_models",
    "merge_state_dicts", "method", "methods", "open", "plan", "plan_all", "push", "read_analysis", "recalibrate_batchnorm", "reproduce", "search",
    "search_scales", "sign", "soup", "suggest", "verify", "weights",
]  # fmt: skip


class _Package(ModuleType):
    """Keeps ``alnico.plan`` and ``alnico.methods`` the functions they are to users.

    Importing a room binds its module on the package; two rooms are called like public functions, and those win. Inside
    alnico rooms are imported with ``from alnico.plan.build import ...``, which does not look at the package's attributes.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"alnico.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'alnico' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
