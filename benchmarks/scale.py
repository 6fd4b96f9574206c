"""How long merges of 70, 405 and 671 billion parameters take on 1 to 64 nodes: computed from their plans and measured rates.

    python benchmarks/scale.py --work /tmp/bench --table docs/scale.md
    python benchmarks/scale.py --work /tmp/bench --cores 16 --memory 64GiB --network 1.2 --storage-read 5 --storage-write 2

Plans are made of files that hold headers and holes, so nothing large is read. What one processor computes is measured here, with whole
merges of a smaller model by one thread and with LAPACK's eigenvectors. Everything else (processors, memory and network of a node, speed of
the storage that all nodes share) is given by options and stated above the tables.
"""

from __future__ import annotations

import argparse
import heapq
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import alnico
from alnico.engine.matrix_time import measure_rate, operations_of
from alnico.numerics.sizes import bytes_of, format_size
from alnico.plan.job import Plan
from limits.made_large import (
    CONFIG_70B,
    CONFIG_405B,
    CONFIG_671B,
    deepseek_671b,
    llama_70b,
    llama_405b,
    save_sparse_model,
)
from merge_speed import make, shapes
from processes import measured

SIZES = {
    "70B": (llama_70b, CONFIG_70B, 30, "Llama 3.1 70B"),
    "405B": (llama_405b, CONFIG_405B, 191, "Llama 3.1 405B"),
    "671B": (deepseek_671b, CONFIG_671B, 163, "DeepSeek-V3, in bf16"),
}
METHODS = ("linear", "ties", "tsv")
NODES = (1, 2, 4, 8, 16, 32, 64)
MODELS = 3
START = 30.0
"""Seconds to start Ray's workers and to finish: assumed."""


@dataclass(frozen=True)
class Rates:
    """What one processor does: seconds per billion parameters of a merge of three models, and operations per second of whole
    matrices; and what this machine's disk does, in bytes per second."""

    seconds: dict[str, float]
    operations: float
    disk_read: float
    disk_write: float


@dataclass(frozen=True)
class Node:
    cores: int
    memory: int
    network: float
    storage_read: float
    storage_write: float


def model_paths(work: Path, size: str) -> list[Path]:
    layout, config, shards, _ = SIZES[size]
    paths = [work / f"{size}-{name}" for name in ("base", *"abc"[:MODELS])]
    for path in paths:
        if not (path / "config.json").exists():
            save_sparse_model(path, layout(), shards=shards, config=config)
    return paths


def recipe_of(method: str, paths: list[Path]) -> dict[str, object]:
    base, *models = map(str, paths)
    recipe: dict[str, object] = {"merge_method": method, "models": models}
    if method == "linear":
        return recipe | {"parameters": {"weight": 1.0}}
    if method == "ties":
        return recipe | {"base_model": base, "parameters": {"weight": 1.0, "density": 0.3}}
    return recipe | {"base_model": base}


def measure(work: Path, millions: float) -> Rates:
    """Measure whole merges by one thread, in processor seconds, less those of the smallest merge; and the disk."""
    layout = shapes(max(1, round((millions * 1e6 - 98e6) / 25.2e6)), 1536, 4096, 32_000)
    tiny = {"model.norm.weight": (64,)}
    folders = {}
    for kind, made in (("rates", layout), ("tiny", tiny)):
        folders[kind] = [work / f"{kind}-{i}" for i in range(MODELS + 1)]
        for i, path in enumerate(folders[kind]):
            make(path, made, i, "BF16", 1 << 30)
    elements = sum(_product(shape) for shape in layout.values())
    seconds = {}
    for method in ("linear", "ties"):
        spent = {}
        for kind, paths in folders.items():
            file = work / f"{kind}-{method}.yml"
            file.write_text(str(recipe_of(method, paths)).replace("'", '"'))
            out = work / "out"
            command = [
                sys.executable,
                "-m",
                "alnico",
                "merge",
                str(file),
                str(out),
                "--threads",
                "1",
                "--quiet",
            ]
            runs = []
            for _ in range(4):
                shutil.rmtree(out, ignore_errors=True)
                runs.append(measured(command).cpu)
            spent[kind] = min(runs[1:])  # the first compiles
        seconds[method] = (spent["rates"] - spent["tiny"]) / elements * 1e9
    seconds["tsv"] = seconds[
        "ties"
    ]  # reading, hashing and writing; the matrices are counted by their operations
    operations = max(measure_rate() for _ in range(3))
    return Rates(seconds, operations, *_disk(work))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def _disk(work: Path) -> tuple[float, float]:
    """Bytes per second of a new file written and flushed, and read back when the page cache has forgotten it."""
    path, block, count = work / "disk", os.urandom(1 << 24), 64
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - begin
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while file.read(1 << 24):
            pass
        read = time.perf_counter() - begin
    path.unlink()
    size = count << 24
    return size / read, size / written


