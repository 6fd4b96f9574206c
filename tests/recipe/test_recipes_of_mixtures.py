"""Recipes that build mixtures: mergekit-moe's in the forms that people use, as plain data, and their mistakes."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from alnico.errors import RecipeError
from alnico.recipe.json_schema import mixture_schema
from alnico.recipe.load import load_recipe, parse_recipe

VALIDATOR = jsonschema.Draft202012Validator(mixture_schema())

UPCYCLED = (
    "base_model: a/small\ngate_mode: random\ndtype: bfloat16\nexperts:\n" + "  - source_model: a/small\n" * 8
)

OF_MERGEKIT = {
    "random": UPCYCLED,
    "prompts": """
base_model: a/chat
gate_mode: hidden # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
## (optional)
# experts_per_token: 2
experts:
  - source_model: a/chat
    positive_prompts:
      - "<|im_start|>user\\nHello, who are you?<|im_end|>"
      - "<|im_start|>user\\nI need help with"
    negative_prompts:
      - "As a doctor of medicine,"
  - source_model: a/bio
    positive_prompts:
      - "As a doctor of medicine,"
""",
    "shared": """
base_model: {model: {path: a/chat, revision: main}}
architecture: qwen
experts_per_token: 1
experts:
  - {source_model: a/one, positive_prompts: [one], noise_scale: 0.0, residual_scale: 0.5}
  - {source_model: a/two, positive_prompts: [two], negative_prompts: null}
shared_experts:
  - source_model: a/chat
    positive_prompts: [blah blah]
    residual_scale: 0.1
""",
    "name of an architecture": UPCYCLED + "architecture: Qwen MoE\n",
}
OURS = """
base_model: base
experts:
  - {source_models: [a, b], gram: g-a}
  - {source_model: c, gram: g-c, rank: 0.1}
