"""Coefficients of the parts that a method over whole matrices adds up, held against autograd through parts of the float64 reference."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adamerge import SHAPES, InMemory, Models, answer, group_of, two_tasks

import alnico
from alnico.errors import MethodError, RunError
from references import tsv


@pytest.fixture
def wide(tmp_path: Path) -> Models:
    return Models(tmp_path, "F64")


def parts_of(values: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Each model's part of each tensor (k, ...): by how much the reference changes with the model's weight. Vectors
    have their mean."""
    base, *models = values
    parts = {}
    for name in SHAPES:
        deltas = [m[name] - base[name] for m in models]
        if base[name].ndim == 1:
            parts[name] = torch.from_numpy(np.stack(deltas) / len(models))
            continue

        def merged(*weight: float, name: str = name) -> np.ndarray:
            found: np.ndarray = tsv.merge([m[name] for m in models], base[name], {"weight": weight}, None)
            return found

        at_one = merged(*np.ones(len(models)))
        rows = [merged(*(1.0 + np.eye(len(models))[i])) - at_one for i in range(len(models))]
        parts[name] = torch.from_numpy(np.stack(rows))
    return parts


@pytest.mark.parametrize("per", ["task", "layer", "tensor"])
def test_the_course_of_parts_is_that_of_autograd_through_the_parts_of_the_reference(
    wide: Models, per: str
) -> None:
    tasks = two_tasks()
    found = wide.learn(tasks, method="tsv", per=per, steps=10, learning_rate=0.02, clamp=None)
    base = {n: torch.from_numpy(v) for n, v in wide.values[0].items()}
    parts = parts_of(wide.values)
    learned = {group_of(n, per): torch.ones(2, dtype=torch.float64, requires_grad=True) for n in SHAPES}
    adam = torch.optim.Adam(learned.values(), lr=0.02)
    assert (found.steps[0].coefficients == 1).all()
    for step, *batch in zip(found.steps, *(t.asked for t in tasks), strict=True):
        merged = {n: base[n] + torch.tensordot(learned[group_of(n, per)], parts[n], 1) for n in SHAPES}
        chances = [
            torch.softmax(answer(merged, task.inputs[rows]) @ task.head, -1)
            for task, rows in zip(tasks, batch, strict=True)
        ]
        loss = torch.stack([torch.distributions.Categorical(c).entropy().mean() for c in chances]).sum()
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-10)
        for group, row in zip(found.groups, step.coefficients, strict=True):
            np.testing.assert_allclose(row, learned[group].detach().numpy(), rtol=1e-7, err_msg=group)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert np.ptp(found.steps[-1].coefficients) > 0.02


@pytest.mark.parametrize("per", ["task", "layer", "tensor"])
@pytest.mark.parametrize("clamp", ["auto", (0.0, 1.0)], ids=str)
def test_the_recipe_of_parts_merges_to_what_was_learned(wide: Models, per: str, clamp: Any) -> None:
    subject = InMemory(wide.values[0])
    found = wide.learn(
        two_tasks(), subject, method="tsv", per=per, steps=6, learning_rate=0.3, clamp=clamp, init=0.4
    )
    recipe = alnico.load_recipe(found.recipe)
    assert recipe.merge_method == "tsv"
    # A 0 would leave the model out, and change the parts of the other.
    assert found.coefficients.min() == (found.coefficients.min() if per == "task" else 1e-6) > 0
    alnico.merge(recipe, wide.paths[0].parent / "out")
    parts = parts_of(wide.values)
    row = {g: torch.from_numpy(found.coefficients[i]) for i, g in enumerate(found.groups)}
    with alnico.open_model(wide.paths[0].parent / "out") as merged:
        for name, parameter in subject.net.named_parameters():
            np.testing.assert_allclose(merged.read(name), parameter.detach().numpy(), atol=1e-14)
            if name != "frozen.weight":
                sum_of_parts = torch.tensordot(row[group_of(name, per)], parts[name], 1).numpy()
                np.testing.assert_allclose(merged.read(name), wide.values[0][name] + sum_of_parts, atol=1e-12)


def test_a_module_of_bf16_files_holds_the_merge_of_parts(tmp_path: Path) -> None:
    models = Models(tmp_path, "BF16")
    subject = InMemory(models.values[0], torch.float32)
    found = models.learn(two_tasks(), subject, method="tsv", learning_rate=0.05)
    alnico.merge(alnico.load_recipe(found.recipe), tmp_path / "out")
    different = total = 0
    with alnico.open_model(tmp_path / "out") as merged:
        for name, parameter in subject.net.named_parameters():
            own = parameter.detach().numpy()
            np.testing.assert_allclose(merged.read(name), own, rtol=2**-7)  # one unit in the last place
            different += int((merged.read(name) != own).sum())
            total += own.size
    assert different <= total / 100


def test_parts_without_room_are_kept_in_a_file_and_change_no_bit(wide: Models) -> None:
    found, without = (
        wide.learn(two_tasks(), method="tsv", memory_bytes=room, steps=5).data() for room in (1 << 30, 500)
    )
    assert found == without


def test_a_full_disk_for_parts_is_named(wide: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError) as caught:
        wide.learn(two_tasks(), method="tsv", memory_bytes=0)
    assert str(caught.value) == (
        f"{tempfile.gettempdir()}: the parts of embed.weight cannot be written (No space left on device). Make room "
        "there, set TMPDIR to another folder, or raise --memory, so that they stay in memory."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "ties"},
            "adamerge: method is 'ties'; expected task_arithmetic, or a method over whole matrices that adds up a part of "
            "each model, such as tsv. Choose one of them.",
        ),
        (
            {"method": "tsv", "plus": True},
            "adamerge: plus is set with the method tsv; expected task_arithmetic, whose task vectors can be trimmed. Remove "
            "one of the two.",
        ),
        (
            {"method": "tsv", "init": 2.5},
            "adamerge: init is 2.5; expected a number from 0 to 2, the range of clamp. Change one of them.",
        ),
    ],
    ids=["ties", "plus", "init"],
)
def test_a_method_without_parts_is_an_error(wide: Models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        wide.learn(two_tasks(), **options)
    assert str(caught.value) == message


def test_modules_learn_the_coefficients_of_parts() -> None:
    torch.manual_seed(4)
    models = [
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)) for _ in range(3)
    ]
    base, *tuned = models
    for model in tuned:
        model.load_state_dict({n: v + 0.2 * torch.randn_like(v) for n, v in base.state_dict().items()})
    found = alnico.adamerge(tuned, base=base, inputs=[torch.randn(20, 6)], method="tsv", per="task", steps=5)
    made = found.module()
    expected = tsv.merge(
        [m[0].weight.detach().double().numpy() for m in tuned],
        base[0].weight.detach().double().numpy(),
        {"weight": found.coefficients[0]},
        None,
    )
    np.testing.assert_allclose(made[0].weight.detach().numpy(), expected, atol=1e-6)
