"""What mergers get wrong without a word cannot happen here: docs/nothing-silent.md lists it, with a test each; here are some."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.checkpoint.file_model import open_shard
from alnico.errors import MismatchError, VerificationError
from made import Tensors, family, llama_config, llama_shapes, read_file, read_model, save_file, save_model

ROOT = Path(__file__).parent.parent
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(
    name: str,
    seed: int,
    more: Mapping[str, tuple[int, ...]] | None = None,
    config: Mapping[str, Any] | None = None,
    **shape: Any,
) -> dict[str, np.ndarray]:
    """Write a Llama-shaped model in float32; returns its tensors."""
    random = np.random.default_rng(seed)
    tensors = {
        n: random.standard_normal(s).astype(np.float32)
        for n, s in {**llama_shapes(**shape), **(more or {})}.items()
    }
    config = {**llama_config(**shape, dtype="float32"), **(config or {})}
    save_model(Path(name), {n: ("F32", v) for n, v in tensors.items()}, config)
    return tensors


def mean(*models: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean in float64, rounded once."""
    return {n: np.mean([m[n].astype(np.float64) for m in models], 0).astype(np.float32) for n in models[0]}


def check_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


LINEAR: dict[str, Any] = {"merge_method": "linear", "models": ["a", "b"]}


def config_of(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return found


def test_every_silent_wrongness_names_tests_that_exist() -> None:
    page, _, listed = (ROOT / "docs" / "nothing-silent.md").read_text().partition("\n## Tests\n")
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| (?!what \||---)", line)
    ]
    tests = dict(re.findall(r"^- (.+): (`test_[^:]+\.py::.*)$", listed, flags=re.MULTILINE))
    assert len(rows) > 40
    assert all(len(row) == 3 for row in rows)
    assert [row[0] for row in rows] == list(tests)
    for what, names in tests.items():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", names)
        assert len(named) == names.count("::"), what
        for file, test in named:
            (path,) = (ROOT / "tests").rglob(file)
            assert f"def {test}(" in path.read_text(), f"{file} has no {test}"


# ---- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_that_no_template_lists_are_merged() -> None:
    more = {
        f"model.layers.{i}.self_attn.{p}_proj.bias": (8 if p in "kv" else 16,) for i in (0, 1) for p in "qkvo"
    }
    more |= {"model.layers.1.self_attn.q_norm.weight": (4,), "model.brand_new.weight": (3, 5)}
    a, b = (model(n, i, more) for i, n in enumerate("ab"))
    alnico.merge(LINEAR, "out")
    check_equal(read_model(Path("out")), mean(a, b))


def test_the_tied_model_s_embedding_is_the_head_where_the_donor_is_not_tied() -> None:
    a, b = model("a", 0, tied=False), model("b", 1, tied=True)
    plan = alnico.merge(LINEAR, "out").plan
    check_equal(read_model(Path("out")), mean(a, {**b, HEAD: b[EMBED]}))
    assert config_of()["tie_word_embeddings"] is False
    assert [i.name for j in plan.jobs if j.name == HEAD for i in j.inputs] == [HEAD, EMBED]


def test_a_head_of_its_own_is_merged_where_the_donor_is_tied() -> None:
    a, b = model("a", 0, tied=True), model("b", 1, tied=False)
    plan = alnico.merge(LINEAR, "out").plan
    check_equal(read_model(Path("out")), mean({**a, HEAD: a[EMBED]}, b))
    assert config_of()["tie_word_embeddings"] is False
    assert not plan.dropped


def test_a_head_that_is_written_though_the_config_ties_it_is_told() -> None:
    for i, name in enumerate("ab"):
        model(name, i, tied=False, config={"tie_word_embeddings": True})
    told = (
        f"{HEAD}: all models store it, but config.json ties it to {EMBED}; both are written, and programs may load "
        "either. Use the same method and parameters for both, or set tie_word_embeddings to false in the output's config.json."
    )
    assert told in alnico.merge(LINEAR, "out").plan.notes


