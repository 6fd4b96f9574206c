"""Statistics of modules on inputs in memory, against plain torch in float64, and merges with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import alnico
from alnico.errors import AlnicoError

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return scores


torch.manual_seed(5)
BASE = Net()
MODELS = [copy.deepcopy(BASE) for _ in range(2)]
for model in MODELS:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
INPUTS = [torch.randn(6, 4), torch.randn(7, 4)]


def stored(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def exact_fisher(module: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean over inputs of sum_c p(c|x) (d log p(c|x) / d theta)^2, in float64."""
    wide = copy.deepcopy(module).double()
    sums = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}
    for x in inputs.double():
        logs = torch.log_softmax(wide(x[None])[0], -1)
        for log in logs:
            gradients = torch.autograd.grad(log, list(wide.parameters()), retain_graph=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += log.exp().detach() * gradient**2 / len(inputs)
    return sums


def test_the_fisher_information_of_a_module_is_that_of_autograd(tmp_path: Path) -> None:
    out = alnico.fisher_statistics(MODELS[0], tmp_path / "a", inputs=INPUTS[0])
    found = stored(out)
    for name, values in exact_fisher(MODELS[0], INPUTS[0]).items():
        assert np.allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-9), name
    assert MODELS[0].training
    batches = alnico.fisher_statistics(
        MODELS[0], tmp_path / "b", inputs={"one": [(x, "labels") for x in INPUTS[0].split(4)]}
    )
    assert all(np.array_equal(value, found[name]) for name, value in stored(batches).items())


def test_modules_merge_with_the_statistics_that_were_measured_in_memory(tmp_path: Path) -> None:
    folders = [
        alnico.fisher_statistics(m, tmp_path / str(i), inputs=x)
        for i, (m, x) in enumerate(zip(MODELS, INPUTS, strict=True))
    ]
    merged = alnico.merge_models(
        MODELS, "fisher", fisher=[str(folder) for folder in folders], normalize=False
    )
    importance = [exact_fisher(m, x) for m, x in zip(MODELS, INPUTS, strict=True)]
    values = [m.double().state_dict() for m in map(copy.deepcopy, MODELS)]
    name = "fc2.weight"
    top = sum(f[name] * v[name] for f, v in zip(importance, values, strict=True))
    expected = top / sum(f[name] for f in importance)
    assert torch.allclose(merged.fc2.weight.double(), expected, atol=1e-4)


def test_the_gram_matrices_of_modules_are_those_of_their_inputs(tmp_path: Path) -> None:
    first, second = alnico.gram_statistics(MODELS, tmp_path, inputs=INPUTS)
    assert (first.name, second.name) == ("models[0]", "models[1]")
    for folder, x in ((first, INPUTS[0]), (second, INPUTS[1])):
        gram = (x.double().T @ x.double()).numpy()
        assert np.allclose(stored(folder)["fc1.weight"], gram, rtol=1e-5)
    for_all = alnico.gram_statistics(MODELS, tmp_path / "all", inputs=INPUTS[0])
    assert np.array_equal(stored(for_all[1])["fc1.weight"], stored(first)["fc1.weight"])
    merged = alnico.merge_models(MODELS, "regmean", gram=[str(first), str(second)])
    assert isinstance(merged, Net)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda out: alnico.fisher_statistics(BASE, out), "tasks: there are none; expected inputs to measure on."),
        (lambda out: alnico.gram_statistics([BASE], out), "tasks: there are none; expected inputs to measure on."),
        (lambda out: alnico.fisher_statistics(BASE, out, inputs=lambda m: m(INPUTS[0])), "inputs is a function; expected inputs"),
        (lambda out: alnico.gram_statistics(MODELS, out, inputs=[INPUTS[0]]), "inputs: there are 1 for 2 models; "),
        (lambda out: alnico.fisher_statistics(BASE.state_dict(), out, inputs=INPUTS[0]), "model: is a dict of tensors, and the task needs a classifier; expected a module."),
        (lambda out: alnico.fisher_statistics([BASE], out, inputs=INPUTS[0]), "model is a list of 1 values; expected one model"),
    ],
)  # fmt: skip
def test_mistakes_name_the_argument(call: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(AlnicoError) as caught:
        call(tmp_path / "out")
    assert str(caught.value).startswith(expected)
