"""Adapters folded into their base, against PEFT's merge_and_unload and dense float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import alnico
import made
from alnico.engine.mix import mix_kernel
from alnico.errors import AlnicoError, ModelError, NonFiniteError
from alnico.lora.fold import fold, fold_recipe
from lora.peft_models import made_by_peft, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "rank 4": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rank 64, all": ("llama", {"r": 64, "lora_alpha": 16, "target_modules": "all-linear"}),
    "rsLoRA": ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR}),
    "DoRA": ("llama", {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR}),
    "patterns": (
        "llama",
        {
            "r": 8, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 17},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32},
        },
    ),
    "embeddings and head": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "saved": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "layers": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "BERT": ("bert", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "BERT, biases": ("bert", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "dense"], "bias": "all"}),
    "BERT, lora biases": ("bert", {"r": 8, "lora_alpha": 16, "target_modules": ["query"], "lora_bias": True}),
    "BERT, DoRA": ("bert", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "word_embeddings"], "use_dora": True}),
    "GPT-2, turned": ("gpt2", {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Mixtral, experts one by one": (
        "mixtral",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "gpt-oss, experts turned": (
        "gpt_oss",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "gpt-oss, a square parameter": (
        "gpt_oss", {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}  # fmt: skip


def agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], near: float = 1e-6) -> None:
    """Equal to ``near`` of each tensor's largest entry."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= near * np.abs(values).max(), name


@pytest.mark.parametrize("case", CASES)
def test_a_folded_model_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    model = tiny(kind)
    model.save_pretrained(tmp_path / "base")
    before = made.read_model(tmp_path / "base")
    made_by_peft(model, tmp_path / "adapter", options)
    model.save_pretrained(tmp_path / "merged")  # merge_and_unload merges in place
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=2)
    expected = made.read_model(tmp_path / "merged")
    agree(made.read_model(tmp_path / "out"), expected)
    changed = [name for name in expected if not np.array_equal(before[name], expected[name])]
    assert changed, "the adapter changes nothing, so nothing is shown"


def test_a_folded_model_loads_and_computes_what_the_adapted_one_does(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    made_by_peft(model, tmp_path / "adapter", {"r": 4, "lora_alpha": 8, "target_modules": LINEAR})
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    tokens = torch.tensor([[1, 5, 9, 11]])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert torch.allclose(adapted, folded, atol=1e-5)


# Several adapters, and weights: W and ΔW in float64.


def write_adapter(folder: Path, a: np.ndarray, b: np.ndarray, alpha: float, **config: object) -> Path:
    tensors = {
        "base_model.model.m.w.lora_A.weight": ("F32", a),
        "base_model.model.m.w.lora_B.weight": ("F32", b),
    }
    if config.get("use_dora"):
        tensors["base_model.model.m.w.lora_magnitude_vector"] = ("F32", np.linspace(0.5, 2, len(b)))
    made.save_file(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": len(a),
                "lora_alpha": alpha,
                "base_model_name_or_path": "x/base",
                **config,
            }
        )
    )
    return folder


@pytest.fixture
def two(tmp_path: Path) -> dict[str, np.ndarray]:
    """A base and two adapters of ranks 3 and 5 in ``tmp_path``, and their W and ΔW in float64."""
    random = np.random.default_rng(0)
    w = random.standard_normal((30, 20)).astype(np.float32)
    made.save_model(
        tmp_path / "base", {"m.w.weight": ("F32", w), "n.weight": ("F32", random.standard_normal(7))}
    )
    found = {"W": w.astype(np.float64)}
    for name, rank, alpha in (("a", 3, 6), ("b", 5, 2)):
        a, b = (
            random.standard_normal((rank, 20)).astype(np.float32),
            random.standard_normal((30, rank)).astype(np.float32),
        )
        write_adapter(tmp_path / name, a, b, alpha)
        found[name] = alpha / rank * b.astype(np.float64) @ a.astype(np.float64)
    return found


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("weights", [1.0, [0.5, -2.0], [0.0, 1.0]], ids=str)
def test_weighted_adapters_add_up(
    tmp_path: Path, two: dict[str, np.ndarray], at_once: bool, weights: float | list[float]
) -> None:
    fold(
        tmp_path / "base",
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        weights=weights,
        at_once=at_once,
    )
    first, second = (weights, weights) if isinstance(weights, float) else weights
    expected = two["W"] + first * two["a"] + second * two["b"]
    found = made.read_model(tmp_path / "out")
    assert np.abs(found["m.w.weight"] - expected).max() <= 2e-6 * np.abs(expected).max()
    assert np.array_equal(found["n.weight"], made.read_model(tmp_path / "base")["n.weight"])