gate_mode: ridge
gate_scale: 4
ridge: 1e-3
others: average
unrelated: allow
seed: 3
"""


@pytest.mark.parametrize("text", [*OF_MERGEKIT.values(), OURS], ids=[*OF_MERGEKIT, "ours"])
def test_a_recipe_is_read_and_written_as_plain_data_that_means_the_same(text: str) -> None:
    recipe = parse_recipe(text, "r")
    again = load_recipe(recipe.canonical())
    assert again.canonical() == recipe.canonical()
    assert again.mixture == recipe.mixture
    assert VALIDATOR.is_valid(yaml.safe_load(text))
    assert VALIDATOR.is_valid(recipe.canonical())
    assert recipe.base_model in recipe.references


def test_what_mergekit_means_is_what_is_read() -> None:
    recipe = parse_recipe(OF_MERGEKIT["shared"], "r")
    assert recipe.base_model == "a/chat@main"
    mixture = recipe.mixture
    assert mixture is not None
    assert (mixture.gate_mode, mixture.architecture, mixture.experts_per_token) == ("hidden", "qwen", 1)
    assert [e.residual_scale for e in (*mixture.experts, *mixture.shared)] == [0.5, 1.0, 0.1]
    assert mixture.gate_scale == 1.0
    assert parse_recipe(OF_MERGEKIT["name of an architecture"], "r").mixture.architecture == "qwen"  # type: ignore[union-attr]
    assert parse_recipe(OURS.replace("gate_scale: 4\n", ""), "r").mixture.gate_scale == 10.0  # type: ignore[union-attr]


def edited(**keys: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base_model": "base",
        "experts": [
            {"source_model": "a", "positive_prompts": ["a"]},
            {"source_model": "b", "positive_prompts": ["b"]},
        ],
    }
    return {k: v for k, v in {**recipe, **keys}.items() if v != ""}


def expert(**keys: Any) -> list[dict[str, Any]]:
    return [
        {"source_model": "a", "positive_prompts": ["a"], **keys},
        {"source_model": "b", "positive_prompts": ["b"]},
    ]


WRONG = {
    "no base": (edited(base_model=""), "base_model is missing; expected the path of a model."),
    "a merge": (
        edited(merge_method="linear"),
        "merge_method and experts are both given; expected a merge, or a mixture. Make what the mixture is built from by a document of its "
        "own, and name that as source_model.",
    ),
    "no list": (
        edited(experts="a"),
        "experts is 'a'; expected a list of experts, each with its source_model.",
    ),
    "too few": (
        edited(experts_per_token=3),
        "there are 2 experts, and a token passes 3; expected at least as many experts. Add experts, or lower experts_per_token.",
    ),
    "a slip": (edited(gate_mdoe="random"), "unknown key 'gate_mdoe'. Did you mean gate_mode?"),
    "a slip of an expert": (
        edited(experts=expert(residual_scal=1)),
        "experts[0] has the unknown key 'residual_scal'. Did you mean residual_scale?",
    ),
    "a mode": (
        edited(gate_mode="hiden"),
        "gate_mode is 'hiden'; expected hidden, hidden_last, hidden_avg, cheap_embed, ridge, random, uniform_random. Did you mean hidden?",
    ),
    "no prompts": (
        edited(experts=["a", "b"]),
        "experts[0] has no positive_prompts, and gate_mode is hidden; expected prompts of every expert. Add some, or choose the gate_mode "
        "ridge or random.",
    ),
    "the same prompts": (
        edited(experts=[{"source_model": n, "positive_prompts": ["x"]} for n in "ab"]),
        "all experts have the same prompts, so no gate could tell them apart; expected prompts of what each expert is for. Change them, or "
        "choose the gate_mode random and train the mixture.",
    ),
    "no statistics": (
        edited(gate_mode="ridge", experts=["a", "b"]),
        "experts[0] has no gram, and gate_mode is ridge; expected the statistics of every expert. Measure them with `alnico statistics "
        "gram`.",
    ),
    "noise": (
        edited(experts=expert(noise_scale=0.1)),
        "experts[0].noise_scale is 0.1; expected 0: alnico adds no noise to weights, which is of use only where the mixture is trained "
        "afterwards. Leave it out, and add noise there.",
    ),
    "a rank": (
        edited(experts=expert(rank=16)),
        "experts[0].rank is 16; expected the share of singular vectors that is kept, in (0, 1].",
    ),
    "rank and scale": (
        edited(experts=expert(rank=0.5, residual_scale=0.5)),
        "experts[0] has rank and residual_scale; expected one of them. Make the expert by a document of its own, and name that as "
        "source_model.",
    ),
    "two shared": (
        edited(shared_experts=["a", "b"]),
        "shared_experts is a list of 2; expected one: the architectures have one shared expert. Average several with source_models.",
    ),
    "an architecture": (
        edited(architecture="granite"),
        "architecture is 'granite'; expected mixtral, qwen or deepseek. Valid names: mixtral, qwen, deepseek.",
    ),
    "gates of no prompts": (
        edited(gate_mode="random", gates="g", experts=["a", "b"]),
        "gates are measured from prompts, and gate_mode is random; expected hidden, hidden_avg or cheap_embed. Leave gates out.",
    ),
    "a scale": (edited(gate_scale=0), "gate_scale is 0; expected a number above 0."),
    "others": (edited(others="mean"), "others is 'mean'; expected base or average."),
    "two sources": (
        edited(experts=expert(source_models=["c"])),
        "experts[0] has source_model and source_models; expected one of them. Leave one out.",
    ),
}


@pytest.mark.parametrize(("recipe", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_one_message(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert caught.value.args == (f"recipe: {message}",)


def test_a_mixtures_key_in_a_merge_is_explained() -> None:
    with pytest.raises(
        RecipeError, match="It is a key of a mixture of experts, which has `experts`, and no merge_method"
    ):
        load_recipe({"merge_method": "linear", "models": ["a"], "gate_mode": "random"})


def test_the_schema_is_one_and_refuses_what_the_loader_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(mixture_schema())
    for name in (
        "no base",
        "no list",
        "a slip",
        "a mode",
        "a rank",
        "two shared",
        "noise",
        "a scale",
        "others",
        "two sources",
    ):
        assert not VALIDATOR.is_valid(WRONG[name][0]), name
