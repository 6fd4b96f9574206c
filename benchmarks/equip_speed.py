"""Measures equipping a base with stored vectors beside the same merge of the full models, in one run.

    python benchmarks/equip_speed.py --work FOLDER [--millions 600] [--rounds 5]

Two fine-tunes of a made base are stored as exact sparse vectors (1 % of the entries changed), as differences in bfloat16 and in
4 bits. Each round merges the full models by task_arithmetic, then equips the base with the vectors: once with hashes that are
known from before, and once with none, when the base and the vectors are hashed first. It prints medians as a Markdown table, by the clock
and, in brackets, of the processors.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import made  # noqa: E402

SIDE = 4096
SHARE = 0.01
ENCODINGS = ("exact sparse", "difference bf16", "int4")


def make_models(work: Path, millions: int) -> tuple[Path, dict[str, list[Path]]]:
    """Write a base of square matrices, two sparse fine-tunes of it and two dense ones."""
    random = np.random.default_rng(0)
    matrices = max(millions * 10**6 // SIDE**2, 1)
    tuned: dict[str, list[Path]] = {
        kind: [work / f"{kind}-{i}" for i in range(2)] for kind in ("sparse", "dense")
    }
    base = work / "base"
    if (base / "model.safetensors").exists():
        return base, tuned
    start = {
        f"layers.{i}.weight": ("BF16", 0.02 * random.standard_normal((SIDE, SIDE), np.float32))
        for i in range(matrices)
    }
    made.save_model(base, start)
    for kind, folders in tuned.items():
        for folder in folders:
            after = {}
            for name, (dtype, values) in start.items():
                moved = values + 0.002 * random.standard_normal(values.shape, np.float32)
                if kind == "sparse":
                    moved = np.where(random.random(values.shape, np.float32) < SHARE, moved, values)
                after[name] = (dtype, moved)
            made.save_model(folder, after)
    return base, tuned


def make_vectors(base: Path, tuned: dict[str, list[Path]], store: Path) -> None:
    import alnico

    kept = alnico.Store(store)
    for kind, options in (
        ("exact sparse", {"exact": True}),
        ("difference bf16", {"encoding": "difference:bf16"}),
        ("int4", {"encoding": "int4"}),
    ):
        for i, folder in enumerate(tuned["sparse" if kind == "exact sparse" else "dense"]):
            name = f"{kind.replace(' ', '-')}-{i}"
            if not (store / "vectors" / name).exists():
                kept.create(folder, base, name, **options)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(*words: Any, cache: Path) -> tuple[float, float]:
    """Seconds of one command in its own process: by the clock, and of the processors, which other work does not change."""
    environment = {**os.environ, "ALNICO_CACHE_DIR": str(cache)}
    begin, used = time.perf_counter(), processor_seconds()
    subprocess.run(
        [sys.executable, "-m", "alnico", *map(str, words), "-q"],
        check=True,
        env=environment,
        capture_output=True,
    )
    return time.perf_counter() - begin, processor_seconds() - used


def measure(work: Path, millions: int, rounds: int) -> list[str]:
    base, tuned = make_models(work, millions)
    store = work / "store"
    make_vectors(base, tuned, store)
    os.environ["ALNICO_STORE"] = str(store)
    warm, cold = work / "warm-cache", work / "cold-cache"
    for left in work.glob(".out.*"):  # of a run that was killed
        shutil.rmtree(left)
    rows = []
    for kind in ENCODINGS:
        models = tuned["sparse" if kind == "exact sparse" else "dense"]
        vectors = [f"{kind.replace(' ', '-')}-{i}:0.5" for i in range(2)]
        recipe = work / "recipe.yml"
        listed = "".join(f"  - {{model: {m}, parameters: {{weight: 0.5}}}}\n" for m in models)
        recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{listed}")
        seconds: dict[str, list[tuple[float, float]]] = {"merge": [], "warm": [], "cold": []}
        out = work / "out"
        for number in range(rounds + 1):
            for what in seconds:
                shutil.rmtree(out, ignore_errors=True)
                if what == "cold":
                    shutil.rmtree(cold, ignore_errors=True)
                    shutil.copytree(warm, cold, ignore=shutil.ignore_patterns("hashes"))  # with its kernels
                cache = cold if what == "cold" else warm
                words = ("merge", recipe, out) if what == "merge" else ("equip", base, *vectors, "-o", out)
                took = command(*words, cache=cache)
                if number:  # the first round compiles, hashes and fills the page cache
                    seconds[what].append(took)
        medians = {
            what: [statistics.median(column) for column in zip(*of, strict=True)]
            for what, of in seconds.items()
        }
        cells = [f"{clock:.2f} ({used:.2f})" for clock, used in medians.values()]
        for what in ("warm", "cold"):
            clock, used = (one / full for one, full in zip(medians[what], medians["merge"], strict=True))
            cells.append(f"{clock:.2f} ({used:.2f})")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--millions", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    rows = measure(chosen.work, chosen.millions, chosen.rounds)
    heads = (
        "vectors",
        "merge of models, s",
        "equip, hashes known, s",
        "equip, nothing known, s",
        "ratio, known",
        "ratio, nothing known",
    )
    print("\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]))


if __name__ == "__main__":
    main()
