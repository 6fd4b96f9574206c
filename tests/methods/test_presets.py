"""Presets are named values of options: valid, told in the docstring, and the paper's merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import alnico
from alnico.errors import MethodError
from alnico.methods import find, registry
from alnico.methods.base import Merge, PerModel, Share, each, method
from alnico.testing import MethodCase, check_presets
from methods.merging import merge_arrays


@pytest.mark.parametrize("name", [m.name for m in registry().values() if m.presets])
def test_a_preset_binds_and_is_told_in_the_docstring(name: str) -> None:
    chosen = find(name)
    check_presets(MethodCase(chosen, models=1 if chosen.models == (1, 1) else 3))


def test_the_presets_of_the_papers_are_there() -> None:
    assert find("ties").presets["paper"] == {
        "density": 0.2,
        "elect": "mass",
        "tie": "none",
        "divide": "count",
        "scope": "model",
        "scale": 1.0,
    }
    assert set(find("linear").presets) == {"uniform_soup", "wise_ft"}


def test_wise_ft_is_the_middle_of_base_and_fine_tune(tmp_path: Path) -> None:
    base, tuned = {"w": np.array([1.0, 2.0, -3.0], np.float32)}, {"w": np.array([3.0, 2.0, 5.0], np.float32)}
    merged = merge_arrays(tmp_path, "linear", {}, [base, tuned], {}, keys={"preset": "wise_ft"})["w"]
    assert merged.tolist() == [2.0, 2.0, 1.0]


def equation(delta, density, flip):
    return density[0] * delta[0] * flip


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"densty": 0.2},
            r"mine: preset paper sets 'densty'; expected an option of the method \(density, flip\)\.",
        ),
        ({"density": (0.2, 1.5)}, r"mine: preset paper: density is 1\.5; expected \(0, 1\]\."),
        ({"flip": (True,)}, r"mine: preset paper: flip is \(True,\); expected true or false\."),
    ],
)
def test_a_preset_that_does_not_fit_is_refused_at_registration(values: dict, told: str) -> None:
    def mine(*, density: PerModel[Share] = each(1.0), flip: bool = False) -> Merge:
        return Merge(equation, (density, float(flip)))

    with pytest.raises(MethodError, match=told):
        method(space="delta", source="nobody", presets={"paper": values})(mine)


@pytest.mark.parametrize("name", list(registry()))
def test_every_preset_can_be_asked_for_in_a_recipe(name: str) -> None:
    for preset in find(name).presets:
        recipe = {
            "merge_method": name,
            "preset": preset,
            "models": ["a", "b"][: find(name).models[1]],
            "base_model": "c",
        }
        if name in ("linear", "karcher"):
            del recipe["base_model"]
        assert alnico.load_recipe(recipe).merge_method == name
