"""What of a stack comes from its first slice and what from its last: the order of transformers' forward passes."""

from __future__ import annotations

import pytest

from alnico.plan.families import comes_first

BEFORE = (
    "transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.bias", "transformer.tokens_embed.weight",
    "transformer.positions_embed.weight", "transformer.word_embedding.weight", "transformer.mask_emb", "transformer.w.weight",
    "transformer.layer_norm_emb.weight", "transformer.position_embeddings.weight", "cpmant.input_embedding.weight",
    "model.decoder.layernorm_embedding.weight", "model.per_layer_model_projection.weight", "model.per_layer_projection_norm.weight",
    "gpt_neox.embed_in.weight", "model.decoder.project_in.weight", "backbone.embeddings.weight",
)  # fmt: skip
AFTER = (
    "embed_out.weight", "model.embedding_norm.weight", "transformer.ln_f.weight", "backbone.norm_f.weight", "model.norm.weight",
    "lm_loss.bias", "model.decoder.project_out.weight", "model.altup_unembed_projections.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
def test_what_is_used_before_the_layers_comes_from_the_first_slice(name: str) -> None:
    assert comes_first(name) == (name in BEFORE)
