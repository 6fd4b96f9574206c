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
    from alnico.analysis.diff import ModelDiff as ModelDiff
    from alnico.analysis.inspect import Inspection as Inspection
    from alnico.analysis.inspect import inspect as inspect
    from alnico.analysis.results import Analysis as Analysis
    from alnico.analysis.results import read_analysis as read_analysis
    from alnico.analysis.retention import Retention as Retention
    from alnico.analysis.suggest import Suggestion as Suggestion
    from alnico.api import adamerge as adamerge
    from alnico.api import analyze as analyze
    from alnico.api import compare as compare
    from alnico.api import diff as diff
    from alnico.api import evaluate as evaluate
    from alnico.api import fisher_statistics as fisher_statistics
    from alnico.api import gram_statistics as gram_statistics
    from alnico.api import load_recipe as load_recipe
    from alnico.api import merge as merge
    from alnico.api import merge_documents as merge_documents
    from alnico.api import merge_models as merge_models
    from alnico.api import merge_state_dicts as merge_state_dicts
    from alnico.api import methods as methods
    from alnico.api import norm_weights as norm_weights
    from alnico.api import open_model as open_model
    from alnico.api import plan as plan
    from alnico.api import plan_documents as plan_documents
    from alnico.api import push as push
    from alnico.api import reproduce as reproduce
    from alnico.api import schema as schema
    from alnico.api import search as search
    from alnico.api import sign as sign
    from alnico.api import soup as soup
    from alnico.api import suggest as suggest
    from alnico.api import verify as verify
    from alnico.checkpoint.source import Model as Model
    from alnico.engine.norm_weights import NormWeights as NormWeights
    from alnico.engine.run import MergeResult as MergeResult
    from alnico.evaluation.scorecard import Scorecard as Scorecard
    from alnico.methods.base import Merge as Merge
    from alnico.methods.base import Method as Method
    from alnico.methods.base import method as method
    from alnico.plan.job import Plan as Plan
    from alnico.recipe.schema import Recipe as Recipe
    from alnico.tune.adamerge import AdaMergingResult as AdaMergingResult
    from alnico.tune.search.result import SearchResult as SearchResult
    from alnico.tune.soup import Soup as Soup
    from alnico.tune.statistics.batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
    from alnico.values.search_scales import ScaleSearch as ScaleSearch
    from alnico.values.search_scales import search_scales as search_scales
    from alnico.values.task_vector import LazyModel as LazyModel
    from alnico.values.task_vector import TaskVector as TaskVector
    from alnico.verification.reproduce import Reproduction as Reproduction
    from alnico.verification.verify import Verification as Verification

__all__ = make_lazy(
    __name__,
    {
        "": ["errors", "lora"],
        "alnico.analysis.diff": ["ModelDiff"],
        "alnico.analysis.inspect": ["Inspection", "inspect"],
        "alnico.analysis.results": ["Analysis", "read_analysis"],
        "alnico.analysis.retention": ["Retention"],
        "alnico.analysis.suggest": ["Suggestion"],
        "alnico.api": [
            "adamerge",
            "analyze",
            "compare",
            "diff",
            "evaluate",
            "fisher_statistics",
            "gram_statistics",
            "load_recipe",
            "merge",
            "merge_documents",
            "merge_models",
            "merge_state_dicts",
            "methods",
            "norm_weights",
            "open_model",
            "plan",
            "plan_documents",
            "push",
            "reproduce",
            "schema",
            "search",
            "sign",
            "soup",
            "suggest",
            "verify",
        ],
        "alnico.checkpoint.source": ["Model"],
        "alnico.engine.norm_weights": ["NormWeights"],
        "alnico.engine.run": ["MergeResult"],
        "alnico.evaluation.scorecard": ["Scorecard"],
        "alnico.methods.base": ["Merge", "Method", "method"],
        "alnico.plan.job": ["Plan"],
        "alnico.recipe.schema": ["Recipe"],
        "alnico.tune.adamerge": ["AdaMergingResult"],
        "alnico.tune.search.result": ["SearchResult"],
        "alnico.tune.soup": ["Soup"],
        "alnico.tune.statistics.batchnorm": ["recalibrate_batchnorm"],
        "alnico.values.search_scales": ["ScaleSearch", "search_scales"],
        "alnico.values.task_vector": ["LazyModel", "TaskVector"],
        "alnico.verification.reproduce": ["Reproduction"],
        "alnico.verification.verify": ["Verification"],
    },
    ["__version__"],
)
