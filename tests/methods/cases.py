"""Settings of every method for the tests over the registry. A method without settings here fails those tests."""

from __future__ import annotations

from typing import Any

import pytest

PER_MODEL = "per model"
POSITIVE = "per model, above 0"
STATISTICS = "one directory a model"
"""Stands for statistics that methods.sides writes."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"weight": PER_MODEL}, {"weight": PER_MODEL, "normalize": False}],
    "passthrough": [{}, {"scale": [0.5]}],
    "slerp": [{"t": 0.3}, {"t": 0.0}, {"t": 1.4}, {"t": 0.4, "over": "row"}],
    "task_arithmetic": [{}, {"weight": PER_MODEL, "scale": 0.4}, {"weight": PER_MODEL, "divide": "weight"}],
    "ties": [
        {},
        {"density": 0.3, "weight": PER_MODEL},
        {"density": 0.2, "elect": "mass", "divide": "count", "scale": 0.8},
        {"density": 0.5, "elect": "count", "divide": "none", "rescale": "l1"},
        {"density": 0.5, "elect": "count", "tie": "plus", "weight": PER_MODEL},
        {"density": 0.5, "rescale": "inverse"},
    ],
    "dare_linear": [
        {},
        {"density": 0.4, "weight": PER_MODEL},
        {"density": 0.4, "rescale": "inverse", "divide": "weight"},
    ],
    "dare_ties": [
        {},
        {"density": 0.6, "weight": PER_MODEL},
        {"density": 0.3, "rescale": "none", "elect": "mass", "tie": "none"},
        {"density": 0.7, "trim": 0.3, "weight": PER_MODEL},
    ],
    "breadcrumbs": [
        {},
        {"density": 0.3, "gamma": 0.05, "weight": PER_MODEL, "scale": 0.3},
        {"density": 0.9, "gamma": 0.4, "rescale": "l1", "divide": "weight"},
    ],
    "breadcrumbs_ties": [
        {},
        {"density": 0.4, "weight": PER_MODEL},
        {"density": 0.4, "gamma": 0.0, "divide": "weight", "elect": "mass"},
    ],
    "della": [
        {},
        {"density": 0.6, "weight": PER_MODEL},
        {"density": 0.4, "epsilon": 0.3, "rescale": "none", "divide": "none"},
    ],
    "della_linear": [
        {},
        {"density": 0.5, "weight": PER_MODEL},
        {"density": 0.3, "epsilon": 0.1, "rescale": "inverse", "divide": "weight"},
    ],
    "karcher": [{}, {"weight": POSITIVE}, {"weight": POSITIVE, "max_iter": 2}],
    "geometric_median": [{}, {"weight": POSITIVE, "max_iter": 2}, {"weight": POSITIVE}],
    "perpendicular": [{}, {"weight": PER_MODEL}],
    "train_difference": [{}, {"strength": 0.6}],
    "model_stock": [{}, {"filter_wise": True}],
    "multislerp": [{}, {"weight": PER_MODEL}, {"weight": PER_MODEL, "normalize_weights": False}],
    "nearswap": [{"t": 0.05}, {"t": 0.0}, {"t": 0.2}],
    "nuslerp": [
        {"weight": [1.0, 3.0]},
        {"weight": [0.6, 0.4], "flatten": False, "row_wise": True},
        {"weight": [0.6, 0.4], "flatten": False},
    ],
    "sce": [{}, {"select_topk": 0.1}, {"select_topk": 0.6}],
    "magmax": [{}, {"weight": PER_MODEL, "scale": 0.5}],
    "emr": [{}, {"weight": PER_MODEL, "scale": 0.6}],
    "consensus": [{}, {"threshold": 0.9, "at_least": 1, "weight": PER_MODEL, "scale": 0.5}],
    "ram": [{}, {"epsilon": 0.1}],
    "arcee_fusion": [{}],
    "pcb": [{}, {"density": 0.5, "weight": PER_MODEL, "scale": 1.2}],
    "fisher": [
        {"fisher": STATISTICS},
        {"fisher": STATISTICS, "weight": POSITIVE, "normalize": False},
        {"fisher": STATISTICS, "weight": POSITIVE, "floor": 0.5},
    ],
    "regmean": [
        {"gram": STATISTICS},
        {"gram": STATISTICS, "weight": POSITIVE, "alpha": 1.0, "ridge": 1e-3},
        {"gram": STATISTICS, "weight": POSITIVE, "alpha": 0.3, "normalize": True},
        {"gram": STATISTICS, "weight": POSITIVE, "vectors": "inputs"},
        {"gram": STATISTICS, "vectors": "inputs", "normalize": True},
    ],
    "tsv": [
        {},
        {"calibrate": "none", "weight": PER_MODEL, "scale": 1.3},
        {"rank": 0.4, "least": 0.1, "weight": PER_MODEL, "others": "sum", "others_scale": 0.5},
    ],
    "dc_merge": [
        {},
        {"calibrate": "none", "density": 0.02, "rank": 0.6, "weight": PER_MODEL, "scale": 1.3},
    ],
    "swudi": [
        {},
        {
            "calibrate": "none",
            "vectors": "all",
            "filter": "time",
            "time": 40.0,
            "weight": PER_MODEL,
            "scale": 0.7,
        },
    ],
    "iso_c": [{}, {"calibrate": "none", "weight": PER_MODEL, "scale": 1.3}],
    "iso_cts": [{}, {"calibrate": "none", "weight": PER_MODEL, "common": 0.5, "scale": 1.3}],
    "svd": [{}, {"calibrate": "projection", "energy": 0.6, "weight": PER_MODEL}],
    "resmerge": [{}, {"head": 3, "budget": 0.5, "beta_min": 0.2, "weight": PER_MODEL, "scale": 1.3}],
    "ramplus_tl": [{}, {"epsilon": 0.15, "r": 0.4, "alpha": 3.0}],
}

MODELS = {
    "slerp": (2,), "train_difference": (2,), "passthrough": (1,), "nuslerp": (2,), "nearswap": (1,),
    "fisher": (3,), "regmean": (2,), "magmax": (3,), "emr": (3,), "consensus": (3,), "ram": (3,), "ramplus_tl": (3,), "arcee_fusion": (2,), "pcb": (3,),
}  # fmt: skip
"""How many values a method gets, where it does not take any number, or is tried with one: each is a compilation of its own."""


OVER_MODEL: dict[str, list[dict[str, Any]]] = {
    "ties": [{"density": 0.3, "scope": "model"}, {"density": 0.2, "scope": "model", "rescale": "l1"}],
}
"""Settings that look at all tensors of a model together: for the laws; the references merge a tensor at a time."""

LEAST = {"model_stock": 2, "perpendicular": 2}
"""The least number of values besides the base, where it is not 1."""

BY_NOISE = ("dare_linear", "dare_ties", "della", "della_linear")


def counts(method: str) -> tuple[int, ...]:
    return MODELS.get(method, tuple(k for k in (1, 2, 3, 8) if k >= LEAST.get(method, 1)))


def options(setting: dict[str, Any], count: int) -> dict[str, Any]:
    """Spell out per-model values: a list of one number a model."""
    weights = [1.0, 0.7, 1.3, -0.4, 0.25, 0.9, 1.1, 0.6, 0.35, 0.8, 1.2, 0.45]
    each = (
        "density",
        "trim",
        "gamma",
        "threshold",
        *(("epsilon",) if "density" in setting else ()),
    )  # ram has one epsilon for all
    spelled = {}
    for name, value in setting.items():
        if value == PER_MODEL:
            value = weights[:count]
        elif value == POSITIVE:
            value = [abs(w) for w in weights[:count]]
        elif value == STATISTICS:
            value = [STATISTICS] * count
        elif name in each and not isinstance(value, list):
            value = [value] * count
        spelled[name] = value
    return spelled


IN_EACH_RUN = ("linear", "ties", "dare_ties", "della")
"""Methods that are compiled before each merge; each kind of argument is among theirs. A kernel takes seconds to compile."""


def compiles(name: str) -> list[pytest.MarkDecorator]:
    """The marks of a method's case in a test that compiles its kernels."""
    return [] if name in IN_EACH_RUN else [pytest.mark.costly]
