"""A base with a LoRA adapter, read by parts. What PEFT 0.21 merges is in peft/adapters.safetensors, made by peft/make_adapters.py."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import alnico
import made
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.virtual_read import CHUNK
from alnico.errors import ModelError, NonFiniteError

PEFT = Path(__file__).parent / "peft" / "adapters.safetensors"
CASES = [
    "plain", "rslora", "patterns", "dora", "dora-turned", "turned", "layers", "saved", "biases", "lora-biases", "lora-bias",
]  # fmt: skip


def peft_case(case: str) -> tuple[dict, dict, dict, dict]:
    """Base, adapter and merged tensors in float64, and the adapter's config."""
    raw = PEFT.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    parts = {"base": {}, "adapter": {}, "merged": {}}
    for name, (_, values) in made.read_file(PEFT).items():
        its_case, part, tensor = name.split("/")
        if its_case == case:
            parts[part][tensor] = values
    return (
        parts["base"],
        parts["adapter"],
        parts["merged"],
        json.loads(header["__metadata__"]["configs"])[case],
    )


def save_adapter(directory: Path, tensors: dict, config: dict, dtype: str = "F32") -> Path:
    made.save_file(directory / "adapter_model.safetensors", {n: (dtype, v) for n, v in tensors.items()})
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return directory


def save_case(root: Path, case: str, dtype: str) -> tuple[str, dict]:
    base, adapter, merged, config = peft_case(case)
    made.save_model(root / "base", {n: (dtype, v) for n, v in base.items()}, {"model_type": "net"})
    save_adapter(root / "adapter", adapter, config, dtype)
    return f"{root}/base+{root}/adapter", merged


def small(
    root: Path, rows: int = 6, columns: int = 5, rank: int = 2, dtype: str = "F32", seed: int = 0, **config
) -> str:
    """A base with one weight, and an adapter of it."""
    random = np.random.default_rng(seed)
    made.save_model(
        root / "base",
        {"m.w.weight": (dtype, random.standard_normal((rows, columns))), "m.n.weight": ("F32", np.ones(3))},
    )
    factors = {
        "base_model.model.m.w.lora_A.weight": random.standard_normal((rank, columns)),
        "base_model.model.m.w.lora_B.weight": random.standard_normal((rows, rank)),
    }
    if config.get("use_dora"):
        factors["base_model.model.m.w.lora_magnitude_vector"] = random.random(rows) + 0.5
    save_adapter(root / "adapter", factors, {"r": rank, "lora_alpha": 2 * rank, **config})
    return f"{root}/base+{root}/adapter"


def refusal(reference: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(reference)
    return str(caught.value)


# What PEFT gives.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "near"), [("F64", 1e-12), ("F32", 2e-6)])
def test_an_adapter_gives_what_peft_merges(tmp_path, case, dtype, near):
    reference, merged = save_case(tmp_path, case, dtype)
    with open_model(reference) as model:
        assert {n for n, t in model.tensors.items() if t.nominal == dtype} == set(model.tensors)
        for name, expected in merged.items():
            assert model.tensors[name].dtype == dtype
            np.testing.assert_allclose(model.read(name), expected, rtol=near, atol=near)


def test_values_are_wider_than_the_base_keeps_them(tmp_path):
    with open_model(small(tmp_path, dtype="BF16")) as model:
        assert [(t.dtype, t.nominal) for t in model.tensors.values()] == [("F32", "F32"), ("F32", "BF16")]
        assert model.held_bytes == 4 * (6 * 2 + 2 * 5)
        base = made.read_model(tmp_path / "base")["m.w.weight"]
        a, b = (made.read_model(tmp_path / "adapter")[f"base_model.model.m.w.lora_{x}.weight"] for x in "AB")
        expected = base.astype(np.float64) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(model.read("m.w.weight"), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(model.read("m.n.weight"), np.ones(3))


# Parts.


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", [(37, 51), (5, 3 * CHUNK // 2), (CHUNK + 3, 2)], ids=str)
def test_which_part_is_asked_for_changes_no_bit(tmp_path, shape, config):
    reference = small(tmp_path, *shape, dtype="BF16", **config)
    size = 4 * shape[0] * shape[1]
    with open_model(reference) as model:
        whole = model.read("m.w.weight").tobytes()
    random = np.random.default_rng(1)
    ends = [tuple(sorted(random.integers(0, size, 2))) for _ in range(20)] + [
        (0, size),
        (3, 6),
        (size - 1, size),
        (5, 5),
    ]
    with open_model(reference) as model:  # a new one: its norms come from whatever part is read first
        for start, stop in ends:
            part = bytearray(stop - start)
            model.read_into("m.w.weight", int(start), memoryview(part))
            assert part == whole[start:stop]


def test_threads_read_the_same_bits(tmp_path):
    reference = small(tmp_path, 300, 200, use_dora=True)

    def rows(model, row: int) -> bytes:
        part = bytearray(4 * 200)
        model.read_into("m.w.weight", 4 * 200 * row, memoryview(part))
        return bytes(part)

    with open_model(reference) as one, open_model(reference) as other, ThreadPoolExecutor(8) as pool:
        assert (
            b"".join(pool.map(lambda row: rows(one, row), range(300))) == other.read("m.w.weight").tobytes()
        )


# Names.


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        ("model.a", "model.a"),
        ("model.a", "a"),
        ("a.b", "model.a.b"),
        ("h.0.a", "transformer.h.0.a"),
        ("a", "base_layer.a"),
    ],
)
def test_names_may_differ_by_a_component_at_their_begin(tmp_path, of_base, of_adapter):
    base, a, b = np.eye(3), np.ones((1, 3)), np.ones((3, 1))
    made.save_model(tmp_path / "base", {f"{of_base}.weight": ("F32", base), "other.weight": ("F32", base)})
    for prefix in ("base_model.model.", ""):
        tensors = {f"{prefix}{of_adapter}.lora_A.default.weight": a, f"{prefix}{of_adapter}.lora_B.weight": b}
        save_adapter(tmp_path / "adapter", tensors, {"r": 1, "lora_alpha": 1})
        with open_model(f"{tmp_path}/base+{tmp_path}/adapter") as model:
            np.testing.assert_array_equal(model.read(f"{of_base}.weight"), base + 1)
            np.testing.assert_array_equal(model.read("other.weight"), base)


