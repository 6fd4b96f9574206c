"""Claims about candidates that are merged on a GPU, checked in numba-cuda's simulator: ``python -m evaluation.simulated_candidates CLAIM``.

The simulator is chosen before numba is imported, so each claim has a process of its own (test_candidates_on_a_gpu.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import alnico
from alnico.devices import Device, made_gpus
from alnico.evaluation import candidates as of_candidates
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.placement import ModulePlacement
from alnico.recipe.load import load_recipe
from made import family

GPU = Device("cuda:0", "Made", 1 << 30)
SHAPE: dict[str, Any] = {"vocabulary": 16, "hidden": 8, "layers": 1}


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are values equal, or next to each other in their dtype?"""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}  # fmt: skip
    a, b = (value.contiguous().view(bits[value.dtype]).long() for value in (one, other))
    return one.dtype == other.dtype and bool(((a - b).abs() <= 1).all())


def recipes(base: Any, names: list[str]) -> list[dict[str, Any]]:
    return [
        {"merge_method": "linear", "models": names},
        {"merge_method": "ties", "base_model": base, "models": names, "parameters": {"density": 0.4}},
        {"merge_method": "passthrough", "models": names[:1]},
    ]


def checkpoints_are_merged_where_they_are_scored() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = family(Path(folder), 2, dtype="BF16", **SHAPE)
        names = [str(path) for path in tuned]
        with made_gpus([GPU]), Candidates([*names, str(base)], placement=ModulePlacement((GPU,))) as made:
            assert made._gpu is GPU
            modules = []
            for recipe in recipes(str(base), names):
                candidate = made.make(load_recipe(recipe))
                assert candidate.plan.devices == (GPU,)
                modules.append(candidate.module("causal"))
                state = modules[-1].state_dict()
                assert {value.dtype for value in state.values()} == {torch.bfloat16}
                with Candidates([*names, str(base)]) as processor:
                    expected = processor.make(load_recipe(recipe)).state()
                    assert all(near(state[n], value) for n, value in expected.items())
                    assert all(torch.equal(state[n], value) for n, value in candidate.state().items())
            assert all(module is modules[0] for module in modules)


def modules_in_memory_are_merged_where_they_are_scored() -> None:
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(6, 5) for name in ("base", "a", "b")}
    expected = alnico.merge_models([models["a"], models["b"]], "ties", base=models["base"], density=0.5)
    recipe = {
        "merge_method": "ties", "base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.5}, "unrelated": "allow",
    }  # fmt: skip
    with made_gpus([GPU]), Candidates(models, placement=ModulePlacement((GPU,), "bfloat16")) as made:
        assert made._gpu is GPU
        module = made.make(load_recipe(recipe)).model()
        assert near(module.weight, expected.weight.to(torch.bfloat16))
    with (
        made_gpus([GPU]),
        Candidates({n: m.state_dict() for n, m in models.items()}, placement=ModulePlacement((GPU,))) as made,
    ):
        assert made._gpu is None  # a function gets the dict on the processor
        assert torch.equal(made.make(load_recipe(recipe)).model()["weight"], expected.weight)


def a_gpu_with_too_little_memory_leaves_merges_to_the_processor() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = family(Path(folder), 2, dtype="BF16", **SHAPE)
        names = [str(path) for path in tuned]
        stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        small = Device("cuda:0", "Made", 2 * stored)
        with made_gpus([small]), Candidates(names, placement=ModulePlacement((small,))) as made:
            assert made._gpu is None
            assert not made.make(load_recipe(recipes(str(base), names)[0])).plan.devices[0].is_gpu
        given = of_candidates.Resident.merge

        def full(self: Any, plan: Any) -> Any:
            if plan.devices[0].is_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return given(self, plan)

        of_candidates.Resident.merge = full  # type: ignore[method-assign]
        with made_gpus([GPU]), Candidates(names, placement=ModulePlacement((GPU,))) as made:
            for _ in range(2):
                candidate = made.make(load_recipe(recipes(str(base), names)[0]))
                assert not candidate.plan.devices[0].is_gpu
                assert candidate.module("causal").lm_head.weight.dtype == torch.bfloat16


CLAIMS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        checkpoints_are_merged_where_they_are_scored,
        modules_in_memory_are_merged_where_they_are_scored,
        a_gpu_with_too_little_memory_leaves_merges_to_the_processor,
    )
}


if __name__ == "__main__":
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    warnings.simplefilter("ignore")
    CLAIMS[sys.argv[1]]()
