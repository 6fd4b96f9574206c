"""What a GPU's compiler makes of the kernels of every method: ``python -m kernels.gpu_code texts FILE``, then ``check FILE``.

The first, under the simulator, writes the texts of all kernels that merges need, with the types of their arguments; the
second compiles them to PTX, which takes the toolkit (NVVM) and no GPU, and prints what should not be in it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FORBIDDEN = {
    "a product joined with a sum": r"\bfma\.rn\.f",
    "subnormal numbers become zero": r"\.ftz\b",
    "a quotient or a root that is not rounded to nearest": r"\b(div|rcp|sqrt|rsqrt)\.(approx|full)",
    "a call": r"\bcall\b",
}
ELEMENTWISE = {
    "float64 in a kernel of float32": r"\.f64\b",
    "values of a parameter in memory": r"\b(ld|st)\.local\b",
}
GPU_GENERATIONS = [(7, 5), (9, 0)]


def type_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"UniTuple({type_of(value[0])}, {len(value)})"
    return value.dtype.name if isinstance(value, np.generic) else "int64"


def texts(file: Path) -> None:
    import alnico
    from alnico.engine import measure
    from alnico.kernels import choice
    from alnico.kernels.cuda import measuring, mixing
    from alnico.kernels.cuda.memory import GpuMemory, gpu_memory
    from alnico.methods import registry
    from alnico.testing.small_models import random_models
    from kernels.gpu_ways import GPU, OnBoth
    from kernels.simulated_gpu import (
        every_argument_is_filled,
        every_reduction_is_the_processors,
        products_are_the_processors,
    )
    from methods.cases import MODELS, OVER_MODEL, SETTINGS, options
    from methods.merging import recipe_for, write_inputs

    found: dict[str, list[str]] = {}

    def launch(_memory: GpuMemory, text: str, arguments: list[Any], **_shape: int) -> None:
        found[text] = [type_of(value) for value in arguments]

    def compare(self: OnBoth, *_: Any) -> None:  # nothing was run
        del self

    gpu_memory(GPU)  # which runs a kernel
    GpuMemory.launch = launch
    OnBoth._compare = compare
    measuring.compiled = mixing.compiled = lambda text: text
    for claim in (every_argument_is_filled, every_reduction_is_the_processors, products_are_the_processors):
        claim()
    made_of: dict[Any, OnBoth] = {}
    choice._interpreted = lambda kernel: made_of.setdefault(kernel, OnBoth(kernel))
    for name in registry():
        for setting in [*SETTINGS[name], *OVER_MODEL.get(name, [])]:
            count = MODELS.get(name, (3,))[0]
            base, models = random_models({"w": (14, 20), "b": (20,)}, count, growth=0.05)
            with tempfile.TemporaryDirectory() as folder, choice.forced("interpreted"):
                base_path, paths = write_inputs(Path(folder), base, models, "BF16")
                place = paths[0] if registry()[name].base == "first" else base_path
                recipe = recipe_for(
                    name, paths, place if registry()[name].base != "unused" else None, options(setting, count)
                )
                for small in (65_536, 100):
                    measure.SMALL = small
                    made_of.clear()
                    alnico.merge(recipe, Path(folder) / "out", overwrite=True)
    file.write_text(json.dumps(found))


def check(file: Path, step: int) -> None:
    """Compile every ``step``-th, and print a line for every fault. No GPU is asked which generation it is."""
    from numba import cuda
    from numba.cuda.cudadrv.nvvm import NVVM

    try:
        NVVM()
        cuda.runtime.get_version()
    except Exception as error:
        print(f"no toolkit: {error}")
        raise SystemExit(77) from None
    from numba.cuda import dispatcher, types

    from alnico.kernels.cuda import elements

    found: dict[str, list[str]] = json.loads(file.read_text())
    for n, (text, names) in enumerate(list(found.items())[::step]):
        generation = GPU_GENERATIONS[n % len(GPU_GENERATIONS)]
        dispatcher.get_current_device = lambda of=generation: SimpleNamespace(compute_capability=of)
        space = {**vars(elements)}
        exec(text, space)
        kinds = {name: getattr(types, name) for name in ("int64", "uint64", "float32", "float64", "UniTuple")}
        signature = types.void(*[eval(name, kinds) for name in names])
        ptx, _ = cuda.compile_ptx(space["run"], signature, cc=generation)
        is_narrow = "REAL = np.float32" in text
        faults = dict(FORBIDDEN)
        if (
            is_narrow
            and "cuda.shared.array" not in text
            and "cuda.local.array" not in text
            and "s0 =" not in text
        ):
            faults |= ELEMENTWISE
        for fault, pattern in faults.items():
            for line in [line for line in ptx.splitlines() if re.search(pattern, line)][:3]:
                print(f"{fault}: {line.strip()}\n{text}\n")
    print(f"{len(found)} kernels", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1] == "texts":
        texts(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), int(sys.argv[3]))
