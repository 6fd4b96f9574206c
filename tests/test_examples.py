"""Every file of examples/ runs, and what it makes loads in transformers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import alnico
from alnico.methods import registry
from methods.sides import made as write_statistics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and torch

EXAMPLES = Path(__file__).parent.parent / "examples"
LAYERS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples beside ``models/``: a base, and three small fine-tunes of it that differ from it by noise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, made, dirs_exist_ok=True)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).to(torch.bfloat16)
    start = {n: t.clone() for n, t in base.state_dict().items()}
    for name in ("base", "coder", "math", "chat"):
        change = 0.0 if name == "base" else 0.003
        base.load_state_dict({n: t + (torch.randn(t.shape) * change).to(t.dtype) for n, t in start.items()})
        base.save_pretrained(made / "models" / name)
        for kind in ("fisher", "gram"):
            write_statistics(kind, made / "models" / name, 0).rename(made / "models" / f"{name}-{kind}")
    for step in range(500, 4500, 500):
        base.load_state_dict({n: t + (torch.randn(t.shape) * 0.003).to(t.dtype) for n, t in start.items()})
        base.save_pretrained(made / "models" / "run" / f"checkpoint-{step}")
    return made


def loss(model: Any) -> float:
    import torch

    tokens = torch.arange(30).reshape(2, 15) % 32
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("path", sorted(p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*.yml")))
def test_an_example_runs_and_its_output_loads(
    path: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(folder)
    made = alnico.merge_documents(folder / path, tmp_path / "out")
    assert len(made) == (3 if path == "several.yml" else 1)
    for result in made:
        model, report = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        assert math.isfinite(loss(model))
        layers = {"repeat.yml": 35}.get(path, LAYERS)
        assert model.config.num_hidden_layers == len(model.model.layers) == layers


def test_there_is_an_example_for_every_method() -> None:
    named = {
        p.stem: yaml.safe_load(p.read_text("utf-8"))["merge_method"]
        for p in (EXAMPLES / "methods").glob("*.yml")
    }
    assert named == {name: name for name in registry()}


def test_the_two_ways_to_write_one_arc_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    made = [alnico.merge(folder / f"slerp-of-{what}.yml", tmp_path / what) for what in ("slices", "models")]
    assert made[0].digests == made[1].digests
