"""The work folder: encoder, texts, specialists, tasks, and every score that was ever taken, so that a run can be stopped and go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoModel, AutoTokenizer

import alnico
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Score, Task
from quality.fetch import ENCODER, fetch
from quality.parse import CORPORA, build
from quality.specialists import MAX_LENGTH, Training, precision, specialist

Recipe = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A recipe as YAML has it; several are stages, of which the last is the result."""
SHARED = ("downloads", "data", "encoder", "base")
"""The folders that do not depend on the specialists."""
EXAMPLES = {"validation": 200, "test": 500}
"""Rows of each task that a score is taken on."""


@dataclass(frozen=True)
class Scored:
    """What a model reached on one part: its scores by task."""

    scores: Mapping[str, Score]
    seconds: float
    """Of merging and scoring, in processor time: what another program takes of the machine does not count."""
    merging: float
    """Of merging alone."""

    @property
    def mean(self) -> float:
        return sum(score.value for score in self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Chosen:
    """What a way came to: a recipe, and what was chosen, in words."""

    recipe: Recipe
    setting: str = ""
    evaluations: int = 0
    """Models that were scored on the validation part to choose it."""
    seconds: float = 0.0
    """What choosing took in processor time: merging and scoring those, or learning. Of a search it is the clock's."""


class Bench:
    """All that the table's rows are made with. Close it, or use it in ``with``."""

    def __init__(
        self, work: Path, tasks: Sequence[str], training: Training, examples: Mapping[str, int] = EXAMPLES
    ) -> None:
        self.work = work
        self.tasks = tuple(tasks)
        self.training = training
        self.examples = examples
        self._stack = ExitStack()
        self._read: dict[str, tuple[Task, ...]] = {}
        self._candidates: Candidates | None = None
        self.fingerprint = ""
        """What texts, tasks and specialists are known by: scores of others are not read."""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        """Fetch, parse and train what is not there, and open the models."""
        base = self.work / "base"
        if not (base / "config.json").exists():
            say("encoder: fetching")
            raw = self.work / "encoder"
            raw.mkdir(parents=True, exist_ok=True)
            for name, data in fetch(ENCODER, self.work / "downloads"):
                if name.count("/") == 2:
                    (raw / Path(name).name).write_bytes(data)
            AutoTokenizer.from_pretrained(raw, trust_remote_code=False).save_pretrained(base)
            AutoModel.from_pretrained(raw, trust_remote_code=False).save_pretrained(base)
        for name in self.tasks:
            if not (self.work / "data" / f"{name}.test.jsonl").exists():
                say(f"{name}: fetching and parsing")
                build(CORPORA[name], self.work / "downloads", self.work / "data")
            began = time.perf_counter()
            data = self.work / "data" / f"{name}.train.jsonl"
            if specialist(base, data, CORPORA[name].words, self.work / "specialists" / name, self.training):
                say(f"{name}: trained a specialist in {time.perf_counter() - began:.0f} s")
        for part, limit in self.examples.items():
            self._write_tasks(part, part, limit)
        self._write_tasks("unlabelled", "validation", None)
        self._write_tasks("training", "train", None)
        digest = hashlib.sha256()
        for name in self.tasks:
            with (self.work / "specialists" / name / "model.safetensors").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for part in self.examples:
            digest.update(self.tasks_of(part).read_bytes())
            for name in self.tasks:
                digest.update((self.work / "data" / f"{name}.{part}.jsonl").read_bytes())
        self.fingerprint = digest.hexdigest()
        references = ["base", *(self.specialist(name) for name in self.tasks)]
        self._candidates = self._stack.enter_context(Candidates(references, donor="base", folder=self.work))

    def specialist(self, task: str) -> str:
        """Return how recipes name a task's specialist."""
        return f"specialists/{task}"

    def statistics(self, kind: str, task: str) -> Path:
        """Return the folder of what was measured of a task's specialist."""
        return self.work / "statistics" / f"{kind}-{self.fingerprint[:8]}" / task

    def tasks_of(self, part: str) -> Path:
        """Return the tasks file of ``validation``, ``test``, ``unlabelled`` (validation, all rows, without labels) or ``training``."""
        return self.work / "tasks" / f"{part}.yml"

    def rows(self, task: str, part: str) -> int:
        """Return how many rows of a task are trained on (``train``), or scored."""
        lines = (self.work / "data" / f"{task}.{part}.jsonl").read_text(encoding="utf-8").count("\n")
        return min(lines, self.examples.get(part, self.training.examples))

    def sum(
        self, method: str, weights: Sequence[Any] | None = None, base: bool = True, **parameters: Any
    ) -> dict[str, Any]:
        """Return the recipe that merges all specialists by one method. ``scale`` is written ``lambda``, as recipes have it."""
        models: list[dict[str, Any]] = [{"model": self.specialist(name)} for name in self.tasks]
        for model, weight in zip(models, weights or (), strict=False):
            model["parameters"] = {"weight": weight}
        recipe: dict[str, Any] = {
            "merge_method": method,
            **({"base_model": "base"} if base else {}),
            "models": models,
        }
        if parameters:
            recipe["parameters"] = {
                "lambda" if name == "scale" else name: value for name, value in parameters.items()
            }
        return recipe

    def score(self, recipe: Recipe, part: str, only: str | None = None) -> Scored:
        """Merge in memory and score on all tasks of a part, or on one; a score that was taken before is read."""
        written = yaml.safe_dump_all(recipe if isinstance(recipe, Sequence) else [recipe], sort_keys=False)
        digest = hashlib.sha256(
            f"{self.fingerprint} {alnico.__version__} {only}\n{written}".encode()
        ).hexdigest()
        kept = self.work / "scores" / part / f"{digest[:24]}.json"
        if not kept.exists():
            began = time.process_time()
            subject = self._made(recipe, written)
            merging = time.process_time() - began
            scores = {
                task.name: task.evaluate(subject)
                for task in self.read_tasks(part)
                if only in (None, task.name)
            }
            self._keep(kept, written, scores, time.process_time() - began, merging)
        found = json.loads(kept.read_text())
        examples = {
            name: np.array([float(digit) for digit in digits]) for name, digits in found["right"].items()
        }
        return Scored(
            {name: Score(float(right.mean()), right) for name, right in examples.items()},
            found["seconds"],
            found["merging"],
        )

    def kept(self, name: str, choose: Callable[[Bench], Chosen]) -> Chosen:
        """Choose, or read what was chosen before."""
        path = self.work / "chosen" / f"{name.replace(' ', '-')}-{self.fingerprint[:8]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(asdict(choose(self)), indent=1))
        return Chosen(**json.loads(path.read_text()))

    def read_tasks(self, part: str) -> tuple[Task, ...]:
        """Return the tasks of a part, the same objects at every call: what they tokenised is kept."""
        if part not in self._read:
            self._read[part] = read_tasks(self.tasks_of(part))
        return self._read[part]

    def _made(self, recipe: Recipe, written: str) -> Any:
        assert self._candidates is not None, "prepare() comes first"
        if not isinstance(recipe, Sequence):
            return self._candidates.make(replace(alnico.load_recipe(recipe), folder=str(self.work)))
        path = self.work / "stages" / hashlib.sha256(written.encode()).hexdigest()[:24]
        alnico.merge_documents(written, path, overwrite=True)
        return self._candidates.make(
            alnico.load_recipe({"merge_method": "passthrough", "models": [{"model": str(path)}]})
        )

    def _keep(
        self, path: Path, recipe: str, scores: Mapping[str, Score], seconds: float, merging: float
    ) -> None:
        right = {}
        for name, score in scores.items():
            assert score.examples is not None, f"{name}: accuracies have their examples"
            right[name] = "".join(str(int(value)) for value in score.examples)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"recipe": recipe, "right": right, "seconds": seconds, "merging": merging}
        write(path, json.dumps(found))

    def _write_tasks(self, name: str, part: str, limit: int | None) -> None:
        labels = {} if name in self.examples else {"label": None}
        entries = [
            {
                "name": task,
                "type": "classification",
                "data": f"../data/{task}.{part}.jsonl",
                "head": "names",
                "labels": dict(CORPORA[task].words),
                "encoder": "../base",
                "max_length": MAX_LENGTH,
                "precision": precision(),
                **({"limit": limit} if limit else {}),
                **labels,
            }
            for task in self.tasks
        ]
        path = self.tasks_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            yaml.safe_dump({"tasks": entries}, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def folder_of(work: Path, seed: int) -> Path:
    """Return the work folder of a seed: ``work`` for 0; for another a folder in it, with links to what does not depend on the seed."""
    if seed == 0:
        return work
    folder = work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        (work / name).mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(work / name)
    return folder


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)


def say(text: str) -> None:
    """Tell what is being done, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
