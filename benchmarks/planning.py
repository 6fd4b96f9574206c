"""How long a plan takes, and how much memory: Llama 3.1 405B, or DeepSeek-V3, from files that hold headers and holes.

    python benchmarks/planning.py --work /tmp/bench                     # a base and two models of 191 shards each, ties
    python benchmarks/planning.py --work /tmp/bench --method linear --runs 9
    python benchmarks/planning.py --work /tmp/bench --model 671b        # 45,395 tensors in 163 shards, most of them experts

Each run is a process of its own that imports alnico, opens the models and plans; the table has medians, the spread and the peak resident
size. The files are made once and take no more room than their headers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from limits.made_large import CONFIG_405B, CONFIG_671B, deepseek_671b, llama_405b, save_sparse_model

MODELS = {"405b": (llama_405b, CONFIG_405B, 191), "671b": (deepseek_671b, CONFIG_671B, 163)}
"""The tensors of each model, its config, and the number of its shards."""

PLAN = """
import json, resource, sys, time
begin = time.perf_counter()
import alnico
plan = alnico.plan(json.loads(sys.argv[1]), memory="8GiB")
seconds = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([seconds, used.ru_utime + used.ru_stime, peak, len(plan.jobs), plan.elements]))
"""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--work", type=Path, required=True, help="folder for the models")
    words.add_argument("--method", default="ties")
    words.add_argument("--model", choices=MODELS, default="405b")
    words.add_argument("--runs", type=int, default=5)
    given = words.parse_args()
    shapes, config, shards = MODELS[given.model]
    folders = [given.work / f"{given.model}-{name}" for name in ("base", "one", "other")]
    for folder in folders:
        if not (folder / "config.json").exists():
            save_sparse_model(folder, shapes(), shards=shards, config=config)
    base, *models = map(str, folders)
    recipe = json.dumps({"merge_method": given.method, "base_model": base, "models": models})
    found = []
    whole = []
    for _ in range(given.runs):
        begin = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", PLAN, recipe], capture_output=True, text=True, check=True
        )
        whole.append(time.perf_counter() - begin)
        found.append(json.loads(ended.stdout))
    seconds, cpu, peaks, jobs, elements = zip(*found, strict=True)
    print(
        f"{jobs[0]} tensors, {elements[0]:,} parameters, 3 models of {shards} shards, {given.method}, {given.runs} runs"
    )
    print("| | median | least | most |")
    print("|---|---|---|---|")
    rows = (
        ("import and plan, seconds", seconds),
        ("whole process, seconds", whole),
        ("CPU seconds", cpu),
        ("peak resident, MiB", peaks),
    )
    for name, values in rows:
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
