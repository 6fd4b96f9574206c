"""Folding, combining and extracting adapters in memory: triples, PEFT modules and dicts of LoRA tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import alnico
from alnico.errors import AlnicoError, MismatchError, ModelError, RecipeError
from alnico.lora import Triples, combine, extract, fold


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 5)
        self.steps: torch.Tensor
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return result


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def triples(seed: int, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "fc1.weight": (torch.randn(rank, 6, dtype=dtype), torch.randn(5, rank, dtype=dtype), 0.5),
        "fc2.weight": (torch.randn(rank, 5, dtype=dtype), torch.randn(5, rank, dtype=dtype), -1.25),
    }


def exact(base: nn.Module, *weighted: tuple[float, Any]) -> dict[str, torch.Tensor]:
    """``W + sum of weight * s B A`` in float64."""
    state = {n: v.double() if v.is_floating_point() else v for n, v in base.state_dict().items()}
    for weight, update in weighted:
        for name, (a, b, scale) in update.items():
            state[name] = state[name] + weight * scale * (b.double() @ a.double())
    return state


def trained(seed: int, **options: Any) -> tuple[nn.Module, Any]:
    """A base, and the same network as PEFT wraps it, with an adapter of random numbers."""
    base = net()
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["fc1", "fc2"], "init_lora_weights": False, **options}
    )
    return base, peft.get_peft_model(copy.deepcopy(base), config)


def assert_equal(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], v) for n, v in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triples_are_added_to_their_tensors(dtype: torch.dtype) -> None:
    base = net().to(dtype)
    before = copy.deepcopy(base.state_dict())
    one, two = triples(1, dtype=dtype), triples(2, rank=3, dtype=dtype)
    expected = exact(base, (1.0, one), (-0.3, two))
    found = fold(base, [one, two], weights=[1, -0.3])
    assert isinstance(found, Net)
    near = 1e-14 if dtype == torch.float64 else 2e-6
    for name, value in found.state_dict().items():
        assert value.dtype == before[name].dtype
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=0, atol=near)
    assert_equal(fold(base.state_dict(), [one, two], weights=[1, -0.3]), found.state_dict())
    assert_equal(base.state_dict(), before)
    at_once = fold(base, [one, two], weights=[1, -0.3], at_once=True).state_dict()
    torch.testing.assert_close(at_once["fc1.weight"], found.state_dict()["fc1.weight"])
    assert_equal(fold(base, one, at_once=True).state_dict(), fold(base, [one]).state_dict())


def test_arrays_give_arrays_and_names_of_modules_are_names_of_weights() -> None:
    base = {"fc.weight": np.zeros((2, 3), np.float16), "plain": np.ones((2, 2), np.float32)}
    a, b = np.float32([[1, 2, 3]]), np.float32([[1], [2]])
    found = fold(base, {"fc": (a, b, 2.0), "plain": (a[:, :2], b, 1)})
    assert found["fc.weight"].tolist() == [[2, 4, 6], [4, 8, 12]]
    assert found["fc.weight"].dtype == np.float16
    assert found["plain"].tolist() == [[2, 3], [3, 5]]
    assert fold(base, {"fc": (a, b, np.float32(2))}, dtype="float32")["fc.weight"].dtype == np.float32


def test_a_convolution_and_a_tied_tensor_take_triples() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False))
    a, b = torch.randn(1, 8), torch.randn(3, 1)
    for first, second in ((a, b), (a.reshape(1, 2, 2, 2), b.reshape(3, 1, 1, 1))):
        found = fold(model, {"0.weight": (first, second, 1.0)})[0].weight
        torch.testing.assert_close(found, model[0].weight + (b @ a).reshape(3, 2, 2, 2))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    tied = Tied()
    a, b = torch.randn(1, 3), torch.randn(4, 1)
    folded = fold(tied, {"head.weight": (a, b, 1.0)})
    torch.testing.assert_close(folded.embed.weight, tied.embed.weight + b @ a)
    assert folded.head.weight is folded.embed.weight


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"fc1": 3}}]
)
def test_a_peft_module_has_the_bits_of_its_files(tmp_path: Path, options: dict[str, Any]) -> None:
    base, adapted = trained(1, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    fold(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    expected = load_file(tmp_path / "out.safetensors")
    state, config = peft.get_peft_model_state_dict(adapted), adapted.peft_config["default"]
    for found in (
        fold(adapted).state_dict(),
        fold(base, adapted).state_dict(),
        fold(base, state, config=config).state_dict(),
        fold(base, state, config=[config.to_dict()]).state_dict(),
        fold(tmp_path / "base.safetensors", adapted),
        fold(base, tmp_path / "adapter").state_dict(),
        fold(tmp_path / "base.safetensors", str(tmp_path / "adapter")),
    ):
        assert {n: v.numpy().tobytes() for n, v in found.items()} == {
            n: v.numpy().tobytes() for n, v in expected.items()
        }
    x = torch.randn(7, 6)
    torch.testing.assert_close(fold(adapted)(x), adapted(x))


def test_a_fold_of_objects_is_written_with_the_bytes_of_memory(tmp_path: Path) -> None:
    base, one = net(), triples(1)
    result = fold(base, one, tmp_path / "out.safetensors", weights=0.5)
    assert result.path == tmp_path / "out.safetensors"
    found = load_file(tmp_path / "out.safetensors")
    assert {n: v.numpy().tobytes() for n, v in found.items()} == {
        n: v.numpy().tobytes() for n, v in fold(base, one, weights=0.5).state_dict().items()
    }


def product(triple: Any) -> torch.Tensor:
    a, b, scale = triple
    return scale * (torch.as_tensor(b).double() @ torch.as_tensor(a).double())


def test_sums_of_triples_are_exact() -> None:
    one, two = (triples(i, dtype=torch.float64) for i in (1, 2))
    two = {"fc1": two["fc1.weight"]}
    for method, rank in (("cat", None), ("svd", 4)):
        both = combine([one, two], weights=[0.7, -2.0], method=method, rank=rank)
        assert isinstance(both, Triples)
        assert list(both) == ["fc1.weight", "fc2.weight"]
        expected = 0.7 * product(one["fc1.weight"]) - 2.0 * product(two["fc1"])
        torch.testing.assert_close(product(both["fc1.weight"]), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(
            product(both["fc2.weight"]), 0.7 * product(one["fc2.weight"]), rtol=0, atol=1e-13
        )
        assert both["fc1.weight"][0].dtype == torch.float64
    a = np.float32([[1, 0]]), np.float32([[1], [0]]), 2.0
    found = combine([{"fc": a}, {"fc": a}], method="cat")
    assert isinstance(found["fc"][0], np.ndarray)
    assert product(found["fc"]).tolist() == [[4, 0], [0, 0]]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.5}),
        ("dare_ties", {"density": 0.5, "seed": 3}),
        ("tsv", {}),
    ],
)
def test_combined_modules_have_the_numbers_of_their_files(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    adapters = [trained(i)[1] for i in (1, 2)]
    for i, adapter in enumerate(adapters):
        adapter.save_pretrained(tmp_path / f"{i}")
    combine([tmp_path / "0", tmp_path / "1"], tmp_path / "out", method=method, **options)
    expected = fold(net(), tmp_path / "out").state_dict()
    for given in (adapters, [tmp_path / "0", adapters[1]]):
        assert_equal(fold(net(), combine(given, method=method, **options)).state_dict(), expected)


def test_a_fine_tune_becomes_triples_and_what_no_triple_holds_is_saved() -> None:
    base, tuned = net(), net()
    with torch.no_grad():
        for value in tuned.parameters():
            value += 0.1 * torch.randn_like(value)
    whole = extract(tuned, base, rank=5)
    assert list(whole) == ["fc1.weight", "fc2.weight"]
    assert sorted(whole.saved) == ["fc1.bias", "fc2.bias"]
    assert repr(whole) == "<adapter: 2 updates of rank 5, 2 saved tensors>"
    change = (tuned.fc1.weight - base.fc1.weight).detach().double()
    torch.testing.assert_close(product(whole["fc1.weight"]), change, rtol=0, atol=1e-6)
    for name, value in fold(base, whole).state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[name])
    small = extract(tuned, base, rank=1, others="leave")
    best = torch.linalg.svd(change)
    torch.testing.assert_close(
        product(small["fc1.weight"]),
        best.S[0] * best.U[:, :1] @ best.Vh[:1],
        rtol=0,
        atol=0.02 * float(best.S[0]),
    )
    assert not small.saved
    assert 0 < small.error < 1
    arrays = [{n: v.numpy() for n, v in m.state_dict().items()} for m in (tuned, base)]
    assert isinstance(extract(*arrays, rank=1)["fc1.weight"][0], np.ndarray)


def told(call: Any, kind: type[AlnicoError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_each_mistake_has_its_sentence() -> None:
    base, one = net(), triples(1)
    a, b, scale = one["fc1.weight"]
    state = {"fc1.lora_A.weight": a, "fc1.lora_B.weight": b}
    for call, kind, text in (
        (lambda: fold(base, {"fc3.weight": (a, b, scale)}), ModelError, "adapters[0]: fc3.weight: is not in base; expected the name of a tensor of the base. Did you mean fc2.weight?"),
        (lambda: fold(base, {"fc2.weight": (a, b, scale)}), MismatchError, "adapters[0]: fc2.weight: B A is (5, 6), the tensor of base is (5, 5); expected one shape. Use factors of this tensor."),
        (lambda: fold(base, {"fc1.weight": (b.T, a.T, scale)}), MismatchError, "adapters[0]: fc1.weight: B A is (6, 5), the tensor of base is (5, 6); expected one shape. It is stored transposed: pass (B.T, A.T, scale)."),
        (lambda: fold(base, {"fc1.weight": (b, a, scale)}), MismatchError, "adapters[0]: fc1.weight: A is (5, 2) and B is (2, 6); expected one rank, A (rank, columns) and B (rows, rank)."),
        (lambda: fold(base, {"fc1.weight": (a, b)}), ModelError, "adapters[0]: fc1.weight has 2 values; expected a triple (A, B, scale), with A (rank, columns) and B (rows, rank). Without a scale, pass 1.0."),
        (lambda: fold(base, {"fc1.weight": (a, b, "1")}), ModelError, "adapters[0]: fc1.weight: the scale is of type str; expected a number. Pass a triple (A, B, scale), in this order."),
        (lambda: fold(base, {"fc1.weight": (scale, b, a)}), ModelError, "adapters[0]: fc1.weight: A is of type float; expected a numpy array or a torch tensor. Pass a triple (A, B, scale)."),
        (lambda: fold(base, {"fc1": (a, b, 1), "fc1.weight": (a, b, 1)}), ModelError, "adapters[0]: has fc1 and fc1.weight; expected one triple for a tensor."),
        (lambda: fold(base, state), ModelError, "adapters[0]: is a dict of LoRA tensors without a config, which its scale (alpha / r) depends on; expected one. Pass config={'r': 8, 'lora_alpha': 16}, or the peft.LoraConfig."),
        (lambda: fold(base, state, config={"r": 2}), ModelError, "adapters[0]: its config: has no lora_alpha, which its scale depends on. Get the adapter from its source."),
        (lambda: fold(base, state, config={"r": 3, "lora_alpha": 3}), ModelError, "adapters[0]: fc1.lora_A.weight has rank 2, adapter_config.json says 3; they must agree and be at least 1. Get the adapter from its source."),
        (lambda: fold(base, [state], config=[None, None]), ModelError, "config has 2 entries for 1 adapters; expected one for all, or one for each. Use None for an adapter that needs none."),
        (lambda: fold(base, base), ModelError, "adapters[0]: is a Net without adapters; expected "),
        (lambda: fold(base, base.state_dict()), ModelError, "adapters[0]: has no LoRA factors, such as fc1.lora_A.weight (its first tensor is steps); expected "),
        (lambda: fold(base, {}), ModelError, "adapters[0] is empty; expected "),
        (lambda: fold(base, {"a": one, "b": one}), ModelError, "adapters[0] is a dict of adapters; expected a list. Pass list(adapters.values())."),
        (lambda: fold(base, 3), ModelError, "adapters[0] is of type int; expected the path of an adapter, a PEFT module, triples"),
        (lambda: fold(base, trained(1)[1].state_dict()), ModelError, "adapters[0]: has base_model.model.fc1.base_layer.weight, a weight of the base; expected the tensors of an adapter alone. Pass the PEFT module itself"),
        (lambda: fold(base, []), AlnicoError, "adapters: there are none; expected at least one. Give an adapter."),
        (lambda: fold("somewhere"), AlnicoError, "adapters: there are none; expected at least one. Give an adapter."),
        (lambda: fold(base, [one, one], weights=[1]), AlnicoError, "weights: there are 1 for 2 adapters; expected one for all, or one for each. Change the number."),
        (lambda: combine([]), RecipeError, "adapters: expected a list with at least one adapter. Give one."),
        (lambda: combine([one, {"fc1": (b.T, a.T, 1.0)}]), MismatchError, "fc1: adapters[0] changes a linear layer of (5, 6), adapters[1] a linear layer of (6, 5); expected the same parameter in both. Combine adapters of one base."),
    ):  # fmt: skip
        assert told(call, kind).startswith(text)


def test_several_active_adapters_are_folded_one_after_another() -> None:
    base, adapted = trained(1)
    torch.manual_seed(5)
    adapted.add_adapter(
        "second", peft.LoraConfig(r=1, lora_alpha=1, target_modules=["fc1"], init_lora_weights=False)
    )
    adapted.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 6)
    torch.testing.assert_close(fold(adapted)(x), adapted(x))
    with pytest.raises(RecipeError, match="there are 2 in 1 modules, as PEFT has several active ones"):
        combine([adapted])
    assert alnico.lora.fold(base, adapted, weights=0.5).fc1.weight.shape == (5, 6)
