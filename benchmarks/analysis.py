"""Whole processes in one run: `alnico analyze`, without and with its report, and the plain way of benchmarks/plain_analysis.py.

    python benchmarks/analysis.py --work /tmp/bench               # shapes of Qwen3-0.6B, bf16, a base and 3 models
    python benchmarks/analysis.py --work /tmp/bench --models 8    # or --dtype F32, --layout small, --layout 384

Models are made once; the programs alternate; the table has medians, spread, CPU time, peak resident size and ratios, and the line
under it how far the numbers are apart. The page cache is warm. The plain way leaves out what alnico finds besides: groups, layers and
the whole model, conflict among all models, what cancels. Both compare singular vectors of matrices of up to 4.2 M elements whose smaller
side is at most 512: all but the embedding in the layout 384, keys and values in 576 and llama, none in qwen, small and embedding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from merge_speed import LAYOUTS as MERGED_LAYOUTS
from merge_speed import make, shapes
from processes import Failed, Run, beside, measured, seconds

PLAIN = Path(__file__).parent / "plain_analysis.py"
WAYS = ("torch", "sorted")


def qwen() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Qwen3-0.6B: 28 layers, an embedding that is the head, too."""
    found = {n: s for n, s in shapes(28, 1024, 3072, 151_936).items() if n != "lm_head.weight"}
    heads = {"q_proj": (2048, 1024), "k_proj": (1024, 1024), "v_proj": (1024, 1024), "o_proj": (1024, 2048)}
    for i in range(28):
        at = f"model.layers.{i}.self_attn."
        found |= {f"{at}{n}.weight": shape for n, shape in heads.items()} | {
            f"{at}{n}_norm.weight": (128,) for n in "qk"
        }
    return found


LAYOUTS = {
    "qwen": lambda _: qwen(),
    "384": lambda _: shapes(12, 384, 1536, 30_522),
    "576": lambda _: shapes(30, 576, 1536, 49_152),
} | MERGED_LAYOUTS


def numbers(found: dict[str, Any], std: float = 1.0) -> Iterator[tuple[str, float, float]]:
    """The numbers of a change or a pair, each with what its differences are measured by: itself, the spread of the entries, or 1."""
    for name, value in found.items():
        if name in ("l1", "l2", "relative_l1", "relative_l2", "max_abs", "std", "distance"):
            yield name, value, value
        elif name == "quantiles":
            yield from ((name, quantile, std) for quantile in value)
        elif name == "subspace":
            yield from numbers(value or {})
        else:
            yield name, value, std if name == "mean" else 1.0


def apart(ours: Path, theirs: Path) -> str:
    """How far two findings are apart: the largest difference of each number over all tensors."""
    tensors = {t["name"]: t for t in json.loads(ours.read_text())["tensors"]}
    plain = json.loads(theirs.read_text())
    assert tensors.keys() == plain.keys(), sorted(tensors.keys() ^ plain.keys())
    worst: dict[str, float] = {}
    for name, tensor in plain.items():
        for kind in ("changes", "pairs"):
            for their, our in zip(tensor[kind], tensors[name][kind], strict=True):
                spread = our.get("std", 1.0)
                mine = numbers({key: our[key] for key in their}, spread)
                for (key, a, size), (_, b, _) in zip(mine, numbers(their, spread), strict=True):
                    worst[key] = max(worst.get(key, 0.0), abs(a - b) / size)
    return ", ".join(f"{key} {value:.0e}" for key, value in worst.items())


def memory_and_time(runs: list[Run]) -> str:
    return (
        f"{seconds(runs)} | {statistics.median(r.cpu for r in runs):.1f} | {max(r.peak for r in runs) >> 20}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs; models are kept"
    )
    parser.add_argument("--parameters", type=float, default=0.6e9, help="of the layouts llama and small")
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen")
    parser.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--plain-repeat", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS), help="of the plain side; empty for none")
    parser.add_argument(
        "--alnico",
        default=shutil.which("alnico") or "alnico",
        help="with [report], for the page and the pictures",
    )
    chosen = parser.parse_args()
    layout = LAYOUTS[chosen.layout](chosen.parameters)
    count = sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"{chosen.layout}-{chosen.dtype}-{count}"
    shard_bytes = max(count * (4 if chosen.dtype == "F32" else 2) // 3, 1)
    paths = [home / f"m{i}" for i in range(chosen.models + 1)]
    for i, path in enumerate(paths):
        beside(make, path, layout, i, chosen.dtype, shard_bytes)
    base, *models = map(str, paths)
    report = home / "report"
    ways = [way for way in chosen.ways.split(",") if way]
    analyze = [chosen.alnico, "analyze", "--base", base, "--models", *models, "--quiet"]
    commands = {"alnico": [*analyze, "--json"], "alnico, report": [*analyze, "--out", str(report)]}
    commands |= {
        way: [sys.executable, str(PLAIN), way, str(home / f"{way}.json"), base, *models] for way in ways
    }
    measured(["sh", "-c", f"cat {' '.join(f'{path}/*.safetensors' for path in paths)} > /dev/null"])
    measured(commands["alnico"])  # compiles kernels
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(max(chosen.repeat, chosen.plain_repeat)):
        for name, command in commands.items():
            if turn < (chosen.plain_repeat if name in ways else chosen.repeat):
                runs[name].append(measured(command))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, {chosen.dtype}, {chosen.models} models\n"
    )
    print("| program | s | CPU s | peak MiB | x alnico |\n|---|---|---|---|---|")
    ours = statistics.median(r.wall for r in runs["alnico"])
    for name, done in runs.items():
        print(f"| {name} | {memory_and_time(done)} | {statistics.median(r.wall for r in done) / ours:.1f} |")
    for way in ways:
        print(
            f"\n{way} and alnico: apart by at most {beside(apart, report / 'summary.json', home / f'{way}.json')}."
        )
    shutil.rmtree(report, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