def test_experts_keep_the_names_of_the_hub() -> None:
    more = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight": (3, 4) for e in (0, 1) for w in (1, 2, 3)
    }
    a, b = (model(n, i, more) for i, n in enumerate("ab"))
    alnico.merge(LINEAR, "out")
    check_equal(read_model(Path("out")), mean(a, b))


def test_experts_one_by_one_and_fused_are_not_paired() -> None:
    model("a", 0, {f"model.layers.0.mlp.experts.{e}.up_proj.weight": (3, 4) for e in (0, 1)})
    model("b", 1, {"model.layers.0.mlp.experts.gate_up_proj": (2, 3, 4)})
    with pytest.raises(MismatchError, match=r"experts\.0\.up_proj\.weight: a has it, b lacks it"):
        alnico.merge(LINEAR, "out")
    assert not Path("out").exists()


def test_layers_with_other_tensors_are_paired_by_name_and_not_by_position() -> None:
    for i, name in enumerate("ab"):
        model(name, i, {"model.layers.1.mlp.router.weight": (2, 16)}, layers=3)
    slices = [{"sources": [{"model": n, "layer_range": r} for n, r in (("a", [0, 2]), ("b", [1, 3]))]}]
    with pytest.raises(MismatchError, match=r"layers\.(0|1)\.mlp\.router\.weight"):
        alnico.merge({"merge_method": "linear", "slices": slices}, "out")


def test_the_last_slice_gives_norm_and_head_however_many_sources_it_has() -> None:
    a, b = (model(n, i, tied=False) for i, n in enumerate("ab"))
    slices = [
        {"sources": [{"model": n, "layer_range": [0, 1]} for n in "ab"]},
        {"sources": [{"model": "b", "layer_range": [1, 2]}]},
    ]
    alnico.merge({"merge_method": "linear", "slices": slices}, "out")
    first = mean(a, b)
    later = ("model.layers.1.", "model.norm.", "lm_head.")
    check_equal(read_model(Path("out")), {n: b[n] if n.startswith(later) else first[n] for n in a})


def test_counters_are_never_averaged() -> None:
    places = {
        "embeddings.position_ids": ("I64", np.arange(6).reshape(1, 6)),
        "embeddings.w.weight": ("F32", np.ones((2, 2))),
    }
    for name in "ab":
        save_model(Path(name), places)
    alnico.merge(LINEAR, "out")
    dtype, values = read_file(Path("out/model.safetensors"))["embeddings.position_ids"]
    assert dtype == "I64"
    np.testing.assert_array_equal(values, np.arange(6).reshape(1, 6))
    save_model(Path("b"), {**places, "embeddings.position_ids": ("I64", 2 * np.arange(6).reshape(1, 6))})
    with pytest.raises(MismatchError, match=r"embeddings\.position_ids"):
        alnico.merge(LINEAR, "other")


def test_adapters_add_what_their_products_add_and_not_the_products_of_sums() -> None:
    random = np.random.default_rng(0)
    base = random.standard_normal((6, 5)).astype(np.float32)
    save_model(Path("base"), {"m.w.weight": ("F32", base)})
    products = []
    for name in ("one", "two"):
        down, up = (random.standard_normal(s).astype(np.float32) for s in ((2, 5), (6, 2)))
        factors: Tensors = {
            f"base_model.model.m.w.lora_{x}.weight": ("F32", v) for x, v in (("A", down), ("B", up))
        }  # fmt: skip
        save_file(Path(name) / "adapter_model.safetensors", factors)
        (Path(name) / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
        )
        products.append(up.astype(np.float64) @ down)
    alnico.merge({"merge_method": "linear", "models": ["base+one", "base+two"]}, "out")
    np.testing.assert_allclose(
        read_model(Path("out"))["m.w.weight"], base + (products[0] + products[1]) / 2, rtol=1e-5, atol=1e-6
    )
    down = np.zeros((2, 5), np.float32)
    factors = {
        "base_model.model.m.w.lora_A.weight": ("F32", down),
        "base_model.model.m.w.lora_B.weight": ("F32", np.ones((6, 2))),
    }
    save_file(Path("two/adapter_model.safetensors"), factors)
    alnico.merge({"merge_method": "linear", "models": ["base+one", "base+two"]}, "again")
    np.testing.assert_allclose(
        read_model(Path("again"))["m.w.weight"], base + products[0] / 2, rtol=1e-5, atol=1e-6
    )


