"""A built mixture of trained specialists does as well as they do. Run with -s to see the losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from made_mixtures import RULES, save_specialists, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import alnico


def loss(path: Path, domain: str) -> float:
    """The mean loss of a model on a text of a domain that nothing was trained or measured on."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text_of(domain, 3_000, 2)).input_ids)
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "only", "keys"),
    [
        ("llama", "mlp", {}),
        ("llama", "", {"others": "average"}),
        ("qwen3", "mlp", {"experts_per_token": 2}),
        ("llama", "mlp", {"architecture": "deepseek"}),
    ],
    ids=["mlps alone", "all tensors, averaged", "two of two experts", "shared"],
)
def test_a_mixture_scores_as_its_experts_do_on_their_own_tasks(
    kind: str, only: str, keys: dict[str, object], tmp_path: Path
) -> None:
    made = save_specialists(tmp_path, kind, only=only, rate=3e-3 if only else 5e-4)
    experts = []
    for domain in RULES:
        (tmp_path / f"{domain}.txt").write_text(text_of(domain, 3_000, 1))
        task = {"name": domain, "type": "perplexity", "data": f"{domain}.txt", "window": 32, "limit": 90}
        (tmp_path / f"{domain}.yml").write_text(yaml.safe_dump({"tasks": [task]}))
        alnico.gram_statistics(
            str(made[domain]), tmp_path / f"gram-{domain}", tasks=tmp_path / f"{domain}.yml"
        )
        experts.append({"source_model": str(made[domain]), "gram": str(tmp_path / f"gram-{domain}")})
    recipe = {
        "base_model": str(made["base"]),
        "experts": experts,
        "gate_mode": "ridge",
        "experts_per_token": 1,
        **(
            {"shared_experts": [{"source_model": str(made["base"]), "residual_scale": 0}]}
            if "architecture" in keys
            else {}
        ),
        **keys,
    }
    alnico.build_mixture(recipe, tmp_path / "mixture")
    alnico.merge({"merge_method": "linear", "models": [str(made[d]) for d in RULES]}, tmp_path / "average")
    places = {**made, "average": tmp_path / "average", "mixture": tmp_path / "mixture"}
    losses = {name: {d: loss(path, d) for d in RULES} for name, path in places.items()}
    for name, own in losses.items():
        print(f"{name:8} " + "  ".join(f"{d} {value:.4f}" for d, value in own.items()))
    mean = {name: sum(own.values()) / len(own) for name, own in losses.items()}
    experts_mean = sum(mean[d] for d in RULES) / len(RULES)
    specialists = sum(losses[d][d] for d in RULES) / len(RULES)
    assert mean["mixture"] < experts_mean
    assert mean["mixture"] < mean["base"]
    assert mean["mixture"] <= mean["average"]
    assert (
        math.exp(mean["mixture"] - specialists) < 1.05
    )  # the perplexity is within 5 % of the specialists' own
