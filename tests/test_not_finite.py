"""A NaN or an infinity in a model is named, with its tensor and index, by everything that reports numbers over values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alnico
from alnico.errors import NonFiniteError
from alnico.evaluation.loaded_model import ModuleSubject
from alnico.evaluation.tasks import Score
from made import save_model

SHAPE = (96, 96)
PLACES = {"first": (0, 0), "middle": (47, 95), "last": (95, 95)}
VALUES = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf}
NAME = "layer.weight"
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensors(seed: int) -> dict[str, np.ndarray]:
    """Weights of a base (seed 0) and of models tuned from it."""
    made = {n: np.random.default_rng(5).standard_normal(SHAPE) for n in (NAME, "other.weight")}
    random = np.random.default_rng(seed)
    return {n: v + (0.1 * random.standard_normal(SHAPE) if seed else 0) for n, v in made.items()}


class Length:
    """A task that looks at the weights of a merge, and would take a NaN for a number."""

    name, goal, weight, size = "length", "max", 1.0, 0

    def evaluate(self, subject: Any, examples: Any = None) -> Score:
        return Score(float(torch.nan_to_num(subject.state()[NAME].double(), 0, 0, 0).norm()))

    def pooled(self, scores: Any) -> Score:
        return scores[0]  # type: ignore[no-any-return]

    def digests(self) -> frozenset[str]:
        return frozenset()


@dataclass(frozen=True)
class Models:
    """A model that is not finite, one that is, their base, and a place for an output."""

    bad: str
    one: str
    base: str
    out: Path


ON_DISK: dict[str, Callable[[Models], Any]] = {
    "norm": lambda m: alnico.TaskVector(m.bad, m.base).norm(),
    "norm of a sum": lambda m: (
        alnico.TaskVector(m.one, m.base) - 0.5 * alnico.TaskVector(m.bad, m.base)
    ).norm(),
    "norm to a bad base": lambda m: alnico.TaskVector(m.one, m.bad).norm(),
    "cosine": lambda m: alnico.TaskVector(m.bad, m.base).cosine(alnico.TaskVector(m.one, m.base)),
    "cosine of the other": lambda m: alnico.TaskVector(m.one, m.base).cosine(
        alnico.TaskVector(m.bad, m.base)
    ),
    "weights": lambda m: alnico.norm_weights([m.one, m.bad], base=m.base),
    "analyze": lambda m: alnico.analyze([m.one, m.bad], base=m.base),
    "analyze a bad base": lambda m: alnico.analyze([m.one], base=m.bad),
    "compare": lambda m: alnico.compare([m.one, m.base], m.bad, base=m.base),
    "compare a bad parent": lambda m: alnico.compare([m.one, m.bad], m.base, base=m.base),
    "suggest": lambda m: alnico.suggest([m.one, m.bad], base=m.base),
    "extract": lambda m: alnico.lora.extract(m.bad, m.base, m.out, rank=4),
    "soup": lambda m: alnico.soup([m.one, m.bad], [Length()]),
    "soup of one order": lambda m: alnico.soup([m.bad, m.one], [Length()], order="uniform"),
    "scales": lambda m: alnico.search_scales(m.base, [m.bad], lambda _: 1.0, trials=2),
    "merge": lambda m: alnico.merge({"merge_method": "linear", "models": [m.bad, m.one]}, m.out),
}


def cases() -> Iterator[Any]:
    """Every value with every dtype, at the places in turn."""
    for i, (value, dtype) in enumerate(product(VALUES, TORCH)):
        place = list(PLACES)[i % 3]
        yield pytest.param(value, place, dtype, id=f"{value}-{place}-{dtype}")


@pytest.fixture(scope="module")
def finite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, str]]:
    root = tmp_path_factory.mktemp("finite")

    def made(dtype: str) -> tuple[str, str]:
        for seed, name in enumerate(("base", "one")):
            if not (root / dtype / name).exists():
                save_model(root / dtype / name, {n: (dtype, v) for n, v in tensors(seed).items()})
        return str(root / dtype / "base"), str(root / dtype / "one")

    return made


@pytest.mark.parametrize(("value", "place", "dtype"), list(cases()))
def test_every_number_over_values_names_tensor_and_index(
    value: str, place: str, dtype: str, finite: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, one = finite(dtype)
    held = tensors(2)
    held[NAME][PLACES[place]] = VALUES[value]
    bad = str(save_model(tmp_path / "bad", {n: (dtype, v) for n, v in held.items()}))
    for name, call in ON_DISK.items():
        with pytest.raises(NonFiniteError) as caught:
            call(Models(bad, one, base, tmp_path / "out"))
        said = str(caught.value)
        assert said.startswith(f"{NAME}[{PLACES[place][0]}, {PLACES[place][1]}]"), (name, said)
        assert bad in said, (name, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", TORCH)
def test_models_in_memory_are_named_too(dtype: str) -> None:
    base, one, bad = (
        {n: torch.tensor(v).to(TORCH[dtype]) for n, v in tensors(seed).items()} for seed in range(3)
    )
    for i, value in product(PLACES.values(), VALUES.values()):
        bad[NAME] = torch.tensor(tensors(2)[NAME]).to(TORCH[dtype])
        bad[NAME][i] = value
        calls: list[Callable[[], Any]] = [
            lambda: alnico.TaskVector(bad, base).norm(),
            lambda: alnico.TaskVector(one, base).cosine(alnico.TaskVector(bad, base)),
            lambda: (base + 0.5 * alnico.TaskVector(bad, base)).state_dict(),
            lambda: alnico.merge_state_dicts([one, bad]),
            lambda: alnico.search_scales(base, [bad], lambda _: 1.0, trials=1),
        ]
        for call in calls:
            with pytest.raises(
                NonFiniteError,
                match=rf"^{NAME}{re.escape(str(list(i)))}: .* has (NaN|an infinity); expected finite",
            ):
                call()


@pytest.mark.parametrize("dtype", TORCH)
def test_infinity_minus_infinity_is_named(dtype: str) -> None:
    both = [{n: torch.tensor(v).to(TORCH[dtype]) for n, v in tensors(seed).items()} for seed in range(2)]
    for model in both:
        model[NAME][3, 5] = torch.inf
    tau = alnico.TaskVector(both[1], both[0])
    for call in (tau.norm, lambda: tau.cosine(tau)):
        with pytest.raises(
            NonFiniteError, match=rf"^{NAME}\[3, 5\]: .* has an infinity; expected finite numbers"
        ):
            call()


def test_a_length_beyond_float64_is_named() -> None:
    base, far = ({"w": np.full(3, value)} for value in (0.0, 1e200))
    with pytest.raises(
        NonFiniteError, match=r"^w: the length of a task vector is beyond float64; expected a finite number\."
    ):
        alnico.TaskVector(far, base).norm()


@pytest.mark.parametrize("dtype", TORCH)
def test_a_difference_counts_what_is_not_finite(
    dtype: str, finite: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    base, _ = finite(dtype)
    held = tensors(0)
    held[NAME][0, 0], held[NAME][47, 95], held[NAME][95, 95] = np.nan, np.inf, -np.inf
    bad = save_model(tmp_path / "bad", {n: (dtype, v) for n, v in held.items()})
    found = {t.name: t.values for t in alnico.diff(base, bad).tensors if t.values is not None}
    assert (found[NAME].differing, found[NAME].not_finite) == (3, 3)


def test_a_module_that_is_scored_or_measured_is_looked_at() -> None:
    module = torch.nn.Linear(8, 8).eval()
    with torch.no_grad():
        module.weight[3, 5] = torch.nan
    with pytest.raises(
        NonFiniteError,
        match=r"^weight\[3, 5\]: mine has NaN; expected finite numbers\. Repair or exclude this model\.$",
    ):
        ModuleSubject("mine", module).module("classifier")


def test_batches_that_make_running_statistics_infinite_are_refused() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    before = module[0].running_mean.clone()
    batch = torch.ones(8, 4)
    batch[3, 2] = torch.nan
    with pytest.raises(
        NonFiniteError,
        match=r"0\.running_mean becomes NaN or infinite on these batches, first at \[2\]; expected",
    ):
        alnico.recalibrate_batchnorm(module, [batch])
    assert torch.equal(module[0].running_mean, before)