def test_one_fine_tune_added_whole_is_that_fine_tune() -> None:
    base, (tuned,) = family(Path("m"), 1, size=0.003)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [str(tuned)],
        "parameters": {"weight": 1.0},
    }
    alnico.merge({**recipe, "dtype": "bfloat16"}, "out")
    check_equal(read_model(Path("out")), read_model(tuned))


# ---- configs and side files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": ["s", "s", "s", "f"]}, {"layer_types": ["s", "s", "s", "s", "f"]}),
        ({"model_type": "cohere2"}, {"layer_types": [*["sliding_attention"] * 4, "full_attention"]}),
        ({"moe_layers": [1, 3], "mlp_layer_types": ["d", "m", "d", "m"]}, {"moe_layers": [1, 2, 4]}),
        ({"text_config": {"num_hidden_layers": 4}}, {"text_config": {"num_hidden_layers": 5}}),
    ],
)
def test_lists_by_layer_follow_the_layers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    for i, name in enumerate("ab"):
        model(name, i, layers=4, config=config)
    slices = [{"sources": [{"model": n, "layer_range": r}]} for n, r in (("a", [0, 2]), ("b", [1, 4]))]
    alnico.merge({"merge_method": "passthrough", "slices": slices}, "out")
    assert config_of() == {**config_of("a"), "num_hidden_layers": 5, **expected, **(
        {"mlp_layer_types": ["d", "m", "m", "d", "m"]} if "mlp_layer_types" in config else {}
    )}  # fmt: skip


