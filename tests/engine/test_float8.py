"""float8 without block scales: every code merged exactly, a NaN found, bytes copied."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alnico
from alnico.errors import NonFiniteError

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def codes(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every finite value, in some order."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = values[values.float().isfinite()]
    order = np.random.default_rng(seed).permutation(len(finite))
    return finite.view(torch.uint8)[torch.from_numpy(order)].view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_models_are_merged_to_bf16_with_one_rounding(tmp_path, dtype):
    held = [codes(dtype, seed).repeat(40) for seed in (0, 1)]
    for i, values in enumerate(held):
        save_file({"w": values}, tmp_path / f"{i}.safetensors")
    recipe = {
        "merge_method": "linear",
        "models": [str(tmp_path / f"{i}.safetensors") for i in (0, 1)],
        "parameters": {"weight": 0.5},
    }
    alnico.merge(recipe, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ((held[0].double() + held[1].double()) / 2).to(torch.bfloat16))
    alnico.merge(
        {"merge_method": "passthrough", "models": recipe["models"][:1]}, tmp_path / "copy.safetensors"
    )
    assert torch.equal(
        load_file(tmp_path / "copy.safetensors")["w"].view(torch.uint8), held[0].view(torch.uint8)
    )


@pytest.mark.parametrize(
    ("dtype", "code", "kind"),
    [(DTYPES[0], 0x7F, "NaN"), (DTYPES[0], 0xFF, "NaN"), (DTYPES[1], 0xFC, "an infinity")],
)
def test_a_code_that_is_no_number_is_named(tmp_path, dtype, code, kind):
    bad = torch.zeros(300, dtype=torch.uint8)
    bad[123] = code
    save_file({"w": torch.zeros(300).to(dtype)}, tmp_path / "a.safetensors")
    save_file({"w": bad.view(dtype)}, tmp_path / "b.safetensors")
    with pytest.raises(NonFiniteError) as caught:
        alnico.merge(
            {"merge_method": "linear", "models": [f"{tmp_path}/{n}.safetensors" for n in "ab"]},
            tmp_path / "out.safetensors",
        )
    assert str(caught.value) == (
        f"w[123]: {tmp_path}/b.safetensors has {kind}; expected finite numbers. Repair or exclude this model."
    )
