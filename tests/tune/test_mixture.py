"""A mixture of experts: loads in transformers, computes what its definition says, and its gates are those of their equations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made_mixtures import change_config, dense, logits, mixed_by_hand, save_dense, save_tuned, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import alnico
from alnico.errors import EvaluationError, MismatchError, RecipeError
from alnico.evaluation.loaded_model import open_subject
from alnico.plan.gates import solve_gates
from made import read_model

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

GATES = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate.weight",
    "qwen": "model.layers.{}.mlp.gate.weight",
    "deepseek": "model.layers.{}.mlp.gate.weight",
}
BUILT = {
    "mixtral of llama": ("llama", "mixtral", False),
    "mixtral of mistral": ("mistral", "mixtral", False),
    "deepseek of llama": ("llama", "deepseek", True),
    "deepseek of mistral": ("mistral", "deepseek", True),
    "qwen of llama": ("llama", "qwen", True),
    "qwen of qwen2": ("qwen2", "qwen", True),
    "qwen of qwen3": ("qwen3", "qwen", False),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of each type."""
    root = tmp_path_factory.mktemp("dense")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        base = save_dense(root / kind / "base", kind)
        for i in range(3):
            save_tuned(root / kind / f"tuned-{i}", base, i + 1)
    return root


def recipe_of(folder: Path, experts: int = 3, shared: bool = False, **keys: Any) -> dict[str, Any]:
    more = (
        {"shared_experts": [{"source_model": str(folder / "base"), "residual_scale": 0.25}]} if shared else {}
    )
    return {
        "base_model": str(folder / "base"),
        "experts": [{"source_model": str(folder / f"tuned-{i}")} for i in range(experts)],
        "gate_mode": "random",
        **more,
        **keys,
    }


def loaded(path: Path, capsys: pytest.CaptureFixture[str] | None = None) -> Any:
    """Load a mixture by transformers, which must have nothing to say about it."""
    logging.set_verbosity_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    if capsys is not None:
        assert capsys.readouterr().err.replace("Loading weights", "").count("\n") <= 1
    return model.eval()


@pytest.mark.parametrize(("kind", "architecture", "shared"), BUILT.values(), ids=BUILT.keys())
def test_a_mixture_loads_and_computes_the_mixture_of_its_experts(
    kind: str, architecture: str, shared: bool, families: Path, tmp_path: Path
) -> None:
    folder = families / kind
    (result,) = alnico.build_mixture(
        recipe_of(folder, shared=shared, architecture=architecture, gate_scale=0.5), tmp_path / "out"
    )
    held = read_model(tmp_path / "out")
    by_hand = mixed_by_hand(
        folder / "base",
        [folder / f"tuned-{i}" for i in range(3)],
        held,
        GATES[architecture],
        2,
        (folder / "base", 0.25) if shared else None,
        "model.layers.{}.mlp.shared_expert_gate.weight" if architecture == "qwen" and shared else "",
        is_sigmoid=architecture == "deepseek",
    )
    made = logits(loaded(tmp_path / "out"))
    expected = logits(by_hand)
    assert np.abs(expected - logits(dense(folder / "base"))).max() > 0.05  # the experts matter
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6)
    assert alnico.verify(tmp_path / "out", against_inputs=True).recomputed is not None
    assert result.plan.notes[0].startswith("a mixture of type ")


