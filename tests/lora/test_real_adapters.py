"""Adapters that PEFT makes of real models, SmolLM2-135M and all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import made
import real
from alnico.lora.fold import fold
from lora.peft_models import made_by_peft
from lora.test_fold import agree
from real import BASE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and peft

SMOLLM2 = {
    "rank 64, rsLoRA, all linear": {"r": 64, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    "rank 16, DoRA, patterns": {
        "r": 16, "lora_alpha": 32, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {r"layers\.3\.self_attn\.q_proj": 5},
    },
    "rank 8, embeddings, saved norm": {"r": 8, "lora_alpha": 8, "target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["norm"]},
}  # fmt: skip
MINILM = {
    "rank 32, all linear": {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"},
    "rank 4, biases, DoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"], "bias": "all", "use_dora": True},
    "rank 16, embeddings, saved pooler": {"r": 16, "lora_alpha": 16, "target_modules": ["word_embeddings", "key"], "modules_to_save": ["pooler"]},
}  # fmt: skip


def folds(model: Any, folder: Path, options: dict[str, Any]) -> None:
    """Fold a new adapter of ``model`` and compare with what PEFT merges, to 1e-6 of each tensor's largest entry.

    An adapter of an embedding unties it from the head: PEFT's live model has the base's head, which its merge changes too.
    """
    model.save_pretrained(folder / "base")
    _, merged = made_by_peft(model, folder / "adapter", options)
    fold(folder / "base", folder / "adapter", folder / "out")
    found = made.read_model(folder / "out")
    assert len(found) > 90
    base = made.read_model(folder / "base")
    untied = (
        {"lm_head.weight": base["model.embed_tokens.weight"]}
        if "lm_head.weight" in found.keys() - base.keys()
        else {}
    )
    agree(found, {name: merged[name].to(torch.float32).numpy() for name in found} | untied)


@pytest.mark.parametrize("case", SMOLLM2)
def test_an_adapter_of_smollm2_folds_to_what_peft_merges(tmp_path: Path, case: str) -> None:
    model, _ = real.smollm2()
    folds(model, tmp_path, SMOLLM2[case])


@pytest.mark.parametrize("case", MINILM)
def test_an_adapter_of_minilm_folds_to_what_peft_merges(tmp_path: Path, case: str) -> None:
    from transformers import AutoModel

    folds(AutoModel.from_pretrained(real.installed(*BASE)), tmp_path, MINILM[case])
