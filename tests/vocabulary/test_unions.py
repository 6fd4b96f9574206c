"""Unions of tokenizers on small models of transformers: the full list is that of the sweep (tests/sweep/unions.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alnico.errors import MismatchError

sys.path.append(str(Path(__file__).parents[1] / "sweep"))

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and torch

ARCHITECTURES = (
    "ModernBertForMaskedLM", "Mamba2ForCausalLM", "RwkvForCausalLM", "XLNetLMHeadModel", "XLMWithLMHeadModel", "CTRLLMHeadModel",
    "OpenAIGPTLMHeadModel", "xLSTMForCausalLM", "CLIPTextModel", "DistilBertForMaskedLM", "Gemma3nForCausalLM", "MobileBertForMaskedLM",
    "MllamaForCausalLM", "BartForConditionalGeneration", "WhisperForConditionalGeneration", "ElectraForMaskedLM", "LlavaForConditionalGeneration",
)  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_union_has_the_mean_of_each_token_in_every_table_and_loads(name: str, tmp_path: Path) -> None:
    import unions

    assert unions.union(name, tmp_path)


def test_what_is_looked_up_by_hashes_of_ids_does_not_move(tmp_path: Path) -> None:
    import unions

    with pytest.raises(MismatchError, match="hashes of token ids"):
        unions.union("BltForCausalLM", tmp_path)
