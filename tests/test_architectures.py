"""The small models of all architectures: which there are, which are made, and that they are small."""

from __future__ import annotations

import pytest

import architectures

SIZES = {
    "causal_lm": 196,
    "masked_lm": 51,
    "seq2seq_lm": 38,
    "sequence_classification": 127,
    "image_classification": 42,
    "image_text_to_text": 100,
    "multimodal_lm": 116,
    "clip_like": 12,
    "speech_seq2seq": 22,
    "ctc": 14,
    "base": 622,
}
"""Types of model in transformers' lists, counted in its file by hand."""


def test_every_list_of_transformers_has_a_kind() -> None:
    from transformers.models.auto import modeling_auto

    there = {n for n in vars(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")}
    assert {architectures.mapping_name(kind) for kind in architectures.KINDS} == there


def test_what_is_made_and_what_is_said_not_to_be_made_is_all_there_is() -> None:
    import transformers

    made = {name for kind in architectures.KINDS for name in architectures.of_kind(kind)}
    assert made | set(architectures.NOT_MADE) >= set(architectures.types())
    assert not made & set(architectures.NOT_MADE)
    assert len(made) > 1000
    if transformers.__version__ == architectures.MADE_FOR:
        assert made | set(architectures.NOT_MADE) == set(architectures.types())
        from transformers.models.auto import modeling_auto

        assert {k: len(getattr(modeling_auto, architectures.mapping_name(k))) for k in SIZES} == SIZES


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "BertForSequenceClassification",
        "ViTForImageClassification",
        "Qwen2VLForConditionalGeneration",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_small_and_its_forward_pass_finite(name: str) -> None:
    import torch

    module = architectures.make(name)
    assert sum(p.numel() for p in module.parameters()) < 250_000
    assert torch.isfinite(architectures.forward(module)).all()
    again = architectures.make(name)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = architectures.make(name, seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_layers_and_vocabulary_are_as_asked() -> None:
    module = architectures.make("LlamaForCausalLM", layers=3, vocab=101)
    assert module.config.num_hidden_layers == len(module.model.layers) == 3
    assert module.get_input_embeddings().weight.shape[0] == 101
