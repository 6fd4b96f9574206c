"""Outputs in the fp8 of the base: torch's float8 cast and float64 are the referees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alnico
from alnico.checkpoint.quantised.requantised_model import encode_e4m3, encode_scales, rounded_scales
from alnico.errors import AlnicoError, MismatchError, RecipeError
from checkpoint.test_quantised import save_adapter
from made_quantised import FORMATS, QuantisedMatrix, save_quantised

ROWS, COLUMNS = 160, 192
KINDS = (
    "fp8 in blocks",
    "fp8 in blocks, bf16 scales",
    "fp8 in blocks, powers of two",
    "fp8 of FBGEMM",
    "fp8 of ModelOpt",
    "fp8 of ComfyUI",
)


def test_rounding_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[torch.isfinite(codes)].sort().values
    halves = (finite[1:] + finite[:-1]) / 2
    random = torch.from_numpy(np.random.default_rng(0).standard_normal(100_000)).float() * 40
    values = torch.cat(
        [
            finite,
            halves,
            halves.nextafter(torch.tensor(1e9)),
            halves.nextafter(torch.tensor(-1e9)),
            random,
            torch.tensor([1e9, -1e9]),
        ]
    )
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert encode_e4m3(values.numpy()).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "F8_E8M0"])
def test_scales_are_those_that_their_bytes_say(kind: str) -> None:
    largest = np.random.default_rng(0).uniform(0, 5, 100).astype(np.float32)
    largest[0] = 0
    scales = rounded_scales(largest, kind)
    dtype = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E8M0": torch.float8_e8m0fnu,
    }[kind]
    assert torch.from_numpy(encode_scales(scales, kind)).view(dtype).float().tolist() == scales.tolist()
    exact = torch.from_numpy(np.where(largest > 0, largest / np.float32(448), 1).astype(np.float32))
    if kind == "F8_E8M0":
        assert all(scales >= exact.numpy())
        assert all(scales < 2 * exact.numpy())
        assert all(np.frexp(scales)[0] == 0.5)
    else:
        assert scales.tolist() == exact.to(dtype).float().tolist()


def spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of each element of a matrix, by the shape of its scales."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(shape)
    height, width = (1, shape[1]) if scales.shape == (shape[0], 1) else (128, 128)
    return scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def merged(folder: Path, kind: str, step: float) -> tuple[QuantisedMatrix, torch.Tensor, alnico.MergeResult]:
    """Average a quantised base with a model that is it and a step on; returns the base, the exact average and the result."""
    one = FORMATS[kind](np.random.default_rng(0), ROWS, COLUMNS)
    save_quantised(
        folder / "base",
        {"a": one, "b": FORMATS[kind](np.random.default_rng(1), 64, 64)},
        {"n": torch.ones(5)},
    )
    with alnico.open_model(folder / "base") as model:
        values = {name: torch.from_numpy(model.read(name)) for name in model.tensors}
    change = torch.from_numpy(np.random.default_rng(2).standard_normal((ROWS, COLUMNS))).float() * step
    tuned = {**values, "a.weight": values["a.weight"] + change}
    (folder / "tuned").mkdir()
    save_file(tuned, folder / "tuned" / "model.safetensors")
    recipe = {"merge_method": "linear", "models": [f"{folder}/base", f"{folder}/tuned"], "unrelated": "allow"}
    result = alnico.merge(recipe, folder / "out", requantise="fp8")
    return one, (values["a.weight"] + tuned["a.weight"]) / 2, result


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_has_the_format_of_the_base_with_new_scales(tmp_path: Path, kind: str) -> None:
    one, exact, result = merged(tmp_path, kind, 0.5)
    found, base = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(tmp_path / "base/model.safetensors"),
    )
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in base.items()
    }
    end = next(end for end in one.stored if "scale" in end and "input" not in end and "k_" not in end)
    scales = spread(found[f"a{end}"].float(), (ROWS, COLUMNS))
    expected = (exact / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found["a.weight"].view(torch.uint8), expected.view(torch.uint8))
    # The largest magnitude of what shares a scale is 448 of it, but for the rounding of the scale; of powers of two at least 224.
    codes = found["a.weight"].double().abs()
    assert codes.amax() >= (224 if "two" in kind else 416)
    for name in base:  # unchanged, and scales of activations
        if name not in ("a.weight", f"a{end}"):
            assert torch.equal(
                found[name].reshape(-1).view(torch.uint8), base[name].reshape(-1).view(torch.uint8)
            ), name
    before = json.loads((tmp_path / "base/config.json").read_text()).get("quantization_config")
    assert json.loads((tmp_path / "out/config.json").read_text()).get("quantization_config") == before
    written, old = found["a.weight"].double() * scales.double(), torch.from_numpy(one.values)
    kept = 1 - float(((written - exact.double()) ** 2).sum() / ((exact.double() - old) ** 2).sum())
    assert result.kept == pytest.approx({"a.weight": kept, "b.weight": 1.0}, abs=1e-4)
    with alnico.open_model(tmp_path / "out") as model:
        assert np.abs(model.read("a.weight") - exact.numpy()).max() <= 2**-4 * float(exact.abs().max())


def test_a_change_below_the_steps_of_fp8_is_gone_and_named(tmp_path: Path) -> None:
    _, _, result = merged(tmp_path, "fp8 of FBGEMM", 1e-5)
    assert result.kept["a.weight"] < 0.2
    assert result.notes[-1].startswith(f"requantised like {tmp_path}/base: of the energy of the change, ")
    assert result.notes[-1].endswith("Most of it is gone in 1: a.weight. Write bf16 to keep it.")


def test_a_fold_onto_fp8_is_written_in_fp8_and_verified(tmp_path: Path) -> None:
    one = FORMATS["fp8 in blocks"](np.random.default_rng(0), ROWS, COLUMNS)
    save_quantised(tmp_path / "base", {"a": one}, {})
    save_adapter(tmp_path / "adapter", ROWS, COLUMNS)
    result = alnico.lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", requantise="fp8")
    alnico.lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "exact", dtype="float32")
    exact = load_file(tmp_path / "exact/model.safetensors")["a.weight"]
    found = load_file(tmp_path / "out/model.safetensors")
    scales = spread(found["a.weight_scale_inv"], (ROWS, COLUMNS))
    assert torch.equal(
        found["a.weight"].view(torch.uint8), (exact / scales).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    assert 0 <= result.kept["a.weight"] <= 1
    alnico.verify(tmp_path / "out")
    alnico.verify(tmp_path / "out", against_inputs=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("requantise", ["fp8", None])
def test_the_file_of_modelopts_quantiser_stays_with_its_codes(tmp_path: Path, requantise: str | None) -> None:
    merged(tmp_path, "fp8 of ModelOpt", 0.1)
    text = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}\n'
    (tmp_path / "base" / "hf_quant_config.json").write_text(text)
    recipe = {
        "merge_method": "linear",
        "models": [f"{tmp_path}/base", f"{tmp_path}/tuned"],
        "unrelated": "allow",
    }
    alnico.merge(recipe, tmp_path / "again", requantise=requantise)
    file = tmp_path / "again" / "hf_quant_config.json"
    assert (file.read_text() if file.exists() else None) == (text if requantise else None)
    if requantise:
        alnico.verify(tmp_path / "again", against_inputs=True)


def test_memory_and_threads_change_no_bit(tmp_path: Path) -> None:
    merged(tmp_path, "fp8 in blocks", 0.1)
    recipe = {
        "merge_method": "linear",
        "models": [f"{tmp_path}/base", f"{tmp_path}/tuned"],
        "unrelated": "allow",
        "requantise": "fp8",
    }
    alnico.merge(recipe, tmp_path / "again", threads=1, memory="1GiB")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()


def test_the_recipe_beside_the_output_makes_it_again(tmp_path: Path) -> None:
    merged(tmp_path, "fp8 in blocks", 0.1)
    alnico.merge_documents(tmp_path / "out/mergekit_config.yml", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("kind", "keys", "error", "message"),
    [
        ("nf4", {}, MismatchError, "expected one shape, in fp8 with scales. Leave out requantise"),
        ("", {}, MismatchError, "base: is not quantised; expected a base that is stored in fp8, for requantise."),
        ("fp8 in blocks", {"dtype": "bfloat16"}, RecipeError, "requantise and dtype are both given; expected one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_requantised_is_refused(
    tmp_path: Path, kind: str, keys: dict[str, Any], error: type[AlnicoError], message: str
) -> None:
    if kind:
        save_quantised(tmp_path / "base", {"a": FORMATS[kind](np.random.default_rng(0), 64, 64)}, {})
    else:
        (tmp_path / "base").mkdir()
        save_file({"a.weight": torch.ones(3)}, tmp_path / "base/model.safetensors")
    recipe = {"merge_method": "linear", "models": [f"{tmp_path}/base", f"{tmp_path}/base"], **keys}
    with pytest.raises(error, match=message):
        alnico.merge(recipe, tmp_path / "out", requantise="fp8")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="requantise is 'int4'; expected fp8"):
        alnico.merge({"merge_method": "linear", "models": ["a", "b"]}, tmp_path / "out", requantise="int4")
    with pytest.raises(RecipeError, match="requantise is 'int4'; expected fp8"):
        alnico.plan({"merge_method": "linear", "models": ["a", "b"], "requantise": "int4"})
    with pytest.raises(AlnicoError, match="requantise is given for models in memory"):
        alnico.lora.fold({"w": np.zeros((2, 2), np.float32)}, {}, requantise="fp8")
