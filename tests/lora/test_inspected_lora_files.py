"""`alnico inspect` of LoRA files without a config: their dialect, kinds, ranks, alphas, parts and header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from lora import dialect_files as files
from lora.dialect_files import lora, random_factors

Run = Callable[..., tuple[int, str, str]]

LOHA = random_factors(
    {".hada_w1_a": (8, 2), ".hada_w1_b": (2, 6), ".hada_w2_a": (8, 2), ".hada_w2_b": (2, 6)}, 1
)
LOKR = random_factors({".lokr_w1": (2, 3), ".lokr_w2_a": (4, 1), ".lokr_w2_b": (1, 2)}, 2)
WHOLE = random_factors({".lokr_w1": (2, 3), ".lokr_w2": (4, 2)}, 3)
CORE = random_factors(
    {".lora_down.weight": (3, 4, 1, 1), ".lora_mid.weight": (3, 3, 3, 3), ".lora_up.weight": (8, 3, 1, 1)}, 4
)


def test_a_file_is_shown_with_its_dialect_kinds_and_header(tmp_path: Path, run: Run) -> None:
    modules = {
        "lora_unet_down_blocks_0_attn1_to_q": lora((8, 6), 2, 1, alpha=1),
        "lora_unet_down_blocks_1_attn1_to_q": lora((8, 6), 2, 2, alpha=1),
        "lora_unet_mid_block_ff": LOHA | {".alpha": np.float32(3)},
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": LOKR | {".alpha": np.float32(1)},
    }
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": "x" * 1000}
    path = files.file_of(tmp_path / "a.safetensors", modules, **header)
    code, out, err = run("inspect", str(path))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"adapter       {path}",
        "dialect       kohya",
        "base          sdxl_base_v1-0",
        "parameters    128, 512 B, F32",
        "changes       unet (3 modules), text_encoder (1 module)",
        "updates       4, LoHa and LoKr and LoRA, rank 1 2",
        "     1 x  rank 1    alpha 1        scale 1        LoKr      (8, 6)            lora_te1_text_model_encoder_layers_N_mlp_fc1",
        "     2 x  rank 2    alpha 1        scale 0.5      LoRA      (8, 6)            lora_unet_down_blocks_N_attn1_to_q",
        "     1 x  rank 2    alpha 3        scale 1.5      LoHa      (8, 6)            lora_unet_mid_block_ff",
        "header        ss_base_model_version: sdxl_base_v1-0",
        "header        1 more key (-v shows them)",
    ]
    assert (
        run("inspect", str(path), "-v")[1].splitlines()[-1]
        == f"header        ss_tag_frequency: {'x' * 100}..."
    )
    data = json.loads(run("inspect", str(path), "--json")[1])
    assert data["updates"][-1] == {"module": "lora_unet_mid_block_ff", "rank": 2, "scale": 1.5, "alpha": 3.0, "shape": [8, 6], "kind": "LoHa"}  # fmt: skip
    assert data["parts"] == {"unet": 3, "text_encoder": 1}
    assert data["metadata"]["ss_tag_frequency"] == "x" * 1000


DIALECTS: dict[str, tuple[str, str, dict[str, int]]] = {
    "lora_unet_input_blocks_4_1_proj_in": ("kohya", "kohya", {"unet": 1}),
    "lora_unet_double_blocks_0_img_mlp_0": ("kohya", "kohya", {"transformer": 1}),
    "lora_unet__blocks_0_self_attn_q": ("kohya", "kohya, as Wan's trainers write it", {"transformer": 1}),
    "lora_transformer_x_embedder": ("kohya", "OneTrainer", {"transformer": 1}),
    "lycoris_mid_block_attn": ("kohya", "LyCORIS", {"unet": 1}),
    "diffusion_model.double_blocks.0.img_mlp.0": ("peft", "ComfyUI", {"transformer": 1}),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": ("kohya", "ComfyUI", {"text_encoder_3": 1}),
    "transformer.transformer_blocks.0.attn.to_q": ("peft", "diffusers", {"transformer": 1}),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": ("peft", "diffusers", {"text_encoder_2": 1}),
    "unet.mid_block.attn1.processor.to_q": ("processor", "diffusers, an older version", {"unet": 1}),
    "conv_in": ("peft", "diffusers", {"a part that is not named": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_names_say_the_program_and_the_part(tmp_path: Path, name: str) -> None:
    words, program, parts = DIALECTS[name]
    path = files.file_of(tmp_path / "a.safetensors", {name: lora((8, 6), 2, 1, words=words)})
    data = alnico.inspect(path).data()
    assert (data["dialect"], data["parts"]) == (program, parts)


KINDS: dict[str, tuple[files.Factors, str, int | None]] = {
    "LoRA": (lora((8, 6), 3, 1), "LoRA", 3),
    "LoHa": (LOHA, "LoHa", 2),
    "LoKr": (LOKR, "LoKr", 1),
    "LoKr without a rank": (WHOLE | {".alpha": np.float32(1)}, "LoKr", None),
    "a core": (CORE, "LoRA with a core", 3),
    "a difference": (random_factors({".diff": (8, 6)}, 5), "difference", None),
    "DoRA": (lora((8, 6), 3, 1) | {".dora_scale": np.ones((8, 1), np.float32)}, "DoRA", 3),
    "LoHa and DoRA": (LOHA | {".dora_scale": np.ones((8, 1), np.float32)}, "LoHa with DoRA", 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_ranks_are_those_of_the_stored_factors(tmp_path: Path, kind: str) -> None:
    factors, shown, rank = KINDS[kind]
    path = files.file_of(tmp_path / "a.safetensors", {"lora_unet_mid_block_q": factors})
    stored = {f"lora_unet_mid_block_q{ending}": np.asarray(values) for ending, values in factors.items()}
    for found in (alnico.inspect(path), alnico.inspect(stored)):
        (update,) = found.data()["updates"]
        assert (update["kind"], update["rank"]) == (shown, rank)
        assert found.data()["parameters"] == sum(values.size for values in stored.values())


def test_differences_of_vectors_are_listed(tmp_path: Path, run: Run) -> None:
    modules: dict[str, files.Factors] = {
        "diffusion_model.q": lora((8, 6), 2, 1, words="peft") | random_factors({".diff_b": (8,)}, 1),
        "diffusion_model.norm": random_factors({".diff": (8,)}, 2),
    }
    path = files.file_of(tmp_path / "a.safetensors", modules)
    vectors = ["diffusion_model.norm.diff", "diffusion_model.q.diff_b"]
    assert alnico.inspect(path).data()["vectors"] == vectors
    assert f"vectors       {', '.join(vectors)}" in run("inspect", str(path))[1].splitlines()


@pytest.mark.parametrize("what", ["a kind that is not applied", "PEFT without its config"])
def test_what_is_not_read_as_an_adapter_is_shown_as_tensors_with_the_reason(
    tmp_path: Path, run: Run, what: str
) -> None:
    modules: dict[str, Any] = {
        "a kind that is not applied": {"lora_unet_q": random_factors({".oft_blocks": (2, 4, 4)}, 1)},
        "PEFT without its config": {"base_model.model.q": lora((8, 6), 2, 1, words="peft")},
    }
    path = files.file_of(tmp_path / "a.safetensors", modules[what])
    found = alnico.inspect(path)
    assert found.kind == "model"
    code, out, _ = run("inspect", str(path))
    reason = {
        "a kind that is not applied": "lora_unet_q.oft_blocks is of a kind that is not applied here",
        "PEFT without its config": "has PEFT's names",
    }[what]
    assert code == 0
    assert out.splitlines()[-1].startswith("no adapter ")
    assert reason in out.splitlines()[-1]
