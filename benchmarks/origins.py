"""How parallel the tensors of models of one origin are, and of models of two: the bounds of engine/relatedness.py.

    python benchmarks/origins.py --steps 300

Trains a small Llama on alnico's own source text from two seeds, and goes on from the first of them for as many steps again, on
other batches; prints the cosine of every matrix, whole. Needs [dev]. `alnico diff BASE MODEL -v` prints them of models that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import alnico

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=128,
)
State = dict[str, torch.Tensor]


def train(seed: int, steps: int, text: torch.Tensor, start: State | None = None) -> State:
    """Train from a seed, or go on from ``start``."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG)
    if start is not None:
        model.load_state_dict(start)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(0, len(text) - 65, (16,), generator=draw)
        batch = torch.stack([text[p : p + 64] for p in places])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # matrices so small take longer on several
    source = "".join(p.read_text() for p in sorted(Path(alnico.__file__).parent.rglob("*.py")))
    text = torch.tensor(list(source.encode()))
    one, other = train(0, steps, text), train(1, steps, text)
    later = train(2, steps, text, one)
    names = [name for name, value in one.items() if value.ndim > 1]
    print(f"{'tensor':42} other seed  trained on")
    for name in names:
        print(f"{name:42} {cosine(one[name], other[name]):10.4f} {cosine(one[name], later[name]):11.4f}")


if __name__ == "__main__":
    main()
