"""A model in the shape of Llama 3.2 1B merged by TSV from three fine-tunes: time and memory against the plan, killed and taken up.

    python benchmarks/spectral_merge.py --work DIR                      # 16 layers of 2048 and 8192, bf16, three models
    python benchmarks/spectral_merge.py --work DIR --layers 2 --whole   # and an uninterrupted merge, whose bytes are compared

Makes a base and fine-tunes once (benchmarks/merge_speed.py's), whose changes are noise: the spectrum that falls slowest. The vocabulary
is cut to 8,192 tokens, since tables of tokens are not decomposed. The merge is killed (`kill -9`) when half of its tensors are in its
journal, and the same command takes it up. A sample of the output is then made again from the inputs. Prints what the plan said, and
seconds, CPU seconds and the largest resident size of both parts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import alnico
from alnico.engine.matrix_time import forecast_matrices
from merge_speed import make, shapes
from processes import Failed, Run, measured

HIDDEN, INNER, VOCABULARY = 2048, 8192, 8192


def models(work: Path, layers: int, count: int) -> list[Path]:
    layout = shapes(layers, HIDDEN, INNER, VOCABULARY)
    paths = [work / f"models-{layers}" / ("base" if i == 0 else f"tuned-{i}") for i in range(count + 1)]
    for i, path in enumerate(paths):
        make(path, layout, i, "BF16", 4 << 30)
        config = json.loads((path / "config.json").read_text())
        config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY}
        config |= {"num_attention_heads": 32, "num_key_value_heads": 8}
        (path / "config.json").write_text(json.dumps(config))
    return paths


def killed(command: list[str], out: Path, tensors: int) -> tuple[Run, int]:
    """Run a merge and kill it when that many tensors are in its journal; the largest size is the kernel's count of it."""
    journal = out.parent / f".{out.name}.alnico-part" / "journal.jsonl"
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = 0
    while done < tensors:
        if process.poll() is not None:
            raise Failed("the merge ended before it was killed")
        time.sleep(0.2)
        done = journal.read_bytes().count(b'"tensor"') if journal.exists() else 0
    process.send_signal(signal.SIGKILL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -signal.SIGKILL
    run = Run(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    return run, done


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def line(what: str, run: Run) -> str:
    return f"{what}: {run.wall:.0f} s, {run.cpu:.0f} s of CPU, {run.peak / 2**20:.0f} MiB resident"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--method", default="tsv")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=float, default=0.02, help="share of the output that is made again")
    parser.add_argument(
        "--whole", action="store_true", help="merge without a kill, too, and compare all bytes"
    )
    given = parser.parse_args()
    base, *tuned = models(given.work, given.layers, given.models)
    recipe = {
        "merge_method": given.method,
        "base_model": str(base),
        "models": [str(path) for path in tuned],
        "dtype": "bfloat16",
    }
    path, out = given.work / "recipe.json", given.work / "out"
    path.write_text(json.dumps(recipe))
    plan = alnico.plan(recipe, memory=given.memory, threads=given.threads)
    forecast = forecast_matrices(plan)
    assert forecast is not None
    print(
        f"{plan.elements / 1e9:.2f} G parameters, {forecast.tensors} matrices, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"plan: about {forecast.seconds:.0f} s, at most {forecast.largest_bytes / 2**20:.0f} MiB a matrix, {forecast.at_once} at a "
        f"time, at most {plan.memory.peak_bytes / 2**20:.0f} MiB",
        flush=True,
    )
    options = ["--memory", given.memory, "--threads", str(given.threads)]
    command = [sys.executable, "-m", "alnico", "merge", str(path), str(out), *options]
    first, done = killed(command, out, len(plan.jobs) // 2)
    print(line(f"killed with {done} of {len(plan.jobs)} tensors in the journal", first), flush=True)
    print(line("taken up", measured(command)), flush=True)
    if given.sample:
        sampled = alnico.verify(out, against_inputs=True, sample=given.sample, threads=given.threads)
        print(f"made again from the inputs: {sampled}", flush=True)
    if given.whole:
        whole = given.work / "whole"
        print(line("without a kill", measured([*command[:5], str(whole), *options])))
        print("the bytes are", "the same" if weights_in(out) == weights_in(whole) else "DIFFERENT")
        shutil.rmtree(whole)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
