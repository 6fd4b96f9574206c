"""Mixing alone, one thread, from the cache: parameters a second by number of models; and merges of many small models.

    python benchmarks/kernel_speed.py --models 3,8,9,16,64,200 --methods linear,ties --empty
    python benchmarks/kernel_speed.py --models 200 --methods linear,ties,model_stock --merge --empty

Compiles (or loads) the kernels of the given methods for BF16 models and mixes a block that stays in the second-level cache, over and
over; prints the best of several rounds, since what disturbs a shared machine only makes it slower. ``ready`` are the seconds of the
processor until the kernel is there, in this process: the first one includes importing numba. ``--empty`` begins with an empty cache
of kernels. ``--merge`` merges as many models of 1 M parameters (float16, on disk) instead, in a new process with every kernel
compiled, and again with the kernels in the cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from alnico.engine.kernel_arguments import kind_of
from alnico.kernels.build import compile_kernel
from alnico.kernels.constants import CODES, LEAF
from alnico.kernels.mix_kernel import MixKernel
from alnico.methods import find

OPTIONS = {"ties": {"density": 0.3}}
ROUNDS = 15


def raw_bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def speed(name: str, models: int) -> tuple[float, float]:
    """Parameters a second, and the seconds it took to compile or load the kernel."""
    elements = (
        max(LEAF * 8 // max(models, 8) // 1024, 4) * 1024
    )  # as many bytes for any number of models from 8 on
    method = find(name)
    merge = method.bind(OPTIONS.get(name, {}), models)
    kinds = tuple(kind_of(argument) for argument in merge.arguments)
    begin = time.process_time()
    run = compile_kernel(MixKernel(merge.mix, models, method.space == "delta", kinds, "float32"))
    ready = time.process_time() - begin
    random = np.random.default_rng(0)
    base = random.standard_normal(elements) * 0.02
    raws = tuple(raw_bf16(base + 0.002 * random.standard_normal(elements)) for _ in range(models))
    arguments = [np.full(models, 0.002, np.float32) if kind == "numbers" else 1.0 for kind in kinds]
    raw_base, out = raw_bf16(base), np.empty(2 * elements, np.uint8)
    codes = np.full(models, CODES["BF16"])
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(5):
            run(raws, codes, raw_base, CODES["BF16"], out, CODES["BF16"], 0, 0, *arguments)
        seconds.append((time.process_time() - begin) / 5)
    return elements / min(seconds), ready


MERGE = """
import sys, alnico
from alnico.kernels.choice import forced
method, folder, count = sys.argv[1:]
recipe = {"merge_method": method, "models": [f"{folder}/{i}" for i in range(int(count))], "unrelated": "allow"}
recipe |= {} if method == "linear" else {"base_model": f"{folder}/base"}
recipe |= {"parameters": {"density": 0.3}} if method == "ties" else {}
with forced("compiled"):
    alnico.merge(recipe, f"{folder}/out", overwrite=True, threads=1)
"""


def write_models(folder: Path, count: int) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    base = {f"layers.{i}.weight": random.standard_normal((512, 256)) * 0.02 for i in range(8)}
    for name in ("base", *map(str, range(count))):
        (folder / name).mkdir()
        noise = 0.0 if name == "base" else 0.002
        tensors = {
            n: (v + noise * random.standard_normal(v.shape)).astype(np.float16) for n, v in base.items()
        }
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")


def merge_seconds(method: str, folder: Path, count: int) -> tuple[float, float]:
    """Seconds of the clock and of the processor for a merge in a process of its own."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", MERGE, method, str(folder), str(count)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="3,8,16,64")
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--empty", action="store_true", help="begin with an empty cache of kernels")
    parser.add_argument("--merge", action="store_true", help="merge small models on disk")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.empty:
            os.environ["ALNICO_CACHE_DIR"] = f"{folder}/cache"
        (show_merges if chosen.merge else show_kernels)(chosen, Path(folder))


def show_merges(chosen: argparse.Namespace, folder: Path) -> None:
    print("| method | models | first s | CPU s | then s | CPU s |\n|---|---|---|---|---|---|")
    for models in map(int, chosen.models.split(",")):
        place = folder / str(models)
        place.mkdir()
        write_models(place, models)
        for method in chosen.methods.split(","):
            first, then = (merge_seconds(method, place, models) for _ in range(2))
            cells = " | ".join(f"{number:.1f}" for number in (*first, *then))
            print(f"| {method} | {models} | {cells} |", flush=True)


def show_kernels(chosen: argparse.Namespace, _folder: Path) -> None:
    print("| method | models | G parameters/s a thread | ready after CPU s |")
    print("|---|---|---|---|")
    for method in chosen.methods.split(","):
        for models in map(int, chosen.models.split(",")):
            rate, ready = speed(method, models)
            print(f"| {method} | {models} | {rate / 1e9:.3f} | {ready:.1f} |", flush=True)


if __name__ == "__main__":
    main()
