"""How small can a stored task vector be? Size, error and accuracy of specialists restored from each encoding.

    python benchmarks/store_encodings.py --work DIR [--write]

DIR is the work folder of `python benchmarks/quality`, which trains the specialists of docs/quality.md. For each encoding every specialist's
task vector is made with `alnico.Store.create`'s function, put on the base (`base+PATH`) and scored on its own task's test rows. Nothing is
chosen. A second table is of a pair as reinforcement learning leaves it: the encoder in bfloat16, and the same after an update so
small that rounding keeps most entries. What was made and scored before is read again: remove DIR/vectors and DIR/scores after a change of an encoding. Prints the tables; --write puts them into docs/store.md, between the marks. Needs [eval]; takes
some minutes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import alnico
from alnico.checkpoint.task_vectors.manifest import read_manifest
from alnico.store.create_options import create_task_vector
from quality.bench import Bench, Scored
from quality.parse import CORPORA
from quality.specialists import Training

PAGE = Path(__file__).parents[1] / "docs" / "store.md"
BEGIN, END = "<!-- encodings -->", "<!-- end -->"
DRAWS = 2000

TARGETS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "difference, float32": {"encoding": "difference:f32"},
    "difference, bfloat16": {"encoding": "difference:bf16"},
    "difference, float16 with a scale": {"encoding": "difference:f16"},
    "low rank, 1/4 of all directions": {"encoding": "low_rank:0.25"},
    "low rank, 1/16": {"encoding": "low_rank:0.0625"},
    "`--tsv 0.1`": {"tsv": 0.1},
    "largest 10 % of the entries": {"encoding": "top_k:0.1"},
    "largest 1 %": {"encoding": "top_k:0.01"},
    "1 bit and a scale per row": {"encoding": "sign"},
    "4 bits in groups of 128": {"encoding": "int4"},
    "`--error 0.01`": {"error": 0.01},
    "`--size 10MB`": {"size": "10MB"},
    "`--size 3MB`": {"size": "3MB"},
}
"""The rows: how each is called, and the options of ``alnico store create``."""

RL_SHARE = 0.002
"""The part of a specialist's task vector that is added in bfloat16: most entries stay, as after a step of reinforcement learning."""


def right(scored: Scored, task: str) -> np.ndarray:
    examples = scored.scores[task].examples
    assert examples is not None
    return np.asarray(examples, float)


def interval(differences: list[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of paired differences, over examples drawn again."""
    draw = np.random.default_rng(0)
    means = [
        fmean(float(d[draw.integers(len(d), size=len(d))].mean()) for d in differences) for _ in range(DRAWS)
    ]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def of(model: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def size_text(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def encodings_table(bench: Bench) -> list[str]:
    """The rows of the first table: means over the specialists."""
    base = bench.work / "base"
    whole = {task: right(bench.score(of(bench.specialist(task)), "test", task), task) for task in bench.tasks}
    untuned = fmean(float(right(bench.score(of("base"), "test", task), task).mean()) for task in bench.tasks)
    lines = [
        "| encoding | all files | relative error | own task, mean of eight | less the fine-tunes |",
        "|---|---|---|---|---|",
        f"| the fine-tunes | {size_text(fmean((bench.work / bench.specialist(t) / 'model.safetensors').stat().st_size for t in bench.tasks))} "
        f"| | {fmean(float(w.mean()) for w in whole.values()):.1%} | |",
        f"| no task vector | | | {untuned:.1%} | |",
    ]
    for label, options in TARGETS.items():
        key = "-".join(str(v) for pair in options.items() for v in pair).replace(":", "-")
        sizes, errors, differences = [], [], []
        for task in bench.tasks:
            folder = bench.work / "vectors" / bench.fingerprint[:8] / key / task
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                create_task_vector(bench.work / bench.specialist(task), base, folder, task, **options)
            sizes.append(sum(p.stat().st_size for p in folder.iterdir()))
            errors.append(read_manifest(folder).error)
            scored = right(bench.score(of(f"{base}+{folder}"), "test", task), task)
            differences.append(scored - whole[task])
        lost = fmean(float(d.mean()) for d in differences)
        low, high = interval(differences)
        mean = fmean(float(w.mean()) for w in whole.values()) + lost
        lines.append(
            f"| {label} | {size_text(fmean(sizes))} | {fmean(errors):.2g} | {mean:.1%} | "
            f"{100 * lost:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] |"
        )
    return lines


def sparse_table(bench: Bench) -> list[str]:
    """The rows of the second table: one pair in bfloat16."""
    folder = bench.work / "vectors" / bench.fingerprint[:8] / "sparse"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = bench.work / "base"
    rounded = folder / "base"
    alnico.merge({**of(str(base)), "dtype": "bfloat16"}, rounded)
    tau = RL_SHARE * alnico.TaskVector(bench.work / bench.specialist(bench.tasks[0]), base)
    tau.on(rounded).save(folder / "wide")
    tuned = folder / "tuned"
    alnico.merge({**of(str(folder / "wide")), "dtype": "bfloat16"}, tuned)
    lines = ["| encoding | all files | relative error |", "|---|---|---|"]
    for label, options in {
        "no option: exact, sparse": {},
        "exact, whole": {"encoding": "whole"},
        "4 bits in groups of 128": {"encoding": "int4"},
        "`--tsv 0.1`": {"tsv": 0.1},
    }.items():
        place = folder / label.replace(" ", "-").replace("`", "")
        made = create_task_vector(tuned, rounded, place, "rl", **options)  # type: ignore[arg-type]
        lines.append(
            f"| {label} | {size_text(sum(p.stat().st_size for p in place.iterdir()))} | {made.manifest.error:.2g} |"
        )
    lines.append(f"\nOf its entries {made.measured.equal_share:.1%} are those of the base.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/store.md")
    asked = parser.parse_args()
    with Bench(asked.work.resolve(), list(CORPORA), Training()) as bench:
        bench.prepare()
        text = "\n".join(
            [*encodings_table(bench), "", "A pair in bfloat16 with a small update:", "", *sparse_table(bench)]
        )
    print(text)
    if asked.write:
        page = PAGE.read_text("utf-8")
        before, rest = page.split(BEGIN, 1)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", "utf-8")


if __name__ == "__main__":
    main()
