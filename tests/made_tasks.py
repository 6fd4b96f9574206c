"""A tiny BERT, fine-tunes of it on three made tasks, and the tasks as files. Training takes 3 s in all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TASKS = {"pets": ("cat", "dog", "bird"), "food": ("sweet", "salty"), "sky": ("sun", "rain", "snow")}
"""The classes of each task; the words of a class are its name after «a», as in «a cat»."""

WORDS_OF_A_CLASS = 6
NOISE = [f"noise{i}" for i in range(16)]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WRONG = 0.15
"""Share of texts whose words are of another class: no model can be right on all."""


@dataclass(frozen=True)
class Made:
    """What :func:`make_tasks` writes into a folder."""

    base: Path
    tuned: dict[str, Path]
    """The specialist of each task."""
    valid: Path
    """tasks.yml with 60 examples a task, heads made of the names of classes."""
    test: Path
    """The same with other examples."""

    @property
    def references(self) -> list[str]:
        return [str(path) for path in self.tuned.values()]


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = [f"{c}{i}" for classes in TASKS.values() for c in classes for i in range(WORDS_OF_A_CLASS)]
    names = [c for classes in TASKS.values() for c in classes]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "a", *names, *NOISE, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    fast.save_pretrained(folder)
    return fast


def save_base(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """Write a BERT of random weights with its tokenizer: what the tasks' models are tuned from."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
    }
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        **sizes,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def texts(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Examples of a task: a few words of a class among noise."""
    random = np.random.default_rng([seed, *task.encode()])
    rows = []
    for _ in range(count):
        label = str(random.choice(TASKS[task]))
        told = str(random.choice(TASKS[task])) if random.random() < WRONG else label
        words = [f"{told}{i}" for i in random.integers(WORDS_OF_A_CLASS, size=random.integers(1, 4))]
        words += [str(word) for word in random.choice(NOISE, size=random.integers(2, 7))]
        rows.append({"text": " ".join(random.permutation(words)), "label": label})
    return rows


def save_texts(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(task: str, data: str, encoder: str = "base", **keys: Any) -> dict[str, Any]:
    """A task as tasks.yml has it."""
    words = {c: f"a {c}" for c in TASKS[task]}
    return {
        "name": task,
        "type": "classification",
        "data": data,
        "head": "names",
        "labels": words,
        "encoder": encoder,
        **keys,
    }


def save_tasks(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump({"tasks": entries}, sort_keys=False))
    return path


def make_tasks(folder: Path, examples: int = 60, steps: int = 80) -> Made:
    """Write base, specialists, ``valid.yml`` and ``test.yml`` with their data into a folder. Always the same bytes on one machine."""
    base = save_base(folder / "base")
    parts = {}
    for part, seed in (("valid", 1), ("test", 2)):
        for task in TASKS:
            save_texts(folder / f"{task}.{part}.jsonl", texts(task, examples, seed))
        parts[part] = save_tasks(
            folder / f"{part}.yml", [entry(task, f"{task}.{part}.jsonl") for task in TASKS]
        )
    tuned = {task: tune(base, folder / f"tuned-{task}", task, steps) for task in TASKS}
    return Made(base, tuned, parts["valid"], parts["test"])


def embedded(model: BertModel, tokenizer: Any, lines: list[str]) -> torch.Tensor:
    batch = tokenizer(lines, padding=True, return_tensors="pt", return_token_type_ids=False)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def head_of(base: Path, task: str) -> torch.Tensor:
    """The frozen head of a task, made without alnico."""
    model, tokenizer = BertModel.from_pretrained(base), PreTrainedTokenizerFast.from_pretrained(base)
    with torch.no_grad():
        rows = embedded(model.eval(), tokenizer, [f"a {c}" for c in TASKS[task]])
        return torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)


def tune(base: Path, folder: Path, task: str, steps: int) -> Path:
    """Fine-tune the base on a task, behind its frozen head."""
    head = head_of(base, task)
    model, tokenizer = BertModel.from_pretrained(base), PreTrainedTokenizerFast.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = texts(task, 32 * steps, 0)
    for step in range(steps):
        part = rows[32 * step : 32 * step + 32]
        logits = 20 * embedded(model, tokenizer, [r["text"] for r in part]) @ head.T
        torch.nn.functional.cross_entropy(
            logits, torch.tensor([TASKS[task].index(r["label"]) for r in part])
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
