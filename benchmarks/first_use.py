"""Measures the first merge by each method in a new process without compiled kernels, and merges of real models.

    python benchmarks/first_use.py [--compiled] [--real]

Of each method: three networks (784-128-64-10) and their base in memory, in a process that has imported torch and
has an empty cache of kernels. ``cold`` is the first call of ``alnico.merge_models``, ``warm`` the second in the
same process. ``--compiled`` compiles every kernel, as it was before numpy ran kernels. ``--real`` merges the two
models of the demo on disk instead; there ``warm`` is a second process whose kernels are compiled and cached.
Seconds are of the processor, of this process and its threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MODELS = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
"""Models besides the base, where a method does not take any number."""

OPTIONS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": [1.0, 3.0]},
    "nearswap": {"t": 0.1},
    "passthrough": {"scale": 0.5},
}

WITH_FILES = ("fisher", "regmean")
"""Methods that need statistics in files."""

REAL = ("linear", "ties", "dare_ties", "breadcrumbs", "sce")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compiled", action="store_true", help="compile every kernel")
    parser.add_argument("--real", action="store_true", help="merge the models of the demo on disk")
    parser.add_argument("--only", help="measure one method in this process and print JSON")
    given = parser.parse_args()
    if given.only:
        measure = of_real_models if given.real else of_networks
        print(json.dumps(measure(given.only, given.compiled)))
        return
    from alnico.methods import registry

    names = REAL if given.real else [name for name in registry() if name not in WITH_FILES]
    print("| method | cold (s) | warm (s) | ratio | compiled |\n|---|--:|--:|--:|--:|")
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            cold = _measured(name, given, cache)
            warm = cold["second"]
            if given.real:
                _measured(name, given, cache, "--compiled")  # compiles what the first run did not
                warm = _measured(name, given, cache, "--compiled")["first"]
        ratio = cold["first"] / max(warm, 1e-9)
        print(
            f"| {name} | {cold['first']:.2f} | {warm:.2f} | {ratio:.1f} | {cold['compiled']:.1f} |",
            flush=True,
        )


def _measured(name: str, given: argparse.Namespace, cache: str, *more: str) -> dict[str, float]:
    """Measure a method in a process of its own, whose kernels are in ``cache``."""
    words = [
        "--only",
        name,
        *(["--compiled"] if given.compiled else []),
        *(["--real"] if given.real else []),
        *more,
    ]
    shown = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, "ALNICO_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    result: dict[str, float] = json.loads(shown.splitlines()[-1])
    return result


def seconds() -> float:
    times = os.times()
    return times.user + times.system


def _twice(merge: Any, compiled: bool) -> dict[str, float]:
    from alnico.kernels.choice import forced
    from alnico.kernels.clock import CLOCK

    with forced("compiled") if compiled else nullcontext():
        begin = seconds()
        merge()
        between = seconds()
        merge()
        return {"first": between - begin, "second": seconds() - between, "compiled": CLOCK.seconds}


def of_networks(name: str, compiled: bool) -> dict[str, float]:
    import torch
    from torch import nn

    import alnico

    torch.manual_seed(0)
    sizes = (784, 128, 64, 10)

    def network() -> Any:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    base = network()
    models = []
    for _ in range(MODELS.get(name, 3)):
        model = network()
        model.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in base.state_dict().items()})
        models.append(model)
    bases = {} if name in ("linear", "passthrough", "nuslerp", "karcher", "multislerp") else {"base": base}
    return _twice(lambda: alnico.merge_models(models, name, **bases, **OPTIONS.get(name, {})), compiled)


def of_real_models(name: str, compiled: bool) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import alnico
    from real import BASE, TUNED, installed

    base, tuned = (str(installed(*place)) for place in (BASE, TUNED))
    recipe: dict[str, Any] = {"merge_method": name, "models": [tuned, base]}
    if name != "linear":
        recipe["base_model"] = base
    if name in ("ties", "dare_ties", "breadcrumbs"):
        recipe["parameters"] = {"density": 0.2, "weight": 0.5}
    with tempfile.TemporaryDirectory() as folder:
        return _twice(lambda: alnico.merge(recipe, f"{folder}/out", overwrite=True), compiled)


if __name__ == "__main__":
    main()
