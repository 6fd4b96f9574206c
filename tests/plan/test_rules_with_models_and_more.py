"""Rules with their own models together with everything else that a recipe can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import alnico
from alnico.cli.main import app
from alnico.plan.job import Plan
from alnico.tune.search.settings import read_search
from made import read_model, save_file, save_model
from made_tokenizers import save_family
from methods.sides import made as made_statistics

NAMES = ("layers.0.fc1.weight", "layers.1.fc1.weight", "layers.0.fc2.weight", "layers.1.fc2.weight")


def values_of(seed: int, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.standard_normal((12, 10)).astype(np.float32) for n in names}


MODELS = {name: values_of(i) for i, name in enumerate(("base", "a", "b", "c"))}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tensors in MODELS.items():
        save_model(Path(name), {n: ("F32", v) for n, v in tensors.items()}, {})


def rule_of(method: str, models: list[Any], **keys: Any) -> dict[str, Any]:
    return {"filter": "fc2", "merge_method": method, "models": models, **keys}


def recipe_of(*rules: dict[str, Any], **keys: Any) -> dict[str, Any]:
    recipe = {"merge_method": "linear", "models": ["a", "b"], "unrelated": "allow"}
    return {**recipe, "methods": list(rules), **keys}


def plan(recipe: dict[str, Any]) -> Plan:
    return alnico.plan(recipe)


def inputs(made: Plan) -> dict[str, list[str]]:
    return {j.name: [made.sources[i.model].label for i in j.read] for j in made.jobs}


def merged(recipe: dict[str, Any], out: str = "out") -> dict[str, np.ndarray]:
    alnico.merge(recipe, out)
    return read_model(Path(out))


def test_weights_from_norms_are_those_of_the_rules_models_and_base() -> None:
    rule = rule_of(
        "linear", ["c", "a"], base_model="b", parameters={"weight": {"from": "l2_norm", "mode": "linear"}}
    )
    found = merged(recipe_of(rule))
    b, c, a = ({n: v.astype(np.float64) for n, v in MODELS[m].items() if "fc2" in n} for m in "bca")
    norms = [np.sqrt(sum(((m[n] - b[n]) ** 2).sum() for n in b)) for m in (c, a)]
    weights = [(1 / norm) / sum(1 / x for x in norms) for norm in norms]
    for name in b:
        np.testing.assert_allclose(
            found[name], weights[0] * c[name] + weights[1] * a[name], rtol=1e-5, atol=1e-6
        )
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert [m["model"] for m in lock["weights"][0]["models"]] == ["c", "a"]
    assert lock["weights"][0]["base"] == "b"
    made = plan(recipe_of(rule_of("linear", ["c", "a"], base_model="base", parameters=rule["parameters"])))
    assert not [note for note in made.notes if "base" in note]
    alnico.merge(made.recipe, "other")
    assert "| base | not from the hub | base of some tensors |" in Path("other/README.md").read_text()


def test_statistics_are_those_of_the_rules_models() -> None:
    models = [
        {"model": m, "parameters": {"fisher": str(made_statistics("fisher", Path(m).absolute(), i))}}
        for i, m in enumerate(("c", "a"))
    ]
    made = plan(recipe_of(rule_of("fisher", models)))
    read = inputs(made)[NAMES[2]]
    assert read[:2] == ["c", "a"]
    assert [Path(x).name for x in read[2:]] == ["c-fisher-0", "a-fisher-1"]
    alone = {"merge_method": "fisher", "models": models, "unrelated": "allow"}
    assert (
        merged(recipe_of(rule_of("fisher", models)))[NAMES[2]].tobytes()
        == merged(alone, "o")[NAMES[2]].tobytes()
    )


def test_a_random_method_draws_by_the_position_in_the_rule() -> None:
    options = {"base_model": "base", "parameters": {"density": 0.5}}
    found = merged(recipe_of(rule_of("dare_linear", ["c", "a"], **options), seed=7))
    alone = {"merge_method": "dare_linear", "models": ["c", "a"], **options, "seed": 7, "unrelated": "allow"}
    assert found[NAMES[2]].tobytes() == merged(alone, "alone")[NAMES[2]].tobytes()


def test_an_adapter_on_its_base_may_be_a_model_of_a_rule() -> None:
    random = np.random.default_rng(5)
    factors = {
        "base_model.model.layers.0.fc2.lora_A.weight": random.standard_normal((2, 10)),
        "base_model.model.layers.0.fc2.lora_B.weight": random.standard_normal((12, 2)),
    }
    save_file(Path("adapter/adapter_model.safetensors"), {n: ("F32", v) for n, v in factors.items()})
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    found = merged(recipe_of(rule_of("linear", ["c+adapter", "b"])))
    a, b = (v.astype(np.float32).astype(np.float64) for v in factors.values())
    expected = (MODELS["c"][NAMES[2]] + 2 * b @ a + MODELS["b"][NAMES[2]]) / 2
    np.testing.assert_allclose(found[NAMES[2]], expected, rtol=1e-5, atol=1e-5)


def test_rules_apply_within_modules() -> None:
    names = tuple(f"{m}.{n}" for m in ("model", "vision_tower") for n in NAMES)
    for i, name in enumerate("abc"):
        kept = names if name != "c" else names[:4]
        save_model(Path(name), {n: ("F32", v) for n, v in values_of(i, kept).items()}, {})
    modules = {"text_decoder": {"models": ["a", "b"]}, "vision_tower": {"models": ["b", "a"]}}
    recipe = recipe_of(rule_of("linear", ["c", "a"], filter="re:^model.*fc2"), modules=modules)
    del recipe["models"]
    read = inputs(plan(recipe))
    assert {n: read[n] for n in names if "fc2" in n} == {
        **{n: ["c", "a"] for n in names[2:4]}, **{n: ["b", "a"] for n in names[6:]}
    }  # fmt: skip
    recipe["methods"][0]["filter"] = "fc2"
    with pytest.raises(alnico.errors.MismatchError, match="module vision_tower: c has no tensors in it"):
        plan(recipe)


def test_the_tokens_of_a_rules_models_are_in_the_union() -> None:
    save_family(Path("."))
    recipe = {
        "merge_method": "linear",
        "models": ["base", "third"],
        "tokenizer": {"source": "union"},
        "unrelated": "allow",
        "methods": [{"filter": "lm_head", "merge_method": "linear", "models": ["base", "chat"]}],
    }
    made = plan(recipe)
    whole = plan(
        {"merge_method": "linear", "models": ["base", "third", "chat"], "tokenizer": {"source": "union"}}
    )
    assert [j.shape for j in made.jobs] == [j.shape for j in whole.jobs]
    read = inputs(made)
    assert [read[n] for n in read if "embed" in n] == [["base", "third"]]
    assert [read[n] for n in read if "head" in n] == [["base", "chat"]]
    found = merged(recipe)
    assert all(np.isfinite(v).all() for v in found.values())


def test_a_stage_may_be_a_model_of_a_rule() -> None:
    stages = [
        {"name": "first", "merge_method": "linear", "models": ["b", "c"], "unrelated": "allow"},
        recipe_of(rule_of("linear", ["first", "a"])),
    ]
    Path("stages.yml").write_text("---\n".join(yaml.safe_dump(s) for s in stages))
    alnico.merge_documents("stages.yml", "out")
    a, b, c = (MODELS[m][NAMES[2]].astype(np.float64) for m in "abc")
    expected = ((b + c) / 2 + a) / 2
    np.testing.assert_allclose(read_model(Path("out"))[NAMES[2]], expected, rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_one_tensor_for_a_rule_too() -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tied = {"tie_word_embeddings": True, "model_type": "llama"}
    for i, name in enumerate("abc"):
        embedding = values_of(i, names[:1])[names[0]]
        stored = {names[0]: ("F32", embedding)} | ({names[1]: ("F32", embedding)} if name == "c" else {})
        save_model(Path(name), stored, tied)
    made = plan(recipe_of(rule_of("linear", ["c", "a"], filter="*")))
    assert inputs(made) == {names[0]: ["c", "a"]}
    assert [(d.name, d.why) for d in made.dropped] == [
        (names[1], "tied to model.embed_tokens.weight in the config, and a lacks it")
    ]


def test_values_under_the_models_of_a_rule_may_be_searched() -> None:
    models = [{"model": m, "parameters": {"weight": {"search": [0, 2]}}} for m in ("c", "a", "b")]
    rule = rule_of("linear", [*models, "base"], parameters={"normalize": True})
    space, _ = read_search({**recipe_of(rule), "search": {"tasks": "tasks.yml"}})
    assert {d.name: d.default for d in space.dimensions} == {
        f"methods[0].models[{i}].weight": 0.25 for i in range(3)
    }
    assert space.references == ("a", "b", "c", "base")
    names = [d.name for d in space.dimensions]
    (made,) = space.instantiate(dict(zip(names, (0.5, 1.0, 1.5), strict=True))).methods
    assert [e.parameters for e in made.models] == [{"weight": 0.5}, {"weight": 1.0}, {"weight": 1.5}, {}]


def test_the_command_prints_each_rule_and_reads_null_as_no_base() -> None:
    rules = [
        rule_of("nuslerp", ["c", "a"], base_model=None),
        {"filter": "layers.1", "merge_method": "ties", "models": ["c", "a"], "parameters": {"density": 0.5}},
    ]
    Path("recipe.yml").write_text(yaml.safe_dump(recipe_of(*rules, base_model="base"), sort_keys=False))
    shown = CliRunner().invoke(app, ["plan", "recipe.yml"]).stdout.splitlines()
    assert [line for line in shown if line.startswith("rule")] == [
        "rule      methods[0] (fc2): 2 tensors by nuslerp of c and a",
        "rule      methods[1] (layers.1): 1 tensor by ties of c and a with base base",
    ]
    recipe = alnico.load_recipe("recipe.yml")
    assert recipe.canonical()["methods"][0]["base_model"] is None
    assert alnico.load_recipe(recipe.canonical()).methods == recipe.methods


def test_a_base_without_effect_is_a_note() -> None:
    notes = plan(recipe_of(rule_of("linear", ["c", "a"], base_model="b"))).notes
    assert "recipe: methods[0].base_model has no effect: linear uses no base." in notes


def test_a_rule_that_merges_only_its_base_copies_it_unscaled() -> None:
    rule = rule_of("task_arithmetic", ["b"], base_model="b", parameters={"scale": 0.5})
    made = plan(recipe_of(rule))
    assert {j.name: (j.kind, inputs(made)[j.name]) for j in made.jobs if "fc2" in j.name} == {
        n: ("copy", ["b"]) for n in NAMES[2:]
    }
    assert any("methods[0].models has only the base, which is copied unchanged." in n for n in made.notes)


def test_the_licence_of_a_rules_model_counts() -> None:
    for name, licence in (("a", "mit"), ("b", "mit"), ("c", "cc-by-nc-4.0")):
        Path(name, "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    recipe = recipe_of(rule_of("linear", ["c", "a"]))
    assert any(
        n.startswith("licences: c is cc-by-nc-4.0, which forbids commercial use") for n in plan(recipe).notes
    )
    with pytest.raises(alnico.errors.MismatchError, match=r"c is cc-by-nc-4\.0"):
        alnico.plan(recipe, strict_license=True)
