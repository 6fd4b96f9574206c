"""PEFT loads extracted adapters and gives the fine-tune's outputs at full rank, wrapped and merged; all-MiniLM's known energies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import real
from alnico.lora import extract
from lora.peft_models import tiny
from real import BASE, TUNED

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

IDS = torch.arange(2, 14).reshape(1, -1)


def moved(model: Any) -> Any:
    """Change every parameter a little: norms and biases too."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    return model


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    values: torch.Tensor = found.logits if "logits" in found else found.last_hidden_state
    return values


def in_peft(base: Any, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base with an adapter gives, as PEFT wraps it and as it merges it."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(base, adapter)
    return outputs(wrapped), outputs(wrapped.merge_and_unload())


CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, embeddings saved": ("llama", {"embeddings": "save"}),
    "bert": ("bert", {}),
    "bert, embeddings saved": ("bert", {"embeddings": "save"}),
    "gpt2, tied embedding saved": ("gpt2", {"embeddings": "save"}),
}


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_peft_gives_the_outputs_of_the_fine_tune(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    before = outputs(base)
    tuned = moved(tiny(kind))
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1000, **options)
    assert not found.of("left out")
    assert not found.unmatched
    wanted = outputs(tuned)
    assert (before - wanted).abs().max() > 0.1
    for got in in_peft(base, tmp_path / "out"):
        assert (got - wanted).abs().max() < 1e-5


def test_a_tied_embedding_is_left_out_by_name_since_peft_would_miss_the_head(tmp_path: Path) -> None:
    base = tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    moved(tiny("gpt2")).save_pretrained(tmp_path / "tuned")
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1000)
    assert [(t.name, t.why) for t in found.of("left out")] == [
        (
            "transformer.wte.weight",
            "tied to the head, which PEFT does not update through factors of the embedding; it can be saved",
        )
    ]
    wrapped, merged = in_peft(base, tmp_path / "out")
    assert (wrapped - merged).abs().max() < 1e-5


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.each = torch.nn.Conv2d(8, 8, 3, groups=8)
        self.line = torch.nn.Conv1d(8, 6, 5)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.each(self.norm(self.first(images)).relu()).flatten(2)
        return self.head(self.line(rows).mean(-1))  # type: ignore[no-any-return]


def test_convolutions_and_batchnorm_come_back(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    base, tuned = Convolutions().eval(), moved(Convolutions()).eval()
    with torch.no_grad():
        tuned.norm.running_mean += 0.1
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(dict(model.state_dict()), tmp_path / f"{name}.safetensors")
    extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "out", rank=1000)
    images = torch.randn(2, 3, 12, 12)
    wanted = tuned(images)
    assert (base(images) - wanted).abs().max() > 0.01
    wrapped = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert (wrapped(images) - wanted).abs().max() < 1e-5
    assert (wrapped.merge_and_unload()(images) - wanted).abs().max() < 1e-5


KEPT = {4: 0.31, 8: 0.41, 16: 0.54, 32: 0.68, 64: 0.82, 128: 0.93}
"""Mean share of energy over the 36 encoder matrices of the fine-tune of all-MiniLM-L6-v2, by numpy's SVD."""


def energies(found: Any) -> list[float]:
    return [t.energy for t in found.of("factors") if t.name.startswith("encoder.")]


@pytest.mark.slow
@pytest.mark.parametrize("rank", KEPT)
def test_minilms_fine_tune_keeps_the_known_energy_within_one_per_cent_of_the_best_error(
    tmp_path: Path, rank: int
) -> None:
    models = real.installed(*TUNED), real.installed(*BASE)
    found = energies(extract(*models, tmp_path / "out", rank=rank, include=["encoder."]))
    best = energies(extract(*models, tmp_path / "exact", rank=rank, include=["encoder."], exact=True))
    assert len(found) == 36
    assert np.mean(found) == pytest.approx(KEPT[rank], abs=0.01)
    assert max((1 - one) / (1 - other) for one, other in zip(found, best, strict=True)) <= 1.01**2


@pytest.mark.slow
def test_peft_gives_the_outputs_of_minilms_fine_tune_at_full_rank(tmp_path: Path) -> None:
    from transformers import AutoModel

    extract(real.installed(*TUNED), real.installed(*BASE), tmp_path / "out", rank=384, energy=None)
    base, tuned = (AutoModel.from_pretrained(real.installed(*place)) for place in (BASE, TUNED))
    wanted = outputs(tuned)
    assert (outputs(base) - wanted).abs().max() > 0.01
    for got in in_peft(base, tmp_path / "out"):
        assert (got - wanted).abs().max() < 1e-4
