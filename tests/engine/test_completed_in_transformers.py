"""A completed vision-language model loads in transformers without a missing key, and sees what the base and the fine-tune see."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import alnico
from made import read_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
IMAGE_TOKEN = 30


def llava() -> Any:
    vision = T.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
    )  # fmt: skip
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE_TOKEN
    )
    return T.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 31,
        "vision_start_token_id": 32,
        "vision_end_token_id": 33,
    }
    config = T.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **tokens,
    )
    return T.Qwen2VLForConditionalGeneration(config)


def base_of(family: str) -> Any:
    torch.manual_seed(0)
    return shaken({"llava": llava, "qwen2_vl": qwen2_vl}[family]().eval(), 0.05)


def shaken(module: Any, size: float) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return module


def seen(model: Any) -> torch.Tensor:
    """The logits for a picture of four tokens with a text."""
    torch.manual_seed(5)
    tokens = torch.tensor([[1, 32, *[IMAGE_TOKEN] * 4, 33, 5, 6]])
    given: dict[str, Any] = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8)}
    if model.config.model_type == "qwen2_vl":
        given |= {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (tokens == IMAGE_TOKEN).int()
    with torch.no_grad():
        logits: torch.Tensor = model(**given, use_cache=False).logits
    return logits


def without_tower(model: Any, folder: Path) -> None:
    """A program that kept the names, and left out what is not of the text."""
    model.save_pretrained(folder / "whole")
    (file,) = (folder / "whole").glob("*.safetensors")
    kept = {
        n: v for n, v in read_file(file).items() if not any(w in n for w in ("visual", "vision", "projector"))
    }
    assert 0 < len(kept) < len(read_file(file))
    save_file(folder / "tuned" / "model.safetensors", kept)
    shutil.copy(folder / "whole" / "config.json", folder / "tuned" / "config.json")


def text_decoder(model: Any, folder: Path) -> None:
    """A program that trained the text model alone, under its own class."""
    model.model.language_model.save_pretrained(folder / "tuned")


def causal_model(model: Any, folder: Path) -> None:
    """The usual case: the text model with its head, as a model of its own."""
    text = T.LlamaForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(folder / "tuned")


FORMS = {
    "llava without its tower": without_tower,
    "qwen2_vl without its tower": without_tower,
    "llava text model": text_decoder,
    "qwen2_vl text model": text_decoder,
    "llava causal model": causal_model,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_completed_model_loads_whole_and_sees_as_its_parts_do(tmp_path: Path, form: str) -> None:
    base = base_of(form.partition(" ")[0])
    base.save_pretrained(tmp_path / "base")
    before = seen(base)
    for size in (0.0, 0.1):
        folder = tmp_path / str(size)
        folder.mkdir()
        expected = copy.deepcopy(base)
        shaken(expected.model.language_model, size)
        FORMS[form](expected, folder)
        alnico.complete(folder / "tuned", tmp_path / "base", folder / "out")
        found, loading = type(base).from_pretrained(folder / "out", output_loading_info=True)
        assert {key: names for key, names in loading.items() if names} == {}
        assert torch.equal(seen(found.eval()), seen(expected))
        assert torch.equal(seen(expected), before) == (size == 0)
    assert json.loads((folder / "out" / "config.json").read_text())["model_type"] == base.config.model_type