def test_a_config_that_would_not_be_true_is_refused_before_anything_is_written() -> None:
    for i, name in enumerate("ab"):
        model(name, i, layers=4, config={"first_k_dense_replace": 1})
    slices = [{"sources": [{"model": n, "layer_range": [0, 2]}]} for n in "ab"]
    with pytest.raises(MismatchError, match="first_k_dense_replace"):
        alnico.merge({"merge_method": "passthrough", "slices": slices}, "out")
    assert {p.name for p in Path().iterdir()} == {"a", "b"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_config_names_the_dtype_that_the_tensors_have(dtype: str) -> None:
    for i, name in enumerate("ab"):
        model(name, i, layers=1)
    alnico.merge({**LINEAR, "dtype": dtype}, "out")
    wanted = {"float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
    assert {d for d, _ in read_file(Path("out/model.safetensors")).values()} == {wanted}
    assert config_of()["torch_dtype"] == dtype


def test_generation_config_and_code_are_carried_with_a_vocabulary_too() -> None:
    from made_tokenizers import letters, save_matrices, save_tokenizer, special

    vocabulary, keys = letters()
    for i, name in enumerate("ab"):
        save_matrices(Path(name), i, len(vocabulary))
        save_tokenizer(Path(name), vocabulary, special(), keys)
        (Path(name) / "generation_config.json").write_text(
            json.dumps({"eos_token_id": 2, "temperature": 0.5 + i})
        )
        (Path(name) / "modeling_own.py").write_text(f"number = {i}\n")
    alnico.merge({**LINEAR, "tokenizer_source": "union"}, "out")
    assert json.loads(Path("out/generation_config.json").read_text())["temperature"] == 0.5
    assert Path("out/modeling_own.py").read_text() == "number = 0\n"


def test_no_file_of_an_older_output_stays_beside_a_new_one() -> None:
    for i, name in enumerate("ab"):
        model(name, i)
    alnico.merge(LINEAR, "out", max_shard_size="4kB")
    assert Path("out/model.safetensors.index.json").exists()
    alnico.merge(LINEAR, "out", overwrite=True)
    assert [p.name for p in Path("out").glob("model*")] == ["model.safetensors"]
    alnico.merge(LINEAR, "out", max_shard_size="4kB", overwrite=True)
    assert not Path("out/model.safetensors").exists()
    check_equal(read_model(Path("out")), mean(read_model(Path("a")), read_model(Path("b"))))


# ---- one recipe, one result -------------------------------------------------------------------------------------------


def test_no_order_depends_on_the_hash_seed_of_the_process() -> None:
    from made_tokenizers import save_family

    folders = save_family(Path("t"))
    for name, folder in folders.items():
        (folder / "chat_template.jinja").write_text(f"{{{{ messages }}}} of the model {name}")
    names = ["base", "other", "third"]
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [str(folders[n]) for n in names],
        "tokenizer_source": "union",
        "chat_template": "auto",
    }
    script = "import alnico, json, sys; alnico.merge(json.loads(sys.argv[1]), sys.argv[2])"
    made = []
    for seed in ("0", "1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, json.dumps(recipe), f"out-{seed}"],
            check=True, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        files = sorted(p for p in Path(f"out-{seed}").iterdir())
        made.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert made[0] == made[1] == made[2]
    assert "of the model base" in Path("out-0/chat_template.jinja").read_text()


@pytest.mark.parametrize("seed", [None, 7])
def test_a_random_merge_can_be_made_again_from_its_own_folder(seed: int | None) -> None:
    base, (tuned,) = family(Path("m"), 1, layers=1)
    recipe = {
        "merge_method": "dare_linear",
        "base_model": str(base),
        "models": [str(tuned)],
        "parameters": {"density": 0.5, "rescale": False},
    }
    first = alnico.merge(recipe, "out", seed=seed)
    assert json.loads(Path("out/alnico.lock.json").read_text())["seed"] == (seed or 0)
    assert f"seed {seed or 0}." in Path("out/README.md").read_text()
    again = alnico.merge("out/mergekit_config.yml", "again")
    assert again.digests == first.digests
    assert alnico.merge(recipe, "other", seed=8).digests != first.digests


def test_a_slice_of_one_layer_takes_the_last_value_of_a_gradient_and_what_is_in_no_layer_the_first_and_says_so() -> (
    None
):
    a, b = (model(n, i, layers=1) for i, n in enumerate("ab"))
    result = alnico.merge(
        {"merge_method": "slerp", "base_model": "a", "models": ["a", "b"], "parameters": {"t": [0, 1]}}, "out"
    )
    check_equal(read_model(Path("out")), {n: b[n] if ".layers." in n else a[n] for n in a})
    assert [n for n in result.plan.notes if "gradient" in n] == [
        "model.embed_tokens.weight, model.norm.weight: outside of the layers, so the first value of each gradient applies, as in mergekit."
    ]


def test_layers_that_a_model_does_not_have_are_told() -> None:
    model("a", 0, layers=2)
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [1, 3]}]}]}
    with pytest.raises(MismatchError) as caught:
        alnico.merge(recipe, "out")
    assert str(caught.value) == (
        "slices[0]: a has 2 layers; layer_range is [1, 3]. Layers count from 0, and the end is excluded: write at most [1, 2]."
    )


def test_a_tensor_that_was_not_written_is_found_before_the_output_has_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from alnico.output import publish

    for i, name in enumerate("ab"):
        model(name, i, layers=1)
    monkeypatch.setattr(publish, "open_written", lambda *_: open_shard(Path("a/model.safetensors")))
    with pytest.raises(VerificationError, match="is not what the plan says"):
        alnico.merge({**LINEAR, "dtype": "bfloat16"}, "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("written", "carried"),
    [
        (
            "# mine\nmerge_method: linear\nmodels: [a, b]\n",
            "# mine\nmerge_method: linear\nmodels: [a, b]\nseed: 7\n",
        ),
        (
            "seed: 3  # lucky\nmerge_method: linear\nmodels: [a, b]",
            "seed: 7\nmerge_method: linear\nmodels: [a, b]\n",
        ),
        (
            "{merge_method: linear, models: [a, b]}",
            "merge_method: linear\nmodels:\n- model: a\n- model: b\nseed: 7\n",
        ),
    ],
)
def test_the_carried_recipe_is_as_written_with_the_seed_that_was_used(written: str, carried: str) -> None:
    for i, name in enumerate("ab"):
        model(name, i, layers=1)
    Path("r.yml").write_text(written)
    alnico.merge("r.yml", "out", seed=7)
    assert Path("out/mergekit_config.yml").read_text() == carried
