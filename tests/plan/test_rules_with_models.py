"""A rule of ``methods`` may name its own models, their order and its own base; results are compared with float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import alnico
from alnico.errors import AlnicoError, MismatchError, RecipeError
from alnico.events import Event, TensorDone
from alnico.plan.job import Plan
from made import read_model, save_model

SHAPE = (24, 20)
NAMES = ("layers.0.fc1.weight", "layers.0.fc2.weight", "layers.1.fc1.weight", "norm.weight")

RULES: list[dict[str, Any]] = [
    {"filter": "fc1", "merge_method": "slerp", "models": ["b", "a"], "parameters": {"t": 0.3}},
    {
        "filter": "fc2",
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "c", "parameters": {"weight": 2.0}},
            "a",
            {"model": "d", "parameters": {"density": 0.25}},
        ],
        "parameters": {"density": 0.5, "weight": 1.0},
    },
]
RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "models": ["a", "b"],
    "methods": RULES,
    "unrelated": "allow",
}


def values_of(seed: int, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.standard_normal(SHAPE if "fc" in n else SHAPE[1:]).astype(np.float32) for n in names}


MODELS = {name: values_of(i) for i, name in enumerate(("base", "a", "b", "c", "d"))}


def write(name: str, tensors: Mapping[str, np.ndarray], **config: Any) -> None:
    save_model(Path(name), {n: ("F32", v) for n, v in tensors.items()}, config)


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tensors in MODELS.items():
        write(name, tensors)


def merged(recipe: Mapping[str, Any], out: str = "out") -> dict[str, np.ndarray]:
    alnico.merge(recipe, out)
    return read_model(Path(out))


def slerp(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    one, two = first.astype(np.float64), second.astype(np.float64)
    angle = np.arccos((one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum()))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


def ties(base: np.ndarray, models: list[tuple[np.ndarray, float, float]]) -> np.ndarray:
    """TIES of models, each with its weight and density: weighted signs, division by the weights that agree."""
    start = base.astype(np.float64)
    trimmed, weights = [], []
    for model, weight, density in models:
        delta = (model - base).astype(np.float64)
        kept = int(density * delta.size)
        threshold = np.sort(np.abs(delta), axis=None)[-kept]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0.0))
        weights.append(weight)
    weighted = np.stack([w * d for w, d in zip(weights, trimmed, strict=True)])
    sign = np.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = np.stack([np.sign(d) == sign for d in trimmed]) & (np.stack(trimmed) != 0)
    share = (agrees * np.array(weights)[:, None, None]).sum(0)
    return start + np.divide((weighted * agrees).sum(0), share, out=np.zeros_like(share), where=share > 0)


def test_each_rule_merges_its_own_models_in_its_own_order() -> None:
    found = merged(RECIPE)
    a, b, c, d, base = (MODELS[n] for n in ("a", "b", "c", "d", "base"))
    for name in NAMES[::2]:
        np.testing.assert_allclose(found[name], slerp(b[name], a[name], 0.3), rtol=2e-6, atol=2e-7)
    name = NAMES[1]
    expected = ties(base[name], [(c[name], 2.0, 0.5), (a[name], 1.0, 0.5), (d[name], 1.0, 0.25)])
    np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found["norm.weight"], (a["norm.weight"] + b["norm.weight"]) / 2, rtol=1e-6)


def test_the_same_merge_in_memory_has_the_same_bytes() -> None:
    found = merged(RECIPE)
    a, b, c, d, base = (MODELS[n] for n in ("a", "b", "c", "d", "base"))
    layers = {
        "fc1": {"method": "slerp", "models": [1, a], "t": 0.3},
        "fc2": {
            "method": "ties", "models": [c, 0, d], "base": base, "density": [0.5, 0.5, 0.25], "weights": [2, 1, 1],
        },
    }  # fmt: skip
    in_memory = alnico.merge_state_dicts([a, b], layers=layers, unrelated="allow")
    assert {n: v.tobytes() for n, v in in_memory.items()} == {n: v.tobytes() for n, v in found.items()}


def plan(recipe: Mapping[str, Any]) -> Plan:
    return alnico.plan(recipe)


def test_the_plan_says_what_each_rule_merges() -> None:
    made = plan(RECIPE)
    assert made.summary()["rules"] == [
        {"filter": "fc1", "merge_method": "slerp", "tensors": 2, "models": ["b", "a"]},
        {"filter": "fc2", "merge_method": "ties", "tensors": 1, "models": ["c", "a", "d"], "base": "base"},
    ]
    assert made.summary()["models"] == ["a", "b", "c", "d", "base"]
    assert {(made.sources[x.model].label, x.name, x.why) for x in made.dropped} >= {
        ("c", "norm.weight", "the output has it from a"),
        ("c", "layers.0.fc1.weight", "methods[0] merges other models there"),
        ("b", "layers.0.fc2.weight", "methods[1] merges other models there"),
    }


def test_the_recipe_reads_back_and_names_every_model() -> None:
    recipe = alnico.load_recipe(RECIPE)
    assert alnico.load_recipe(recipe.canonical()).canonical() == recipe.canonical()
    assert recipe.references == ("a", "b", "c", "d", "base")


def test_a_merge_by_rules_is_verified_reproduced_and_resumed() -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    alnico.merge("recipe.yml", "whole")
    assert alnico.verify("whole", against_inputs=True).tensors == len(NAMES)
    alnico.reproduce("whole", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    lock = json.loads(Path("whole/alnico.lock.json").read_text())
    assert [m["model"] for m in lock["inputs"]] == ["a", "b", "c", "d", "base"]
    card = Path("whole/README.md").read_text()
    assert "| base | not from the hub | base of some tensors |" in card

    class Stop(Exception):
        pass

    done: list[Event] = []

    def stops(event: Event) -> None:
        done.append(event)
        if sum(isinstance(e, TensorDone) for e in done) == 2:
            raise Stop

    with pytest.raises(Stop):
        alnico.merge("recipe.yml", "resumed", watch=stops, threads=1)
    alnico.merge("recipe.yml", "resumed")
    assert Path("resumed/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_tensor_that_only_the_models_of_a_rule_have_is_merged() -> None:
    for name in ("c", "d"):
        write(
            name, {**MODELS[name], "extra.fc.weight": MODELS[name][NAMES[0]], "other.weight": np.float32([1])}
        )
    rule = {"filter": "extra", "merge_method": "linear", "models": ["c", "d"]}
    recipe = {"merge_method": "linear", "models": ["a", "b"], "methods": [rule], "unrelated": "allow"}
    found = merged(recipe)
    expected = (MODELS["c"][NAMES[0]] + MODELS["d"][NAMES[0]]) / 2
    np.testing.assert_allclose(found["extra.fc.weight"], expected, rtol=1e-6)
    dropped = {(x.model, x.name): x.why for x in plan(recipe).dropped}
    assert dropped[2, "other.weight"] == dropped[3, "other.weight"] == "no part of the recipe uses it"


def test_a_tensor_that_the_models_of_its_rule_lack_is_an_error() -> None:
    write("b", {**MODELS["b"], "extra.fc1": np.float32([1])})
    recipe = {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"}
    rule = {"filter": "fc1", "merge_method": "linear", "models": ["c", "d"]}
    with pytest.raises(
        MismatchError, match=r"extra\.fc1: b has it, c and d lack it; expected it in all models"
    ):
        plan({**recipe, "methods": [rule]})


def test_only_models_that_are_merged_together_must_have_one_shape() -> None:
    write("d", {**MODELS["d"], NAMES[0]: np.zeros((3, 3), np.float32)})
    assert "d" in plan(RECIPE).summary()["models"]
    rules = [{**RULES[0], "models": ["a", "d"]}]
    with pytest.raises(MismatchError, match=r"layers.0.fc1.weight: a is \(24, 20\), d is \(3, 3\)"):
        plan({**RECIPE, "methods": rules})


def rule_of(method: str, **keys: Any) -> dict[str, Any]:
    return {"filter": "fc2", "merge_method": method, **keys}


def made_of(rule: Mapping[str, Any], **recipe: Any) -> tuple[list[str], str | None]:
    """The inputs of the tensor that a rule makes, and its base."""
    made = plan({"merge_method": "linear", "models": ["a", "b"], "methods": [rule], **recipe})
    (job,) = [j for j in made.jobs if "fc2" in j.name]
    return [made.sources[i.model].label for i in job.inputs], job.base and made.sources[job.base.model].label


@pytest.mark.parametrize(
    ("rule", "recipe", "inputs", "base"),
    [
        (rule_of("ties", models=["c", "d"]), {"base_model": "base"}, ["c", "d"], "base"),
        (rule_of("ties", base_model="c"), {"base_model": "base"}, ["a", "b"], "c"),
        (rule_of("ties", models=["c", "base"], parameters={"density": 0.5}), {"base_model": "base"}, ["c"], "base"),
        (rule_of("slerp", models=["c", "a"], parameters={"t": 0.5}), {"base_model": "base"}, ["c", "a"], None),
        (rule_of("slerp", models=["c", "a"], base_model="a", parameters={"t": 0.5}), {}, ["a", "c"], None),
        (rule_of("slerp", models=["c"], parameters={"t": 0.5}), {"base_model": "a"}, ["a", "c"], None),
        (rule_of("nearswap", models=["c", "a"], parameters={"t": 0.5}), {"base_model": "base"}, ["a"], "c"),
        (rule_of("nuslerp", models=["c", "a"]), {"base_model": "base"}, ["c", "a"], "base"),
        (rule_of("nuslerp", models=["c", "a"], base_model=None), {"base_model": "base"}, ["c", "a"], None),
        (rule_of("linear", models=["c", "c", "a"]), {}, ["c", "c", "a"], None),
        (rule_of("passthrough", models=["d"]), {"parameters": {"scale": 0.5}}, ["d"], None),
    ],
    ids=str,
)  # fmt: skip
def test_the_models_and_the_base_of_a_rule(
    rule: dict[str, Any], recipe: dict[str, Any], inputs: list[str], base: str | None
) -> None:
    assert made_of(rule, **recipe) == (inputs, base)


def test_options_of_a_rules_models_are_its_own() -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 5.0}}, "b"],
        "methods": [
            {
                "filter": "norm",
                "merge_method": "linear",
                "models": ["a", {"model": "c", "parameters": {"weight": [{"filter": "norm", "value": 3.0}]}}],
                "parameters": {"weight": 1.0},
            }
        ],
    }
    a, c = (MODELS[n]["norm.weight"].astype(np.float64) for n in ("a", "c"))
    np.testing.assert_allclose(merged(recipe)["norm.weight"], (a + 3 * c) / 4, rtol=1e-6, atol=1e-7)


def test_notes_name_models_that_contribute_nothing() -> None:
    rules = [
        {"filter": "absent", "merge_method": "linear", "models": ["c", "d"]},
        rule_of("linear", models=["a"]),
    ]
    notes = plan({"merge_method": "linear", "models": ["a", "b"], "methods": rules}).notes
    assert "methods[0].filter is 'absent', which matches no tensor, so it has no effect. An example of a name is layers.0.fc1.weight." in notes  # fmt: skip
    assert "c is named by methods[0] alone, which uses none of its tensors." in notes
    rules = [{"filter": "*", "merge_method": "linear", "models": ["a", "c"]}]
    notes = plan({"merge_method": "linear", "models": ["a", "b"], "methods": rules}).notes
    assert "b is listed, but rules under methods make all tensors, without it." in notes


def test_only_models_that_are_merged_together_must_be_related() -> None:
    names = tuple(f"layers.{i}.{w}.weight" for i in range(6) for w in ("fc1", "fc2"))
    first, second = (
        {n: np.random.default_rng(seed).standard_normal((80, 64)).astype(np.float32) for n in names}
        for seed in (1, 2)
    )
    for name, start in (("a", first), ("b", first), ("c", second), ("d", second)):
        noise = np.random.default_rng(ord(name))
        write(
            name, {n: v + 0.05 * noise.standard_normal(v.shape).astype(np.float32) for n, v in start.items()}
        )
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    merged({**recipe, "methods": [rule_of("linear", models=["c", "d"])]})
    with pytest.raises(MismatchError, match="c and a were not tuned from one base: 6 of 6 sampled matrices"):
        merged({**recipe, "methods": [rule_of("linear", models=["a", "c"])]}, "other")


def test_the_sample_of_a_rules_models_is_not_left_to_chance() -> None:
    names = tuple(f"layers.{i}.fc1.weight" for i in range(60)) + tuple(f"fc2.{i}.weight" for i in range(4))
    first, second = (
        {n: np.random.default_rng(seed).standard_normal((65, 64)).astype(np.float32) for n in names}
        for seed in (1, 2)
    )
    for name, tensors in (("a", first), ("b", first), ("c", second)):
        write(name, tensors)
    recipe = {
        "merge_method": "linear",
        "models": ["a", "b"],
        "methods": [rule_of("linear", models=["a", "c"])],
    }
    with pytest.raises(MismatchError, match="c and a were not tuned from one base: 4 of 4 sampled matrices"):
        merged(recipe)


def test_rules_with_models_in_slices_take_the_layers_of_the_slice() -> None:
    names = tuple(f"model.layers.{i}.fc{k}.weight" for i in range(3) for k in (1, 2))
    for i, name in enumerate("abc"):
        write(name, values_of(i, names), num_hidden_layers=3)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 1]}]},
        {"sources": [{"model": "a", "layer_range": [2, 3]}, {"model": "b", "layer_range": [2, 3]}]},
    ]
    recipe = {
        "merge_method": "linear", "slices": slices, "methods": [rule_of("linear", models=["c", "a"])]
    }  # fmt: skip
    made = plan(recipe)
    inputs = {j.name: [f"{made.sources[i.model].label}:{i.name}" for i in j.inputs] for j in made.jobs}
    assert inputs["model.layers.1.fc2.weight"] == [f"{m}:model.layers.2.fc2.weight" for m in ("c", "a")]
    assert inputs["model.layers.1.fc1.weight"] == [f"{m}:model.layers.2.fc1.weight" for m in ("a", "b")]
    slices[1]["sources"][1]["layer_range"] = [1, 2]
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    assert str(caught.value) == (
        "slices[1]: its sources have different layers, so the layers of c, which a rule under methods names, are ambiguous. "
        "List it among the sources, with its layer_range."
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        rule_of("slerp", models=["a", "b", "c"], parameters={"t": 0.5}),
        "methods[0].models: slerp merges 2 models, base_model one of them; found 3. Remove models.",
    ),
    (
        rule_of("ties", models=["a", "b"]),
        "methods[0]: ties needs base_model, the model that the others were fine-tuned from. Add base_model: PATH.",
    ),
    (rule_of("linear", models=[]), "methods[0].models is a list of 0; expected a list of 1 to 1000 models."),
    (
        rule_of("slerp", models=["a", "b"]),
        "methods[0]: slerp needs the option t: the place on the arc, any number. Set it under methods[0].parameters.",
    ),
    (
        rule_of("linear", models=["a", "b", "c"], parameters={"weight": [1, 2]}),
        "methods[0].parameters.weight has 2 values, but there are 3 models; expected one per model.",
    ),
    (
        rule_of("passthrough", model="c", models=["a"]),
        "methods[0] has model, whose tensors are copied, and models; expected one of them. Remove one.",
    ),
    (
        rule_of("linear", models=[{"model": "a", "layer_range": [0, 1]}]),
        "methods[0].models[0] has the unknown key 'layer_range'. Valid names: model, parameters.",
    ),
    (rule_of("linear", model=["a", "b"]), "methods[0].model is a list; expected text."),
    (rule_of("linear", modles=["a", "b"]), "methods[0] has the unknown key 'modles'. Did you mean models?"),
    (rule_of("ties", models=["a"], bas_model="b"), "methods[0] has the unknown key 'bas_model'. Did you mean base_model?"),
    (
        rule_of("slerp", parameters={"t": 0.5}, base_model="c"),
        "methods[0]: slerp merges 2 models, base_model one of them; found 3. For two models and a base that is neither of them, use nuslerp. Or name the models of this rule under methods[0].models.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_of_rules_with_models(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(AlnicoError) as caught:
        plan({"merge_method": "linear", "models": ["a", "b"], "methods": [rule]})
    assert [line.removeprefix("recipe: ") for line in caught.value.args] == [message]


def test_a_rule_that_changes_a_shape_is_noted() -> None:
    for name in ("c", "d"):
        write(name, {**MODELS[name], NAMES[1]: np.zeros((3, 4), np.float32)})
    notes = plan(
        {"merge_method": "linear", "models": ["a", "b"], "methods": [rule_of("linear", models=["c", "d"])]}
    ).notes
    assert (
        "layers.0.fc2.weight: a rule makes it (3, 4), and it is (24, 20) in a, whose config the output has. Make sure that the "
        "output can be loaded."
    ) in notes


def test_a_pair_of_models_is_judged_as_one_in_both_orders() -> None:
    names = tuple(f"layers.{i}.{w}.weight" for i in range(2) for w in ("fc1", "fc2"))
    for seed, name in enumerate("ab"):
        write(
            name,
            {
                n: np.random.default_rng((seed, i)).standard_normal((80, 64)).astype("f4")
                for i, n in enumerate(names)
            },
        )
    rule = rule_of("linear", models=["b", "a"])
    with pytest.raises(MismatchError, match="b and a were not tuned from one base: 4 of 4 sampled matrices"):
        merged({"merge_method": "linear", "models": ["a", "b"], "methods": [rule]})