def test_an_adapter_tensor_that_matches_nothing_is_named(tmp_path):
    reference = small(tmp_path)
    made.save_model(tmp_path / "base", {"m.x.weight": ("F32", np.ones((6, 5)))})
    assert refusal(reference) == (
        f"{reference}: the adapter's base_model.model.m.w.lora_A.weight is for 'm.w.weight'; the base has m.x.weight, and has no such "
        "tensor. If PEFT loads this adapter on this base, merge it there (merge_and_unload) and give the result; if not, use another base."
    )
    save_adapter(
        tmp_path / "adapter",
        made.read_model(tmp_path / "adapter"),
        {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "x/other"},
    )
    assert refusal(reference).endswith(" The adapter was trained on x/other: use that as its base.")


def test_an_ambiguous_name_is_named(tmp_path):
    reference = small(tmp_path)
    made.save_model(
        tmp_path / "base", {n: ("F32", np.ones((6, 5))) for n in ("a.m.w.weight", "b.m.w.weight")}
    )
    assert (
        "is for 'm.w.weight', which may be a.m.w.weight or b.m.w.weight of the base; expected one match. "
        in refusal(reference)
    )


# What does not fit.


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'."),
        (
            {"layer_replication": [[0, 2]]},
            "layer_replication is '[[0, 2]]', which changes what the adapter does",
        ),
        ({"use_qalora": True}, "use_qalora is 'True', which changes"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
        ({"a_new_option": 1}, "a_new_option is '1', which changes"),
        ({"rank_pattern": [1]}, "rank_pattern is '[1]', expected a mapping from modules to numbers."),
    ],
)
def test_an_option_that_is_not_applied_is_refused_by_name(tmp_path, config, told):
    message = refusal(small(tmp_path, **config))
    assert message.startswith(f"{tmp_path}/adapter: adapter_config.json: {told}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"lora_A.weight": np.ones((3, 5))},
            "lora_A.weight has rank 3, adapter_config.json says 2; they must agree and be at least 1.",
        ),
        (
            {"lora_A.weight": np.ones((2, 4))},
            "the adapter's base_model.model.m.w.lora_A.weight is (2, 4); expected 5 columns.",
        ),
        (
            {"lora_B.weight": np.ones((7, 2))},
            "the adapter's base_model.model.m.w.lora_B.weight is (7, 2); expected (6, 2).",
        ),
        (
            {"lora_B.weight": None},
            "the adapter has base_model.model.m.w.lora_A.weight without its lora_A or lora_B.",
        ),
        ({"lora_magnitude_vector": np.ones(5)}, "lora_magnitude_vector is (5,); expected 6 numbers."),
        ({"lora_B.bias": np.ones(6)}, "is for 'm.w.bias'; the base has m."),
        (
            {"weight": np.ones((7, 5))},
            "is (7, 5); expected the same shape; if the vocabulary was extended, extend it in the base too.",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(tmp_path, change, told):
    reference = small(tmp_path)
    tensors = made.read_model(tmp_path / "adapter")
    tensors |= {f"base_model.model.m.w.{name}": values for name, values in change.items()}
    save_adapter(
        tmp_path / "adapter", {n: v for n, v in tensors.items() if v is not None}, {"r": 2, "lora_alpha": 4}
    )
    assert told in refusal(reference)


def test_what_is_no_adapter_is_refused(tmp_path):
    reference = small(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "model.safetensors")
    assert refusal(reference) == (
        f"{tmp_path}/adapter: has no adapter_model.safetensors and no adapter_model.bin, expected a LoRA adapter as PEFT saves it. "
        "Check the path."
    )
    assert refusal(f"{tmp_path}/base+{tmp_path}/base/config.json") == refusal(
        f"{tmp_path}/base+{tmp_path}/base/config.json"
    )
    assert refusal(f"{tmp_path}/base+{tmp_path}/base").startswith(
        f"{tmp_path}/base: has no adapter_config.json, expected a LoRA"
    )


def test_a_nan_in_an_adapter_is_named(tmp_path):
    reference = small(tmp_path)
    tensors = made.read_model(tmp_path / "adapter")
    tensors["base_model.model.m.w.lora_B.weight"] = np.full((6, 2), np.nan)
    save_adapter(tmp_path / "adapter", tensors, {"r": 2, "lora_alpha": 4})
    with (
        open_model(reference) as model,
        pytest.raises(NonFiniteError, match=r"lora_B.weight\[0, 0\] has NaN"),
    ):
        model.read("m.w.weight")


# References, and the whole way.


def test_a_path_with_a_plus_wins_over_an_adapter(tmp_path):
    small(tmp_path)
    whole = made.save_model(tmp_path / "base+x", {"v": ("F32", np.ones(2))})
    shutil.copytree(tmp_path / "adapter", tmp_path / "x")
    with open_model(whole) as model:
        assert list(model.tensors) == ["v"]
    shutil.copytree(tmp_path / "base", tmp_path / "a+b")
    with open_model(f"{tmp_path}/a+b+{tmp_path}/adapter") as model:
        assert model.label == f"{tmp_path}/a+b+{tmp_path}/adapter"
        assert model.directory == tmp_path / "a+b"
        assert [p.name for p in model.paths()] == ["model.safetensors", "adapter_model.safetensors"]
        assert [f["file"] for f in model.identity()] == ["model.safetensors", "adapter_model.safetensors"]


def test_a_pickled_adapter_is_read(tmp_path):
    reference = small(tmp_path)
    with open_model(reference) as model:
        expected = model.read("m.w.weight")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(
        {n: torch.from_numpy(v.copy()) for n, v in made.read_model(weights).items()},
        tmp_path / "adapter" / "adapter_model.bin",
    )
    weights.unlink()
    with open_model(reference) as model:
        np.testing.assert_array_equal(model.read("m.w.weight"), expected)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_adapters_merge_in_a_recipe(tmp_path, monkeypatch, dtype):
    small(tmp_path / "models", 40, 30, dtype="BF16")
    small(tmp_path / "others", 40, 30, dtype="BF16", seed=5, use_dora=True)
    shutil.copytree(tmp_path / "others" / "adapter", tmp_path / "models" / "dora")
    parts = []
    for adapter in ("adapter", "dora"):
        with open_model(f"{tmp_path}/models/base+{tmp_path}/models/{adapter}") as model:
            parts.append(model.read("m.w.weight").astype(np.float64))
    expected = (parts[0] + parts[1]) / 2
    recipe = tmp_path / "models" / "r.yml"
    asked = f"dtype: {dtype}\n" if dtype else ""
    recipe.write_text(
        f"merge_method: linear\nmodels: [base+adapter, base+dora]\nparameters: {{weight: 0.5}}\n{asked}"
    )
    monkeypatch.chdir(tmp_path)
    result = alnico.merge(recipe, tmp_path / "out")
    found, values = made.read_file(tmp_path / "out" / "model.safetensors")["m.w.weight"]
    assert found == ("F32" if dtype else "BF16")
    np.testing.assert_allclose(values, expected, rtol=1e-6 if dtype else 2**-8, atol=1e-6)
    lock = json.loads((tmp_path / "out" / "alnico.lock.json").read_text())
    assert [i["model"] for i in lock["inputs"]] == [
        f"{tmp_path}/models/base+{tmp_path}/models/{adapter}" for adapter in ("adapter", "dora")
    ]
    assert "A merge of base+adapter, base+dora" in (tmp_path / "out" / "README.md").read_text()
    assert result.plan.memory.peak_bytes > sum(s.held_bytes for s in result.plan.sources)
    alnico.merge(
        {"merge_method": "passthrough", "models": [f"{tmp_path}/models/base+{tmp_path}/models/adapter"]},
        tmp_path / "folded",
    )
    assert made.read_file(tmp_path / "folded" / "model.safetensors")["m.w.weight"][0] == "BF16"
