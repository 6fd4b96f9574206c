"""Recipes with a name are the sums that their papers define, in Python and by a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.errors import RecipeError
from made import read_model, save_model

Run = Callable[..., tuple[int, str, str]]
TENSORS = ("embed_tokens.weight", "vision_tower.w", "action_expert.w", "model.w")


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """An old base, what was tuned from it, and a new base; one tensor was not tuned."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)

    def near(start: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
        return {
            n: v + np.float32(share) * random.standard_normal(v.shape).astype(np.float32)
            for n, v in start.items()
        }

    old = {n: random.standard_normal((3, 5)).astype(np.float32) for n in TENSORS}
    made = {"old": old, "tuned": {**near(old, 0.1), "model.w": old["model.w"]}, "new": near(old, 0.2)}
    for name, tensors in made.items():
        save_model(
            Path("models", name),
            {n: ("F32", v) for n, v in tensors.items()},
            {"architectures": ["X"], "of": name},
        )
    return made


def merged(recipe: alnico.Recipe) -> dict[str, np.ndarray]:
    alnico.merge(recipe, "out", overwrite=True)
    return read_model(Path("out"))


CHAT = {"old_base": "models/old", "tuned": "models/tuned", "new_base": "models/new"}


@pytest.mark.parametrize("scale", [1.0, 0.7, -1.0])
def test_a_chat_vector_is_added_to_the_new_base(models: Any, scale: float) -> None:
    out = merged(alnico.recipe.chat_vector(**CHAT, scale=scale))
    for name, values in out.items():
        old, tuned, new = (models[m][name].astype(float) for m in ("old", "tuned", "new"))
        np.testing.assert_allclose(values, new + scale * (tuned - old), atol=1e-6)
    assert out["model.w"].tobytes() == models["new"]["model.w"].tobytes()  # what was not tuned keeps its bits
    assert '"of": "new"' in Path("out/config.json").read_text()


def test_tensors_that_are_kept_are_those_of_the_new_base(models: Any) -> None:
    out = merged(alnico.recipe.chat_vector(**CHAT, keep=["embed_tokens", "vision"]))
    for name in ("embed_tokens.weight", "vision_tower.w", "model.w"):
        assert out[name].tobytes() == models["new"][name].tobytes()
    assert not np.array_equal(out["action_expert.w"], models["new"]["action_expert.w"])


def test_the_chat_template_is_that_of_the_tuned_model() -> None:
    Path("models/tuned/chat_template.jinja").write_text("{{ messages[0].content }}")
    merged(alnico.recipe.chat_vector(**CHAT))
    assert Path("out/chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_difference_is_added(models: Any) -> None:
    out = merged(
        alnico.recipe.add_difference(a="models/new", b="models/tuned", c="models/old", multiplier=0.5)
    )
    for name, values in out.items():
        a, b, c = (models[m][name].astype(float) for m in ("new", "tuned", "old"))
        np.testing.assert_allclose(values, a + (b - c) * 0.5, atol=1e-6)


def test_each_module_has_its_own_share_of_the_fine_tune(models: Any) -> None:
    shares = {"vision_tower": 0.3, "action_expert": 0.9}
    recipe = alnico.recipe.retain(
        pretrained="models/old", finetuned="models/tuned", alpha=0.5, modules=shares
    )
    for name, values in merged(recipe).items():
        share = next((s for part, s in shares.items() if part in name), 0.5)
        before, after = (models[m][name].astype(float) for m in ("old", "tuned"))
        np.testing.assert_allclose(values, (1 - share) * before + share * after, atol=1e-6)
    assert '"of": "tuned"' in Path("out/config.json").read_text()
    assert recipe.notes == ()


COMMANDS: dict[str, tuple[tuple[str, ...], Callable[[], alnico.Recipe]]] = {
    "chat_vector": (
        ("--old-base", "models/old", "--tuned", "models/tuned", "--new-base", "models/new", "--scale", "0.5", "--keep", "embed", "--keep", "lm"),
        lambda: alnico.recipe.chat_vector(**CHAT, scale=0.5, keep=["embed", "lm"]),
    ),
    "add_difference": (
        ("--a", "models/new", "--b", "models/tuned", "--c", "models/old", "--multiplier", "0.5", "--dtype", "float16"),
        lambda: alnico.recipe.add_difference(
            a="models/new", b="models/tuned", c="models/old", multiplier=0.5, dtype="float16"
        ),
    ),
    "retain": (
        ("--pretrained", "models/old", "--finetuned", "models/tuned", "--module", "vision=0.3", "--module", "action=1"),
        lambda: alnico.recipe.retain(
            pretrained="models/old", finetuned="models/tuned", modules={"vision": 0.3, "action": 1}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_writes_the_recipe_of_the_function(name: str, run: Run) -> None:
    words, recipe = COMMANDS[name]
    assert run("recipe", name, *words) == (0, recipe().text, "")
    Path("recipes").mkdir()
    assert run("recipe", name, *words, "-o", "recipes/r.yml") == (0, "recipes/r.yml\n", "")
    written = Path("recipes/r.yml").read_text()
    assert written.replace(chr(34), "") == recipe().text.replace("models/", "../models/")
    assert alnico.plan("recipes/r.yml").jobs
    code, _, err = run("recipe", name, *words, "-o", "recipes/r.yml")
    assert code
    assert "recipes/r.yml" in err
    assert Path("recipes/r.yml").read_text() == written


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alnico.recipe.chat_vector(**CHAT, scale=float("nan")), "scale is nan; expected a finite number."),
        (lambda: alnico.recipe.chat_vector(**CHAT, keep=[""]), "keep has ''; expected part of a tensor's name, such as embed_tokens."),
        (lambda: alnico.recipe.chat_vector(**CHAT, dtype="bf61"), "dtype is 'bf61'; expected bfloat16, float16"),
        (lambda: alnico.recipe.add_difference(a="a", b="b", c="c", multiplier="1"), "multiplier is '1'; expected a finite number."),
        (lambda: alnico.recipe.retain(pretrained="a", finetuned="b", alpha=1.5), "alpha is 1.5; expected a weight of the fine-tune, from 0 to 1."),
        (lambda: alnico.recipe.retain(pretrained="a", finetuned="b", modules={"vision": -1}), "modules: vision is -1; expected a weight of the fine-tune, from 0 to 1."),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_message(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call()
    assert len(caught.value.args) == 1
    assert str(caught.value).startswith(message)


def test_a_wrong_weight_of_a_module_is_one_message(run: Run) -> None:
    code, _, err = run("recipe", "retain", "--pretrained", "a", "--finetuned", "b", "--module", "vision")
    assert code == 2
    assert "--module: 'vision' is not NAME=NUMBER. Write it once, as vision_tower=0.3." in err
    assert (
        "--old-base: base that the tuned model was tuned from."
        in run("recipe", "chat_vector", "--tuned", "a")[2]
    )