@pytest.mark.parametrize(
    ("kind", "removed"),
    [
        (
            "llama",
            ("rms_norm_eps", "rope_parameters", "head_dim"),
        ),
        ("mistral", ("rope_parameters", "sliding_window", "rms_norm_eps")),
        ("qwen2", ("rope_parameters", "rms_norm_eps")),
    ],
    ids=["llama", "mistral", "qwen2"],
)
def test_keys_that_a_config_leaves_out_keep_their_meaning(
    kind: str, removed: tuple[str, ...], tmp_path: Path
) -> None:
    """A Llama without rope_theta turns by 10,000; a Mixtral without it by 1,000,000."""
    base = (
        save_dense(tmp_path / "base", kind, head_dim=4)
        if kind == "llama"
        else save_dense(tmp_path / "base", kind)
    )
    change_config(base, removed)
    shared = (
        {"shared_experts": [{"source_model": str(base), "residual_scale": 0.0}]} if kind == "qwen2" else {}
    )
    recipe = {"base_model": str(base), "experts": [str(base)] * 2, "gate_mode": "random", **shared}
    alnico.build_mixture(recipe, tmp_path / "out")
    ids = tokens(40)
    np.testing.assert_allclose(
        logits(loaded(tmp_path / "out"), ids), logits(dense(base), ids), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize(
    ("kind", "architecture"), [("mistral", "mixtral"), ("mistral", "qwen"), ("qwen2", "qwen")]
)
def test_a_sliding_window_is_kept_where_the_mixture_has_one(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    window = {"sliding_window": 8} | (
        {"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {}
    )
    base = save_dense(tmp_path / "base", kind, **window)
    recipe = {
        "base_model": str(base),
        "experts": [str(base)] * 2,
        "gate_mode": "random",
        "architecture": architecture,
        **(
            {"shared_experts": [{"source_model": str(base), "residual_scale": 0}]}
            if architecture == "qwen"
            else {}
        ),
    }
    alnico.build_mixture(recipe, tmp_path / "out")
    ids = tokens(40)
    wide = save_dense(tmp_path / "wide", kind)
    expected = logits(dense(base), ids)
    assert np.abs(expected - logits(dense(wide), ids)).max() > 1e-3
    np.testing.assert_allclose(logits(loaded(tmp_path / "out"), ids), expected, rtol=0, atol=5e-6)


def test_an_expert_may_be_averaged_scaled_or_cut_to_a_low_rank(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    recipe = recipe_of(folder)
    recipe["experts"] = [
        {"source_models": [str(folder / "tuned-0"), str(folder / "tuned-1")], "residual_scale": 0.5},
        {"source_model": str(folder / "tuned-2"), "rank": 0.25},
        {"source_model": str(folder / "tuned-2")},
    ]
    alnico.build_mixture(recipe, tmp_path / "out")
    held, base = read_model(tmp_path / "out"), read_model(folder / "base")
    tuned = [read_model(folder / f"tuned-{i}") for i in range(3)]
    for matrix, own, scale in (("gate_proj", "w1", 1.0), ("up_proj", "w3", 1.0), ("down_proj", "w2", 0.5)):
        name = f"model.layers.1.mlp.{matrix}.weight"
        expert = "model.layers.1.block_sparse_moe.experts.{}." + own + ".weight"
        mean = scale * (tuned[0][name].astype(np.float64) + tuned[1][name]) / 2
        np.testing.assert_allclose(held[expert.format(0)], mean, rtol=1e-6, atol=1e-7)
        u, s, v = np.linalg.svd(tuned[2][name].astype(np.float64) - base[name], full_matrices=False)
        low = base[name] + (u[:, :4] * s[:4]) @ v[:4]  # a quarter of 16
        np.testing.assert_allclose(held[expert.format(1)], low, rtol=0, atol=1e-5)
        assert (held[expert.format(2)] == tuned[2][name]).all()


def test_others_may_be_averaged_over_the_experts(families: Path, tmp_path: Path) -> None:
    folder = families / "qwen3"
    alnico.build_mixture(recipe_of(folder, others="average"), tmp_path / "out")
    held, tuned = read_model(tmp_path / "out"), [read_model(folder / f"tuned-{i}") for i in range(3)]
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.q_norm.weight", "lm_head.weight"):
        mean = sum(t[name].astype(np.float64) for t in tuned) / 3
        np.testing.assert_allclose(held[name], mean, rtol=1e-6, atol=1e-7)


def test_a_stage_may_be_an_expert(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    text = f"""
name: both
merge_method: linear
models: [{folder / "tuned-0"}, {folder / "tuned-1"}]
---
base_model: {folder / "base"}
experts: [both, {folder / "tuned-2"}]
gate_mode: random
"""
    (result,) = alnico.build_mixture(text, tmp_path / "out")
    held = read_model(result.path)
    tuned = [read_model(folder / f"tuned-{i}")["model.layers.0.mlp.up_proj.weight"] for i in range(2)]
    own = held["model.layers.0.block_sparse_moe.experts.0.w3.weight"]
    np.testing.assert_allclose(own, (tuned[0].astype(np.float64) + tuned[1]) / 2, rtol=1e-6, atol=1e-7)


# ---- gates


def test_random_gates_follow_from_the_seed_alone(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    digests = []
    for name, keys in {
        "a": {"seed": 5},
        "b": {"seed": 5, "gate_mode": "uniform_random"},
        "c": {"seed": 6},
        "d": {"seed": 5},
    }.items():
        alnico.build_mixture(recipe_of(folder, **keys), tmp_path / name)
        digests.append(read_model(tmp_path / name)[GATES["mixtral"].format(1)])
    assert (digests[0] == digests[3]).all()
    assert (digests[0] != digests[2]).all()
    assert np.abs(digests[1]).max() <= 16**-0.5
    from alnico.plan.gates import random_gates

    drawn = random_gates({"g": (64, 512)}, 1, 1.0, is_uniform=False)
    buffer = bytearray(64 * 512 * 4)
    drawn.read_into("g", 0, memoryview(buffer))
    values = np.frombuffer(buffer, np.float32)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_the_gates_of_a_ridge_regression_are_least_squares(families: Path, tmp_path: Path) -> None:
    """Against lstsq over the inputs themselves, which hooks see in float64."""
    folder = families / "llama"
    texts = {0: "abcabcabdabc abc", 1: "hghghfhgeehgh"}
    experts = []
    inputs: list[list[np.ndarray]] = []
    for i, text in texts.items():
        tasks = tmp_path / f"{i}.yml"
        (tmp_path / f"{i}.txt").write_text(text)
        tasks.write_text(
            yaml.safe_dump(
                {"tasks": [{"name": "t", "type": "perplexity", "data": f"{i}.txt", "window": 12, "limit": 1}]}
            )
        )
        model = folder / f"tuned-{i}"
        alnico.gram_statistics(str(model), tmp_path / f"gram-{i}", tasks=tasks)
        experts.append({"source_model": str(model), "gram": str(tmp_path / f"gram-{i}")})
        module, seen = dense(model), []
        for layer in module.model.layers:
            layer.mlp.register_forward_hook(lambda _, x, __, seen=seen: seen.append(x[0][0].detach().numpy()))
        ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
        module(ids[:, :12])  # the inputs of the one window
        inputs.append(seen)
    recipe = {
        **recipe_of(folder),
        "experts": experts,
        "gate_mode": "ridge",
        "ridge": 0.05,
        "experts_per_token": 1,
    }
    alnico.build_mixture(recipe, tmp_path / "out")
    held = read_model(tmp_path / "out")
    for layer in range(3):
        x = [own[layer] / np.sqrt(len(own[layer])) for own in inputs]  # each expert counts the same
        stacked = np.concatenate(x)
        labels = np.zeros((len(stacked), 2))
        for e in range(2):
            first = sum(map(len, x[:e]))
            labels[first : first + len(x[e]), e] = 1 / np.sqrt(len(x[e]))
        mean = (stacked**2).sum() / stacked.shape[1]
        width = stacked.shape[1]
        rows = np.concatenate([stacked, np.sqrt(0.05 * mean) * np.eye(width)])
        gates = np.linalg.lstsq(rows, np.concatenate([labels, np.zeros((width, 2))]), rcond=None)[0].T
        gates = 10 * gates / np.linalg.norm(gates, axis=1, keepdims=True)
        np.testing.assert_allclose(held[GATES["mixtral"].format(layer)], gates, rtol=0, atol=2e-3)
    routed = loaded(tmp_path / "out")
    chosen = []
    for module in routed.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_hook(lambda _, __, out: chosen.append(out[-1].flatten()))
    for i, text in texts.items():
        chosen.clear()
        routed(AutoTokenizer.from_pretrained(folder / "base")(text, return_tensors="pt").input_ids)
        assert (torch.cat(chosen) == i).double().mean() > 0.7


def test_solved_gates_do_not_depend_on_the_amount_of_data() -> None:
    random = np.random.default_rng(0)
    x = [random.standard_normal((n, 6)) + i for i, n in enumerate((40, 40))]
    twice = [x[0], np.concatenate([x[1]] * 3)]
    one, other = (
        solve_gates([a.T @ a for a in data], [a.sum(0) for a in data], [len(a) for a in data], 0.01)
        for data in (x, twice)
    )
    np.testing.assert_allclose(one, other, rtol=1e-10)


PROMPTS = [
    {"positive_prompts": ["abc", "abcd efgh"], "negative_prompts": ["hh"]},
    {"positive_prompts": ["gfe d"]},
    {"positive_prompts": ["aaaa"], "negative_prompts": ["bb", "c"]},
]


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_gates_of_prompts_are_what_the_base_computes_for_them(
    mode: str, families: Path, tmp_path: Path
) -> None:
    folder = families / "mistral"
    recipe = recipe_of(folder, gate_mode=mode)
    recipe["experts"] = [{**e, **p} for e, p in zip(recipe["experts"], PROMPTS, strict=True)]
    alnico.build_mixture(recipe, tmp_path / "out")
    held = read_model(tmp_path / "out")
    module, tokenizer = dense(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    seen: list[torch.Tensor] = []
    for layer in module.model.layers:
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))

    def measured(prompts: list[str]) -> np.ndarray:
        each = []
        for prompt in prompts:
            seen.clear()
            ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                module(ids[:, :12])  # the inputs of the one window
            if mode == "cheap_embed":
                each.append(np.tile(module.model.embed_tokens(ids)[0].sum(0).detach().numpy(), (3, 1)))
            else:
                each.append(np.stack([(s.mean(0) if mode == "hidden_avg" else s[-1]).numpy() for s in seen]))
        total = np.sum(each, axis=0)
        return (
            total / np.linalg.norm(total, axis=1, keepdims=True)
            if mode == "cheap_embed"
            else total / len(each)
        )

    for i, prompts in enumerate(PROMPTS):
        values = measured(prompts["positive_prompts"])
        if "negative_prompts" in prompts:
            values = values - measured(prompts["negative_prompts"])
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        for layer in range(3):
            np.testing.assert_allclose(
                held[GATES["mixtral"].format(layer)][i], values[layer], rtol=0, atol=1e-5
            )


def test_measured_gates_are_kept_and_used_again(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder = families / "llama"
    recipe = recipe_of(folder, gate_mode="hidden")
    recipe["experts"] = [{**e, **p} for e, p in zip(recipe["experts"], PROMPTS, strict=True)]
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(yaml.safe_dump(recipe))
    assert run("plan", "r.yml")[0] == 0
    code, _, printed = run("merge", "r.yml", "out")
    assert (code, printed.count("Build the mixture with `alnico moe`")) == (3, 1)
    assert run("moe", "r.yml", "out")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-gates", "r.yml"]
    lock = json.loads(Path("out/alnico.lock.json").read_text())
    assert lock["recipe"]["gates"] == "out-gates"
    monkeypatch.setattr("alnico.tune.mixture.open_subject", None)  # no model runs again
    assert run("moe", "r.yml", "other", "--gates", "out-gates")[0] == 0
    assert run("merge", "out/mergekit_config.yml", "again")[0] == 0
    models = [read_model(Path(name)) for name in ("out", "other", "again")]
    assert all((models[0][n] == m[n]).all() for m in models for n in models[0])
    assert run("verify", "out", "--against-inputs")[0] == 0
    assert run("reproduce", "out")[0] == 0
    assert "mixtral" in Path("out/README.md").read_text()
    loaded(tmp_path / "out")
    assert open_subject("out").tokenizer().bos_token == "<s>"


def test_gates_of_another_base_are_refused(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    recipe = recipe_of(folder, gate_mode="hidden", experts=2, gates=str(tmp_path / "gates"))
    recipe["experts"] = [{**e, **p} for e, p in zip(recipe["experts"], PROMPTS, strict=False)]
    asked = {key: value for key, value in recipe.items() if key != "gates"}
    alnico.build_mixture(asked, tmp_path / "out", gates=tmp_path / "gates")
    recipe["base_model"] = str(folder / "tuned-2")
    with pytest.raises(MismatchError, match="its statistics were measured of one with"):
        alnico.build_mixture(recipe, tmp_path / "other")


def test_statistics_of_another_expert_are_refused(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    (tmp_path / "t.txt").write_text("abcdefgh")
    (tmp_path / "t.yml").write_text("tasks: [{name: t, type: perplexity, data: t.txt, window: 7, limit: 1}]")
    alnico.gram_statistics(str(folder / "tuned-0"), tmp_path / "gram", tasks=tmp_path / "t.yml")
    recipe = recipe_of(folder, experts=2, gate_mode="ridge")
    for expert in recipe["experts"]:
        expert["gram"] = str(tmp_path / "gram")
    (result,) = alnico.build_mixture(recipe, tmp_path / "out")
    assert any("was measured on" in note and "tuned-1" in note for note in result.plan.notes)
    changed = save_tuned(tmp_path / "tuned-0", folder / "base", 99)
    recipe["experts"][0]["source_model"] = str(changed)
    with pytest.raises(MismatchError, match="its statistics were measured of one with"):
        alnico.build_mixture(recipe, tmp_path / "other")


# ---- what is refused, in one message each


def test_a_mixture_is_no_expert_and_no_base(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    alnico.build_mixture(recipe_of(folder), tmp_path / "mixture")
    for key in ("base_model", "experts"):
        recipe = recipe_of(folder)
        recipe[key] = str(tmp_path / "mixture") if key == "base_model" else [str(tmp_path / "mixture")] * 2
        with pytest.raises(MismatchError) as caught:
            alnico.build_mixture(recipe, tmp_path / "out")
        assert str(caught.value) == (
            f"{tmp_path / 'mixture'}: is a mixture of experts already, with model.layers.0.block_sparse_moe.gate.weight; expected a dense "
            "model. Merge mixtures with `alnico merge`, or use the dense models that it was built from."
        )


def test_a_recipe_of_dense_models_builds_no_mixture(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    recipe = {"merge_method": "linear", "models": [str(folder / "tuned-0"), str(folder / "tuned-1")]}
    with pytest.raises(RecipeError) as caught:
        alnico.build_mixture(recipe, tmp_path / "out")
    assert str(caught.value) == (
        "recipe: has no experts, so it merges models into one of their kind; expected the recipe of a mixture. Run `alnico merge`, in "
        "Python alnico.merge, or write experts."
    )


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (
            "qwen3",
            {"architecture": "mixtral"},
            "architecture mixtral: is not built from models of type qwen3",
        ),
        ("qwen2", {}, "shared_experts: is missing, and qwen2_moe has an expert that every token passes"),
        ("llama", {"architecture": "deepseek"}, "shared_experts: is missing, and glm4_moe has"),
        ("qwen3", {"shared": True}, "shared_experts: qwen3_moe has no shared expert"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(
    kind: str, keys: dict[str, Any], message: str, families: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError) as caught:
        alnico.build_mixture(recipe_of(families / kind, **keys), tmp_path / "out")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_of_other_types_shapes_and_biases_are_refused(families: Path, tmp_path: Path) -> None:
    folder = families / "llama"
    wide = save_dense(tmp_path / "wide", "llama", intermediate_size=40)
    biased = save_dense(tmp_path / "biased", "llama", attention_bias=True)
    gpt = save_dense(tmp_path / "gpt", "llama")
    change_config(gpt, model_type="gpt_neox")
    cases = {
        "are models of different sizes: intermediate size 24 and 40": [wide, folder / "tuned-0"],
        "the models are of several types": [families / "mistral" / "base", folder / "tuned-0"],
    }
    for message, experts in cases.items():
        with pytest.raises(MismatchError, match=message):
            alnico.build_mixture({**recipe_of(folder), "experts": list(map(str, experts))}, tmp_path / "out")
    for base, message in (
        (biased, "attention_bias is true in its config"),
        (gpt, "is of model_type gpt_neox"),
    ):
        recipe = {"base_model": str(base), "experts": [str(base)] * 2, "gate_mode": "random"}
        with pytest.raises(MismatchError, match=message):
            alnico.build_mixture(recipe, tmp_path / "out")


def test_prompts_that_cancel_are_refused(families: Path, tmp_path: Path) -> None:
    recipe = recipe_of(families / "llama", gate_mode="hidden", experts=2)
    recipe["experts"][0] |= {"positive_prompts": ["abc"], "negative_prompts": ["abc"]}
    recipe["experts"][1] |= {"positive_prompts": ["abc"]}
    with pytest.raises(EvaluationError, match="its prompts give no direction in layer 0"):
        alnico.build_mixture(recipe, tmp_path / "out")


def test_alike_prompts_are_noted(families: Path, tmp_path: Path) -> None:
    recipe = recipe_of(families / "llama", gate_mode="hidden", experts=2)
    recipe["experts"][0] |= {"positive_prompts": ["abcdefgh"]}
    recipe["experts"][1] |= {"positive_prompts": ["abcdefgh", "abcdefgh", "abcdefg"]}
    (result,) = alnico.build_mixture(recipe, tmp_path / "out")
    assert any("the gates of prompts are so alike" in note for note in result.notes)


def test_experts_that_are_all_the_same_are_noted(families: Path, tmp_path: Path) -> None:
    base = families / "qwen3" / "base"
    expert = {"source_model": str(base)}
    recipe = {
        "base_model": str(base),
        "experts": [{**expert, "positive_prompts": ["abc"]}, {**expert, "positive_prompts": ["hgf"]}],
    }
    (result,) = alnico.build_mixture(recipe, tmp_path / "out")
    assert any("all experts are the same" in note for note in result.plan.notes)
    np.testing.assert_allclose(logits(loaded(tmp_path / "out")), logits(dense(base)), rtol=0, atol=5e-6)
