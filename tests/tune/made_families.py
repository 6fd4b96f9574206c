"""Small models of architectures whose modules and files have different names or layouts, each with two tuned from it, and tasks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as T

from alnico.evaluation.tasks import Score

EXAMPLES = 6
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, **SPECIAL, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def qwen2_vl() -> Any:
    text = {**GROUPED, "rope_parameters": ROPE}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {
        "image_token_id": 30,
        "video_token_id": 31,
        "vision_start_token_id": 32,
        "vision_end_token_id": 33,
    }
    return T.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)


@dataclass(frozen=True)
class Family:
    """What a model is made of: its class, as tasks load it and as it is saved, and what goes in."""

    saved: Any
    config: Any
    kind: Any
    has_pictures: bool = False


FAMILIES = {
    "vit": Family(T.ViTForImageClassification, lambda: T.ViTConfig(**IMAGE, num_labels=3), "classifier", True),
    "vit encoder": Family(T.ViTForImageClassification, lambda: T.ViTConfig(**IMAGE, num_labels=3), "encoder", True),
    "clip": Family(
        T.CLIPForImageClassification,
        lambda: T.CLIPConfig(vision_config=IMAGE, text_config=TEXT | SPECIAL, projection_dim=8, num_labels=3),
        "classifier",
        True,
    ),
    "qwen2_vl": Family(T.Qwen2VLForConditionalGeneration, qwen2_vl, "encoder"),
    "qwen3_moe": Family(
        T.Qwen3MoeForSequenceClassification,
        lambda: T.Qwen3MoeConfig(**GROUPED, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, num_labels=3),
        "classifier",
    ),
    "mixtral": Family(
        T.MixtralForCausalLM, lambda: T.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2), "causal"
    ),
    "nomic_bert": Family(  # transformers 5 cuts the files' fused Wqkv into three
        T.NomicBertForSequenceClassification, lambda: T.NomicBertConfig(**TEXT, num_labels=3), "classifier"
    ),
    "bert": Family(T.BertForSequenceClassification, lambda: T.BertConfig(**TEXT, num_labels=3), "encoder"),
    "tied gpt2": Family(T.GPT2LMHeadModel, lambda: T.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16), "causal"),
}  # fmt: skip


class Made:
    """A base and two models tuned from it, on disk, and a task for each of these."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family = FAMILIES[name]
        torch.manual_seed(len(name))
        model = self.family.saved(self.family.config()).eval()
        self.base = str(folder / "base")
        self.models = [str(folder / tuned) for tuned in ("one", "two")]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    torch.randn_like(parameter) * 0.3
                )  # no zeros and ones: values tell tensors apart
            model.save_pretrained(self.base)
            before = {n: v.clone() for n, v in model.state_dict().items()}
            for path in self.models:
                model.load_state_dict(before)
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                model.save_pretrained(path)
        self.tasks = [Direct(letter, self.family, seed) for seed, letter in enumerate("ab")]

    def loaded(self, path: str | Path) -> Any:
        """The model on disk as transformers loads it for the tasks."""
        classes = {"encoder": T.AutoModel, "causal": T.AutoModelForCausalLM, "classifier": self.family.saved}
        return classes[self.family.kind].from_pretrained(path).eval()

    def logits(self, path: str | Path, task: Direct) -> torch.Tensor:
        """What the model on disk says."""
        with torch.no_grad():
            return task.of(self.loaded(path), range(task.size))

    def entropies(self, path: str | Path) -> dict[str, float]:
        return {
            task.name: float(torch.distributions.Categorical(logits=self.logits(path, task)).entropy().mean())
            for task in self.tasks
        }


class Direct:
    """A task over inputs that no tokenizer makes: scores of classes, and the share of examples whose best class is the first."""

    goal: Any = "max"
    weight = 1.0

    def __init__(self, name: str, family: Family, seed: int, size: int = EXAMPLES) -> None:
        self.name, self.kind, self.size, self.has_pictures = name, family.kind, size, family.has_pictures
        random = torch.Generator().manual_seed(seed)
        self.inputs = (
            {"pixel_values": torch.randn(size, 3, 8, 8, generator=random)}
            if family.has_pictures
            else {"input_ids": torch.randint(3, 30, (size, 5), generator=random)}
        )
        self.head = torch.randn(16, 3, generator=random)

    def of(self, module: Any, examples: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scores of three classes."""
        given = {n: v[list(examples)] for n, v in self.inputs.items()}
        found = module(**{n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()})
        if self.kind == "encoder":
            return found.last_hidden_state.mean(1) @ self.head.to(found.last_hidden_state.dtype)
        return found.logits if self.kind == "classifier" else found.logits[:, -1, :3]

    def logits(self, subject: Any, examples: Sequence[int]) -> torch.Tensor:
        return self.of(subject.module(self.kind), examples)

    def evaluate(self, subject: Any, examples: Sequence[int] | None = None) -> Score:
        """The mean chance of the first class: it depends on every parameter."""
        with torch.no_grad():
            chances = self.logits(subject, range(self.size)).softmax(-1)[:, 0].double().numpy()
        return Score(float(chances.mean()), chances)

    def pooled(self, scores: Sequence[Score]) -> Score:
        raise AssertionError("all examples are scored at once")

    def digests(self) -> frozenset[str]:
        return frozenset({self.name})
