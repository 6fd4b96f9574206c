"""Networks in memory are looked at before they are merged, as files are; small ones, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.engine.relatedness import LEAST_ELEMENTS
from alnico.errors import MismatchError, RecipeError

torch.set_num_threads(1)

ADVICE = 'Use models tuned from one base, or pass unrelated="allow".'


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 1
        )
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return found


def perceptron(*widths: int) -> nn.Module:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two layers": (lambda: perceptron(196, 64, 10), (196,)),
    "a transformer": (Attention, ()),
}


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name][0]()


def trained(name: str, start: nn.Module, task: int, steps: int, rate: float) -> nn.Module:
    """A copy, trained on data of its own: classes that a random linear map of the inputs says."""
    random = torch.Generator().manual_seed(task)
    shape = NETWORKS[name][1]
    inputs = (
        torch.randn(256, *shape, generator=random)
        if shape
        else torch.randint(0, 50, (256, 8), generator=random)
    )
    flat = inputs.flatten(1) if shape else nn.functional.one_hot(inputs, 50).sum(1).float()
    classes = (flat @ torch.randn(flat.shape[1], 10, generator=random)).argmax(1)
    module = copy.deepcopy(start)
    adam = torch.optim.Adam(module.parameters(), rate)
    for step in range(steps):
        batch = torch.arange(step * 32, step * 32 + 32) % len(inputs)
        loss = nn.functional.cross_entropy(module(inputs[batch]), classes[batch])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return module


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """The name of a network, and one that was trained: a base to tune from."""
    return request.param, trained(request.param, made(request.param, 0), 0, 60, 1e-3)


@pytest.mark.parametrize(("steps", "rate"), [(10, 1e-3), (80, 1e-2)], ids=["lightly", "heavily"])
def test_networks_tuned_from_one_base_are_merged(
    network: tuple[str, nn.Module], steps: int, rate: float
) -> None:
    name, base = network
    models = [trained(name, base, task, steps, rate) for task in (1, 2)]
    merged = alnico.merge_models(models, "linear").state_dict()
    one, other = (m.state_dict() for m in models)
    for key, value in merged.items():
        expected = (one[key].double() + other[key].double()) / 2
        assert torch.allclose(value.double(), expected, atol=1e-6), key
    (alnico.TaskVector(models[0], base) + base).state_dict()


def test_networks_of_one_untrained_start_are_merged(network: tuple[str, nn.Module]) -> None:
    name, _ = network
    alnico.merge_models([trained(name, made(name, 0), task, 60, 3e-3) for task in (1, 2)], "linear")


@pytest.mark.parametrize("steps", [0, 40])
def test_networks_of_two_starts_are_refused(network: tuple[str, nn.Module], steps: int) -> None:
    name, _ = network
    one, other = (trained(name, made(name, seed), 0, steps, 1e-3) for seed in (1, 2))
    with pytest.raises(MismatchError) as caught:
        alnico.merge_models([one, other], "linear")
    assert str(caught.value).startswith("models[1] and models[0] were not tuned from one base: ")
    assert str(caught.value).endswith(f"a merge of them works like neither. {ADVICE}")


def test_every_merge_in_memory_refuses_them_in_the_words_of_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, stranger = (perceptron(196, 64, 10) for _ in range(2))
    calls: dict[str, Callable[..., Any]] = {
        "modules": lambda **allow: alnico.merge_models([base, stranger], "linear", **allow),
        "a base": lambda **allow: alnico.merge_models(
            [stranger], "task_arithmetic", base=base, weights=[0.5], **allow
        ),
        "dicts": lambda **allow: alnico.merge_state_dicts(
            [base.state_dict(), stranger.state_dict()], **allow
        ),
        "arrays": lambda **allow: alnico.merge_state_dicts(
            [{n: v.numpy() for n, v in m.state_dict().items()} for m in (base, stranger)], **allow
        ),
        "a task vector": lambda **allow: (0.5 * alnico.TaskVector(stranger, base) + base).state_dict(**allow),
        "saved": lambda **allow: (0.5 * alnico.TaskVector(stranger, base) + base).save(
            tmp_path / "out", **allow
        ),
        "applied": lambda **allow: (0.5 * alnico.TaskVector(stranger, base) + base).apply(
            perceptron(196, 64, 10), **allow
        ),
        "scales": lambda **allow: alnico.search_scales(base, [stranger], lambda _: 1.0, trials=2, **allow),
    }
    for name, call in calls.items():
        with pytest.raises(MismatchError) as caught:
            call()
        assert str(caught.value).endswith(ADVICE), name
        assert "recipe" not in str(caught.value), name
        call(unrelated="allow")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_task_vector_of_another_start_is_refused_and_allowed() -> None:
    torch.manual_seed(0)
    base, one = perceptron(196, 64, 10), perceptron(196, 64, 10)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    analogy = alnico.TaskVector(other, one) + base
    with pytest.raises(MismatchError, match=r"were not tuned from one base"):
        analogy.state_dict()
    made = analogy.state_dict(unrelated="allow")
    for name, value in base.state_dict().items():
        assert torch.allclose(made[name], value + 0.01, atol=1e-6)


def test_allowed_models_have_the_mean_of_float64() -> None:
    torch.manual_seed(0)
    one, other = (perceptron(196, 64, 10).state_dict() for _ in range(2))
    merged = alnico.merge_state_dicts([one, other], unrelated="allow")
    for name, value in merged.items():
        assert torch.allclose(value.double(), (one[name].double() + other[name].double()) / 2, atol=1e-7)


def test_networks_too_small_to_tell_are_merged() -> None:
    random = np.random.default_rng(0)
    few = LEAST_ELEMENTS // 2 - 32
    for sizes, is_refused in (((few, few), False), ((few, few + 96), True), ((LEAST_ELEMENTS + 64,), False)):
        one, other = (
            {f"w{i}": random.standard_normal((n // 32, 32)) for i, n in enumerate(sizes)} for _ in range(2)
        )
        if is_refused:
            with pytest.raises(MismatchError, match=r"2 of 2 sampled matrices"):
                alnico.merge_state_dicts([one, other])
        else:
            alnico.merge_state_dicts([one, other])


def test_another_word_than_error_and_allow_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unrelated is .yes.; expected error or allow\."):
        alnico.merge_state_dicts([{"w": np.ones(3)}, {"w": np.ones(3)}], unrelated="yes")
