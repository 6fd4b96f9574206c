"""Mixing alone, one thread, from the cache: parameters a second by number of models.

    python benchmarks/kernel_speed.py --models 3,8,16,64 --methods linear,ties

Compiles (or loads) the kernels of the given methods for BF16 models and mixes a block that stays in the second-level cache, over and
over; prints the best of several rounds, since what disturbs a shared machine only makes it slower.
"""

from __future__ import annotations

import argparse
import time

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
    method = find(name)
    merge = method.bind(OPTIONS.get(name, {}), models)
    kinds = tuple(kind_of(argument) for argument in merge.arguments)
    begin = time.perf_counter()
    run = compile_kernel(MixKernel(merge.mix, models, method.space == "delta", kinds, "float32"))
    ready = time.perf_counter() - begin
    random = np.random.default_rng(0)
    base = random.standard_normal(LEAF) * 0.02
    raws = tuple(raw_bf16(base + 0.002 * random.standard_normal(LEAF)) for _ in range(models))
    arguments = [np.full(models, 0.002, np.float32) if kind == "numbers" else 1.0 for kind in kinds]
    raw_base, out = raw_bf16(base), np.empty(2 * LEAF, np.uint8)
    codes = np.full(models, CODES["BF16"])
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(5):
            run(raws, codes, raw_base, CODES["BF16"], out, CODES["BF16"], 0, 0, *arguments)
        seconds.append((time.perf_counter() - begin) / 5)
    return LEAF / min(seconds), ready


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="3,8,16,64")
    parser.add_argument("--methods", default="linear,ties")
    chosen = parser.parse_args()
    print("| method | models | G parameters/s a thread | ready after s |")
    print("|---|---|---|---|")
    for method in chosen.methods.split(","):
        for models in map(int, chosen.models.split(",")):
            rate, ready = speed(method, models)
            print(f"| {method} | {models} | {rate / 1e9:.3f} | {ready:.1f} |", flush=True)


if __name__ == "__main__":
    main()
