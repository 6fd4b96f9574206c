"""Task vectors one computes with: terms until asked for, then the bits of an ordinary recipe."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico import TaskVector
from alnico.errors import AlnicoError, MismatchError, ModelError
from made import family, read_model, save_model


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    base, (code, toxic) = family(tmp_path, 2, "F32", layers=1)
    return str(base), str(code), str(toxic)


def arrays(count: int, seed: int = 0, spread: float = 0.1) -> list[dict[str, np.ndarray]]:
    """A base and models near it, which equal it in the first half."""
    random = np.random.default_rng(seed)
    base = random.standard_normal((40, 30)).astype(np.float32)
    found = [{"w": base}]
    for _ in range(count):
        w = base.copy()
        w[20:] += spread * random.standard_normal((20, 30)).astype(np.float32)
        found.append({"w": w})
    return found


def test_a_sum_over_one_base_has_the_bytes_of_task_arithmetic(
    files: tuple[str, str, str], tmp_path: Path
) -> None:
    base, code, toxic = files
    model = base + 0.6 * TaskVector(code, base) - 0.3 * TaskVector(toxic, base)
    result = model.save(tmp_path / "lazy")
    recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": base}
    recipe["models"] = [{"model": m, "parameters": {"weight": w}} for m, w in ((code, 0.6), (toxic, -0.3))]
    alnico.merge(recipe, tmp_path / "recipe")
    assert result.path == tmp_path / "lazy"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "lazy" / name).read_bytes() == (tmp_path / "recipe" / name).read_bytes()
    assert {n: v.numpy().tobytes() for n, v in model.state_dict().items()} == {
        n: v.tobytes() for n, v in read_model(tmp_path / "recipe").items()
    }
    again = alnico.merge(model.recipe, tmp_path / "again")
    assert again.digests == result.digests


def test_models_come_as_paths_opened_files_dicts_and_modules(files: tuple[str, str, str]) -> None:
    base, code, _ = files
    expected = (base + 0.5 * TaskVector(code, base)).state_dict()
    with alnico.open_model(base) as opened:
        in_memory = [
            {n: torch.tensor(m.read(n)) for n in m.tensors} for m in (opened, alnico.open_model(code))
        ]
        for of_base, of_code in (
            (Path(base), Path(code)),
            (opened, code),
            (in_memory[0], in_memory[1]),
            (base, in_memory[1]),
        ):
            found = (of_base + 0.5 * TaskVector(of_code, of_base)).state_dict()
            assert all(torch.equal(found[n], v) for n, v in expected.items())


def test_analogies_add_the_difference_of_two_to_a_third() -> None:
    (base, a, b), (_, c) = arrays(2), arrays(1, seed=1)
    exact = c["w"].astype(np.float64) + 0.7 * (b["w"].astype(np.float64) - a["w"])
    for found in (
        c + 0.7 * TaskVector(b, a),
        base + (TaskVector(c, base) + 0.7 * (TaskVector(b, base) - TaskVector(a, base))),
    ):
        assert np.abs(found.state_dict()["w"] - exact).max() <= 2 * np.spacing(np.float32(8))


def test_where_no_pair_differs_the_base_keeps_its_bits() -> None:
    (base, one), (origin, other) = arrays(1), arrays(1, seed=1)
    origin["w"][:20], other["w"][:20] = 1e3, 1e3
    base["w"][0, :2] = one["w"][0, :2] = [-0.0, 1e-30]
    target = {"w": (base["w"] * 1.7).astype(np.float32)}
    tau = 0.3 * TaskVector(one, base) + 0.37 * TaskVector(other, origin)
    found = (target + tau).state_dict()["w"]
    assert found[:20].tobytes() == target["w"][:20].tobytes()
    assert not np.array_equal(found[20:], target["w"][20:])


def test_equal_terms_are_one_and_numbers_multiply() -> None:
    base, a, b = arrays(2)
    one, two = TaskVector(a, base), TaskVector(b, base)
    tau = sum([one, two, one]) / 2 - -np.float64(3) * two
    assert [(c, m.value is a, o.value is base) for c, m, o in tau.terms] == [
        (1.0, True, True),
        (3.5, False, True),
    ]
    assert repr(tau) == "<task vector (dict - dict) + 3.5 x (dict - dict)>"
    assert (one - one).norm() == 0
    assert np.array_equal((base + (one - one)).state_dict()["w"], base["w"])
    assert np.array_equal((base + TaskVector(base, base)).state_dict()["w"], base["w"])
    assert np.array_equal((a - one).state_dict()["w"], base["w"])
    assert np.array_equal((one + base).state_dict()["w"], a["w"])


def test_a_path_in_two_spellings_is_one_model(
    files: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, code, _ = files
    monkeypatch.chdir(Path(base).parent)
    model = "base" + TaskVector("tuned-0", base) + TaskVector(code, "./base")
    assert model.recipe == {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "tuned-0", "parameters": {"weight": 2.0}}],
    }
    assert repr(model) == f"<model base + 2 x (tuned-0 - {base})>"


def test_norm_and_cosine_are_those_of_float64() -> None:
    (base, a, b), (_, c) = arrays(2), arrays(1, seed=1)
    wide = [m["w"].astype(np.float64) for m in (base, a, b, c)]
    one, two = wide[1] - wide[0], 0.5 * (wide[2] - wide[0]) - 2 * (wide[3] - wide[2])
    x, y = TaskVector(a, base), 0.5 * TaskVector(b, base) - 2 * TaskVector(c, b)
    assert x.norm() == pytest.approx(np.linalg.norm(one), rel=1e-13)
    assert y.norm() == pytest.approx(np.linalg.norm(two), rel=1e-13)
    assert x.cosine(y) == pytest.approx(
        np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-10
    )
    assert x.cosine(3 * x) == pytest.approx(1.0, rel=1e-14)
    with pytest.raises(AlnicoError, match="is 0 in every tensor; a cosine needs two directions"):
        x.cosine(x - x)


def test_a_small_task_vector_of_bf16_has_its_exact_norm(tmp_path: Path) -> None:
    values = np.full(100_000, 256.0, np.float32)
    base = save_model(tmp_path / "base", {"w": ("BF16", values)})
    values[:3] += 2.0
    tuned = save_model(tmp_path / "tuned", {"w": ("BF16", values)})
    assert TaskVector(tuned, base).norm() == np.sqrt(12.0)


def test_a_module_is_filled_in_place_but_never_an_input() -> None:
    torch.manual_seed(0)
    base, tuned, target = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    before = copy.deepcopy(base.state_dict())
    model = base + 0.5 * TaskVector(tuned, base)
    assert model.apply(target) is target
    assert torch.allclose(target.weight, (base.weight + tuned.weight) / 2, atol=1e-7)
    assert all(torch.equal(base.state_dict()[n], v) for n, v in before.items())
    with pytest.raises(AlnicoError, match="the module to fill is an input of the model"):
        model.apply(base)
    with pytest.raises(
        MismatchError,
        match=r"^weight: is \(2, 3\) in the merge, \(2, 4\) in the module \(Linear\); expected one shape",
    ):
        model.apply(nn.Linear(4, 2))
    with pytest.raises(MismatchError, match=r"^0\.bias: |^weight: is not in the module \(Sequential\)"):
        model.apply(nn.Sequential(nn.Linear(3, 2)))


def test_a_buffer_that_a_module_does_not_save_may_be_given() -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("places", torch.zeros(2), persistent=False)
    given = {**{n: v.clone() for n, v in module.state_dict().items()}, "places": torch.ones(2)}
    (given + TaskVector(given, given)).apply(module)
    assert module.places.tolist() == [1, 1]
    part = {"weight": given["weight"]}
    with pytest.raises(MismatchError, match=r"^bias: the module \(Linear\) has it, the merged models do not"):
        (part + TaskVector(part, part)).apply(module)


def test_models_in_memory_are_saved_as_files_and_leave_no_half_merge(tmp_path: Path) -> None:
    base, tuned = arrays(1)
    model = base + 0.5 * TaskVector(tuned, base)

    def stop(event: object) -> None:
        if type(event).__name__ == "TensorDone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "out", watch=stop)
    model.save(tmp_path / "out")  # inputs in memory cannot be told from changed ones: it begins anew
    assert read_model(tmp_path / "out")["w"].tobytes() == model.state_dict()["w"].tobytes()
    half = model.save(tmp_path / "half.safetensors", dtype="float16", memory="1GiB")
    assert half.plan.dtype == "F16"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "dict 1" in card


def test_what_is_no_model_is_refused(files: tuple[str, str, str]) -> None:
    base, tuned, _ = files
    with pytest.raises(
        ModelError, match=r"^finetuned is of type int; expected the path or hub id of a model"
    ):
        TaskVector(3, base)
    tau = TaskVector(tuned, base)
    with pytest.raises(TypeError):
        tau + 3
    with pytest.raises(TypeError):
        tau * "0.5"
    with pytest.raises(AlnicoError, match="a task vector is multiplied by nan; expected a finite factor"):
        tau * float("nan")
    with pytest.raises(ModelError, match="no such directory or file"):
        (base + TaskVector("./nowhere", base)).state_dict()
    other = {"w": np.ones(3, np.float32)}
    with pytest.raises(MismatchError, match="lacks it; expected it in all models"):
        (base + TaskVector(other, base)).state_dict()


def test_arrays_are_merged_without_torch() -> None:
    code = (
        "import sys, numpy as np, alnico; b, t = {'w': np.float32([1, 2])}, {'w': np.float32([4, 6])}; "
        "tau = alnico.TaskVector(t, b); print(tau.norm(), (b + tau).state_dict()['w'], 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "5.0 [4. 6.] False\n"


MODULES = {
    "linear": nn.Linear,
    "sequential": lambda *size: nn.Sequential(nn.Linear(*size), nn.ReLU()),
    "named sequential": lambda *size: NamedSequential(nn.Linear(*size)),
    "list": lambda *size: nn.ModuleList([nn.Linear(*size)]),
    "dict": lambda *size: nn.ModuleDict({"a": nn.Linear(*size)}),
    "parameters": lambda *size: nn.ParameterList([nn.Parameter(torch.rand(size))]),
    "named parameters": lambda *size: nn.ParameterDict({"a": nn.Parameter(torch.rand(size))}),
}
"""Containers of torch, some of which define ``+`` themselves."""


class NamedSequential(nn.Sequential):
    """A class of the user."""


@pytest.mark.parametrize("kind", list(MODULES))
def test_a_task_vector_goes_on_every_kind_of_module(kind: str) -> None:
    base, tuned = MODULES[kind](3, 2), MODULES[kind](3, 2)
    tau = TaskVector(tuned, base)
    expected = {n: v + 0.5 * (tuned.state_dict()[n] - v) for n, v in base.state_dict().items()}
    whole = (0.5 * tau).on(base)
    assert isinstance(whole, alnico.LazyModel)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert (tau + base).recipe == tau.on(base).recipe
    assert (base - tau).recipe == (-tau).on(base).recipe
    filled = tau.on(base).apply(copy.deepcopy(base))
    assert all(
        torch.equal(v, tuned.state_dict()[n]) or torch.allclose(v, tuned.state_dict()[n])
        for n, v in filled.state_dict().items()
    )


def test_a_task_vector_goes_on_paths_dicts_opened_and_lazy_models(files: tuple[str, str, str]) -> None:
    base, code, toxic = files
    tau = TaskVector(code, base)
    expected = read_model_of(base + tau)
    with alnico.open_model(base) as opened:
        for model in (base, Path(base), opened, read_model(Path(base))):
            found = read_model_of(tau.on(model))
            assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    other = TaskVector(toxic, base)
    assert other.on(tau.on(base)).recipe == (base + tau + other).recipe == sum([tau, other]).on(base).recipe  # type: ignore[union-attr]


def read_model_of(model: alnico.LazyModel) -> dict[str, np.ndarray]:
    return {n: np.asarray(v) for n, v in model.state_dict().items()}


def test_torchs_lists_do_not_take_a_task_vector_as_modules() -> None:
    tau = TaskVector({"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
    modules = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="is not a Module subclass"):
        modules + tau
    with pytest.raises(TypeError, match="is not a Module subclass"):
        modules += tau
    assert len(modules) == 1


@pytest.mark.parametrize("half", [np.array(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_arrays_of_one_number_are_numbers(half: Any) -> None:
    tau = TaskVector({"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
    assert [c for c, *_ in (half * tau).terms] == [c for c, *_ in (tau * half).terms] == [0.5]
    assert [c for c, *_ in (tau / half).terms] == [2.0]


@pytest.mark.parametrize("numbers", [np.ones(2), torch.ones(2)])
def test_arrays_of_several_numbers_are_refused(numbers: Any) -> None:
    tau = TaskVector({"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
    kind = type(numbers).__name__
    says = rf"^a task vector is multiplied or divided by a value of type {kind} and shape \(2,\); expected one number\."
    for compute in (lambda: numbers * tau, lambda: tau * numbers, lambda: tau / numbers):
        with pytest.raises(AlnicoError, match=says):
            compute()
    for compute in (
        lambda: numbers + tau,
        lambda: tau + numbers,
        lambda: numbers - tau,
        lambda: tau.on(numbers),
    ):
        with pytest.raises(ModelError, match=rf"^the model is of type {kind}; expected the path or hub id"):
            compute()


def test_a_factor_that_needs_its_gradient_is_refused() -> None:
    tau = TaskVector({"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
    with pytest.raises(AlnicoError, match=r"by a Parameter that needs its gradient, .* Pass its \.item\(\)"):
        nn.Parameter(torch.tensor(0.5)) * tau
    with pytest.raises(AlnicoError, match=r"by 1j of type complex; expected a real number\."):
        np.array(1j) * tau


def test_a_lazy_model_is_the_base_and_its_task_vectors_in_a_task_vector() -> None:
    base, one, other = ({"w": np.float32([i, 2 * i])} for i in (1, 3, 7))
    first, second = alnico.TaskVector(one, base), alnico.TaskVector(other, base)
    assert alnico.TaskVector((0.5 * first).on(base), base).terms == (0.5 * first).terms
    assert alnico.TaskVector(first, base).terms == first.terms
    apart = alnico.TaskVector((first + second).on(base), first.on(base))
    assert apart["w"].tolist() == [6.0, 12.0]
    moved = alnico.TaskVector(second.on(one), base)
    assert moved["w"].tolist() == [8.0, 16.0]
