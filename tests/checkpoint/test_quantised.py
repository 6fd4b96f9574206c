"""Quantised models are read as numbers: each format against float64 from its description, in every command, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alnico
import made
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.virtual_read import CHUNK
from alnico.errors import ModelError
from alnico.evaluation.loaded_model import open_subject
from alnico.kernels.choice import Backend, forced
from hostile.malformed import reading
from made_quantised import FORMATS, QuantisedMatrix, gptq, save_decoded, save_quantised

ROWS, COLUMNS = 160, 192
OTHERS = {"n.weight": torch.ones(5), "a.bias": torch.arange(4, dtype=torch.bfloat16)}
FEW = ("fp8 in blocks", "nvfp4 of ModelOpt", "mxfp4 of gpt-oss", "int4 with an order", "nf4 with double quantisation", "GPTQ with an order", "AWQ")  # fmt: skip
"""One format of each way to lie in memory."""


def random_matrix(kind: str, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> QuantisedMatrix:
    return FORMATS[kind](np.random.default_rng(seed), rows, columns)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_means_what_its_description_says(tmp_path: Path, kind: str) -> None:
    one = random_matrix(kind)
    save_quantised(tmp_path, {"a": one}, OTHERS)
    with alnico.open_model(tmp_path) as model:
        found = {name: (t.dtype, t.nominal, t.shape) for name, t in model.tensors.items()}
        assert found == {
            f"a{one.name}": ("F32", "BF16", one.values.shape),
            "n.weight": ("F32", "F32", (5,)),
            "a.bias": ("BF16", "BF16", (4,)),
        }
        assert "quantization_config" not in model.config
        # Differences from zero points cancel, so errors are compared with the largest value.
        assert relative(model.read(f"a{one.name}"), one.values) < 2**-22
        assert model.read("a.bias").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", FORMATS)
def test_numpy_and_the_compiled_kernel_decode_the_same_bits(tmp_path: Path, kind: str) -> None:
    one = random_matrix(kind)
    save_quantised(tmp_path, {"a": one}, {})
    found = []
    for backend in ("interpreted", "compiled"):
        with forced(backend), alnico.open_model(tmp_path) as model:
            found.append(model.read(f"a{one.name}").tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_which_part_is_asked_for_changes_no_bit(tmp_path: Path, kind: str) -> None:
    one = random_matrix(kind)
    save_quantised(tmp_path, {"a": one}, {})
    random = np.random.default_rng(1)
    with alnico.open_model(tmp_path) as model:
        name = f"a{one.name}"
        whole = model.read(name).tobytes()
        for start, stop in (tuple(sorted(random.integers(0, len(whole), 2))) for _ in range(12)):
            part = bytearray(stop - start)
            model.read_into(name, int(start), memoryview(part))
            assert part == whole[start:stop]


@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
@pytest.mark.parametrize("kind", FEW)
def test_tensors_larger_than_a_chunk_and_a_panel(
    tmp_path: Path, kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transposed_rows", "fp4"):
        monkeypatch.setattr(f"alnico.checkpoint.quantised.{module}.PANEL_BYTES", 1 << 16)
    one = random_matrix(kind, rows=1056, columns=576)
    assert one.values.size > 2 * CHUNK
    save_quantised(tmp_path, {"a": one}, {})
    with forced(backend), alnico.open_model(tmp_path) as model:
        assert relative(model.read(f"a{one.name}"), one.values) < 2**-22


@pytest.mark.parametrize("columns", [1, 7, 33, 130])
def test_rows_that_fill_no_word_or_byte(tmp_path: Path, columns: int) -> None:
    for kind in ("int4 by row", "nf4", "fp8 in blocks", "int8 by row"):
        one = random_matrix(kind, rows=5, columns=columns)
        save_quantised(tmp_path / kind, {"a": one}, {})
        with alnico.open_model(tmp_path / kind) as model:
            whole = model.read("a.weight")
            assert relative(whole, one.values) < 2**-22
            part = bytearray(4 * (whole.size - 1))
            model.read_into("a.weight", 4, memoryview(part))
            assert part == whole.tobytes()[4:]


@pytest.mark.parametrize("backend", ["interpreted", "compiled"])
@pytest.mark.parametrize("group", [3, 5, 64])
def test_groups_that_cut_a_byte(tmp_path: Path, group: int, backend: Backend) -> None:
    one = gptq(group=group)(np.random.default_rng(0), 32, 64)
    save_quantised(tmp_path, {"a": one}, {})
    with forced(backend), alnico.open_model(tmp_path) as model:
        assert relative(model.read("a.weight"), one.values) < 2**-22


@pytest.mark.parametrize("shape", [(7, 10), (6, 8), (2, 7, 10), (1, 1), (CHUNK // 2 + 1, 5)], ids=str)
def test_blocks_of_any_size_as_the_config_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected = save_blocks(tmp_path, shape)
    with alnico.open_model(tmp_path) as model:
        np.testing.assert_allclose(model.read("a.weight"), expected, rtol=1e-7)


BLOCK = [3, 4]


def save_blocks(folder: Path, shape: tuple[int, ...] = (7, 10), block: object = BLOCK) -> np.ndarray:
    """Write a model of one fp8 matrix in blocks of the given size; returns the matrix that is meant, in float64."""
    torch.manual_seed(0)
    rows, columns = BLOCK
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)) + 0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": weight, "a.weight_scale_inv": scales}, folder / "model.safetensors")
    config = {"model_type": "net", "quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    whole = scales.double().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return (weight.double() * whole[..., : shape[-2], : shape[-1]]).numpy()


def test_experts_with_a_scale_per_column_and_per_expert(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = torch.from_numpy(random.standard_normal((3, 6, 8))).to(torch.float8_e4m3fn)
    by_column, by_expert = torch.rand(3, 1, 8) + 0.5, torch.rand(3, 1, 1) + 0.5
    tensors = {"up": weight, "up_scale": by_column, "down": weight.clone(), "down_scale_inv": by_expert}
    save_file(tensors, tmp_path / "m.safetensors")
    with alnico.open_model(tmp_path / "m.safetensors") as model:
        np.testing.assert_allclose(model.read("up"), weight.double() * by_column.double(), rtol=1e-7)
        np.testing.assert_allclose(model.read("down"), weight.double() * by_expert.double(), rtol=1e-7)


@pytest.mark.parametrize("kind", FORMATS)
def test_merges_and_folds_are_those_of_the_decoded_copy(tmp_path: Path, kind: str) -> None:
    made_one, tuned = (random_matrix(kind, seed, HIDDEN, HIDDEN) for seed in range(2))
    name = f"a{made_one.name}"
    for which, one in (("base", made_one), ("tuned", tuned)):
        save_quantised(tmp_path / which, {"a": one}, OTHERS)
        with alnico.open_model(tmp_path / which) as model:
            decoded = torch.from_numpy(model.read(name))
        save_file({name: decoded, **OTHERS}, tmp_path / f"{which}.safetensors", {"format": "pt"})
    for number, options in enumerate(
        ({"merge_method": "linear"}, {"merge_method": "ties", "parameters": {"density": 0.4}})
    ):
        results = []
        for end in ("", ".safetensors"):
            recipe = {
                **options,
                "models": [f"{tmp_path}/tuned{end}", f"{tmp_path}/base{end}"],
                "dtype": "bfloat16",
                "unrelated": "allow",
            }
            if number:
                recipe |= {"models": [f"{tmp_path}/tuned{end}"], "base_model": f"{tmp_path}/base{end}"}
            alnico.merge(recipe, tmp_path / f"out{number}{end}")
            file = tmp_path / f"out{number}{end}"
            results.append(load_file(file if end else file / "model.safetensors"))
        assert results[0].keys() == results[1].keys()
        assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    if made_one.values.ndim != 2:
        return
    save_adapter(tmp_path / "adapter", *made_one.values.shape)
    folded = [
        alnico.lora.fold(tmp_path / f"base{end}", tmp_path / "adapter", tmp_path / f"folded{end}", dtype="bfloat16") for end in ("", ".safetensors")
    ]  # fmt: skip
    assert len(folded) == 2
    one, other = load_file(tmp_path / "folded/model.safetensors"), load_file(tmp_path / "folded.safetensors")
    assert all(torch.equal(one[n], other[n]) for n in one)


def save_adapter(folder: Path, rows: int, columns: int, base: str = "") -> None:
    random = np.random.default_rng(1)
    factors = {
        "a.lora_A.weight": ("F32", random.standard_normal((2, columns)).astype(np.float32)),
        "a.lora_B.weight": ("F32", random.standard_normal((rows, 2)).astype(np.float32)),
    }
    made.save_file(folder / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_the_output_of_a_fold_is_bf16_and_says_nothing_of_quantisation(tmp_path: Path) -> None:
    one = random_matrix("fp8 in blocks")
    save_quantised(tmp_path / "base", {"a": one}, {})
    save_adapter(tmp_path / "adapter", ROWS, COLUMNS)
    result = alnico.lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["a.weight"].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (
        f"{tmp_path}/base: 1 fp8 tensors with scales per 128 x 128 block are decoded; the output is bf16, 2.0 times the bytes. Quantising it "
        "again loses changes that are smaller than the steps of the codes, which most of a fine-tune's are."
    ) in result.plan.notes


def test_files_of_the_quantiser_are_not_carried_to_a_bf16_model(tmp_path: Path) -> None:
    save_quantised(tmp_path / "base", {"a": random_matrix("nvfp4 of ModelOpt")}, {})
    for name in (
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "generation_config.json",
    ):
        (tmp_path / "base" / name).write_text("{}")
    alnico.merge({"merge_method": "passthrough", "models": [str(tmp_path / "base")]}, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*config.json")} == {
        "config.json",
        "generation_config.json",
    }


def test_several_formats_in_one_model_are_counted(tmp_path: Path) -> None:
    parts = {"a": random_matrix("fp8 of FBGEMM"), "b": random_matrix("nf4"), "c": random_matrix("nf4", 1)}
    save_quantised(tmp_path, parts, {"plain": torch.ones(3, dtype=torch.bfloat16)})
    with alnico.open_model(tmp_path) as model:
        assert isinstance(model, DequantisedModel)
        assert set(model.tensors) == {"a.weight", "b.weight", "c.weight", "plain"}
        assert (
            "2 nf4 tensors of bitsandbytes and 1 fp8 tensors with a scale per row are decoded"
            in model.notes[0]
        )
        assert "1 scales of activations and marks are left out" in model.notes[0]


# What is refused.


def change(kind: str, **stored: torch.Tensor | None) -> QuantisedMatrix:
    """A matrix of a format with parts replaced or, where they are None, missing."""
    one = random_matrix(kind)
    ends = {end: part for end, part in one.stored.items() if stored.get(end.lstrip("."), part) is not None}
    ends |= {f".{end}": part for end, part in stored.items() if part is not None}
    return QuantisedMatrix(ends, one.values, one.config)


def told(folder: Path, one: QuantisedMatrix) -> str:
    save_quantised(folder, {"a": one}, {})
    with pytest.raises(ModelError) as caught:
        reading(folder)()
    return str(caught.value).removeprefix(f"{folder}: ")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("fp8 in blocks", "weight_scale_inv"), ("fp8 of FBGEMM", "weight_scale"), ("nvfp4 of compressed-tensors", "weight_scale"),
        ("nvfp4 of compressed-tensors", "weight_global_scale"), ("nvfp4 of ModelOpt", "weight_scale_2"), ("int4 in groups", "weight_scale"),
        ("nf4", "weight.absmax"), ("nf4 with double quantisation", "weight.nested_quant_map"), ("GPTQ", "scales"), ("GPTQ", "qzeros"), ("AWQ", "qzeros"),
    ],
)  # fmt: skip
def test_a_missing_part_is_named(tmp_path: Path, kind: str, part: str) -> None:
    message = told(tmp_path, change(kind, **{part: None}))
    assert message.endswith(f"without a.{part}; expected its scales. Complete the download.")


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("fp8 in blocks", "weight_scale_inv", 0.0), ("fp8 of FBGEMM", "weight_scale", float("nan")), ("nvfp4 of ModelOpt", "weight_scale", 0.0),
        ("nvfp4 of ModelOpt", "weight_scale_2", 0.0), ("nvfp4 of compressed-tensors", "weight_global_scale", 0.0), ("int8 by row", "weight_scale", 0.0),
        ("int4 in groups", "weight_scale", float("inf")), ("int4 with an order", "weight_scale", 0.0), ("nf4", "weight.absmax", float("nan")),
        ("int8 of bitsandbytes", "SCB", float("nan")), ("GPTQ", "scales", 0.0), ("GPTQ", "scales", float("nan")), ("GPTQ with an order", "scales", 0.0), ("AWQ", "scales", 0.0),
    ],
)  # fmt: skip
def test_scales_that_are_zero_or_no_numbers_are_refused(
    tmp_path: Path, kind: str, part: str, value: float
) -> None:
    before = random_matrix(kind).stored[f".{part}"]
    scales = before.float().clone()
    scales.view(-1)[-1] = value
    message = told(tmp_path, change(kind, **{part: scales.to(before.dtype)}))
    if value:
        assert (
            message
            == f"a.{part}: a scale is {value}; expected finite numbers. Get the model from its source."
        )
    else:
        assert message == (
            f"a.{part}: a scale is 0, and the values that it scales are not; expected positive numbers. Get the model from its source."
        )


def test_scales_of_zero_over_zeros_are_read(tmp_path: Path) -> None:
    stored = {".weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), ".weight_scale": torch.zeros(4, 1)}
    save_quantised(tmp_path, {"a": QuantisedMatrix(stored, np.zeros((4, 4)))}, {})
    with alnico.open_model(tmp_path) as model:
        assert not model.read("a.weight").any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: change("fp8 of FBGEMM", weight_scale=torch.ones(7, 3)),
            "a.weight is (160, 192), its weight_scale is F32 (7, 3); expected F32 or BF16 or F16 or F8_E8M0 () or (160, 1) or (2, 2). "
            "Get the model from its source.",
        ),
        (
            lambda: change("int4 in groups", weight_shape=torch.tensor([160, 100])),
            "a.weight_shape is '(160, 100)'; expected 160 rows in 24 words of 4-bit or 8-bit codes each. Use the full-precision model, "
            "or one that was quantised in that way.",
        ),
        (
            lambda: change("AWQ", scales=torch.ones(7, 160, dtype=torch.float16)),
            "a.qweight is (192, 20), its scales is F16 (7, 160); expected F32 or BF16 or F16 of another shape. Get the model from its source.",
        ),
        (
            lambda: change("GPTQ", g_idx=torch.full((192,), 6, dtype=torch.int32)),
            "a.g_idx reaches from 6 to 6; expected 0 to 5, the groups of scales. Get the model from its source.",
        ),
        (
            lambda: change("int8 of bitsandbytes", weight_format=torch.tensor(2, dtype=torch.uint8)),
            "a.weight_format is '2'; expected 0, rows one after the other. Use the full-precision model, or one that was quantised in that "
            "way.",
        ),
        (
            lambda: change("GPTQ", weight=torch.ones(3)),
            "a.weight is stored twice, as F32 and as a.qweight; expected one of them. Remove the other.",
        ),
        (
            lambda: change("nvfp4 of ModelOpt", comfy_quant=torch.ones(3, dtype=torch.uint8)),
            "the form of a.weight is '4-bit codes of ComfyUI'; expected fp8 with one scale. Use the full-precision model, or one that was "
            "quantised in that way.",
        ),
    ],
    ids=["scale", "shape", "groups", "index", "layout", "twice", "comfy"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tmp_path: Path, make: Callable[[], QuantisedMatrix], message: str
) -> None:
    assert told(tmp_path, make()) == message


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("GPTQ", {"bits": 3}, "the form of a.qweight is '3 bits, gptq'; expected 4 or 8 bits of gptq or gptq_v2."),
        ("GPTQ", {"checkpoint_format": "marlin"}, "the form of a.qweight is '4 bits, marlin'; expected 4 or 8 bits of gptq or gptq_v2."),
        ("AWQ", {"version": "gemv"}, "the version of a.qweight is '4 bits, gemv'; expected 4 bits of AWQ's version gemm."),
        ("fp8 in blocks", {"weight_block_size": [0, 4]}, "config.json has the weight_block_size [0, 4]; expected two positive whole numbers. Check the model."),
    ],
)  # fmt: skip
def test_an_unknown_version_is_refused(
    tmp_path: Path, kind: str, config: dict[str, object], message: str
) -> None:
    one = random_matrix(kind)
    assert told(tmp_path, QuantisedMatrix(one.stored, one.values, {**one.config, **config})).startswith(
        message
    )


# Notes on what goes together.


def test_a_quantised_base_of_a_model_that_is_not_is_noted(tmp_path: Path) -> None:
    one = random_matrix("nf4")
    save_quantised(tmp_path / "base", {"a": one}, {})
    save_decoded(tmp_path / "tuned", {"a": random_matrix("nf4", 1)}, {})
    recipe = {"merge_method": "ties", "models": [f"{tmp_path}/tuned"], "base_model": f"{tmp_path}/base"}
    plan = alnico.plan({**recipe, "parameters": {"density": 0.5}})
    assert (
        f"{tmp_path}/base holds nf4 tensors of bitsandbytes and {tmp_path}/tuned holds none: what is between them is also the error of "
        "quantisation, which is as large as many a fine-tune's change. Use models of one precision, best the full one."
    ) in plan.notes


def test_models_of_two_formats_are_noted(tmp_path: Path) -> None:
    for name, kind in (("base", "fp8 in blocks"), ("tuned", "nf4")):
        save_quantised(tmp_path / name, {"a": random_matrix(kind)}, {})
    plan = alnico.plan({"merge_method": "linear", "models": [f"{tmp_path}/tuned", f"{tmp_path}/base"]})
    assert (
        f"{tmp_path}/tuned holds nf4 tensors of bitsandbytes and {tmp_path}/base holds fp8 tensors with scales per 128 x 128 block: what is "
        "between them is also the error of quantisation, which is as large as many a fine-tune's change. Use models of one precision, best the "
        "full one."
    ) in plan.notes


def test_models_of_one_format_are_not_noted(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        save_quantised(tmp_path / name, {"a": random_matrix("nf4", seed)}, {})
    plan = alnico.plan({"merge_method": "linear", "models": [f"{tmp_path}/tuned", f"{tmp_path}/base"]})
    assert not any("error of quantisation" in note for note in plan.notes)


def test_an_adapter_of_the_quantised_base_fits_its_decoded_numbers(tmp_path: Path) -> None:
    save_quantised(tmp_path / "base-bnb-4bit", {"a": random_matrix("nf4")}, {})
    save_adapter(tmp_path / "adapter", ROWS, COLUMNS, "org/base-bnb-4bit")
    with alnico.open_model(f"{tmp_path}/base-bnb-4bit+{tmp_path}/adapter") as model:
        assert model.notes[-1] == (
            f"{model.label}: the adapter was trained on org/base-bnb-4bit, whose decoded weights it is applied to: the result is the model "
            "that was trained. On the full-precision model the result is another one."
        )


def test_an_adapter_of_the_full_model_on_a_quantised_base_is_noted(tmp_path: Path) -> None:
    save_quantised(tmp_path / "base-bnb-4bit", {"a": random_matrix("nf4")}, {})
    save_adapter(tmp_path / "adapter", ROWS, COLUMNS, "org/base")
    with alnico.open_model(f"{tmp_path}/base-bnb-4bit+{tmp_path}/adapter") as model:
        assert model.notes[-1] == (
            f"{model.label}: the adapter was trained on org/base, here it is applied to base-bnb-4bit, which is quantised: the error of "
            "quantisation stays in the result. Use the model that it was trained on, unless that was quantised while it was trained (QLoRA)."
        )


HIDDEN = 64


def save_causal(folder: Path, kind: str) -> None:
    """A Llama of one layer whose matrices in the layer are quantised."""
    config = made.llama_config(hidden=HIDDEN, layers=1)
    random = np.random.default_rng(0)
    parts, others = {}, {}
    for name, shape in made.llama_shapes(hidden=HIDDEN, layers=1).items():
        if ".layers." in name and len(shape) == 2:
            parts[name.removesuffix(".weight")] = FORMATS[kind](random, *shape)
        else:
            others[name] = torch.from_numpy(
                random.standard_normal(shape) * 0.1 + (len(shape) == 1)
            ).bfloat16()
    save_quantised(folder, parts, others, config)


def save_gpt_oss(folder: Path, kind: str) -> None:
    """A gpt-oss of one layer, whose experts are its only quantised weights."""
    import transformers

    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=32, layer_types=["full_attention"], architectures=["GptOssForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.GptOssForCausalLM(config).bfloat16()
    random = np.random.default_rng(0)
    rows = {"gate_up_proj": 2 * HIDDEN, "down_proj": HIDDEN}
    stems = {
        f"model.layers.0.mlp.experts.{part}": FORMATS[kind](random, n, HIDDEN) for part, n in rows.items()
    }
    others = {name: part.clone() for name, part in module.state_dict().items() if name not in stems}
    save_quantised(folder, stems, others, config.to_dict())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_model_has_the_scores_of_its_decoded_copy(tmp_path: Path, kind: str) -> None:
    (save_gpt_oss if kind == "mxfp4 of gpt-oss" else save_causal)(tmp_path / "quantised", kind)
    alnico.merge({"merge_method": "passthrough", "models": [f"{tmp_path}/quantised"]}, tmp_path / "copy")
    scores = []
    for name in ("quantised", "copy"):
        subject = open_subject(tmp_path / name, offline=True)
        with torch.no_grad():
            scores.append(subject.model()(torch.arange(12)[None]).logits)
    assert torch.isfinite(scores[0]).all()
    assert torch.equal(*scores)
