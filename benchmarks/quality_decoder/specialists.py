"""Fine-tunes of the decoder: a specialist for each question, trained on the answers' loss."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality.specialists import Training, batches_of, precision
from quality_decoder.language_model import next_token_logits
from quality_decoder.questions import TEXT_TOKENS, Question, read_rows

TRAINING = Training(examples=768, epochs=1, batch_size=8, learning_rate=1e-4)
WARM_UP = 10
"""Steps over which the learning rate rises."""


def specialist(base: Path, data: Path, question: Question, folder: Path, training: Training) -> bool:
    """Train a specialist of ``base`` into ``folder``; False if it is there, made so, already.

    All tensors but the table of tokens, which is also the head, are trained: cross-entropy of the answer over the whole
    vocabulary, AdamW, learning rate linearly to 0.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    rows = read_rows(question, data, training.examples, tokenizer)
    asked: dict[str, Any] = {
        **asdict(training),
        "warm_up": WARM_UP,
        "text_tokens": TEXT_TOKENS,
        "precision": precision(),
        "rows": hashlib.sha256(json.dumps([rows.prompts, rows.classes, rows.answers]).encode()).hexdigest(),
        "base": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
    }
    record = folder / "training.json"
    if (
        record.exists()
        and {k: v for k, v in json.loads(record.read_text()).items() if k != "seconds"} == asked
    ):
        return False
    began = time.perf_counter()
    torch.manual_seed(training.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    lengths = [len(prompt) for prompt in rows.prompts]
    targets = torch.tensor([rows.answers[label] for label in rows.classes])
    batches = [batch for epoch in range(training.epochs) for batch in batches_of(lengths, training, epoch)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / len(batches))
    )
    for batch in batches:
        cross_entropy(next_token_logits(model, [rows.prompts[i] for i in batch]), targets[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "training.json").write_text(
        json.dumps({**asked, "seconds": time.perf_counter() - began}, indent=1)
    )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True
