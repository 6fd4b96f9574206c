"""What a course on merging does with plain modules and a function as score, each in at most three lines, next to torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import alnico
from alnico.analysis.model_map import map_models

State = dict[str, torch.Tensor]
"""Tensors in float64, by name."""

FIRST, LAST = "fc1.weight", "fc2.weight"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


@pytest.fixture(scope="module")
def base() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture(scope="module")
def models(base: Network) -> list[Network]:
    tuned = [copy.deepcopy(base) for _ in range(3)]
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in tuned:
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return tuned


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(2)
    return torch.randn(200, 10, generator=draws), torch.randint(4, (200,), generator=draws)


@pytest.fixture(scope="module")
def score(batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[Any], float]:
    return lambda model: accuracy(model, *batch)


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def wide(model: Any) -> State:
    """The tensors of a module, or of a dict, in float64."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor.double() for name, tensor in state.items()}


def average(models: Sequence[Any], weights: Sequence[float]) -> State:
    states = [wide(m) for m in models]
    return {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / sum(weights) for n in states[0]}  # type: ignore[misc]


def vectors(models: Sequence[Any], base: Any) -> list[State]:
    start = wide(base)
    return [{n: t - start[n] for n, t in wide(m).items()} for m in models]


def added(base: Any, *terms: tuple[float, State]) -> State:
    return {n: t + sum(factor * tau[n] for factor, tau in terms) for n, t in wide(base).items()}


def assert_equal(found: Any, expected: Mapping[str, torch.Tensor]) -> None:
    state = wide(found)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_uniform_and_a_weighted_average(models: list[Network]) -> None:
    assert_equal(alnico.merge_models(models), average(models, [1, 1, 1]))
    assert_equal(alnico.merge_models(models, weights=[3, 1, 2]), average(models, [3, 1, 2]))


def filled(template: nn.Module, state: State) -> nn.Module:
    module = copy.deepcopy(template)
    module.load_state_dict({n: t.float() for n, t in state.items()})
    return module


def test_a_greedy_soup(models: list[Network], score: Callable[[Any], float]) -> None:
    soup = alnico.soup(models, score)

    def score_of(chosen: Sequence[int]) -> float:
        return score(filled(models[0], average([models[i] for i in chosen], [1] * len(chosen))))

    first, *others = sorted(range(3), key=lambda i: -score(models[i]))
    chosen = [first]
    for i in others:
        if score_of([*chosen, i]) >= score_of(chosen):
            chosen.append(i)
    assert set(soup.counts) == {f"models[{i}]" for i in chosen}
    assert_equal(soup.module(), average([models[i] for i in chosen], [1] * len(chosen)))


def test_task_vectors_added_negated_and_scaled(base: Network, models: list[Network]) -> None:
    first, second, third = (alnico.TaskVector(model, base) for model in models)
    a, b, c = vectors(models, base)
    assert_equal((first + second).on(base).state_dict(), added(base, (1, a), (1, b)))
    assert_equal((-first).on(base).state_dict(), added(base, (-1, a)))
    assert_equal((0.5 * first + third / 4).on(base).state_dict(), added(base, (0.5, a), (0.25, c)))
    assert_equal((second - first).on(models[2]).state_dict(), added(models[2], (1, b), (-1, a)))


def test_one_tensor_of_a_task_vector(base: Network, models: list[Network]) -> None:
    tau = alnico.TaskVector(models[0], base)
    expected = vectors(models, base)[0]
    assert list(tau.keys()) == list(expected)
    torch.testing.assert_close(tau[FIRST].double(), expected[FIRST], rtol=1e-6, atol=1e-8)
    assert_equal(tau.state_dict(), expected)


