"""Adapters of real models combined, SmolLM2-135M and all-MiniLM-L6-v2: the logits that PEFT gives with what is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import real
from alnico.lora.combine import combine
from lora.peft_models import made_by_peft
from lora.test_combine_in_peft import in_peft, outputs, with_sum
from real import BASE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and peft

ALL = {"target_modules": "all-linear"}
CASES: dict[str, list[dict[str, Any]]] = {
    "rank 64, rsLoRA, and rank 4, patterns": [
        {"r": 64, "lora_alpha": 16, "use_rslora": True, **ALL},
        {
            "r": 4,
            "lora_alpha": 8,
            **ALL,
            "rank_pattern": {".*layer.*[13]\\..*": 7},
            "alpha_pattern": {".*layer.*2\\..*": 5},
        },
    ],
    "rank 16 and rank 8, embeddings": [
        {"r": 16, "lora_alpha": 32, **ALL},
        {"r": 8, "lora_alpha": 8, "target_modules": ["embed_tokens", "word_embeddings", "k_proj", "key"]},
    ],
}


def gives_the_sum(base: Any, folder: Path, options: list[dict[str, Any]], inputs: torch.Tensor) -> None:
    """In float64, so that the roundings of a forward pass do not stand beside those of what was written, to 1e-4."""
    weights = [0.7, -0.4]
    found = [made_by_peft(copy.deepcopy(base), folder / str(i), o, seed=i + 1) for i, o in enumerate(options)]
    expected = outputs(with_sum(copy.deepcopy(base).double(), [m for _, m in found], weights), inputs)
    assert (expected - outputs(copy.deepcopy(base).double(), inputs)).abs().max() > 0.1
    for name, asked in (("cat", {"method": "cat"}), ("svd", {"rank": 128})):
        combine([a for a, _ in found], folder / name, weights=weights, **asked)
        loaded = in_peft(copy.deepcopy(base), folder / name).double()
        assert (outputs(loaded, inputs) - expected).abs().max() < 1e-4, name


@pytest.mark.nightly  # each run has every case on MiniLM
@pytest.mark.parametrize("case", CASES)
def test_combined_adapters_of_smollm2_give_the_logits_of_the_sum(tmp_path: Path, case: str) -> None:
    model, tokenizer = real.smollm2()
    # PEFT's forward applies an embedding's factors to the embedding alone, its merge to the head that is tied to it, too.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    inputs = tokenizer("Models that were tuned from one base can be added up.", return_tensors="pt").input_ids
    gives_the_sum(model, tmp_path, CASES[case], inputs)


@pytest.mark.parametrize("case", CASES)
def test_combined_adapters_of_minilm_give_the_outputs_of_the_sum(tmp_path: Path, case: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    place = real.installed(*BASE)
    inputs = AutoTokenizer.from_pretrained(place)(
        "Models that were tuned from one base can be added up.", return_tensors="pt"
    ).input_ids
    gives_the_sum(AutoModel.from_pretrained(place), tmp_path, CASES[case], inputs)
