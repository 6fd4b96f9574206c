"""How much of one task does `protect` keep while another is merged in, and what does that cost the other?

    python benchmarks/protection.py --work DIR

Trains a small BERT on three made tasks (tests/made_tasks.py: seconds), measures each specialist's Gram matrices on 256 texts that are
not scored, and for each ordered pair of tasks merges the second specialist into the first by `task_arithmetic`, with and without
`protect`. Nothing is chosen. Prints the table of docs/quality.md: test accuracy of the protected and of the added task, mean over the
six pairs, and the paired difference to the merge without `protect` with its 95 % interval over examples. Needs [eval]; takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import alnico
from alnico.evaluation.loaded_model import open_subject
from alnico.evaluation.task_file import read_tasks
from made_tasks import TASKS, Made, make_tasks

ENERGIES = (0.9, 0.99, 0.999)
EXAMPLES = 600
DRAWS = 2000


def recipes_of(made: Made, first: str, second: str, gram: Path) -> dict[str, dict[str, Any]]:
    """The merges of two specialists by name, the one without `protect` first."""
    models = [{"model": str(made.tuned[first])}, {"model": str(made.tuned[second])}]
    plain = {"merge_method": "task_arithmetic", "base_model": str(made.base), "models": models}
    halved = [models[0], {**models[1], "parameters": {"weight": 0.5}}]
    recipes = {"without": plain, "without, the added one at weight 0.5": {**plain, "models": halved}}
    for others in ("merge", "keep"):
        for energy in ENERGIES:
            protect = {
                "model": str(made.tuned[first]),
                "gram": str(gram),
                "energy": energy,
                "others": others,
            }
            recipes[f"energy {energy:g}, others {others}"] = {**plain, "protect": protect}
    return recipes


def interval(differences: list[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean over pairs of paired differences, over examples drawn again."""
    draw = np.random.default_rng(0)
    means = [
        np.mean([d[draw.integers(len(d), size=len(d))].mean() for d in differences]) for _ in range(DRAWS)
    ]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    work: Path = parser.parse_args().work
    work.mkdir(parents=True)
    torch.set_num_threads(1)  # two take longer with matrices of this size
    made = make_tasks(work, examples=EXAMPLES)
    tests = {task.name: task for task in read_tasks(made.test)}

    def right(model: Path, task: str) -> np.ndarray:
        return np.asarray(tests[task].evaluate(open_subject(model)).examples, float)

    for entry in yaml.safe_load(made.valid.read_text())["tasks"]:
        name = entry["name"]
        tasks = work / f"{name}.yml"
        tasks.write_text(yaml.safe_dump({"tasks": [entry]}))
        alnico.gram_statistics(made.tuned[name], work / f"gram-{name}", tasks=tasks)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for first, second in permutations(TASKS, 2):
        alone = (right(made.tuned[first], first), right(made.tuned[second], second))
        found.setdefault("each specialist alone", []).append(alone)
        for name, recipe in recipes_of(made, first, second, work / f"gram-{first}").items():
            alnico.merge(recipe, work / "out", overwrite=True)
            found.setdefault(name, []).append((right(work / "out", first), right(work / "out", second)))
    print("| `protect` | protected task | difference | added task | difference |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        cells = [name]
        for side in (0, 1):
            cells.append(f"{100 * np.mean([row[side].mean() for row in rows]):.1f}")
            differences = [row[side] - plain[side] for row, plain in zip(rows, found["without"], strict=True)]
            low, high = interval(differences)
            mean = np.mean([d.mean() for d in differences])
            cells.append(
                "" if name == "without" else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            )
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
