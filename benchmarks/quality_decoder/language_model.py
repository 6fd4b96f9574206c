"""One forward pass: the logits of the next token after each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quality.specialists import precision

BATCH_TOKENS = 2048
"""The most tokens of a batch that is scored, padding included."""


def next_token_logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits after each prompt, (prompts, vocabulary), float32.

    Prompts are padded behind, which a causal model cannot see, so no mask is needed; the head is applied to last tokens alone.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision() == "bfloat16"):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(prompts)), lengths - 1]
        return model.lm_head(last).float()


def batches_by_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return positions of prompts in batches of similar length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(prompts[batches[-1][0]]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
