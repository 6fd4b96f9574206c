"""Merged routers are fitted to the inputs that each model's routers see: against least squares in float64 on recorded inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made_families import Made
from made_mixtures import RULES, SIZES, text_of
from transformers import MixtralConfig, MixtralForCausalLM

import alnico
from alnico.errors import MismatchError, ModelError
from made import read_model
from made_tokenizers import letters, save_tokenizer, special

ROUTER = {"qwen3_moe": "mlp.gate", "mixtral": "mlp.gate"}


@pytest.fixture(scope="module", params=sorted(ROUTER))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    return request.param, Made(request.param, tmp_path_factory.mktemp(request.param))


def recorded(made: Made, path: str, task: Any, word: str) -> list[np.ndarray]:
    """The inputs of each router of a model on a task, by hooks on the modules."""
    module = made.loaded(path)
    seen: dict[str, list[np.ndarray]] = {}
    for name, layer in module.named_modules():
        if name.endswith(word):
            layer.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(name, []).append(
                    x[0].detach().reshape(-1, x[0].shape[-1]).double().numpy()
                )
            )
    with torch.no_grad():
        task.of(module, range(task.size))
    return [np.concatenate(seen[name]) for name in sorted(seen)]


def test_calibrated_routers_are_the_least_squares_of_each_models_logits(
    made: tuple[str, Made], tmp_path: Path
) -> None:
    name, of = made
    written = alnico.router_statistics(of.models, tmp_path / "routers", tasks=[[t] for t in of.tasks])
    assert written == (tmp_path / "routers" / "one", tmp_path / "routers" / "two")
    models = [read_model(Path(path)) for path in of.models]
    routers = sorted(n for n in models[0] if n.endswith(".gate.weight"))
    assert len(routers) == 2
    for folder in written:
        told = json.loads((folder / "statistics.json").read_text())
        assert sorted(told["tensors"]) == routers
        assert set(told["tensors"]) | set(told["left_out"]) == set(models[0])
        assert set(told["left_out"].values()) == {"not a router"}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": of.base,
        "models": of.models,
        "parameters": {"weight": 0.5},
        "routers": {"calibrate": str(tmp_path / "routers")},
        "dtype": "float32",
    }
    alnico.merge(recipe, tmp_path / "out")
    alnico.verify(tmp_path / "out", against_inputs=True)
    out = read_model(tmp_path / "out")
    inputs = [recorded(of, m, t, ROUTER[name]) for m, t in zip(of.models, of.tasks, strict=True)]
    for layer, router in enumerate(routers):
        rows, targets = [], []
        for i, model in enumerate(models):
            x, own = inputs[i][layer], model[router].astype(np.float64)
            scale = np.sqrt(1e-3 * np.mean(x**2))  # the ridge as rows that ask for the model's own router
            both = np.concatenate([x / np.sqrt(len(x)), scale * np.eye(x.shape[1])])
            rows.append(both)
            targets.append(both @ own.T)
        expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].T
        np.testing.assert_allclose(out[router], expected, rtol=0, atol=2e-4 * np.abs(expected).max())
        mean = (models[0][router] + models[1][router]) / 2
        assert np.abs(expected - mean).max() > 0.05 * np.abs(mean).max()


def save_mixture(folder: Path, seed: int) -> None:
    """Write a mixture of random weights with a tokenizer of letters."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, sliding_window=None))
    model.save_pretrained(folder)
    vocabulary, merges = letters()
    save_tokenizer(
        folder, vocabulary, special(), merges, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_the_command_measures_and_prints_the_recipe(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        save_mixture(Path(name), i)
    Path("text.txt").write_text(text_of(next(iter(RULES)), 600, 1))
    task = {"name": "text", "type": "perplexity", "data": "text.txt", "window": 32, "limit": 4}
    Path("tasks.yml").write_text(yaml.safe_dump({"tasks": [task]}))
    code, out, err = run("statistics", "routers", "a", "b", "--tasks", "tasks.yml", "-o", "measured")
    assert code == 0, err
    recipe = yaml.safe_load(out)
    assert recipe == {"merge_method": "linear", "models": ["a", "b"], "routers": {"calibrate": "measured"}}
    Path("recipe.yml").write_text(yaml.safe_dump({**recipe, "unrelated": "allow"}))
    code, out, err = run("plan", "recipe.yml")
    assert code == 0, err
    assert "2 tensors by regmean of a and b" in out
    assert "merged like other weights" not in out
    with pytest.raises(ModelError, match="statistics 'absent/a': does not exist"):
        alnico.plan({**recipe, "routers": {"calibrate": "absent"}})


def test_a_dense_model_is_one_message(tmp_path: Path) -> None:
    of = Made("bert", tmp_path)
    with pytest.raises(MismatchError) as raised:
        alnico.router_statistics(of.models[0], tmp_path / "out", tasks=[of.tasks[0]])
    assert "one: has no router; expected a mixture of experts" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_module_in_memory_is_measured(made: tuple[str, Made], tmp_path: Path) -> None:
    name, of = made
    if name != "qwen3_moe":
        pytest.skip("the inputs are for a classifier")
    module = of.loaded(of.models[0])
    ids = torch.arange(12).reshape(2, 6) % 40
    (folder,) = alnico.router_statistics([module], tmp_path / "routers", inputs=ids)
    assert folder == tmp_path / "routers" / "models[0]"
    assert len(json.loads((folder / "statistics.json").read_text())["tensors"]) == 2
