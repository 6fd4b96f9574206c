"""Compiles the kernels of merge methods ahead of their use, for container images and clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from alnico.checkpoint.memory_model import MemoryModel
from alnico.engine import measure, row_ranks
from alnico.engine.matrix import rounding_kernel
from alnico.engine.mix import mix_kernel
from alnico.errors import AlnicoError, OutputError, RecipeError, RunError
from alnico.kernels import build
from alnico.kernels.cache import cache_directory
from alnico.kernels.clock import counts_compiling
from alnico.kernels.constants import FEW_MODELS
from alnico.methods import find, registry
from alnico.methods.base import Method
from alnico.methods.shared.documentation import read_documentation
from alnico.plan.build import build_plan
from alnico.plan.job import Plan
from alnico.recipe.load import load_recipe
from alnico.run_options import RunOptions

SHAPES = {"large.weight": (512, 256), "small.weight": (32, 16), "small.bias": (16,)}
"""Tensors that a merge measures in different ways: thresholds of a large one are searched, of a small one sorted."""

MANY = FEW_MODELS + 1
"""A number of models whose kernels serve all larger numbers."""

DTYPES = ("bfloat16", "float16", "float32", "float64")

CHILD = "import sys; from alnico.engine.warm import compile_lines; compile_lines(sys.stdin)"


@dataclass(frozen=True)
class WarmResult:
    """What :func:`warm` did. ``folder`` is where the kernels are, ``byte_size`` their size there.

    ``made`` were compiled, ``ready`` were there already. ``left`` says of each method that was left out why.
    """

    folder: str
    methods: tuple[str, ...]
    models: tuple[int, ...]
    dtypes: tuple[str, ...]
    made: int
    ready: int
    byte_size: int
    seconds: float
    left: dict[str, str]
    compile_seconds: float = 0.0

    def data(self) -> dict[str, Any]:
        """The result as plain data, for ``--json``."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "compile_seconds"
        }


@counts_compiling
def warm(
    methods: Sequence[str] = (),
    *,
    models: Sequence[int] = (2, 3, 4),
    dtypes: Sequence[str] = ("bfloat16", "float16", "float32"),
    threads: int | None = None,
) -> WarmResult:
    """Compile the kernels of merge methods into the cache, so that later merges compile nothing.

    Of each method: its defaults, the parameters that its documentation starts with, and its presets. Kernels fit the
    processor that they were compiled on, and one version of alnico, numba and Python: run it where merges will run, or on the
    same kind of processor. What is in the cache already is left as it is.

    Options:
        methods: Names of merge methods; default: all.
        models: Numbers of models, without the base; those above 8 share their kernels.
        dtypes: Dtypes of the models; bfloat16, float16 and float32 share their kernels.
        threads: Number of processes that compile; default: one per processor.
    Errors: MethodError for an unknown method; RecipeError for a number or dtype that cannot be; OutputError if the cache
        cannot be written.
    """
    begin = time.perf_counter()
    chosen = [find(name) for name in methods] or list(registry().values())
    wrong = [
        f"models has {n!r}; expected whole numbers from 1 on"
        for n in models
        if not (isinstance(n, int) and n > 0)
    ]
    wrong += [f"dtypes has {d}; expected {', '.join(DTYPES)}" for d in dtypes if d not in DTYPES]
    if wrong or not models or not dtypes:
        raise RecipeError(*(wrong or ["models or dtypes is empty; expected at least one of each"]))
    texts: dict[str, None] = {}
    left: dict[str, str] = {}
    for method in chosen:
        found = dict.fromkeys(_texts(method, models, dtypes))
        if not found:
            left[method.name] = "needs statistics" if method.statistics else "computes nothing"
        texts |= found
    missing = [text for text in texts if not build.is_ready(text)]
    _compile(missing, RunOptions.of(threads=threads).threads or os.cpu_count() or 1)
    folder = cache_directory()
    if folder is None or not all(map(build.is_ready, missing)):
        raise OutputError(
            f"warm: {'there is no private folder for compiled kernels' if folder is None else f'{folder} does not keep kernels'}; "
            "expected a folder that only this user can write, on a disk with room. Set ALNICO_CACHE_DIR to one."
        )
    size = sum(map(build.size_of, texts))
    names = tuple(m.name for m in chosen if m.name not in left)
    return WarmResult(
        str(folder), names, tuple(models), tuple(dtypes), len(missing), len(texts) - len(missing), size,
        time.perf_counter() - begin, left,
    )  # fmt: skip


def _texts(method: Method, models: Sequence[int], dtypes: Sequence[str]) -> Iterator[str]:
    """The texts of all kernels that merges by a method need."""
    for real in sorted({"float64" if dtype == "float64" else "float32" for dtype in dtypes}):
        for count in sorted({min(n, MANY) for n in models}):
            for parameters in _settings(method):
                for plan in _plans(method, count, parameters, real):
                    yield from map(build.text_of, _kernels(plan))


def _settings(method: Method) -> list[dict[str, Any]]:
    """Parameters of a method, each a way in which it is used: defaults, those to start with, presets."""
    start = read_documentation(method).parts.get("Start with")
    return [{}, *([yaml.safe_load(start)] if start else []), *({"preset": name} for name in method.presets)]


def _plans(method: Method, count: int, parameters: dict[str, Any], real: str) -> Iterator[Plan]:
    """Plans of made models, with their base and without; of fewer where a method takes no more."""
    most = method.models[1]
    for number in {count, min(count, most or count), min(count, (most or count + 1) - 1)}:
        names = [f"model{i}" for i in range(number)]
        for base in ("base", names[0] if names else None, None):
            recipe: dict[str, Any] = {"merge_method": method.name, "models": names, "parameters": parameters}
            if base is not None:
                recipe["base_model"] = base
            with suppress(AlnicoError):  # a method that needs a base, or has none, or takes other numbers
                yield build_plan(load_recipe(recipe), open_source=lambda name: _made_model(name, real))


def _made_model(name: str, real: str) -> MemoryModel:
    return MemoryModel(name, {n: np.zeros(shape, real) for n, shape in SHAPES.items()})


def _kernels(plan: Plan) -> Iterator[Any]:
    """The kernels that a merge by a plan runs."""
    for job in plan.jobs:
        if job.kind == "matrix":
            yield rounding_kernel()
        if job.kind == "mix":
            yield from (*row_ranks.kernels(job), *measure.kernels(job), mix_kernel(job))
    for fact, jobs in measure.over_model(plan.jobs).items():
        yield measure.model_kernel(fact, jobs)


def _compile(texts: Sequence[str], processes: int) -> None:
    """Compile kernels into the cache, in so many processes."""
    count = min(processes, len(texts))
    if count < 2:
        for text in texts:
            build.make_ready(text)
        return
    # Processes of their own, not threads: numba compiles one function at a time. They import nothing from the working directory,
    # whose files may be a stranger's.
    children = [
        subprocess.Popen([sys.executable, "-P", "-c", CHILD], stdin=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for i, child in enumerate(children):
            assert child.stdin is not None
            child.stdin.write("".join(f"{json.dumps(text)}\n" for text in texts[i::count]))
            child.stdin.close()
        for child in children:
            if child.wait():
                raise RunError("warm: a process that compiles kernels ended with an error, printed above.")
    finally:
        for child in children:
            child.kill()
            child.wait()


def compile_lines(lines: Iterable[str]) -> None:
    """Compile the kernels whose texts are lines of JSON."""
    for line in lines:
        build.make_ready(json.loads(line))
