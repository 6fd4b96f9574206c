"""Every parameter that mergekit 0.1.5 has for a method is known here: as an option, by an alias, or as one without effect."""

from __future__ import annotations

import pytest

import alnico

SPARSE = {"normalize": True, "lambda": 0.9, "int8_mask": True, "rescale": True, "weight": 0.5, "density": 0.5}

PARAMETERS = {
    "linear": {"weight": 0.5, "normalize": True},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5, "nuslerp_row_wise": False, "nuslerp_flatten": True},
    "multislerp": {"weight": 0.5, "normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "passthrough": {"scale": 0.5},
    "model_stock": {"filter_wise": False},
    "arcee_fusion": {},
    "nearswap": {"t": 0.3},
    "sce": {"int8_mask": True, "select_topk": 0.5},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "task_arithmetic": SPARSE,
    "ties": SPARSE,
    "dare_linear": SPARSE,
    "dare_ties": SPARSE,
    "breadcrumbs": SPARSE | {"gamma": 0.01},
    "breadcrumbs_ties": SPARSE | {"gamma": 0.01},
    "della": SPARSE | {"epsilon": 0.15},
    "della_linear": SPARSE | {"epsilon": 0.15},
}
"""From mergekit 0.1.5's registry."""

MODELS = {"passthrough": 1, "slerp": 1, "nearswap": 1, "arcee_fusion": 1}
"""How many are merged besides the base, where it is not two."""


@pytest.mark.parametrize("method", PARAMETERS)
def test_a_parameter_of_mergekit_is_known(method: str) -> None:
    recipe = {"merge_method": method, "models": [f"m{i}" for i in range(MODELS.get(method, 2))]}
    if alnico.methods()[method].base != "unused":
        recipe["base_model"] = "base"
    assert alnico.load_recipe(recipe | {"parameters": PARAMETERS[method]}).merge_method == method
