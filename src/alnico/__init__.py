"""alnico merges neural networks in weight space.

>>> import alnico
>>> alnico.methods()["ties"].summary
'Trim each task vector, elect a sign for each parameter, average the entries that agree with it.'

The names below are the public interface; see docs/python.md for what is stable. Importing this package loads neither
numba nor torch nor numpy.
"""

from __future__ import annotations

from alnico._package import make_lazy
from alnico._version import __version__ as __version__

TYPE_CHECKING = False  # importing typing takes half of the time until alnico handles Ctrl-C

if TYPE_CHECKING:
    from alnico import errors as errors
    from alnico import lora as lora
    from alnico import recipe as recipe
    from alnico.analysis.analyze import analyze as analyze
    from alnico.analysis.diff import ModelDiff as ModelDiff
    from alnico.analysis.diff import diff as diff
    from alnico.analysis.inspect import Inspection as Inspection
    from alnico.analysis.inspect import inspect as inspect
    from alnico.analysis.norm_weights import norm_weights as norm_weights
    from alnico.analysis.results import Analysis as Analysis
    from alnico.analysis.results import read_analysis as read_analysis
    from alnico.analysis.retention import Retention as Retention
    from alnico.analysis.suggest import suggest as suggest
    from alnico.analysis.suggest_rules import Suggestion as Suggestion
    from alnico.api import merge as merge
    from alnico.api import merge_documents as merge_documents
    from alnico.api import methods as methods
    from alnico.api import open_model as open_model
    from alnico.api import plan as plan
    from alnico.api import plan_documents as plan_documents
    from alnico.api import schema as schema
    from alnico.checkpoint.source import Model as Model
    from alnico.engine.average import average as average
    from alnico.engine.complete import complete as complete
    from alnico.engine.norm_weights import NormWeights as NormWeights
    from alnico.engine.retokenize import retokenize as retokenize
    from alnico.engine.run import MergeResult as MergeResult
    from alnico.engine.warm import WarmResult as WarmResult
    from alnico.engine.warm import warm as warm
    from alnico.evaluation.compare import compare as compare
    from alnico.evaluation.evaluate import evaluate as evaluate
    from alnico.evaluation.scorecard import Scorecard as Scorecard
    from alnico.methods.base import Merge as Merge
    from alnico.methods.base import Method as Method
    from alnico.methods.base import method as method
    from alnico.output.push import push as push
    from alnico.plan.job import Plan as Plan
    from alnico.recipe.from_options import make_recipe as make_recipe
    from alnico.recipe.load import load_recipe as load_recipe
    from alnico.recipe.schema import Recipe as Recipe
    from alnico.store.details import VectorDetails as VectorDetails
    from alnico.store.equip import Equipped as Equipped
    from alnico.store.equip import equip as equip
    from alnico.store.listing import FoundVector as FoundVector
    from alnico.store.listing import FoundVectors as FoundVectors
    from alnico.store.store import Store as Store
    from alnico.store.stored_task_vector import StoredTaskVector as StoredTaskVector
    from alnico.store.unequip import unequip as unequip
    from alnico.store.updating import StoreUpdate as StoreUpdate
    from alnico.store.verify_vectors import StoreVerification as StoreVerification
    from alnico.tune.adamerge import AdaMergingResult as AdaMergingResult
    from alnico.tune.adamerge import adamerge as adamerge
    from alnico.tune.curve.curve import curve as curve
    from alnico.tune.curve.result import Curve as Curve
    from alnico.tune.mixture import build_mixture as build_mixture
    from alnico.tune.search.result import SearchResult as SearchResult
    from alnico.tune.search.search import search as search
    from alnico.tune.search_weights import search_weights as search_weights
    from alnico.tune.soup import Soup as Soup
    from alnico.tune.soup import soup as soup
    from alnico.tune.statistics.batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
    from alnico.tune.statistics.fisher import fisher_statistics as fisher_statistics
    from alnico.tune.statistics.gram import gram_statistics as gram_statistics
    from alnico.tune.statistics.router_inputs import router_statistics as router_statistics
    from alnico.tune.weight_trials import WeightSearch as WeightSearch
    from alnico.values.merge import merge_models as merge_models
    from alnico.values.merge import merge_state_dicts as merge_state_dicts
    from alnico.values.search_scales import ScaleSearch as ScaleSearch
    from alnico.values.search_scales import search_scales as search_scales
    from alnico.values.task_vector import LazyModel as LazyModel
    from alnico.values.task_vector import TaskVector as TaskVector
    from alnico.verification.reproduce import Reproduction as Reproduction
    from alnico.verification.reproduce import reproduce as reproduce
    from alnico.verification.sign import sign as sign
    from alnico.verification.verify import Verification as Verification
    from alnico.verification.verify import verify as verify

    open = open_model
    weights = norm_weights


