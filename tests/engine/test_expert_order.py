"""Experts that have another order in one model are found before a merge, and experts in one order are not suspected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.engine.expert_order import best_matching, compare_order
from alnico.errors import MismatchError
from made import Tensors, llama_config, save_model

E, H, F, LAYERS = 8, 16, 24, 4
CASES = range(20)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, values: dict[str, np.ndarray]) -> None:
    tensors: Tensors = {n: ("BF16", v) for n, v in values.items()}
    save_model(
        Path(name), tensors, {**llama_config(H, LAYERS, 64), "model_type": "qwen3_moe", "num_experts": E}
    )


def mixture(seed: int, is_packed: bool) -> dict[str, np.ndarray]:
    """A mixture of experts; with ``is_packed`` all experts of a layer are one tensor."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {f"model.embed_{i}.weight": (256, H) for i in range(6)}
    for i in range(LAYERS):
        block = f"model.layers.{i}.mlp"
        shapes[f"{block}.gate.weight"] = (E, H)
        if is_packed:
            shapes |= {
                f"{block}.experts.gate_up_proj": (E, 2 * F, H),
                f"{block}.experts.down_proj": (E, H, F),
            }
        else:
            shapes |= {
                f"{block}.experts.{e}.{w}.weight": (F, H) for e in range(E) for w in ("up_proj", "down_proj")
            }
    return {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def tuned(values: dict[str, np.ndarray], seed: int, noise: float) -> dict[str, np.ndarray]:
    """A model near another one: noise of ``noise`` times the size of its values."""
    random = np.random.default_rng(1_000 + seed)
    return {
        n: v + np.float32(noise) * random.standard_normal(v.shape).astype(np.float32)
        for n, v in values.items()
    }


def reordered(values: dict[str, np.ndarray], order: list[int]) -> dict[str, np.ndarray]:
    """The same model with its experts, and the rows of its routers, in another order."""
    out = {}
    for name, value in values.items():
        if ".experts." in name and value.ndim == 2:
            stem, _, rest = name.partition(".experts.")
            number, _, word = rest.partition(".")
            out[name] = values[f"{stem}.experts.{order[int(number)]}.{word}"]
        else:
            out[name] = value[order] if ".mlp." in name else value
    return out


def notes_of(recipe: dict[str, Any]) -> list[str]:
    """What a merge says about the order of experts, in notes or in its refusal."""
    try:
        notes = alnico.merge(recipe, "out", overwrite=True).plan.notes
    except MismatchError as error:
        notes = tuple(str(error).splitlines())
    return [note for note in notes if "in another order" in note]


@pytest.mark.parametrize("case", CASES)
def test_reordered_experts_are_found_and_others_are_not(case: int) -> None:
    random = np.random.default_rng(case)
    is_packed, noise = bool(case % 2), (0.0, 0.1, 0.3, 0.8)[case % 4]
    base = mixture(case, is_packed)
    order = list(range(E))
    if case < 5:  # two experts alone
        i, j = random.choice(E, 2, replace=False)
        order[i], order[j] = order[j], order[i]
    else:
        while order == list(range(E)):
            order = [int(i) for i in random.permutation(E)]
    write("base", base)
    write("a", tuned(base, case, noise))
    write("b", reordered(tuned(base, case + 100, noise), order))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["a", "b"],
        "routers": "base",
    }
    (note,) = notes_of(recipe)
    moved = sum(i != j for i, j in enumerate(order))
    assert note.removeprefix("error: ").startswith(
        f"b: {moved} of {E} experts of model.layers.0.mlp.experts are in another order than in base"
    )
    first = next(i for i, j in enumerate(order) if i != j)
    assert f"expert {first} of base is expert {order.index(first)} of b" in note
    write("b", tuned(base, case + 100, noise))
    assert not notes_of({**recipe, "unrelated": "allow" if noise > 0.5 else "error"})


def test_equal_experts_of_a_fresh_mixture_and_unrelated_experts_have_no_order() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal(2_048)
    copies = one + 0.01 * random.standard_normal((2, 16, 2_048))
    assert compare_order(*copies) is None
    assert compare_order(*random.standard_normal((2, 64, 2_048))) is None
    assert compare_order(np.zeros((2, 8)), np.ones((2, 8))) is None


def test_a_matching_uses_each_expert_once() -> None:
    for seed in range(50):
        cosines = np.random.default_rng(seed).random((7, 7))
        assert sorted(best_matching(cosines)) == list(range(7))