def test_one_weighted_adapter_is_a_reference_in_any_recipe(
    tmp_path: Path, two: dict[str, np.ndarray]
) -> None:
    reference = f"{tmp_path}/base+0.25*{tmp_path}/a+-1.5*{tmp_path}/b"
    with alnico.open_model(reference) as model:
        expected = two["W"] + 0.25 * two["a"] - 1.5 * two["b"]
        assert np.abs(model.read("m.w.weight") - expected).max() <= 2e-6 * np.abs(expected).max()
    alnico.merge(
        {"merge_method": "linear", "models": [reference, f"{tmp_path}/base"], "parameters": {"weight": 0.5}},
        tmp_path / "out",
    )
    half = two["W"] + 0.5 * (expected - two["W"])
    assert np.abs(made.read_model(tmp_path / "out")["m.w.weight"] - half).max() <= 2e-6 * np.abs(half).max()


def dora(w: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The weight of DoRA by its definition: rows of W + ΔW brought to the norms of the magnitudes."""
    whole = w + delta
    return np.linspace(0.5, 2, len(w))[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)


def test_dora_in_sequence_and_at_once_differ_as_they_should(
    tmp_path: Path, two: dict[str, np.ndarray]
) -> None:
    for name in "ab":
        factors = made.read_model(tmp_path / name)
        a, b = (factors[f"base_model.model.m.w.lora_{x}.weight"] for x in "AB")
        write_adapter(tmp_path / name, a, b, {"a": 6, "b": 2}[name], use_dora=True)
    w, first = two["W"], two["W"] + 0.5 * (dora(two["W"], two["a"]) - two["W"])
    chained = first + 2 * (dora(first, two["b"]) - first)
    at_once = w + 0.5 * (dora(w, two["a"]) - w) + 2 * (dora(w, two["b"]) - w)
    for name, expected in (("chained", chained), ("at_once", at_once)):
        fold(
            tmp_path / "base",
            [tmp_path / "a", tmp_path / "b"],
            tmp_path / name,
            weights=[0.5, 2],
            at_once=name == "at_once",
        )
        found = made.read_model(tmp_path / name)["m.w.weight"]
        assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()
    assert np.abs(chained - at_once).max() > 0.1


@pytest.mark.usefixtures("two")
def test_a_weighted_replaced_tensor_is_part_of_the_way(tmp_path: Path) -> None:
    saved = np.arange(7.0)
    tensors = dict(made.read_file(tmp_path / "a" / "adapter_model.safetensors"))
    made.save_file(
        tmp_path / "a" / "adapter_model.safetensors", {**tensors, "base_model.model.n.weight": ("F32", saved)}
    )
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "whole")
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "part", weights=0.25)
    before = made.read_model(tmp_path / "base")["n.weight"]
    np.testing.assert_array_equal(made.read_model(tmp_path / "whole")["n.weight"], saved.astype(np.float32))
    np.testing.assert_allclose(
        made.read_model(tmp_path / "part")["n.weight"], before + 0.25 * (saved - before), rtol=1e-6, atol=1e-6
    )


# Bits, memory, notes.


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 4}, {"memory": "400MiB"}], ids=str)
def test_threads_and_memory_change_no_bit(tmp_path: Path, options: dict[str, object]) -> None:
    random = np.random.default_rng(3)
    made.save_model(tmp_path / "base", {"m.w.weight": ("BF16", random.standard_normal((3001, 701)))})
    write_adapter(
        tmp_path / "a", random.standard_normal((9, 701)), random.standard_normal((3001, 9)), 4, use_dora=True
    )
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "one", threads=2)
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "other", **options)  # type: ignore[arg-type]
    one, other = (
        p.read_bytes() for p in (tmp_path / "one/model.safetensors", tmp_path / "other/model.safetensors")
    )
    assert one == other


def test_the_budget_counts_a_few_factors_and_not_all(tmp_path: Path) -> None:
    names = [f"layers.{i}.w" for i in range(40)]
    zeros = np.zeros((400, 300))
    made.save_model(tmp_path / "base", {f"{n}.weight": ("F32", zeros) for n in names})
    tensors = {}
    for n in names:
        tensors |= {
            f"{n}.lora_A.weight": ("F32", np.ones((50, 300))),
            f"{n}.lora_B.weight": ("F32", np.ones((400, 50))),
        }
    made.save_file(tmp_path / "a" / "adapter_model.safetensors", tensors)
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 50, "lora_alpha": 1})
    )
    with alnico.open_model(f"{tmp_path}/base+{tmp_path}/a") as model:
        assert 4 * 50 * 700 <= model.held_bytes <= 5 * 4 * 50 * 700  # type: ignore[attr-defined]


@pytest.mark.usefixtures("two")
def test_a_quantised_name_of_the_base_is_told_apart(tmp_path: Path) -> None:
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "unsloth/base-bnb-4bit"})
    )
    result = fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert any(
        "the adapter was trained on unsloth/base-bnb-4bit, a quantised model; here it is applied to the full-precision"
        in note
        for note in result.plan.notes
    )
    assert not fold(tmp_path / "base", tmp_path / "b", tmp_path / "other").plan.notes


# Wrong input: one message, nothing left behind.


def refused(tmp_path: Path, kind: type[AlnicoError] = ModelError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        fold(tmp_path / "base", tmp_path / "a", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.alnico-part").exists()
    return str(caught.value).replace(f"{tmp_path}/", "")


def change(
    tmp_path: Path, config: dict[str, object] | None = None, drop: str = "", **tensors: np.ndarray
) -> None:
    held = {
        n: v
        for n, v in made.read_file(tmp_path / "a" / "adapter_model.safetensors").items()
        if drop == "" or drop not in n
    }
    held |= {f"base_model.model.m.w.lora_{n}.weight": ("F32", v) for n, v in tensors.items()}
    made.save_file(tmp_path / "a" / "adapter_model.safetensors", held)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in {**json.loads(path.read_text()), **(config or {})}.items() if v != "gone"}
        )
    )


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"drop": "lora_A"}, "a: the adapter has base_model.model.m.w.lora_B.weight without its lora_A or lora_B. Complete the download."),
        ({"drop": "lora_B"}, "a: the adapter has base_model.model.m.w.lora_A.weight without its lora_A or lora_B. Complete the download."),
        (
            {"config": {"r": 0}},
            "a: base_model.model.m.w.lora_A.weight has rank 3, adapter_config.json says 0; they must agree and be at least 1. "
            "Get the adapter from its source.",
        ),
        (
            {"config": {"lora_alpha": "gone"}},
            "a: adapter_config.json: has no lora_alpha, which its scale depends on. Get the adapter from its source.",
        ),
        (
            {"config": {"lora_alpha": None}},
            "a: adapter_config.json: the rank or alpha of m.w cannot be determined (unsupported operand type(s) for /: 'NoneType' and 'int'). "
            "Check the adapter.",
        ),
        (
            {"config": {"peft_type": "LOHA"}},
            "a: adapter_config.json: peft_type is 'LOHA', expected 'LORA'. Merge this adapter into its base with PEFT and use the result.",
        ),
        (
            {"config": {"rank_pattern": {"(a+)(b+)\\1": 4}}},
            "a: adapter_config.json: rank_pattern has the pattern '(a+)(b+)\\\\1', which has a reference to a group, an atomic group or a "
            "possessive repetition, which are supported only with at most one other repetition; expected module names, or a short "
            "regular expression. Use another adapter, or list the modules by name.",
        ),
        (
            {"A": np.ones((3, 21))},
            "base+a: m.w.weight is (30, 20) in the base, the adapter's base_model.model.m.w.lora_A.weight is (3, 21); expected 20 "
            "columns. If PEFT loads this adapter on this base, merge it there (merge_and_unload) and give the result; if not, use another base.",
        ),
    ],
    ids=["no A", "no B", "rank 0", "no alpha", "alpha null", "peft_type", "pattern", "shape"],
)  # fmt: skip
def test_a_wrong_adapter_is_refused_in_one_message(tmp_path: Path, how: dict[str, object], told: str) -> None:
    change(tmp_path, **how)  # type: ignore[arg-type]
    assert refused(tmp_path) == told


@pytest.mark.usefixtures("two")
def test_a_nan_in_an_adapter_ends_the_fold(tmp_path: Path) -> None:
    change(tmp_path, A=np.full((3, 20), math.nan))
    assert refused(tmp_path, NonFiniteError) == (
        "a: base_model.model.m.w.lora_A.weight[0, 0] has NaN; expected finite numbers. Fix this adapter or leave it out."
    )


@pytest.mark.usefixtures("two")
def test_a_sum_too_large_for_the_output_ends_the_fold(tmp_path: Path) -> None:
    change(tmp_path, A=np.full((3, 20), 1e4))
    assert refused(tmp_path, NonFiniteError, dtype="float16").startswith("m.w.weight[")


@pytest.mark.usefixtures("two")
def test_a_cut_off_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert refused(tmp_path).startswith("a/adapter_model.safetensors: ")


def test_the_numbers_of_weights_and_adapters_must_agree() -> None:
    with pytest.raises(
        AlnicoError,
        match=r"^weights: there are 2 for 1 adapters; expected one for all, or one for each\. Change the number\.$",
    ):
        fold_recipe("base", "a", weights=[1, 2])
    with pytest.raises(
        AlnicoError, match=r"^adapters: there are none; expected at least one\. Give an adapter\.$"
    ):
        fold_recipe("base", [])


def test_the_command_folds(tmp_path: Path, two: dict[str, np.ndarray], run) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(
        "lora",
        "fold",
        f"{tmp_path}/base",
        f"{tmp_path}/a",
        f"{tmp_path}/b",
        f"{tmp_path}/out",
        "--weights",
        "0.5,2",
    )
    assert (code, err) == (0, ""), err
    assert out.startswith(f"{tmp_path}/out: 2 tensors, 607 parameters, 2.6 kB, ")
    expected = two["W"] + 0.5 * two["a"] + 2 * two["b"]
    assert (
        np.abs(made.read_model(tmp_path / "out")["m.w.weight"] - expected).max()
        <= 2e-6 * np.abs(expected).max()
    )
    code, _, err = run("lora", "fold", f"{tmp_path}/base", f"{tmp_path}/out2")
    assert code == 2
    assert "Missing argument 'ADAPTER'." in err
    code, _, err = run(
        "lora", "fold", f"{tmp_path}/base", f"{tmp_path}/a", f"{tmp_path}/out2", "--weights", "1,2"
    )
    assert code == 2
    assert "--weights: there are 2 for 1 adapters. Give one for all, or one for each." in " ".join(
        err.split()
    ).replace("│ ", "")


@pytest.mark.usefixtures("two")
def test_inspect_shows_an_adapter(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run("inspect", f"{tmp_path}/a")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "base          x/base",
        "parameters    150, 600 B, F32",
        "updates       1, LoRA, rank 3",
        "     1 x  rank 3    scale 2        LoRA      (30, 20)          m.w",
    ]
    data = json.loads(run("inspect", f"{tmp_path}/a", "--json")[1])
    assert data["updates"] == [{"module": "m.w", "rank": 3, "scale": 2.0, "shape": [30, 20], "kind": "LoRA"}]


def test_an_interrupted_fold_is_taken_up(tmp_path: Path) -> None:
    from alnico.events import Event, TensorDone

    base, _ = made.family(tmp_path, 1, layers=3)
    tensors = {}
    random = np.random.default_rng(0)
    for name, shape in made.llama_shapes(layers=3).items():
        if name.endswith("_proj.weight"):
            at = name.removesuffix(".weight")
            tensors |= {f"{at}.lora_A.weight": ("F32", random.standard_normal((2, shape[1])))}
            tensors |= {f"{at}.lora_B.weight": ("F32", random.standard_normal((shape[0], 2)))}
    made.save_file(tmp_path / "a" / "adapter_model.safetensors", tensors)
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1})
    )
    done = 0

    def interrupt(event: Event) -> None:
        nonlocal done
        done += isinstance(event, TensorDone)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, tmp_path / "a", tmp_path / "out", watch=interrupt, threads=1)
    assert not (tmp_path / "out").exists()
    taken_up = fold(base, tmp_path / "a", tmp_path / "out")
    assert taken_up.resumed >= 4
    fold(base, tmp_path / "a", tmp_path / "whole")
    assert made.model_bytes(tmp_path / "out") == made.model_bytes(tmp_path / "whole")


def test_an_adapter_in_place_of_its_base_is_refused_with_the_order(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        fold(adapter, [base], tmp_path / "out")
    assert str(caught.value) == (
        f"{adapter}: is a LoRA adapter, and {base} is none; expected the base first, then its adapters. Exchange them."
    )


@pytest.mark.usefixtures("two")
def test_the_changed_tensors_of_a_fold_have_one_kernel(tmp_path: Path) -> None:
    plan = alnico.plan(fold_recipe(tmp_path / "base", tmp_path / "a", dtype="float16"))
    mixed = [job for job in plan.jobs if job.kind == "mix"]
    assert len(mixed) > 1
    assert len({mix_kernel(job) for job in mixed}) == 1