def _explain(name: str) -> str:
    from alnico.methods import registry

    if name[:1] == "_" or name not in registry():
        return ""
    return f"{name} is a merge method: alnico.merge_models(models, {name!r}). "


def _synonym(name: str) -> str:
    if name[:1] == "_":
        return ""
    from alnico.methods.shared.other_words import synonyms

    known = synonyms("function").get(name)
    return known.words[0] if known is not None else ""


__all__ = make_lazy(
    __name__,
    {
        "": ["errors", "lora", "recipe"],
        "alnico.analysis.analyze": ["analyze"],
        "alnico.analysis.diff": ["ModelDiff", "diff"],
        "alnico.analysis.inspect": ["Inspection", "inspect"],
        "alnico.analysis.norm_weights": ["norm_weights"],
        "alnico.analysis.results": ["Analysis", "read_analysis"],
        "alnico.analysis.retention": ["Retention"],
        "alnico.analysis.suggest": ["suggest"],
        "alnico.analysis.suggest_rules": ["Suggestion"],
        "alnico.api": [
            "merge",
            "merge_documents",
            "methods",
            "open_model",
            "plan",
            "plan_documents",
            "schema",
        ],
        "alnico.checkpoint.source": ["Model"],
        "alnico.engine.average": ["average"],
        "alnico.engine.complete": ["complete"],
        "alnico.engine.norm_weights": ["NormWeights"],
        "alnico.engine.retokenize": ["retokenize"],
        "alnico.engine.run": ["MergeResult"],
        "alnico.engine.warm": ["WarmResult", "warm"],
        "alnico.evaluation.compare": ["compare"],
        "alnico.evaluation.evaluate": ["evaluate"],
        "alnico.evaluation.scorecard": ["Scorecard"],
        "alnico.methods.base": ["Merge", "Method", "method"],
        "alnico.output.push": ["push"],
        "alnico.plan.job": ["Plan"],
        "alnico.recipe.from_options": ["make_recipe"],
        "alnico.recipe.load": ["load_recipe"],
        "alnico.recipe.schema": ["Recipe"],
        "alnico.store.details": ["VectorDetails"],
        "alnico.store.equip": ["Equipped", "equip"],
        "alnico.store.listing": ["FoundVector", "FoundVectors"],
        "alnico.store.store": ["Store"],
        "alnico.store.stored_task_vector": ["StoredTaskVector"],
        "alnico.store.unequip": ["unequip"],
        "alnico.store.updating": ["StoreUpdate"],
        "alnico.store.verify_vectors": ["StoreVerification"],
        "alnico.tune.adamerge": ["AdaMergingResult", "adamerge"],
        "alnico.tune.curve.curve": ["curve"],
        "alnico.tune.curve.result": ["Curve"],
        "alnico.tune.mixture": ["build_mixture"],
        "alnico.tune.search.result": ["SearchResult"],
        "alnico.tune.search.search": ["search"],
        "alnico.tune.search_weights": ["search_weights"],
        "alnico.tune.soup": ["Soup", "soup"],
        "alnico.tune.statistics.batchnorm": ["recalibrate_batchnorm"],
        "alnico.tune.statistics.fisher": ["fisher_statistics"],
        "alnico.tune.statistics.gram": ["gram_statistics"],
        "alnico.tune.statistics.router_inputs": ["router_statistics"],
        "alnico.tune.weight_trials": ["WeightSearch"],
        "alnico.values.merge": ["merge_models", "merge_state_dicts"],
        "alnico.values.search_scales": ["ScaleSearch", "search_scales"],
        "alnico.values.task_vector": ["LazyModel", "TaskVector"],
        "alnico.verification.reproduce": ["Reproduction", "reproduce"],
        "alnico.verification.sign": ["sign"],
        "alnico.verification.verify": ["Verification", "verify"],
    },
    ["__version__"],
    _explain,
    _synonym,
)
