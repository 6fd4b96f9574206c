"""AdaMerging of modules from inputs in memory, against plain torch in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_modules import Small, close

import alnico
from alnico.errors import EvaluationError, RecipeError


@pytest.fixture(scope="module")
def small() -> Small:
    return Small(2, seed=6)


def by_hand(small: Small, steps: int, rate: float) -> tuple[list[float], list[float]]:
    """One coefficient per model, learned by Adam on the entropy of all inputs: coefficients and losses."""
    base, tuned = dict(small.base.named_parameters()), [dict(m.named_parameters()) for m in small.models]
    c = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([c], lr=rate)
    losses = []
    for _ in range(steps):
        state = {n: (v + sum(c[i] * (m[n] - v) for i, m in enumerate(tuned))) for n, v in base.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for x, _y in small.data:
            logs = torch.func.functional_call(small.base, state, (x,)).log_softmax(-1)
            loss = loss - (logs.exp() * logs).sum(-1).mean()
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            c.clamp_(0, 1)
    return c.tolist(), losses


def test_the_coefficients_are_those_of_plain_torch(small: Small) -> None:
    before = {n: v.clone() for n, v in small.base.state_dict().items()}
    options: dict[str, Any] = {"per": "task", "steps": 5, "learning_rate": 0.05, "batch_size": 40}
    found = alnico.adamerge(small.models, base=small.base, inputs=[x for x, _ in small.data], **options)
    coefficients, losses = by_hand(small, 5, 0.05)
    assert found.coefficients[0] == pytest.approx(coefficients, abs=2e-6)  # rounded to 6 places
    assert [step.loss for step in found.steps] == pytest.approx(losses, abs=1e-9)
    assert found.used == {"inputs[0]": 40, "inputs[1]": 40}
    assert found.models == ("models[0]", "models[1]")
    assert close(found.module(), small.added(found.coefficients[0]))
    assert close(found.state_dict(), small.added(found.coefficients[0]))
    assert all(torch.equal(v, before[n]) for n, v in small.base.state_dict().items())
    assert small.base.training
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*small.data[0]), batch_size=16)
    other = {"A": loader, "B": lambda module: module(small.data[1][0])}
    again = alnico.adamerge(
        [m.state_dict() for m in small.models], base=small.base, inputs=other, names=["a", "b"], **options
    )
    assert again.coefficients == pytest.approx(found.coefficients, abs=2e-6)
    assert again.models == ("a", "b")
    assert list(again.used) == ["A", "B"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": lambda _: 1.0}, "score: is a function that scores a model, and AdaMerging learns from class scores of inputs; expected inputs without labels. Pass inputs=, the inputs of each task: inputs=[X1, X2]."),
        ({}, "tasks: there are none; expected inputs to learn from. Pass tasks=, a tasks file of classifications, or inputs=, the inputs of each task."),
        ({"inputs": [3]}, "inputs[0] is of type int; expected a tensor of inputs, batches of them (a list or a DataLoader), or a function"),
        ({"inputs": {"A": []}}, "A is empty; expected at least one input."),
        ({"inputs": {"A": ["text"]}}, "A: holds a value of type str; expected a tensor of inputs"),
        ({"inputs": {"A": [torch.zeros(2, 4), torch.zeros(2, 3)]}}, "A: its batches cannot be joined"),
        ({"inputs": {"A": lambda _: 1.0}}, "A of base: the module returned float; expected logits of shape (inputs, classes)."),
        ({"inputs": [np.zeros((2, 9))]}, "inputs[0] of base: the evaluation raised RuntimeError: mat1 and mat2"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_reported(small: Small, arguments: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(message)):
        alnico.adamerge(small.models, base=small.base, steps=1, **arguments)


def test_a_recipe_of_objects_is_not_written(small: Small, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="out is set, but the recipe of models in memory"):
        alnico.adamerge(
            small.models, base=small.base, inputs=[small.data[0][0]], out=tmp_path / "learned.yml"
        )
