"""Small dense models of the types that mixtures are built from, made by transformers, and the mixture computed by their modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from made_tokenizers import LETTERS, SPECIAL, letters, save_tokenizer, special

SIZES = {
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS: Mapping[str, tuple[Any, Any, Mapping[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 6, "rms_norm_eps": 0.03}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rms_norm_eps": 0.02}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
"""So small that another base would show."""


def save_dense(
    folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any
) -> Path:
    """Write a dense model of random weights, biases and norms, with a tokenizer of letters."""
    config_class, model_class, own = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **own, "rope_parameters": dict(ROPE), **keys}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(0.2 * torch.randn(value.shape))
    model.to(dtype).save_pretrained(folder)
    vocabulary, merges = letters()
    save_tokenizer(
        folder, vocabulary, special(), merges, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return folder


def save_tuned(folder: Path, base: Path, seed: int, change: float = 0.1, only: str = "") -> Path:
    """Write a model that differs from ``base`` by noise; ``only`` in the tensors with this in their names."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only in name:
                value.add_(change * torch.randn(value.shape))
    model.save_pretrained(folder)
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder: Path, remove: Sequence[str] = (), **keys: Any) -> None:
    path = folder / "config.json"
    held = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps({**held, **keys}))


def tokens(count: int = 12, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (2, count), generator=generator)


def logits(model: Any, ids: torch.Tensor | None = None) -> np.ndarray:
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits.double().numpy()


class Mixed(nn.Module):
    """A mixture of MLPs as the papers write it: softmax over all, the best k, divided by their sum; and a shared one."""

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: torch.Tensor,
        k: int,
        shared: nn.Module | None = None,
        shared_gate: torch.Tensor | None = None,
        is_sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.shared = nn.ModuleList(experts), shared
        self.gate, self.k, self.shared_gate, self.is_sigmoid = gate, k, shared_gate, is_sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ self.gate.T
        scores = scores.sigmoid() if self.is_sigmoid else scores.softmax(-1)
        best = scores.topk(self.k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
        weights = weights / weights.sum(-1, keepdim=True)
        out = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        if self.shared is not None:
            factor = 1.0 if self.shared_gate is None else (x @ self.shared_gate.T).sigmoid()
            out = out + factor * self.shared(x)
        return out


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def mixed_by_hand(
    base: Path,
    experts: Sequence[Path],
    held: Mapping[str, np.ndarray],
    gate: str,
    k: int,
    shared: tuple[Path, float] | None = None,
    shared_gate: str = "",
    is_sigmoid: bool = False,
) -> Any:
    """The base in float64 with the experts' MLPs side by side, under the gates in ``held``, by names with ``{}`` for the layer."""
    model, others = dense(base), [dense(path) for path in experts]
    extra = None if shared is None else dense(shared[0])
    for i, layer in enumerate(model.model.layers):
        of_shared = None
        if extra is not None and shared is not None:
            of_shared = copy.deepcopy(extra.model.layers[i].mlp)
            of_shared.down_proj.weight.data *= shared[1]
        layer.mlp = Mixed(
            [other.model.layers[i].mlp for other in others],
            torch.from_numpy(held[gate.format(i)].astype(np.float64)),
            k,
            of_shared,
            torch.from_numpy(held[shared_gate.format(i)].astype(np.float64)) if shared_gate else None,
            is_sigmoid,
        )
    return model.eval()


RULES = {"code": "bcdaabcd", "maths": "efghfghe"}
"""The letter that follows each of a to h in the texts of a domain, in most places; elsewhere any letter does."""


def text_of(domain: str, count: int, seed: int) -> str:
    """A text of a domain: letters by its rule, in words of twelve letters. Nine of ten letters are of the domain's half."""
    random = np.random.default_rng([seed, *domain.encode()])
    follows = dict(zip("abcdefgh", RULES[domain], strict=True))
    text, letter = "", "a"
    for i in range(count):
        letter = follows[letter] if random.random() < 0.85 else str(random.choice(list("abcdefgh")))
        text += letter + (" " if i % 12 == 11 else "")
    return text


def train(model: Any, texts: Sequence[str], tokenizer: Any, steps: int, rate: float, only: str = "") -> None:
    """Train on windows of texts; ``only`` the parameters with this in their names."""
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    tuned = [p for n, p in model.named_parameters() if only in n]
    optimizer = torch.optim.AdamW(tuned, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = []
        for own in ids:
            starts = torch.randint(0, len(own) - 32, (16 // len(ids),), generator=generator)
            batch += [own[s : s + 32] for s in starts.tolist()]
        windows = torch.stack(batch)
        optimizer.zero_grad()
        model(windows, labels=windows).loss.backward()
        optimizer.step()


def save_specialists(
    folder: Path, kind: str = "llama", steps: int = 150, only: str = "mlp", rate: float = 3e-3
) -> dict[str, Path]:
    """Write a base that has read both domains, and a specialist of each. ``only`` tensors with this in their names are tuned."""
    torch.set_num_threads(1)
    base = save_dense(
        folder / "base",
        kind,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=8,
        initializer_range=0.05,
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = {domain: text_of(domain, 6_000, 0) for domain in RULES}
    model = AutoModelForCausalLM.from_pretrained(base)
    train(model, list(texts.values()), tokenizer, steps, 3e-3)
    model.save_pretrained(base)
    made = {"base": base}
    for domain, text in texts.items():
        own = AutoModelForCausalLM.from_pretrained(base)
        train(own, [text], tokenizer, steps, rate, only)
        own.save_pretrained(folder / domain)
        for file in base.glob("*token*"):
            (folder / domain / file.name).write_bytes(file.read_bytes())
        made[domain] = folder / domain
    return made
