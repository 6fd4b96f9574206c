"""Small models of transformers, adapters that PEFT makes of them, and what PEFT merges: the referee of reading and folding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip


def tiny(kind: str) -> Any:
    """A random model of a family, in float32."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=False))
    if kind == "bert":
        return t.BertModel(t.BertConfig(**TINY))
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64))
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=3))
    if kind == "gpt_oss":
        config = t.GptOssConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_local_experts=3, vocab_size=40, layer_types=["full_attention"] * 2,
        )  # fmt: skip
        model = t.GptOssForCausalLM(config)
        for parameter in model.parameters():  # experts begin unset
            torch.nn.init.normal_(parameter, std=0.05)
        return model
    raise ValueError(kind)


def train(model: Any, options: Mapping[str, Any], *, seed: int = 1) -> Any:
    """Wrap a model with an adapter whose every trained number is moved at random, by about a tenth of a weight."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.02 if "lora" in name else 0.002)
    return adapted


def made_by_peft(
    base: Any, root: Path, options: Mapping[str, Any], *, seed: int = 1
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter of ``base`` into ``root`` and return its place and what PEFT merges; ``base`` is changed."""
    adapted = train(base, options, seed=seed)
    adapted.save_pretrained(root)
    merged = adapted.merge_and_unload()
    return root, {name: value.detach().clone() for name, value in merged.state_dict().items()}
