"""Fine-tunes of one encoder: a specialist for each task, under a frozen head of its label words."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

from alnico.evaluation.classification import Classification
from alnico.evaluation.loaded_model import ModuleSubject, open_subject

MAX_LENGTH = 48
BUCKET = 16
"""Batches that are cut from examples sorted by length together: less padding, and no epoch sorted as a whole."""


@dataclass(frozen=True)
class Training:
    """How a specialist is trained."""

    examples: int = 1536
    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0


def precision() -> Literal["bfloat16", "float32"]:
    """Return bfloat16 where the CPU multiplies matrices in it (three times as fast), else float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def specialist(base: Path, data: Path, words: Mapping[str, str], folder: Path, training: Training) -> bool:
    """Train a specialist of ``base`` on the rows of ``data`` into ``folder``; False if it is there, made so, already.

    All but the word embeddings is trained, under the very head that it will be scored with: cross-entropy, AdamW, learning rate
    linearly to 0.
    """
    lines = data.read_text(encoding="utf-8").splitlines()[: training.examples]
    asked: dict[str, Any] = {
        **asdict(training),
        "max_length": MAX_LENGTH,
        "precision": precision(),
        "words": [list(pair) for pair in words.items()],
        "rows": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "base": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
    }
    record = folder / "training.json"
    if (
        record.exists()
        and {k: v for k, v in json.loads(record.read_text()).items() if k != "seconds"} == asked
    ):
        return False
    began = time.perf_counter()
    rows = [json.loads(line) for line in lines]
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    task = Classification(
        data.stem,
        texts,
        labels,
        classes=words,
        head="names",
        encoder=open_subject(base),
        max_length=MAX_LENGTH,
        precision=precision(),
    )
    torch.manual_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModel.from_pretrained(base, trust_remote_code=False).train()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    subject = ModuleSubject(data.stem, model, tokenizer)
    lengths = [
        len(tokens) for tokens in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    ]
    targets = torch.tensor([list(words).index(label) for label in labels])
    batches = [batch for epoch in range(training.epochs) for batch in batches_of(lengths, training, epoch)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        cross_entropy(task.logits(subject, batch), targets[batch]).backward()
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


def batches_of(lengths: list[int], training: Training, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, in the order they are trained on: shuffled, sorted by length in buckets, shuffled again."""
    draw = random.Random(1000 * training.seed + epoch)
    order = draw.sample(range(len(lengths)), len(lengths))
    size = training.batch_size
    batches = []
    for first in range(0, len(order), size * BUCKET):
        bucket = sorted(order[first : first + size * BUCKET], key=lambda i: lengths[i])
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    draw.shuffle(batches)
    return batches
