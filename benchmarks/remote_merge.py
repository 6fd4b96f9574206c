"""Measures a merge from an S3-compatible server into it beside the same merge on the disk: time, memory, bytes, and the result.

    python benchmarks/remote_merge.py --work FOLDER [--millions 160] [--method ties] [--memory 1GiB] [--rounds 3]

A sharded model of a Llama's shapes in bfloat16 and two fine-tunes of it are made once, put on moto's server, which runs in this process
on loopback, and merged by alnico in processes of their own. It prints medians as a Markdown table: seconds by the clock, the largest
memory of the process, and the bytes that the server sent and received. It ends with an error if an output differs, or if the memory
is more than the plan says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import made  # noqa: E402
from s3_server import S3Server, serving_s3  # noqa: E402

MERGE = """
import json, re, sys, alnico
recipe, out, memory = sys.argv[1:]
result = alnico.merge(json.loads(recipe), out, memory=memory, max_shard_size="100MB", overwrite=True)
# Not ru_maxrss, which begins with the memory of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": result.seconds - result.compile_seconds, "peak": peak, "planned": result.plan.memory.peak_bytes}))
"""
SIDE = 2048


def make_models(work: Path, millions: int) -> list[Path]:
    """Write a base and two fine-tunes, each in shards of 100 MB."""
    folders = [work / name for name in ("base", "one", "other")]
    if (folders[-1] / "config.json").exists():
        return folders
    random = np.random.default_rng(0)
    count = max(millions * 10**6 // SIDE**2, 1)
    base = {f"model.layers.{i}.mlp.up_proj.weight": 0.02 * random.standard_normal((SIDE, SIDE), np.float32) for i in range(count)}  # fmt: skip
    for folder in folders:
        tensors = {
            name: ("BF16", values if folder.name == "base" else values + 0.002 * random.standard_normal(values.shape, np.float32))
            for name, values in base.items()
        }  # fmt: skip
        made.save_model(folder, tensors, {"model_type": "llama"}, -(-count * SIDE * SIDE * 2 // 100_000_000))
    return folders


def merged(models: list[str], method: str, out: str, memory: str, work: Path) -> dict[str, Any]:
    base, *tuned = models
    recipe = {"merge_method": method, "base_model": base, "models": tuned, "parameters": {"density": 0.5} if method == "ties" else {}}  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "ALNICO_CACHE_DIR": str(work / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", MERGE, json.dumps(recipe), out, memory],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def objects(server: S3Server, folder: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{folder}/"): server.read(name) for name in server.names(f"{folder}/")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--millions", type=int, default=160)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work: Path = options.work
    folders = make_models(work, options.millions)
    rows: dict[str, list[dict[str, Any]]] = {
        "disk to disk": [],
        "disk to S3": [],
        "S3 to disk": [],
        "S3 to S3": [],
    }
    with serving_s3() as server:
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        for folder in folders:
            server.put_folder(folder.name, folder)
        local, remote = [str(f) for f in folders], [f"{server.url}{f.name}" for f in folders]
        for _ in range(options.rounds):
            for name, found in rows.items():
                models = remote if name.startswith("S3") else local
                at_url = name.endswith("S3")
                server.forget()
                out = f"{server.url}out" if at_url else str(work / "out")
                shutil.rmtree(work / "out", ignore_errors=True)
                row = merged(models, options.method, out, options.memory, work)
                row["sent"] = sum(server.sent.values())
                written = objects(server, "out") if at_url else made.model_bytes(work / "out")
                row["weights"] = {n: hash(data) for n, data in written.items() if n.endswith(".safetensors")}
                # Files on the disk are mapped, and count as memory of the process while the system has room.
                if models is remote and row["peak"] > row["planned"]:
                    sys.exit(f"{name}: {row['peak']:,} bytes of memory, the plan says {row['planned']:,}")
                found.append(row)
    if len({json.dumps(row["weights"], sort_keys=True) for found in rows.values() for row in found}) != 1:
        sys.exit("the weights differ")
    size = sum(path.stat().st_size for f in folders for path in f.glob("*.safetensors")) / 1e9
    print(
        f"{size:.2f} GB of weights in 3 models, {options.method}, --memory {options.memory}; the weights are equal\n"
    )
    print(
        "| from, to | seconds | of disk to disk | memory, MB | the plan says | sent by the server, GB |\n|---|---|---|---|---|---|"
    )
    first = statistics.median(row["seconds"] for row in rows["disk to disk"])
    for name, found in rows.items():
        seconds = statistics.median(row["seconds"] for row in found)
        peak, planned = max(row["peak"] for row in found), found[0]["planned"]
        memory = f"{peak / 1e6:.0f}" if name.startswith("S3") else "files are mapped"
        sent = max(row["sent"] for row in found) / 1e9
        print(
            f"| {name} | {seconds:.2f} | {seconds / first:.1f} | {memory} | {planned / 1e6:.0f} | {sent:.2f} |"
        )


if __name__ == "__main__":
    main()
