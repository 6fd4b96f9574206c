"""PEFT loads extracted adapters and gives the fine-tune's outputs at full rank, wrapped and merged; all-MiniLM's known energies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy

import real
from alnico.lora import extract, fold
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


# ---- experts packed into one parameter --------------------------------------------------------------------------------

LEFT_ALONE = ("gate_up_proj_bias", "down_proj_bias")
"""Parameters of two dimensions that are no weight of a module: extraction leaves them out."""


def packed(kind: str, folder: Path, *, is_moved: bool) -> Any:
    """A mixture of experts with its experts packed in the file, as in the module; moved where extraction follows."""
    from safetensors.torch import save_file

    model = tiny(kind)
    for part in model.modules():
        if hasattr(part, "top_k"):  # gpt-oss chooses four experts by default, and has three here
            part.top_k = 2
    if is_moved:
        still = {name: p.clone() for name, p in model.named_parameters() if name.endswith(LEFT_ALONE)}
        moved(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in still:
                    parameter.copy_(still[name])
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


def changes(base: Any, tuned: Any) -> dict[str, np.ndarray]:
    """What changed of each stack of experts, in float64."""
    before, after = base.state_dict(), tuned.state_dict()
    names = [n for n in before if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    return {n: (after[n].double() - before[n].double()).numpy() for n in names}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_packed_experts_become_factors_of_a_parameter_that_peft_loads(tmp_path: Path, kind: str) -> None:
    base = packed(kind, tmp_path / "base", is_moved=False)
    tuned = packed(kind, tmp_path / "tuned", is_moved=True)
    wanted, before = outputs(tuned), outputs(base)
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1000)
    stacks = changes(base, tuned)
    assert len(stacks) == 4
    assert {t.name for t in found.of("factors")} >= stacks.keys()
    assert found.is_verified
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert (before - wanted).abs().max() > 0.02  # gpt-oss of these sizes moves less than Mixtral
    for got in in_peft(base, tmp_path / "out"):
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_factors_of_packed_experts_are_the_best_of_their_rank_and_fold_as_peft_merges_them(
    tmp_path: Path, kind: str
) -> None:
    from peft import PeftModel

    base = packed(kind, tmp_path / "base", is_moved=False)
    tuned = packed(kind, tmp_path / "tuned", is_moved=True)
    stacks = changes(base, tuned)
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, exact=True)
    for t in found.tensors:
        if t.name in stacks:
            tails = [np.linalg.svd(matrix, compute_uv=False)[3:] for matrix in stacks[t.name]]
            best = np.sqrt(sum(float(np.sum(tail**2)) for tail in tails))
            assert t.rank == 3
            assert t.expected == pytest.approx(best, rel=1e-5)
            assert t.measured == pytest.approx(best, rel=1e-4)
    fold(tmp_path / "base", [tmp_path / "out"], tmp_path / "folded")
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    for name in stacks:
        largest = float(merged[name].abs().max())
        assert np.abs(folded[name] - merged[name].numpy()).max() <= 1e-6 * largest


def test_ranks_of_packed_experts_follow_energy_and_size(tmp_path: Path) -> None:
    base = packed("mixtral", tmp_path / "base", is_moved=False)
    tuned = packed("mixtral", tmp_path / "tuned", is_moved=True)
    stacks = changes(base, tuned)
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "energy", energy=0.5, exact=True)
    for t in found.tensors:
        if t.name in stacks:
            assert 0.5 <= t.energy < 0.9
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "size", size="60kB", exact=True)
    assert found.byte_size <= 60_000
    written = (tmp_path / "size" / "adapter_model.safetensors").stat().st_size
    assert written == found.byte_size


def test_packed_experts_in_memory_have_factors_of_three_dimensions(tmp_path: Path) -> None:
    base, tuned = (packed("mixtral", tmp_path / n, is_moved=n == "tuned") for n in ("base", "tuned"))
    triples = extract(tuned, base, rank=2, exact=True)
    for name, change in changes(base, tuned).items():
        a, b, scale = triples[name]
        product = scale * (b.double() @ a.double()).numpy()
        left, values, right = np.linalg.svd(change)
        best = (left[:, :, :2] * values[:, None, :2]) @ right[:, :2]
        np.testing.assert_allclose(product, best, atol=1e-5)


def test_a_stack_that_did_not_change_is_no_target(tmp_path: Path) -> None:
    base = packed("mixtral", tmp_path / "base", is_moved=False)
    tuned = packed("mixtral", tmp_path / "tuned", is_moved=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    state = load_file(tmp_path / "tuned" / "model.safetensors")
    state[name] = load_file(tmp_path / "base" / "model.safetensors")[name]
    save_numpy(state, tmp_path / "tuned" / "model.safetensors")
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1000)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
    tuned.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()})
    wanted = outputs(tuned)
    for got in in_peft(base, tmp_path / "out"):
        assert (got - wanted).abs().max() < 1e-5
