"""Adapters whose modules have other names than the tensors of the base's file, other parameters, or a head of their own, against PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import architectures
import made
from alnico.lora.extract import extract
from alnico.lora.fold import fold
from lora.test_tied_adapters import SMALL, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

OTHERS = (
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "PaliGemmaForConditionalGeneration", "MllamaForConditionalGeneration",
    "InternVLForConditionalGeneration", "GraniteMoeForCausalLM", "PhimoeForCausalLM", "Qwen3MoeForCausalLM", "Dinov2ForImageClassification",
    "NomicBertForMaskedLM", "HrmTextForCausalLM", "MobileBertForMaskedLM", "ImageGPTForImageClassification",
)  # fmt: skip


def trained(model: Any, place: Path, **options: Any) -> Any:
    """Save an adapter that moves every number it trains; return PEFT's live model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    live = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 4, **options}))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    live.save_pretrained(place)
    return live


def check(root: Path, name: str, targets: Any) -> None:
    model = architectures.make(name)
    model.save_pretrained(root / "base")
    before = made.read_model(root / "base")
    live = trained(copy.deepcopy(model), root / "adapter", target_modules=targets)
    live.merge_and_unload().save_pretrained(root / "merged")
    fold(root / "base", root / "adapter", root / "out")
    found, expected = made.read_model(root / "out"), made.read_model(root / "merged")
    assert set(found) == set(expected)
    for tensor, values in expected.items():
        np.testing.assert_allclose(found[tensor], values, atol=1e-6, err_msg=tensor)
    assert any(not np.array_equal(before[n], v) for n, v in expected.items())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("LlavaForConditionalGeneration", ["q_proj", "fc1"]),
        ("ViTForImageClassification", ["q_proj", "fc1"]),
        ("MixtralForCausalLM", ["q_proj", "gate", "w1", "w2", "w3"]),
        ("Qwen3MoeForCausalLM", ["q_proj", "down_proj"]),
        ("Qwen3MoeForCausalLM", ["gate_proj", "up_proj"]),
        ("GteForMaskedLM", ["q_proj", "v_proj", "up_proj"]),
    ],
)
def test_an_adapter_of_renamed_modules_is_what_peft_merges(
    tmp_path: Path, name: str, targets: list[str]
) -> None:
    check(tmp_path, name, targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_is_one_of_all_linear_layers(tmp_path: Path, name: str) -> None:
    check(tmp_path, name, "all-linear")


HEADS = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification", "SEQ_CLS", "q_proj", True),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2ForTokenClassification", "TOKEN_CLS", "q_proj", True),
    "no task": ("LlamaForCausalLM", "LlamaForSequenceClassification", None, "q_proj", True),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "SEQ_CLS", "c_attn", True),
    "bert": ("BertForPreTraining", "BertForSequenceClassification", "SEQ_CLS", "query", True),
    "bert without a prefix": ("BertModel", "BertForSequenceClassification", "SEQ_CLS", "query", False),
    "roberta": ("RobertaForMaskedLM", "RobertaForSequenceClassification", "SEQ_CLS", "query", True),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", "SEQ_CLS", "q_lin", True),
}


@pytest.mark.parametrize("case", HEADS)
def test_an_adapter_with_a_head_of_its_own_gives_a_model_with_that_head(tmp_path: Path, case: str) -> None:
    import transformers as t

    name, headed, task, layer, has_names = HEADS[case]
    kind = (
        name.removesuffix("ForCausalLM")
        .removesuffix("LMHeadModel")
        .removesuffix("ForPreTraining")
        .removesuffix("ForMaskedLM")
    )
    sizes: dict[str, Any] = {
        **SMALL,
        **({"tie_word_embeddings": True, "num_key_value_heads": 2} if "tied" in case else {}),
    }
    if kind == "GPT2":
        sizes = {
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 4,
            "vocab_size": 40,
            "n_positions": 64,
            "pad_token_id": 1,
        }
    if kind == "DistilBert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 40}
    torch.manual_seed(0)
    getattr(t, name)(getattr(t, kind.removesuffix("Model") + "Config")(**sizes)).save_pretrained(
        tmp_path / "base"
    )
    model = getattr(t, headed).from_pretrained(tmp_path / "base", num_labels=3)
    task_of = {"task_type": task} if task else {"modules_to_save": ["score"]}
    live = trained(model, tmp_path / "adapter", target_modules=[layer], **task_of)
    expected = logits(live)
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [headed]
    assert len(config["id2label"]) == 3
    found, told = getattr(t, headed).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.allclose(logits(found), expected, atol=1e-5)
    if has_names:
        live.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert set(made.read_model(tmp_path / "out")) == set(made.read_model(tmp_path / "merged"))


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.attention(x, x, x)[0])
        return out


def test_an_adapter_of_torch_s_attention_is_what_peft_s_live_model_computes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = Attending()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    live = trained(model, tmp_path / "adapter", target_modules=["attention", "last"]).eval()
    x = torch.randn(3, 2, 8)
    expected = live(x).detach()
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = Attending().eval()
    found.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.allclose(found(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "LlavaForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
    ],
)
def test_an_extracted_adapter_has_the_names_of_the_modules(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    base = architectures.make(name)
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tuned.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=400)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    held = dict(found.state_dict())
    for tensor, values in tuned.state_dict().items():
        assert torch.allclose(held[tensor], values, atol=1e-5), tensor
