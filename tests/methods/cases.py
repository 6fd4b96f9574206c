"""Settings of every method for the tests over the registry. A method without settings here fails those tests."""

from __future__ import annotations

from typing import Any

PER_MODEL = "per model"

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"weight": PER_MODEL}, {"weight": PER_MODEL, "normalize": False}],
    "passthrough": [{}, {"scale": [0.5]}],
    "slerp": [{"t": 0.3}, {"t": 0.0}, {"t": 1.4}],
    "task_arithmetic": [{}, {"weight": PER_MODEL, "scale": 0.4}, {"weight": PER_MODEL, "divide": "weight"}],
    "ties": [
        {},
        {"density": 0.3, "weight": PER_MODEL},
        {"density": 0.2, "elect": "mass", "divide": "count", "scale": 0.8},
        {"density": 0.5, "elect": "count", "divide": "none", "rescale": "l1"},
        {"density": 0.5, "rescale": "inverse"},
    ],
    "dare_linear": [{}, {"density": 0.4, "weight": PER_MODEL}, {"density": 0.4, "rescale": "inverse", "divide": "weight"}],
    "dare_ties": [{}, {"density": 0.6, "weight": PER_MODEL}, {"density": 0.3, "rescale": "none", "elect": "mass"}],
}

MODELS = {"slerp": (2,), "passthrough": (1,)}
"""How many values a method gets, where it does not take any number."""


def counts(method: str) -> tuple[int, ...]:
    return MODELS.get(method, (1, 2, 3, 5, 8))


def options(setting: dict[str, Any], count: int) -> dict[str, Any]:
    """Spell out per-model values: a list of one number a model."""
    weights = [1.0, 0.7, 1.3, -0.4, 0.25, 0.9, 1.1, 0.6, 0.35, 0.8, 1.2, 0.45]
    spelled = {}
    for name, value in setting.items():
        if value == PER_MODEL:
            value = weights[:count]
        elif name == "density" and not isinstance(value, list):
            value = [value] * count
        spelled[name] = value
    return spelled
