"""What a cluster costs: three Ray nodes of this machine, one thread each, against three processes that merge a third each.

    python benchmarks/cluster_merge.py --work /tmp/bench            # a base and two models of 0.33 G parameters each, bf16: 2 GB

Makes Llama-shaped models once, a whole one and a third of it, then alternates: three processes with one thread each that merge
the third at the same time; one process with three threads that merges all; and the nodes. "making" is what the command says
that the merge took, without starting Python, without connecting to Ray, and with the planning of the nodes. The page cache is
warm. All outputs of the whole model are compared.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from merge_speed import LAYOUTS, make

METHODS = {
    "linear": "merge_method: linear\nmodels: [{0}/1, {0}/2]\n",
    "ties": "merge_method: ties\nbase_model: {0}/0\nmodels: [{0}/1, {0}/2]\nparameters: {{density: 0.3}}\n",
}
NODES = 3


def timed(commands: list[list[str]]) -> tuple[float, float]:
    """Run commands at the same time; returns the seconds of all, and the longest that one says of its merge."""
    begin = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    printed = [process.communicate()[0] for process in running]
    wall = time.perf_counter() - begin
    if any(process.returncode for process in running):
        sys.exit("a merge failed")
    return wall, max(json.loads(text)["seconds"] for text in printed)


def merge(recipe: Path, out: Path, *options: str) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, "-m", "alnico", "merge", str(recipe), str(out), "--json", *options]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parameters", type=float, default=0.33e9)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    work: Path = arguments.work
    for name, parameters in (("whole", arguments.parameters), ("third", arguments.parameters / NODES)):
        for i in range(3):
            make(work / name / str(i), LAYOUTS["llama"](parameters), i, "BF16", 1 << 28)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1)
        print("| method | program | seconds in all | making | against three processes |")
        print("|---|---|---|---|---|")
        for method, text in METHODS.items():
            recipes = {}
            for name in ("whole", "third"):
                recipes[name] = work / f"{method}-{name}.yml"
                recipes[name].write_text(text.format(work / name) + "dtype: bfloat16\n")
            seen: dict[str, list[tuple[float, float]]] = {}
            for _ in range(arguments.runs + 1):  # the first run compiles, and warms the cache
                thirds = [merge(recipes["third"], work / f"out-{i}", "--threads", "1") for i in range(NODES)]
                seen.setdefault("three processes, a third each", []).append(timed(thirds))
                alone = merge(recipes["whole"], work / "alone", "--threads", str(NODES))
                seen.setdefault("one process, three threads", []).append(timed([alone]))
                nodes = merge(
                    recipes["whole"], work / "nodes", "--threads", "1", "--ray", str(cluster.address)
                )
                seen.setdefault("three nodes", []).append(timed([nodes]))
                weights = [p.name for p in (work / "alone").glob("*.safetensors")]
                differing = filecmp.cmpfiles(work / "alone", work / "nodes", weights, shallow=False)[1:]
                if any(differing):
                    sys.exit(f"{method}: the nodes made other bytes: {differing}")
            reference = 0.0
            for program, runs in seen.items():
                wall, making = (statistics.median(column) for column in zip(*runs[1:], strict=True))
                reference = reference or making
                print(f"| {method} | {program} | {wall:.1f} | {making:.2f} | {making / reference:.2f} |")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
