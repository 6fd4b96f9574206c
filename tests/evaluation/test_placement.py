"""Modules on a GPU are those that transformers loads in the checkpoint's dtype; made GPUs are torch's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from alnico.devices import Device, made_gpus
from alnico.errors import ResourceError
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loaded_model import load_module, open_subject
from alnico.evaluation.memory_subject import MemorySubject
from alnico.evaluation.module_places import places
from alnico.evaluation.placement import ModulePlacement
from alnico.recipe.load import load_recipe
from made import family
from made_tasks import Made

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch

GPU = Device("cuda:0", "Made", 8 << 30)
OTHER = Device("cuda:1", "Made", 8 << 30)


def on(*gpus: Device, dtype: str = "auto") -> ModulePlacement:
    return ModulePlacement(gpus, dtype)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)]
)
def test_a_gpu_loads_a_checkpoint_in_its_own_dtype(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    base, _ = family(tmp_path, 1, dtype=dtype, vocabulary=64)
    with made_gpus([GPU]):
        module = load_module(base, "causal", "base", placement=on(GPU))
    assert {p.dtype for p in module.parameters()} == {expected}
    assert not module.training
    assert same(module, AutoModelForCausalLM.from_pretrained(base, dtype=expected))


def test_the_placement_may_name_the_dtype(made: Made) -> None:
    with made_gpus([GPU]):
        module = load_module(made.base, "encoder", "base", placement=on(GPU, dtype="bfloat16"))
    assert same(module, AutoModel.from_pretrained(made.base, dtype=torch.bfloat16))
    on_the_processor = load_module(made.base, "encoder", "base", placement=ModulePlacement(dtype="bfloat16"))
    assert same(module, on_the_processor)


def test_candidates_on_a_gpu_have_the_dtype_of_the_merge(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, dtype="BF16", vocabulary=64)
    names = [str(t) for t in tuned]
    with made_gpus([GPU]), Candidates([*names, str(base)], placement=on(GPU)) as candidates:
        modules = []
        for weight in (0.3, 0.9):
            recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": names, "parameters": {"weight": weight}}  # fmt: skip
            candidate = candidates.make(load_recipe(recipe))
            modules.append(candidate.module("causal"))
            state = candidate.state()
            assert all(torch.equal(modules[-1].state_dict()[n], v) for n, v in state.items())
            assert {p.dtype for p in modules[-1].parameters()} == {torch.bfloat16}
        assert modules[0] is modules[1]
