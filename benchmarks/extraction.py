"""Whole processes in turn: `alnico lora extract`, an older alnico and mergekit-extract-lora on the same two models, and both limits.

    python benchmarks/extraction.py --work /tmp/bench                      # 0.6 G parameters, bf16, rank 32
    python benchmarks/extraction.py --work /tmp/bench --models smollm2     # SmolLM2-135M and a model trained from it
    python benchmarks/extraction.py --work /tmp/bench --before OLD/src     # beside another version
    python benchmarks/extraction.py --work /tmp/bench --mergekit ENV/bin/mergekit-extract-lora

Makes a Llama-shaped base and a fine-tune once (benchmarks/merge_speed.py's), of which the change is noise: the spectrum that falls
slowest. Prints medians, CPU time, peak memory and the ratio as a table; ours with the verification, and without. The page cache is
warm. Under the table stands how much of the energy of the matrices' change each adapter keeps, taken from the adapters' factors and
the models alone, in float64, over a sample of matrices that both have, with the best that their rank can.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from merge_speed import LAYOUTS, make, merging, tensors
from processes import Failed, Run, alternating, beside, cpu, limits, seconds, wall
from search_speed import smollm2

SAMPLE = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
PREFIX = "base_model.model."


def wide(values: np.ndarray) -> np.ndarray:
    return (
        (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
    ).astype(np.float64)


def shapes_of(file: Path) -> dict[str, list[int]]:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def kept(tuned: Path, base: Path, adapters: list[Path]) -> str:
    """The mean share of energy that each adapter keeps of the sample in layer 1, and the best of its rank."""
    new, old, files = tensors(tuned), tensors(base), [tensors(a) for a in adapters]
    held = [shapes_of(a / "adapter_model.safetensors") for a in adapters]
    shares = []
    for module in (f"model.layers.1.{name}" for name in SAMPLE):
        rows, (rank, columns) = (
            held[0][f"{PREFIX}{module}.lora_B.weight"][0],
            held[0][f"{PREFIX}{module}.lora_A.weight"],
        )
        delta = (wide(new[f"{module}.weight"]) - wide(old[f"{module}.weight"])).reshape(rows, columns)
        whole = float(np.sum(delta**2))
        small = delta @ delta.T if rows <= columns else delta.T @ delta
        share = [float(np.linalg.eigvalsh(small)[-rank:].sum()) / whole]
        for values, shapes in zip(files, held, strict=True):
            left, right = (f"{PREFIX}{module}.lora_{x}.weight" for x in "BA")
            made = wide(values[left]).reshape(shapes[left]) @ wide(values[right]).reshape(shapes[right])
            share.append(1 - float(np.sum((delta - made) ** 2)) / whole)
        shares.append(share)
    means = [f"{100 * statistics.mean(column):.3f} %" for column in zip(*shares, strict=True)]
    return f"energy kept of {len(shares)} matrices: the best of the rank {means[0]}, alnico {means[1]}" + (
        f", mergekit {means[2]}" if len(means) > 2 else ""
    )


def row(program: str, runs: list[Run], first: float) -> str:
    peak = max(r.peak for r in runs)
    return f"| {program} | {seconds(runs)} | {cpu(runs):.1f} | {peak >> 20} | {wall(runs) / first:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs; models are kept"
    )
    parser.add_argument("--models", choices=["made", "smollm2"], default="made")
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alnico", default=shutil.which("alnico") or "alnico", help="the command")
    parser.add_argument(
        "--before", type=Path, help="the src of another version, which runs in turn with this one"
    )
    parser.add_argument("--mergekit", help="mergekit-extract-lora of an environment of its own; run once")
    chosen = parser.parse_args()
    if chosen.models == "smollm2":
        home = chosen.work / "smollm2"
        beside(smollm2, home)
        base, tuned = home / "base", home / "a"
    else:
        layout = LAYOUTS["llama"](chosen.parameters)
        made = sum(int(np.prod(s)) for s in layout.values())
        home = chosen.work / f"llama-BF16-{made}"
        for i in range(2):
            beside(make, home / f"m{i}", layout, i, "BF16", max(made * 2 // 3, 1))
        base, tuned = home / "m0", home / "m1"
    files = [file for model in (base, tuned) for file in sorted(model.glob("*.safetensors"))]
    shapes = {name: shape for file in files for name, shape in shapes_of(file).items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    out, other = home / "adapter", home / "theirs"
    command = [chosen.alnico, "lora", "extract", str(tuned), str(base), str(out), "--rank", str(chosen.rank)]
    alone = [*command, "--quiet", "--no-verify"]
    written = 4 * chosen.rank * sum(sum(s) for s in shapes.values() if len(s) == 2)
    programs = limits(files, written, home / "limit")
    if chosen.before:
        programs["before, not verified"] = merging(alone, out, chosen.before)
        programs["before"] = merging([*command, "--quiet"], out, chosen.before)
    programs["alnico, not verified"] = merging(alone, out)
    programs["alnico"] = merging([*command, "--quiet"], out)
    runs = alternating(programs, chosen.repeat)
    if chosen.mergekit:
        options = ["--model", tuned, "--base-model", base, "--out-path", other, "--max-rank", chosen.rank]
        peer = [chosen.mergekit, *map(str, options), "--skip-undecomposable"]
        runs["mergekit"] = [merging(peer, other)()]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, BF16, rank {chosen.rank}\n"
    )
    print("| program | s | CPU s | peak MiB | x alnico |\n|---|---|---|---|---|")
    for program, found in runs.items():
        print(row(program, found, wall(runs["alnico"])), flush=True)
    print(f"\n{beside(kept, tuned, base, [out, *([other] if chosen.mergekit else [])])}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(other, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
