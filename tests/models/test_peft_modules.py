"""Modules with adapters of PEFT stand for their merged weights; factors are never merged by themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import alnico
from alnico.errors import AlnicoError, MismatchError, ModelError

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        found: torch.Tensor = self.head(torch.tanh(self.q(hidden)) * self.v(hidden))
        return found


TOKENS = torch.arange(24).reshape(2, 12) % 12
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "embed", "conv"]),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q"], use_rslora=True, rank_pattern={"q": 2}
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], use_dora=True),
    "a trained head": lambda: peft.LoraConfig(r=4, target_modules=["q"], modules_to_save=["head"]),
    "parameters": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q.weight"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "v"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q", "v"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q", "v"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q", "v"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q", "v"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["q", "v"]),
}


def moved(module: nn.Module, seed: int) -> nn.Module:
    """Move all that an adapter trains away from where it began, at which it adds nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return module.eval()


def wrapped(kind: str, base: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return moved(peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind]()), seed)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_module_of_peft_stands_for_its_merged_weights(kind: str, base: nn.Module) -> None:
    models = [wrapped(kind, base, seed) for seed in (1, 2)]
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    alone = alnico.merge_models([models[0]], "linear")
    assert type(alone) is Network
    with torch.no_grad():
        live = models[0](TOKENS)
        assert not torch.allclose(live, base(TOKENS), atol=1e-3)
        assert torch.allclose(alone(TOKENS), live, atol=1e-5)
    merged = alnico.merge_models(models, "linear", weights=[1, 3])
    one, other = (copy.deepcopy(m).merge_and_unload().state_dict() for m in models)
    assert merged.state_dict().keys() == base.state_dict().keys()
    for name, value in merged.state_dict().items():
        assert torch.allclose(
            value.double(), (one[name].double() + 3 * other[name].double()) / 4, atol=1e-6
        ), name
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_task_vectors_of_wrapped_modules_are_those_of_their_products(base: nn.Module) -> None:
    model = wrapped("lora", base, 1)
    tau = alnico.TaskVector(model, base)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    start = base.state_dict()
    squares = sum(float(((merged[n].double() - v.double()) ** 2).sum()) for n, v in start.items())
    assert tau.norm() == pytest.approx(squares**0.5, rel=1e-6)
    half = (tau * 0.5 + base).state_dict()
    for name, value in start.items():
        assert torch.allclose(half[name], (value + merged[name]) / 2, atol=1e-6)
    filled = (tau * 0.5 + base).apply(Network())
    assert torch.equal(filled.q.weight, half["q.weight"])


def test_searches_fill_a_module_without_adapters(base: nn.Module) -> None:
    models = [wrapped("lora", base, seed) for seed in (1, 2)]
    seen: list[type] = []
    alnico.search_scales(wrapped("lora", base, 3), models, lambda m: seen.append(type(m)) or 1.0, trials=2)
    assert seen == [Network, Network]


def test_layers_that_were_wrapped_in_place_and_merged_before_are_the_same(base: nn.Module) -> None:
    injected = moved(peft.inject_adapter_in_model(CONFIGS["lora"](), copy.deepcopy(base)), 1)
    with torch.no_grad():
        live = injected(TOKENS)
    found = alnico.merge_models([injected], "linear")
    assert torch.allclose(found(TOKENS), live, atol=1e-5)
    assert found.state_dict().keys() == base.state_dict().keys()
    model = wrapped("lora", base, 1)
    expected = alnico.merge_state_dicts([model])
    model.merge_adapter()
    for name, value in alnico.merge_state_dicts([model]).items():
        assert torch.allclose(value, expected[name], atol=1e-6)


def test_sums_are_not_rounded_before_they_are_merged(base: nn.Module) -> None:
    start = copy.deepcopy(base).to(torch.bfloat16)
    models = [wrapped("lora", start, seed) for seed in (1, 2)]
    merged = alnico.merge_models(models, "linear")
    assert merged.q.weight.dtype == torch.bfloat16
    exact = []
    for model in models:
        layer = model.base_model.model.q
        a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
        exact.append(layer.base_layer.weight.double() + 2.0 * b @ a)
    assert torch.equal(merged.q.weight, ((exact[0] + exact[1]) / 2).float().to(torch.bfloat16))


def test_an_adapter_on_a_tied_head_changes_the_head_alone() -> None:
    class Tied(Network):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    start = Tied().eval()
    model = moved(peft.get_peft_model(copy.deepcopy(start), peft.LoraConfig(r=4, target_modules=["head"])), 1)
    merged = alnico.merge_models([model], "linear")
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS), model(TOKENS), atol=1e-5)
    assert torch.equal(merged.embed.weight, start.embed.weight)
    with pytest.raises(
        MismatchError,
        match=r"^head\.weight: is tied to embed\.weight in the module \(Tied\), but differs from it",
    ):
        alnico.merge_models([start, model], "linear")


def test_factors_by_themselves_are_refused_with_advice(base: nn.Module) -> None:
    model = wrapped("lora", base, 1)
    for state in (peft.get_peft_model_state_dict(model), model.state_dict()):
        for call in (
            lambda state=state: alnico.merge_state_dicts([state, state]),
            lambda state=state: alnico.TaskVector(state, base).norm(),
            lambda state=state: alnico.search_scales(state, [state], lambda _: 1.0),
        ):
            with pytest.raises(
                ModelError,
                match=r"merge_and_unload\(\); or combine the adapters' folders with alnico\.lora\.combine",
            ):
                call()


def test_factors_of_other_makers_are_not_averaged() -> None:
    state = {"q.weight": np.ones((8, 8)), "q.lora_A": np.ones((2, 8)), "q.lora_B": np.ones((8, 2))}
    with pytest.raises(AlnicoError, match=r"q\.lora_A"):
        alnico.merge_state_dicts([state, {n: 2 * v for n, v in state.items()}], unrelated="allow")


def test_prompts_and_disabled_adapters_are_refused(base: nn.Module) -> None:
    model = wrapped("lora", base, 1)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ModelError, match=r"^models\[0\]: its adapters are disabled; expected enabled ones\."):
        alnico.merge_models([model, base], "linear")
