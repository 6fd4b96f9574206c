"""Merges mixtures of experts with averaged, kept and calibrated routers: routing agreement and scores. Writes a table in Markdown.

Run: ``python benchmarks/mixture_routers.py [--steps 300] [--seeds 3]``. It needs the extra ``[eval]``, one processor and a few minutes.

A base of the shape of Mixtral and one of Qwen3-MoE (4 layers, 8 experts, 2 for each token, hidden size 64) learn two languages
of letters, each with its own rule for the letter that follows. Two specialists go on four times as long, with all tensors, on one language each.
Scores are accuracies of the next letter on text that nothing was trained or measured on. Agreement is the share of tokens of a
specialist's language that a merged router sends to the expert that it is sent to in this specialist (top 1), over all layers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import alnico
from alnico.evaluation.tasks import Score

LETTERS = 24
WINDOW = 32
SIZES: dict[str, Any] = {
    "vocab_size": LETTERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS: dict[str, Any] = {
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, sliding_window=None)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=96, norm_topk_prob=True)
    ),
}


def text(language: int, count: int, seed: int) -> torch.Tensor:
    """Windows of a language: the next letter follows from the two before it, by a table, in nine of ten places."""
    table = np.random.default_rng(100 + language).integers(0, LETTERS, (LETTERS, LETTERS))
    random = np.random.default_rng([seed, language])
    letters = random.integers(0, LETTERS, (count, WINDOW))
    for i in range(2, WINDOW):
        ruled = random.random(count) < 0.9
        letters[ruled, i] = table[letters[ruled, i - 2], letters[ruled, i - 1]]
    return torch.tensor(letters)


class Windows:
    """Windows of a language as a task of alnico: a model reads them, and only its hidden states count."""

    name = "windows"
    goal: Any = "max"
    weight = 1.0
    kind = "causal"

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows
        self.size = len(windows)

    def evaluate(self, subject: Any, places: Any = None) -> Score:
        chosen = list(range(self.size) if places is None else places)
        with torch.no_grad():
            subject.module("causal")(self.windows[chosen])
        return Score(0.0)

    def pooled(self, scores: Sequence[Score]) -> Score:
        return scores[0]

    def digests(self) -> frozenset[str]:
        return frozenset({self.name})


def train(model: Any, texts: list[torch.Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    windows = torch.cat(texts)
    model.train()
    for _ in range(steps):
        batch = windows[torch.randint(0, len(windows), (48,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()


def run(model: Any, windows: torch.Tensor) -> tuple[float, np.ndarray]:
    """The accuracy of the next letter, and the first expert of each token in each layer."""
    chosen: list[np.ndarray] = []

    def record(_: Any, __: Any, result: Any) -> None:
        logits = result[0] if isinstance(result, tuple) else result
        chosen.append(logits.reshape(-1, 8).argmax(-1).numpy())

    hooks = [m.register_forward_hook(record) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    with torch.no_grad():
        logits = model(windows).logits
    for hook in hooks:
        hook.remove()
    right = (logits[:, 1:-1].argmax(-1) == windows[:, 2:]).double().mean()
    return float(right), np.stack(chosen)


def measure(kind: str, seed: int, steps: int, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Accuracies on both languages, and the agreement, by what was merged how."""
    torch.manual_seed(seed)
    base = KINDS[kind]()
    texts = [text(i, 4_000, seed) for i in range(2)]
    train(base, texts, steps // 4, 3e-3)
    base.save_pretrained(folder / "base")
    held_out = [text(i, 200, 1_000 + seed) for i in range(2)]
    specialists = []
    for i, own in enumerate(texts):
        model = type(base).from_pretrained(folder / "base", trust_remote_code=False)
        train(model, [own], steps, 2e-3)
        model.save_pretrained(folder / str(i))
        specialists.append(model)
    experts = [run(model, windows)[1] for model, windows in zip(specialists, held_out, strict=True)]
    few = [text(i, 32, 2_000 + seed) for i in range(2)]
    names = [str(folder / str(i)) for i in range(2)]
    alnico.router_statistics(names, folder / "routers", tasks=[[Windows(windows)] for windows in few])

    def scores(model: Any) -> tuple[float, float, float]:
        ran = [run(model, windows) for windows in held_out]
        agreement = np.mean([(mine == own).mean() for (_, mine), own in zip(ran, experts, strict=True)])
        return ran[0][0], ran[1][0], float(agreement)

    found = {"base": scores(base.eval())}
    found |= {f"specialist {i + 1}": scores(model) for i, model in enumerate(specialists)}
    routers = {"averaged": "merge", "base": "base", "calibrated": {"calibrate": str(folder / "routers")}}
    for weight in (0.5, 0.8):
        for name, setting in routers.items():
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": str(folder / "base"),
                "models": names,
                "parameters": {"weight": weight},
                "routers": setting,
                "unrelated": "allow",
            }
            alnico.merge(recipe, folder / "out", overwrite=True)
            label = f"weight {weight}, routers {name}"
            found[label] = scores(type(base).from_pretrained(folder / "out", trust_remote_code=False).eval())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        "| model | what | language 1 | language 2 | mean | agreement |\n| --- | --- | --- | --- | --- | --- |"
    )
    for kind in KINDS:
        runs = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(kind, seed, options.steps, Path(folder)))
        for name in runs[0]:
            one, two, agreement = (statistics.mean(r[name][i] for r in runs) for i in range(3))
            print(
                f"| {kind} | {name} | {one:.3f} | {two:.3f} | {(one + two) / 2:.3f} | {agreement:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
