"""The work folder: base, texts, specialists, and every score that was taken, so that a run can be stopped and go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import alnico
from alnico.evaluation.candidates import Candidates
from alnico.run_options import RunOptions
from quality.bench import say, write
from quality.parse import CORPORA, build
from quality_decoder.base import write_base
from quality_decoder.language_model import batches_by_length, next_token_logits
from quality_decoder.questions import QUESTIONS, Rows, read_rows
from quality_decoder.specialists import TRAINING, specialist
from quality_decoder.variants import VARIANTS

EXAMPLES = {"validation": 100, "test": 200}
"""Rows of each task that a score is taken on."""
MEMORY = 5 << 30
"""Bytes for merging: the models, and their singular vectors, which trials share."""


@dataclass(frozen=True)
class Models:
    """Specialists that are merged together: tasks, and the variant of the specialists (``variants``)."""

    tasks: tuple[str, ...]
    variant: str = ""

    def folder(self, name: str) -> str:
        """Return how recipes name the base or a task's specialist."""
        base = VARIANTS[self.variant].base if self.variant else "base"
        return base if name == "base" else f"specialists{self.variant and '-'}{self.variant}/{name}"


@dataclass(frozen=True)
class Measured:
    """What a model reached on one part, by task: which examples are right, and the loss of the right answer, in nats."""

    right: Mapping[str, np.ndarray]
    losses: Mapping[str, np.ndarray]
    seconds: float
    """What merging and scoring took."""

    @property
    def mean(self) -> float:
        """The mean accuracy over the tasks."""
        return float(np.mean([right.mean() for right in self.right.values()]))

    @property
    def loss(self) -> float:
        """The mean loss over the tasks."""
        return float(np.mean([losses.mean() for losses in self.losses.values()]))


class Bench:
    """All that the tables are made with. Close it, or use it in ``with``."""

    def __init__(self, work: Path, examples: Mapping[str, int] = EXAMPLES) -> None:
        self.work = work
        self.examples = examples
        self.fingerprint = ""
        """What texts and specialists are known by: scores of others are not read."""
        self._stack = ExitStack()
        self._candidates: Candidates | None = None
        self._opened: Models | None = None
        self._rows: dict[tuple[str, str], Rows] = {}
        self._tokenizer: Any = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        """Fetch, parse, convert and train what is not there."""
        base = self.work / "base"
        write_base(base, self.work / "downloads")
        self._tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        digest = hashlib.sha256()
        for name, question in QUESTIONS.items():
            if not (self.work / "data" / f"{name}.test.jsonl").exists():
                say(f"{name}: fetching and parsing")
                build(CORPORA[name], self.work / "downloads", self.work / "data")
            began = time.perf_counter()
            data = self.work / "data" / f"{name}.train.jsonl"
            folder = self.work / "specialists" / name
            if specialist(base, data, question, folder, TRAINING):
                say(f"{name}: trained a specialist in {time.perf_counter() - began:.0f} s")
            digest.update((folder / "training.json").read_bytes())
            for part in self.examples:
                rows = self._rows[name, part] = read_rows(
                    question,
                    self.work / "data" / f"{name}.{part}.jsonl",
                    self.examples[part],
                    self._tokenizer,
                )
                digest.update(json.dumps([rows.prompts, rows.classes, rows.answers]).encode())
        self.fingerprint = digest.hexdigest()

    def seconds_of_training(self) -> float:
        """Return how long the training of all specialists took."""
        records = [self.work / "specialists" / name / "training.json" for name in QUESTIONS]
        return float(sum(json.loads(record.read_text())["seconds"] for record in records))

    def recipe(self, models: Models, method: str, base: bool = True, **parameters: Any) -> dict[str, Any]:
        """Return the recipe that merges models by one method. ``scale`` is written ``lambda``, as recipes have it; ``preset`` is a preset."""
        preset = parameters.pop("preset", None)
        recipe: dict[str, Any] = {
            "merge_method": method,
            **({"base_model": models.folder("base")} if base else {}),
            "models": [{"model": models.folder(name)} for name in models.tasks],
            **({"preset": preset} if preset else {}),
        }
        if parameters:
            recipe["parameters"] = {
                "lambda" if name == "scale" else name: value for name, value in parameters.items()
            }
        return recipe

    def score(self, recipe: Mapping[str, Any], part: str, models: Models) -> Measured:
        """Merge in memory and score on the tasks of ``models``; a score that was taken before is read."""
        written = yaml.safe_dump(dict(recipe), sort_keys=False)
        key = f"{self.fingerprint} {alnico.__version__} {' '.join(models.tasks)}\n{written}"
        kept = self.work / "scores" / part / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if not kept.exists():
            began = time.perf_counter()
            merged = self.open(models).make(replace(alnico.load_recipe(recipe), folder=str(self.work)))
            module = merged.module("causal")
            scores = {task: measure(module, self._rows[task, part]) for task in models.tasks}
            kept.parent.mkdir(parents=True, exist_ok=True)
            found = {
                "recipe": written,
                "right": {task: right.tolist() for task, (right, _) in scores.items()},
                "losses": {task: losses.tolist() for task, (_, losses) in scores.items()},
                "seconds": time.perf_counter() - began,
            }
            write(kept, json.dumps(found))
        found = json.loads(kept.read_text())
        return Measured(
            {task: np.array(right) for task, right in found["right"].items()},
            {task: np.array(losses) for task, losses in found["losses"].items()},
            found["seconds"],
        )

    def open(self, models: Models) -> Candidates:
        """Return the open models, which are written first where their variant is not there; one set is open at a time."""
        now = self._opened
        if now is None or now.variant != models.variant or not set(models.tasks) <= set(now.tasks):
            self._stack.close()
            if models.variant:
                VARIANTS[models.variant].write(self.work)
            references = [models.folder(name) for name in ("base", *models.tasks)]
            run = RunOptions(memory_bytes=MEMORY)
            self._candidates = self._stack.enter_context(
                Candidates(references, donor=references[0], folder=self.work, run=run)
            )
            self._opened = models
        assert self._candidates is not None
        return self._candidates


def measure(model: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each row, whether the right answer is the likeliest of all answers (1 or 0), and its loss over the whole vocabulary."""
    right, losses = np.zeros(len(rows.prompts)), np.zeros(len(rows.prompts))
    answers, classes = torch.tensor(rows.answers), torch.tensor(rows.classes)
    with torch.inference_mode():
        for batch in batches_by_length(rows.prompts):
            logits = next_token_logits(model, [rows.prompts[i] for i in batch])
            right[batch] = (logits[:, answers].argmax(1) == classes[batch]).numpy()
            losses[batch] = cross_entropy(logits, answers[classes[batch]], reduction="none").numpy()
    return right, losses
