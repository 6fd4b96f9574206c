"""Do the rules of docs/choosing.md hold on small models? Cosines of task vectors, and what merges keep of what experts learned.

    python benchmarks/choosing.py --steps 200

Trains a small Llama on alnico's own source and documents, and from it experts of four tasks: adding numbers, sorting letters, a
substituted alphabet, text written backwards; two of them from three seeds. "Kept" is the mean over the experts of (loss of the base -
loss of the merge) / (loss of the base - loss of the expert), on held-out text of the expert's task. Needs [dev]; takes minutes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import alnico
from alnico.analysis.measure import analyze_sources
from alnico.analysis.suggest_rules import suggest_recipe
from alnico.checkpoint.open_model import open_model

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=128,
)
ROOT = Path(__file__).parents[1]
State = dict[str, torch.Tensor]
SETS = (
    ("adding-1", "adding-2", "adding-3"),
    ("alphabet-1", "alphabet-2", "alphabet-3"),
    ("adding-1", "sorting-1"),
    ("adding-1", "alphabet-1"),
    ("alphabet-1", "backwards-1"),
    ("adding-1", "sorting-1", "alphabet-1"),
    ("adding-1", "sorting-1", "alphabet-1", "backwards-1"),
    ("adding-1", "adding-2", "alphabet-1"),
)


def texts() -> dict[str, torch.Tensor]:
    """The base's text and those of the tasks, as bytes."""
    source = "".join(p.read_text() for p in sorted((ROOT / "src").rglob("*.py"))).encode()
    prose = "".join(p.read_text() for p in sorted((ROOT / "docs").rglob("*.md"))).encode()
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(40_000)]
    words = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(40_000)]
    found = {
        "base": source + prose,
        "adding": "".join(f"{a}+{b}={a + b}\n" for a, b in pairs).encode(),
        "sorting": "".join(f"{w}>{''.join(sorted(w))}\n" for w in words).encode(),
        "alphabet": prose.translate(
            bytes((c - 97 + 13) % 26 + 97 if 97 <= c < 123 else c for c in range(256))
        ),
        "backwards": prose[::-1],
    }
    return {name: torch.tensor(list(text)) for name, text in found.items()}


def batch(text: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    return torch.stack([text[p : p + 64] for p in torch.randint(0, len(text) - 65, (count,), generator=draw)])


def train(seed: int, steps: int, rate: float, text: torch.Tensor, start: State | None = None) -> State:
    """Train on the first nine tenths of a text, from a seed or from ``start``."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG)
    if start is not None:
        model.load_state_dict(start)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        tokens = batch(text[: len(text) * 9 // 10], 16, draw)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def loss(state: State, text: torch.Tensor) -> float:
    """On the last tenth of a text."""
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(state)
    tokens = batch(text[len(text) * 9 // 10 :], 128, torch.Generator().manual_seed(9))
    return float(model(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # matrices so small take longer on several
    text = texts()
    base = train(0, 1500, 1e-3, text["base"])
    names = sorted({name for chosen in SETS for name in chosen})
    experts = {name: train(int(name[-1]), steps, 3e-4, text[name[:-2]], base) for name in names}
    gains = {name: loss(base, text[name[:-2]]) - loss(experts[name], text[name[:-2]]) for name in names}

    def kept(state: State, chosen: tuple[str, ...]) -> float:
        return sum((loss(base, text[n[:-2]]) - loss(state, text[n[:-2]])) / gains[n] for n in chosen) / len(
            chosen
        )

    with TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in ("base", *names)}
        for name, file in files.items():
            save_file(base if name == "base" else experts[name], file, {"format": "pt"})
        opened = {name: open_model(file) for name, file in files.items()}
        print(
            "| models | cosines | rule | suggested | mean | model_stock | task_arithmetic 1/k, 1/sqrt(k), 1 | ties 0.2 | dare_ties 0.5 | "
            "tsv | with calibrate none | with embeddings matrix | dc_merge |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for chosen in SETS:
            found = analyze_sources(opened["base"], [opened[n] for n in chosen])
            cosines = [p.cosine for p in found.whole.pairs if p.cosine is not None]
            advice = suggest_recipe(found)
            assert advice.recipe is not None
            written = yaml.safe_load(advice.recipe)
            Path(folder, "recipe.yml").write_text(advice.recipe)
            alnico.merge(Path(folder, "recipe.yml"), Path(folder, "out.safetensors"), overwrite=True)
            suggested = {
                n: torch.from_numpy(v.copy()) for n, v in read(Path(folder, "out.safetensors")).items()
            }
            models = [experts[n] for n in chosen]

            def other(
                method: str, models: list[State] = models, chosen: tuple[str, ...] = chosen, **options: Any
            ) -> str:
                state = alnico.merge_state_dicts(
                    models, method, base=None if method == "linear" else base, **options
                )
                return f"{kept(state, chosen):.2f}"

            sums = ", ".join(
                other("task_arithmetic", scale=s) for s in (1 / len(chosen), len(chosen) ** -0.5, 1.0)
            )
            scale = written.get("parameters", {}).get("scale")
            print(
                f"| {', '.join(chosen)} | {min(cosines):.2f} to {max(cosines):.2f} | {advice.rule} | {kept(suggested, chosen):.2f}"
                f"{f' (scale {scale:g})' if scale else ''} | {other('linear')} | {other('model_stock')} | {sums} | "
                f"{other('ties', density=0.2)} | {other('dare_ties', density=0.5)} | {other('tsv')} | "
                f"{other('tsv', calibrate='none')} | {other('tsv', embeddings='matrix')} | {other('dc_merge')} |",
                flush=True,
            )


def read(file: Path) -> dict[str, Any]:
    with alnico.open_model(file) as model:
        return {name: model.read(name) for name in model.tensors}


if __name__ == "__main__":
    main()
