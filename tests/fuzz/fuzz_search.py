"""A recipe with values to search, whose space is checked at its corners."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.methods import registry
from alnico.recipe.keys import TOP
from alnico.tune.search.samplers.registry import SAMPLERS
from alnico.tune.search.settings import HALVING_KEYS, KEYS, read_search
from fuzz.harness import Target


def read(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yml"
    path.write_bytes(data)
    read_search(path)


def seeds() -> list[bytes]:
    models = {
        "merge_method": "ties",
        "base_model": "b",
        "models": ["a", {"model": "c", "parameters": {"weight": {"search": [0, 1]}}}],
    }
    inputs = [
        {**models, "parameters": {"density": {"search": [0.1, 1.0]}, "rescale": {"choice": ["l1", "none"]}}, "search": {"trials": 5}},
        {**models, "merge_method": {"choice": ["ties", "linear"]}, "search": {"objective": ["mean"], "sampler": "nsga2", "seed": 1}},
        {"merge_method": "slerp", "base_model": "b", "models": ["b", "a"], "parameters": {"t": [{"search": [0, 1]}, 0.5, {"search": [0, 1]}]}},
        {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": [{"filter": "mlp", "value": {"search": [0, 1]}}, 0.5]},
         "search": {"sampler": "dirichlet", "halving": {"fraction": 0.5, "keep": 0.5}, "held_out": 0.25}},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (*TOP, *list(registry())[:8], *KEYS, *HALVING_KEYS, *SAMPLERS, "search", "choice", "stack", "simplex")
TARGET = Target(read, seeds, WORDS)
