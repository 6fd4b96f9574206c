"""Merges in memory on a made GPU: where their results are, and what was not changed. The bits: tests/engine/test_gpu_laws.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import alnico
from alnico.devices import Device, made_gpus
from alnico.engine.in_memory import Arrays, Follower, new_arrays
from alnico.errors import AlnicoError, ResourceError
from alnico.models.open_models import open_models
from alnico.run_options import RunOptions

torch = pytest.importorskip("torch")
pytest.importorskip("numba_cuda")

GPUS = [Device("cuda:0", "Made", 8 << 30), Device("cuda:1", "Made", 8 << 30)]


def arrays(count: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"w": random.normal(size=(5, 7)).astype(np.float32), "n": np.array(3)} for _ in range(count)]


def test_numpy_arrays_give_numpy_arrays_on_every_device() -> None:
    first, second, base = arrays()
    expected = alnico.merge_state_dicts([first, second], "ties", base=base, unrelated="allow")
    with made_gpus(GPUS):
        for device in ("cpu", "cuda", "cuda:all", torch.device("cuda", 1)):
            found = alnico.merge_state_dicts(
                [first, second], "ties", base=base, unrelated="allow", device=device
            )
            assert all(isinstance(value, np.ndarray) for value in found.values())
            np.testing.assert_array_equal(found["w"], expected["w"])


def test_modules_and_lazy_models_are_merged_on_a_gpu() -> None:
    modules = [torch.nn.Linear(3, 2) for _ in range(2)]
    before = [module.weight.detach().clone() for module in modules]
    expected = alnico.merge_models(modules, unrelated="allow")
    with made_gpus(GPUS):
        found = alnico.merge_models(modules, unrelated="allow", device="cuda")
        tuned = (alnico.TaskVector(modules[0], modules[1]) * 0.5).on(modules[0])
        state = tuned.state_dict(unrelated="allow", device="cuda")
        target = torch.nn.Linear(3, 2)
        tuned.apply(target, unrelated="allow", device="cuda")
    assert torch.equal(found.weight, expected.weight)
    assert all(torch.equal(module.weight, old) for module, old in zip(modules, before, strict=True))
    assert torch.equal(target.weight, state["weight"])
    assert torch.equal(state["weight"], tuned.state_dict(unrelated="allow")["weight"])


def test_a_result_stays_on_the_gpu_where_an_input_of_it_lives() -> None:
    """torch calls the made GPU `cpu`, so torch tensors live on it, and arrays do not."""
    first, second, _ = arrays()
    tensors = {name: torch.tensor(value) for name, value in first.items()}
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    with made_gpus(GPUS):
        for models, kind in (((tensors, second), torch.Tensor), ((second, first), np.ndarray)):
            opened = open_models(dict(zip("ab", models, strict=True)))
            plan = opened.plan(recipe, run=RunOptions.of(device="cuda"))
            assert {name: type(raw) for name, raw in new_arrays(plan).items()} == {"w": kind, "n": kind}
            opened.close()


def test_a_tensor_on_a_gpu_follows_an_output() -> None:
    values = torch.zeros(6, dtype=torch.bfloat16)
    made: dict[str, Any] = {"w": torch.zeros(24, dtype=torch.uint8)}
    output = Arrays(made, {"w": [Follower(values, "F32")]})
    output.write("w", 8, memoryview(np.float32([1, 2, 3, 4]).view(np.uint8)))
    assert values.tolist() == [0, 0, 1, 2, 3, 4]
    assert made["w"].view(torch.float32).tolist() == [0, 0, 1, 2, 3, 4]
    back = bytearray(8)
    output.read_into("w", 12, memoryview(back))
    assert np.frombuffer(back, np.float32).tolist() == [2, 3]


def test_a_device_that_is_none_or_does_not_exist_is_one_error() -> None:
    models = arrays(2)
    with pytest.raises(AlnicoError, match="device is 'gpu'; expected auto"):
        alnico.merge_state_dicts(models, device="gpu")
    with made_gpus([]), pytest.raises(ResourceError) as caught:
        alnico.merge_state_dicts(models, device="cuda")
    assert str(caught.value) == (
        "device is cuda; no GPU can be used here (the machine has no GPU). Choose cpu, or fix that."
    )
