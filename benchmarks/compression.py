"""How small can a task vector be? Accuracy of specialists whose task vectors are stored in factors (TSV-C), at several ranks.

    python benchmarks/compression.py --work DIR

DIR is the work folder of `python benchmarks/quality`, which trains the specialists of docs/quality.md. For each rank and task the task
vector is compressed, put on the base again and scored on the task's test rows; then all of them are merged by `tsv`. Nothing is
chosen. Prints the table of docs/models-in-python.md. Needs [eval]; takes some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import numpy as np

import alnico
from quality.bench import Bench, Scored
from quality.parse import CORPORA
from quality.specialists import Training

RANKS = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
DRAWS = 2000


def interval(differences: list[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of paired differences, over examples drawn again."""
    draw = np.random.default_rng(0)
    means = [
        fmean(float(d[draw.integers(len(d), size=len(d))].mean()) for d in differences) for _ in range(DRAWS)
    ]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def right(scored: Scored, task: str) -> np.ndarray:
    examples = scored.scores[task].examples
    assert examples is not None
    return np.asarray(examples, float)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the specialists' training (default: 0)")
    asked = parser.parse_args()
    with Bench(asked.work.resolve(), list(CORPORA), Training(seed=asked.seed)) as bench:
        bench.prepare()
        base = bench.work / "base"
        whole = {task: bench.score(copy_of(bench.specialist(task)), "test", task) for task in bench.tasks}
        merged = bench.score(bench.sum("tsv"), "test")
        mean = fmean(right(whole[t], t).mean() for t in bench.tasks)
        print(
            "| rank, of min(rows, columns) | size of a task vector | relative error | own task, mean of eight | less whole | merged by `tsv` |"
        )
        print("|---|---|---|---|---|---|")
        for rank in RANKS:
            sizes, errors, differences, models = [], [], [], {}
            for task in bench.tasks:
                folder = bench.work / "compressed" / f"{bench.fingerprint[:8]}-{rank:g}" / task
                tau = alnico.TaskVector(bench.work / bench.specialist(task), base)
                found = tau.compress(folder / "vector.safetensors", rank=rank, overwrite=True)
                sizes.append(found.bytes)
                errors.append(found.error)
                models[task] = folder / "model"
                alnico.TaskVector.load(folder / "vector.safetensors").on(base).save(
                    models[task], overwrite=True
                )
                scored = bench.score(copy_of(str(models[task])), "test", task)
                differences.append(right(scored, task) - right(whole[task], task))
            low, high = interval(differences)
            lost = fmean(float(d.mean()) for d in differences)
            recipe = {**bench.sum("tsv"), "models": [{"model": str(m)} for m in models.values()]}
            of_merge = bench.score(recipe, "test").mean
            if rank == RANKS[0]:
                size = found.whole_bytes / 1e6
                print(f"| whole | {size:.1f} MB | 0 | {mean:.1%} | | {merged.mean:.1%} |")
            print(
                f"| 1/{1 / rank:g} | {fmean(sizes) / 1e6:.2f} MB | {fmean(errors):.2f} | {mean + lost:.1%} | "
                f"{100 * lost:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {of_merge:.1%} |",
                flush=True,
            )


def copy_of(model: str) -> dict[str, object]:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


if __name__ == "__main__":
    main()
