"""Layers in other orders, of architectures whose configs say something of each layer: loaded back, and the forward pass compared."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [p for p in (str(Path(__file__).parent / "sweep"),) if p not in sys.path]

import stacks  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and torch

SLIDING, FULL = "sliding_attention", "full_attention"
EQUAL: Mapping[str, dict[str, Any]] = {
    "RecurrentGemmaForCausalLM": {"attention_window_size": 8},
    "Ernie4_5_MoeForCausalLM": {"moe_layer_start_index": 1, "moe_layer_end_index": 7},
    "HunYuanMoEV1ForCausalLM": {"num_experts": 3, "moe_topk": [1, 1, 2, 2, 3, 3, 1, 1]},
    "NemotronHForCausalLM": {
        "hybrid_override_pattern": "M-M*M-M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "use_mamba_kernels": False,
    },
    "MiniCPM3ForCausalLM": {},
    "GptOssForCausalLM": {"sliding_window": 4},
    "ModernBertDecoderForCausalLM": {},
    "DeepseekV3ForCausalLM": {"first_k_dense_replace": 1},
    "Gemma4UnifiedForCausalLM": {
        "layer_types": [SLIDING, FULL] * 4,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
    },
}
"""With what a config says beyond that of a small model."""

MORE_ORDERS = ("NemotronHForCausalLM", "Gemma4UnifiedForCausalLM")

REFUSED = {
    ("ModernBertDecoderForCausalLM", "tail"): "attn_norm.weight",
    ("Gemma4UnifiedForCausalLM", "prefix"): "has sliding_attention",
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_stack_computes_what_the_modules_put_together_do(name: str, tmp_path: Path) -> None:
    orders = ("stacked", "prefix", "doubled", "tail") if name in MORE_ORDERS else ("stacked", "tail")
    found = stacks.outcomes(name, tmp_path, orders, **EQUAL[name])
    for order, outcome in found.items():
        expected = REFUSED.get((name, order))
        assert outcome == "equal" or (
            expected is not None and outcome.startswith("refused") and expected in outcome
        ), (
            order,
            outcome,
        )


def test_what_families_imply_of_their_layers_is_what_transformers_does() -> None:
    """Each list by layer that a config of transformers makes up by itself is known, or no layer of such a model moves."""
    import transformers

    from alnico.plan import families

    layers = 13
    for model_type, kind in transformers.CONFIG_MAPPING.items():
        try:
            config = kind(num_hidden_layers=layers).to_dict()
        except Exception:  # one that needs more keys, or has no layers of this name
            continue
        for key, value in config.items():
            is_by_layer = isinstance(value, list) and len(value) == layers and len(set(map(str, value))) > 1
            if (
                not is_by_layer
                or families.NOT_BY_LAYER.search(key)
                or key in (*families.LAYER_INDICES, *families.LAYER_REFERENCES)
            ):
                continue
            implied = families.IMPLIED.get(model_type, {}).get(key)
            if implied is not None:
                assert implied({}, layers) == value, (model_type, key)
            elif model_type != "llama4_text":  # whose layer_types follow from no_rope_layers
                assert families.UNKNOWN_LISTS.get(model_type) or value == sorted(value), (
                    model_type,
                    key,
                    value,
                )