def test_ties_with_trim_by_quantile_and_counted_votes(base: Network, models: list[Network]) -> None:
    merged = alnico.merge_models(models, "ties", base=base, trim_ratio=0.5, elect="count", tie="none")
    expected = {}
    for name, start in wide(base).items():
        taus = torch.stack([tau[name] for tau in vectors(models, base)])
        limits = [float(torch.quantile(t.abs().flatten(), 0.5)) for t in taus]
        taus = torch.stack([t * (t.abs() >= limit) for t, limit in zip(taus, limits, strict=True)])
        sign = torch.sign(torch.sign(taus).sum(0))  # a tie elects 0
        agrees = (torch.sign(taus) == sign) & (sign != 0)
        expected[name] = start + (taus * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    assert_equal(merged, expected)


def test_dare_drops_at_random_and_keeps_the_expectation(base: Network, models: list[Network]) -> None:
    merged = alnico.merge_models(models[:1], "dare", base=base, drop_rate=0.75, rescale="inverse", seed=3)
    kept = {n: t != wide(base)[n] for n, t in wide(merged).items()}
    (tau,) = vectors(models[:1], base)
    assert_equal(merged, added(base, (4, {n: t * kept[n] for n, t in tau.items()})))
    assert 0.15 < torch.cat([k.flatten() for k in kept.values()]).double().mean() < 0.35
    again, other = (
        alnico.merge_models(models[:1], "dare", base=base, drop_rate=0.75, rescale="inverse", seed=s)
        for s in (3, 4)
    )
    assert torch.equal(again.fc1.weight, merged.fc1.weight)
    assert not torch.equal(other.fc1.weight, merged.fc1.weight)


def test_all_methods_in_a_loop_take_what_they_know(base: Network, models: list[Network]) -> None:
    options = {"weights": [1.0, 1.0], "density": 0.5, "t": 0.5}
    merged = {}
    for name, method in alnico.methods().items():
        start = None if method.base == "first" else base
        if not method.statistics and method.models[0] <= 2 <= (method.models[1] or 2):
            merged[name] = alnico.merge_models(models[:2], name, base=start, seed=1, **method.known(options))
    assert set(alnico.methods()) - set(merged) == {"fisher", "regmean", "passthrough", "nearswap"}
    assert all(type(m) is Network for m in merged.values())
    one, other = vectors(models[:2], base)
    assert_equal(merged["task_arithmetic"], added(base, (1, one), (1, other)))
    assert_equal(merged["linear"], average(models[:2], [1, 1]))


def test_lora_of_triples(base: Network) -> None:
    draws = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 10, generator=draws), torch.randn(20, 3, generator=draws)
    c, d = torch.randn(2, 10, generator=draws), torch.randn(20, 2, generator=draws)
    adapters = [{FIRST: (a, b, 0.5)}, {FIRST: (c, d, 2.0)}]
    one, other = 0.5 * b.double() @ a.double(), 2.0 * d.double() @ c.double()

    folded = alnico.lora.fold(base, [adapters[0]])
    assert_equal(folded, {n: t + (one if n == FIRST else 0) for n, t in wide(base).items()})

    combined = alnico.lora.combine(adapters, weights=[1.0, 0.5], method="cat")
    found_a, found_b, scale = combined[FIRST]
    torch.testing.assert_close(
        scale * found_b.double() @ found_a.double(), one + 0.5 * other, rtol=1e-5, atol=1e-5
    )


def test_a_search_of_weights_on_the_simplex(models: list[Network], score: Callable[[Any], float]) -> None:
    found = alnico.search_weights(models, score, simplex=True, trials=12, seed=5)
    assert len(found.trials) == 12
    for trial in found.trials:
        assert sum(trial.weights) == pytest.approx(1)
        assert min(trial.weights) >= 0
        assert trial.score == score(filled(models[0], average(models, trial.weights)))
    assert found.score == max(trial.score for trial in found.trials)
    assert_equal(found.module(), average(models, found.weights))


def test_layers_by_three_methods(base: Network, models: list[Network]) -> None:
    merged = alnico.merge_models(
        models,
        layers={
            FIRST: {"method": "slerp", "models": models[:2], "t": 0.3},
            "fc2": {"method": "task_arithmetic", "base": base, "weights": [1, 2, 3]},
        },
    )
    expected = average(models, [1, 1, 1])
    u, v = (wide(m)[FIRST] for m in models[:2])
    angle = torch.arccos(torch.clamp((u * v).sum() / u.norm() / v.norm(), -1, 1))
    expected[FIRST] = (torch.sin(0.7 * angle) * u + torch.sin(0.3 * angle) * v) / torch.sin(angle)
    summed = added(base, *zip([1, 2, 3], vectors(models, base), strict=True))
    expected |= {n: t for n, t in summed.items() if n.startswith("fc2")}
    assert_equal(merged, expected)


def test_the_analysis_of_a_merge(base: Network, models: list[Network], score: Callable[[Any], float]) -> None:
    merged = alnico.merge_models(models, "ties", base=base, density=0.5)
    names = ["one", "two", "three"]
    kept = alnico.compare(models, merged, base=base, tasks={"A": score}, names=names)
    assert kept.by_model["A"] == {
        name: score(model)
        for name, model in {"base": base, **dict(zip(names, models, strict=True)), "merged": merged}.items()
    }
    *parents, result = (
        torch.cat([t.flatten() for t in tau.values()]) for tau in vectors([*models, merged], base)
    )
    for of, parent in zip(kept.whole.parents, parents, strict=True):
        assert of.distance == pytest.approx(float((parent - result).norm()), rel=1e-5)


def test_the_curve_of_a_scale_and_a_path(
    base: Network, models: list[Network], batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(batch[0]), batch[1]))

    curve = alnico.curve(base, models, {"loss": loss}, scale="0:1:0.25")
    taus = vectors(models, base)
    expected = [loss(filled(base, added(base, *((s, tau) for tau in taus)))) for s in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose([point.scores["loss"].value for point in curve.points], expected, rtol=1e-5)

    path = alnico.curve(None, models[:2], {"loss": loss}, path=True, scale="0:1:0.5", minimize=True)
    between = [loss(filled(base, average(models[:2], [1 - t, t]))) for t in (0, 0.5, 1)]
    assert path.barrier.height.value == pytest.approx(
        max(0, between[1] - (between[0] + between[2]) / 2), abs=1e-6
    )


def test_the_map_of_models(base: Network, models: list[Network]) -> None:
    plane = map_models(alnico.analyze(models[:2], base=base))
    one, other = (torch.cat([t.flatten() for t in tau.values()]) for tau in vectors(models[:2], base))
    x, y = (np.array([point.x, point.y]) for point in plane.points)
    assert np.linalg.norm(x) == pytest.approx(float(one.norm()), rel=1e-6)
    assert np.linalg.norm(y) == pytest.approx(float(other.norm()), rel=1e-6)
    assert np.linalg.norm(x - y) == pytest.approx(float((one - other).norm()), rel=1e-6)
