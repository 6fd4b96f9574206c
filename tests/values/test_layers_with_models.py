"""``layers=`` with models, an order and a base of its own, on modules and on everything else that is a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.errors import AlnicoError, MethodError, MismatchError, ModelError, RecipeError


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))


def state_of(seed: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network(seed).state_dict().items()}


def values(model: Any) -> dict[str, np.ndarray]:
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return {n: np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for n, v in tensors.items()}


def test_one_layer_by_slerp_of_two_and_another_by_ties_of_three_with_a_base() -> None:
    base, a, b, c = (network(i) for i in range(4))
    layers = {
        "0": {"method": "slerp", "models": [b, a], "t": 0.3},
        "2": {"method": "task_arithmetic", "models": [0, 1, c], "base": base, "weights": [0.5, 1.0, 2.0]},
    }
    merged = alnico.merge_models([a, b], layers=layers, unrelated="allow")
    assert isinstance(merged, nn.Sequential)
    start, one, two, three = (
        {n: v.astype(np.float64) for n, v in values(m).items()} for m in (base, a, b, c)
    )
    for name, found in values(merged).items():
        if name.startswith("2"):
            deltas = [m[name] - start[name] for m in (one, two, three)]
            expected = start[name] + 0.5 * deltas[0] + deltas[1] + 2 * deltas[2]
        else:
            cosine = (one[name] * two[name]).sum() / np.sqrt((one[name] ** 2).sum() * (two[name] ** 2).sum())
            angle = np.arccos(cosine)
            expected = (np.sin(0.7 * angle) * two[name] + np.sin(0.3 * angle) * one[name]) / np.sin(angle)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_models_of_layers_are_of_every_kind_and_inputs_never_change(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    base, a, b, c = (network(i) for i in range(4))
    save_file(values(c), tmp_path / "c.safetensors")
    tau = alnico.TaskVector(b, base)
    kinds: list[Any] = [
        c,
        values(c),
        c.state_dict(),
        tmp_path / "c.safetensors",
        str(tmp_path / "c.safetensors"),
    ]
    kinds.append((1.0 * alnico.TaskVector(c, base)).on(base))
    expected = (values(a)["2.weight"].astype(np.float64) + values(c)["2.weight"]) / 2
    before = {id(m): {n: v.copy() for n, v in values(m).items()} for m in (base, a, b, c)}
    for kind in kinds:
        merged = alnico.merge_models([a, b], layers={"2": {"models": [0, kind]}}, unrelated="allow")
        np.testing.assert_allclose(values(merged)["2.weight"], expected, rtol=1e-6, atol=1e-6)
    merged = alnico.merge_models([a], base=base, layers={"2": {"models": [tau]}}, unrelated="allow")
    np.testing.assert_allclose(values(merged)["2.weight"], values(b)["2.weight"], rtol=1e-5, atol=1e-6)
    for model in (base, a, b, c):
        assert all((v == before[id(model)][n]).all() for n, v in values(model).items())


def test_a_layer_may_have_no_base_beside_a_call_with_one() -> None:
    base, a, b = (state_of(i) for i in range(3))
    layers: dict[str, Any] = {"2": {"method": "nuslerp", "base": None, "weights": [0.4, 0.6]}}
    arguments: dict[str, Any] = {"base": base, "density": 0.5, "unrelated": "allow"}
    merged = alnico.merge_state_dicts([a, b], "ties", layers=layers, **arguments)
    alone = alnico.merge_state_dicts([a, b], "nuslerp", weights=[0.4, 0.6], unrelated="allow")
    assert merged["2.weight"].tobytes() == alone["2.weight"].tobytes()
    ties = alnico.merge_state_dicts([a, b], "ties", **arguments)
    assert merged["0.weight"].tobytes() == ties["0.weight"].tobytes()


def test_a_layers_models_may_have_tensors_of_their_own_and_other_shapes_elsewhere() -> None:
    a, b = state_of(1), state_of(2)
    c = {"0.weight": np.zeros((2, 2), np.float32), "2.weight": a["2.weight"], "head.weight": np.float32([3])}
    merged = alnico.merge_state_dicts([a, b], layers={"2.weight": {"models": [c, b]}}, unrelated="allow")
    assert "head.weight" not in merged
    merged = alnico.merge_state_dicts([a, b], layers={"head": {"models": [c]}}, unrelated="allow")
    assert merged["head.weight"].tolist() == [3]


def test_only_models_of_one_layer_must_be_related() -> None:
    def wide(seed: int, noise: int) -> dict[str, np.ndarray]:
        start, own = np.random.default_rng(seed), np.random.default_rng(noise)
        names = ("fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight")
        return {
            n: (start.standard_normal((64, 64)) + 0.01 * own.standard_normal((64, 64))).astype("f4")
            for n in names
        }

    a, b, c, d = wide(0, 1), wide(0, 2), wide(9, 3), wide(9, 4)
    alnico.merge_state_dicts([a, b], layers={"fc1": {"models": [c, d]}, "fc2": {"models": [c, d]}})
    with pytest.raises(
        MismatchError, match=r"layers\['fc1'\].models\[1\] and state_dicts\[0\] were not tuned from one base"
    ):
        alnico.merge_state_dicts([a, b], layers={"fc1": {"models": [0, c]}, "fc2": {"models": [0, c]}})


ONE, TWO, THREE, BASE = (state_of(i) for i in range(4))
SLERP = {"method": "slerp", "t": 0.3}

MISTAKES: list[tuple[dict[str, Any], type[AlnicoError], str]] = [
    (
        {**SLERP, "models": [0, 1, THREE]}, RecipeError,
        "layers['2'].models: slerp merges 2 models, the base one of them; found 3. Remove models.",
    ),
    (
        {"method": "ties", "models": [ONE, TWO]}, RecipeError,
        "layers['2']: ties needs base, the model that the others were fine-tuned from. Pass base.",
    ),
    (
        {"models": []}, RecipeError,
        "layers['2'].models is empty; expected at least one model. Leave it out to merge all state_dicts.",
    ),
    ({"models": [0, 2]}, RecipeError, "layers['2'].models[1] is 2; expected a model, or a position in state_dicts, from 0 to 1."),
    ({"base": -1}, RecipeError, "layers['2'].base is -1; expected a model, or a position in state_dicts, from 0 to 1."),
    ({"models": [True]}, RecipeError, "layers['2'].models[0] is True; expected a model, or a position in state_dicts, from 0 to 1."),
    (
        {"models": [0, object()]}, ModelError,
        "layers['2'].models[1] is of type object; expected a path, a hub id, a dict of tensors, an nn.Module, a TaskVector or a "
        "LazyModel.",
    ),
    (
        {"models": {"a": ONE}}, RecipeError,
        "layers['2'].models is a dict of models; expected a list of models. Pass list(layers['2'].models.values()).",
    ),
    ({"model": [ONE, TWO]}, RecipeError, "layers['2'] has the unknown key 'model'. Did you mean models?"),
    ({"modles": [ONE, TWO]}, RecipeError, "layers['2'] has the unknown key 'modles'. Did you mean models?"),
    ({"base_model": BASE}, RecipeError, "layers['2'] has the unknown key 'base_model'. Did you mean base?"),
    (
        {"method": "ties", "base": BASE, "densty": 0.5}, RecipeError,
        "layers['2'].densty is not an option of ties. Did you mean density?",
    ),
    (
        {"method": "ties", "base": BASE, "models": [0, 1, THREE], "density": [0.5, 0.2]}, RecipeError,
        "layers['2'].density has 2 values, but there are 3 models besides the base; expected one per model.",
    ),
    ({"base": BASE}, RecipeError, "layers['2'].base has no effect on linear, which uses no base. Leave it out."),
    (
        {"models": [0, 1, THREE], "weights": [1, 2]}, RecipeError,
        "layers['2'].weights has 2 values, but there are 3 models; expected one per model.",
    ),
    (
        {"method": "ties", "base": BASE, "preset": "papr"}, RecipeError,
        "layers['2'].preset is 'papr', which is not a preset of ties. Did you mean paper?",
    ),
    ({"method": "tiess"}, MethodError, "layers['2'].method: unknown merge method 'tiess'; expected one of those that `alnico methods` lists. Did you mean ties?"),
    (
        {"models": [0, {"2.weight": np.zeros((5, 5), np.float32)}]}, MismatchError,
        "2.weight: state_dicts[0] is (5, 9), layers['2'].models[1] is (5, 5); expected one shape. Use models of one architecture "
        "and size.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "kind", "message"), MISTAKES, ids=[m for _, _, m in MISTAKES])
def test_mistakes_of_layers_with_models(layer: dict[str, Any], kind: type[AlnicoError], message: str) -> None:
    with pytest.raises(kind) as caught:
        alnico.merge_state_dicts([ONE, TWO], layers={"2": layer}, unrelated="allow")
    assert caught.value.args[0] == message


def test_a_key_that_only_models_of_another_layer_match_is_an_error() -> None:
    other = {**THREE, "head.weight": np.float32([3])}
    with pytest.raises(RecipeError, match=r"layers\['head'\] matches no tensor"):
        alnico.merge_state_dicts(
            [ONE, TWO], layers={"2": {"models": [other, 0]}, "head": {"method": "linear"}}
        )


def test_the_model_that_a_call_starts_from_is_no_base_of_a_layer() -> None:
    with pytest.raises(RecipeError, match=r"layers\['2'\]: ties needs base, the model that the others were"):
        alnico.merge_state_dicts(
            [ONE, TWO], "slerp", t=0.3, layers={"2": {"method": "ties"}}, unrelated="allow"
        )
    layers: dict[str, Any] = {"2": {"t": 0.6}}
    merged = alnico.merge_state_dicts([ONE, TWO], "slerp", t=0.3, layers=layers, unrelated="allow")
    alone = alnico.merge_state_dicts([ONE, TWO], "slerp", t=0.6, unrelated="allow")
    assert merged["2.weight"].tobytes() == alone["2.weight"].tobytes()
    layers = {"2": {"models": [1, 0], "t": 0.4}}
    merged = alnico.merge_state_dicts([ONE, TWO], "slerp", t=0.3, layers=layers, unrelated="allow")
    np.testing.assert_allclose(merged["2.weight"], alone["2.weight"], rtol=1e-5, atol=1e-6)