def matrix_seconds(plan: Plan, workers: int, rate: float) -> tuple[float, float]:
    """How long whole matrices take, the longest first, each on the worker that is free next; and how long the longest does."""
    work = sorted((operations_of(job) / rate for job in plan.jobs if job.matrix is not None), reverse=True)
    ends = [0.0] * workers
    for seconds in work:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends), work[0]


def merge_time(plan: Plan, method: str, nodes: int, node: Node, rates: Rates) -> tuple[float, str]:
    """Return the seconds of a merge and what limits it: the slowest of reading, writing and computing, which overlap."""
    read = plan.bytes_to_read / min(nodes * node.network, node.storage_read)
    write = plan.bytes_to_write / min(nodes * node.network, node.storage_write)
    of_storage = nodes * node.network >= (node.storage_read if read >= write else node.storage_write)
    computing = rates.seconds[method] * plan.elements / 1e9 / (nodes * node.cores)
    limit = "processors"
    if method == "tsv":
        whole, longest = matrix_seconds(plan, nodes * plan.memory.threads, rates.operations)
        limit = (
            "largest matrix"
            if longest > 0.9 * whole
            else "memory"
            if plan.memory.threads < node.cores
            else limit
        )
        computing += whole
    slowest = max(read, write, computing)
    if slowest > computing:
        limit = "storage" if of_storage else "network"
    return slowest + START, limit


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86_400:.0f} d"


def tables(work: Path, node: Node, rates: Rates) -> str:
    lines = [
        "| measured here | |",
        "|---|---|",
        f"| one thread, a weighted sum of {MODELS} models (reading from memory, hashing and writing included) | {rates.seconds['linear']:.1f} s for 10^9 parameters |",
        f"| one thread, `ties` | {rates.seconds['ties']:.1f} s for 10^9 parameters |",
        f"| one thread, eigenvectors of large matrices | {rates.operations / 1e9:.0f} · 10^9 operations/s |",
        f"| the disk of this machine, reading and writing | {rates.disk_read / 1e9:.1f} and {rates.disk_write / 1e9:.1f} GB/s |",
        "",
        "| assumed | |",
        "|---|---|",
        f"| processors of a node | {node.cores}, each as fast as the one measured |",
        f"| memory budget of a node | {format_size(node.memory)} |",
        f"| network of a node | {node.network / 1e9:.1f} GB/s |",
        f"| storage that all nodes share, reading and writing | {node.storage_read / 1e9:.0f} and {node.storage_write / 1e9:.0f} GB/s in all |",
        f"| starting and finishing | {START:.0f} s |",
    ]
    for size in SIZES:
        paths = model_paths(work, size)
        plans = {
            method: alnico.plan(recipe_of(method, paths), memory=node.memory, threads=node.cores)
            for method in METHODS
        }
        largest = plans["tsv"].memory
        lines += [
            "",
            f"## {size}: {SIZES[size][3]}",
            "",
            f"{plans['ties'].elements / 1e9:.1f} · 10^9 parameters in {len(plans['ties'].jobs):,} tensors. {MODELS} models and their base have "
            f"{plans['ties'].bytes_to_read / 1e12:.2f} TB, the output {plans['ties'].bytes_to_write / 1e12:.2f} TB. By `tsv`, a node works on {largest.threads} "
            f"matrices at once in {format_size(largest.peak_bytes)}.",
            "",
            f"| method | {' | '.join(f'{n} node' + 's' * (n > 1) for n in NODES)} |",
            f"|---|{'---|' * len(NODES)}",
        ]
        for method, plan in plans.items():
            cells = [merge_time(plan, method, nodes, node, rates) for nodes in NODES]
            lines.append(f"| `{method}` | {' | '.join(f'{duration(s)} ({limit})' for s, limit in cells)} |")
    return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    begin, end = "<!-- scale -->\n", "<!-- /scale -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--work", type=Path, required=True, help="folder for the models")
    words.add_argument("--table", type=Path, help="page to write the tables into")
    words.add_argument(
        "--millions", type=float, default=300, help="parameters of the measured merge, in millions"
    )
    words.add_argument("--cores", type=int, default=32)
    words.add_argument("--memory", default="128GiB")
    words.add_argument("--network", type=float, default=3.1, help="GB/s of a node")
    words.add_argument("--storage-read", type=float, default=20, help="GB/s of all nodes")
    words.add_argument("--storage-write", type=float, default=10, help="GB/s of all nodes")
    given = words.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    node = Node(
        given.cores,
        bytes_of(given.memory),
        given.network * 1e9,
        given.storage_read * 1e9,
        given.storage_write * 1e9,
    )
    text = tables(given.work, node, measure(given.work, given.millions))
    if given.table:
        put_into(given.table, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
