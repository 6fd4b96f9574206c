"""What it takes to prove a finished merge: whole processes in one run, beside the merge itself and a reading of the output.

    python benchmarks/verify_speed.py --work /tmp/bench                      # 0.6 G parameters, bf16, a base and 3 models

Models and recipes are those of merge_speed.py. The commands alternate; prints medians of wall seconds with their range, CPU seconds and the
largest resident size. The page cache is warm.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from merge_speed import LAYOUTS, RECIPES, make
from processes import Run, beside, measured, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs; models are kept"
    )
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", default="linear,ties")
    chosen = parser.parse_args()
    layout = LAYOUTS["llama"](chosen.parameters)
    count = sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"llama-BF16-{count}"
    for i in range(4):
        beside(make, home / f"m{i}", layout, i, "BF16", max(count * 2 // 3, 1))
    out, tuned = home / "out", [home / f"m{i}" for i in (1, 2, 3)]
    alnico = [sys.executable, "-m", "alnico"]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, BF16, 3 models\n")
    print("| method | command | s | CPU s | peak MiB |")
    print("|---|---|---|---|---|")
    for method in chosen.methods.split(","):
        asked = RECIPES[method]
        recipe = home / f"{method}.yml"
        recipe.write_text(
            f"merge_method: {method}\n"
            + f"base_model: {home / 'm0'}\n" * asked.has_base
            + "models:\n"
            + "".join(f"  - model: {p}\n" for p in tuned)
            + f"parameters: {{{asked.parameters}}}\ndtype: bfloat16\n"
        )
        commands = {
            "merge": [*alnico, "merge", str(recipe), str(out), "--quiet", "--overwrite"],
            "cat OUT": ["sh", "-c", f"cat {out}/*.safetensors > /dev/null"],
            "verify": [*alnico, "verify", str(out), "--quiet"],
            "verify --against-inputs --sample 0.01": [
                *alnico,
                "verify",
                str(out),
                "--against-inputs",
                "--sample",
                "0.01",
                "--quiet",
            ],
            "verify --against-inputs": [*alnico, "verify", str(out), "--against-inputs", "--quiet"],
            "reproduce": [*alnico, "reproduce", str(out), "--quiet"],
        }
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for turn in range(chosen.repeat + 1):
            for name, command in commands.items():
                run = measured(command)
                if turn:  # the first compiles kernels and fills the page cache
                    runs[name].append(run)
        for name, of in runs.items():
            cpu, peak = statistics.median(r.cpu for r in of), max(r.peak for r in of)
            print(f"| {method} | `{name}` | {seconds(of)} | {cpu:.2f} | {peak >> 20} |", flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
