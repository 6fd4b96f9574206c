"""fp8 weights with scales of blocks are decoded while they are read; torch's float8 is the referee."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import alnico
import made
from alnico.checkpoint.virtual_read import CHUNK
from alnico.errors import ModelError

BLOCK = [3, 4]


def save(
    folder: Path, shape: tuple[int, ...] = (7, 10), block: object = BLOCK, scale: torch.dtype = torch.float32
) -> np.ndarray:
    """Write a model of one fp8 matrix and one norm; returns the matrix that is meant, in float64."""
    torch.manual_seed(0)
    rows, columns = BLOCK
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = (torch.rand(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)) + 0.5).to(scale)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "a.weight": weight,
        "a.weight_scale_inv": scales,
        "n.weight": torch.ones(5),
        "a.input_scale": torch.ones(1),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "net", "quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    whole = scales.double().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return (weight.double() * whole[..., : shape[-2], : shape[-1]]).numpy()


@pytest.mark.parametrize("shape", [(7, 10), (6, 8), (2, 7, 10), (1, 1), (CHUNK // 2 + 1, 5)], ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_blocks_are_decoded(tmp_path: Path, shape: tuple[int, ...], scale: torch.dtype) -> None:
    expected = save(tmp_path, shape, scale=scale)
    with alnico.open_model(tmp_path) as model:
        assert {n: (t.dtype, t.nominal) for n, t in model.tensors.items()} == {
            "a.weight": ("F32", "BF16"),
            "n.weight": ("F32", "F32"),
        }
        assert "quantization_config" not in model.config
        np.testing.assert_allclose(model.read("a.weight"), expected, rtol=1e-7)


def test_which_part_is_asked_for_changes_no_bit(tmp_path: Path) -> None:
    save(tmp_path, (11, 13))
    random = np.random.default_rng(0)
    with alnico.open_model(tmp_path) as model:
        whole = model.read("a.weight").tobytes()
        for start, stop in (tuple(sorted(random.integers(0, len(whole), 2))) for _ in range(30)):
            part = bytearray(stop - start)
            model.read_into("a.weight", int(start), memoryview(part))
            assert part == whole[start:stop]


def test_an_adapter_on_an_fp8_base_is_folded_to_bf16_with_a_warning(tmp_path: Path) -> None:
    base = save(tmp_path / "base", (7, 10))
    random = np.random.default_rng(1)
    a, b = (
        random.standard_normal((2, 10)).astype(np.float32),
        random.standard_normal((7, 2)).astype(np.float32),
    )
    made.save_file(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {"a.lora_A.weight": ("F32", a), "a.lora_B.weight": ("F32", b)},
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1})
    )
    result = alnico.lora.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    (dtype, values), expected = (
        made.read_file(tmp_path / "out" / "model.safetensors")["a.weight"],
        base + 0.5 * b.astype(float) @ a,
    )
    assert dtype == "BF16"
    assert np.abs(values - expected).max() <= 2**-8 * np.abs(expected).max()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(made.read_model(tmp_path / "out")) == {"a.weight", "n.weight"}
    assert (
        f"{tmp_path}/base: 1 fp8 tensors with scales per 3 x 4 block are decoded; the output is bf16, twice the bytes. Quantising it "
        "again would round every number to 4 significant bits, by up to 6 %, and lose smaller changes, which most of a fine-tune's are."
    ) in result.plan.notes


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block": [0, 4]}, "config.json has the weight_block_size [0, 4]; expected two positive whole numbers. Check the model."),
        (
            {"block": [7, 10]},
            "a.weight is (7, 10), its scales are F32 (3, 3); expected floating-point (1, 1), one per block of 7 x 10. "
            "Get the model from its source.",
        ),
    ],
    ids=["block", "shape"],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    save(tmp_path, **change)  # type: ignore[arg-type]
    with pytest.raises(ModelError) as caught:
        alnico.open_model(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {told}"


def test_missing_scales_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    save_file({"a.weight": torch.ones(7, 10).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        alnico.open_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: a.weight is F8_E4M3 without a.weight_scale_inv; expected its scales. Complete the download."
    )
