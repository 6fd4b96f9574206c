"""What a GPU is worth: merges in memory, merges of files, whole matrices, scoring and a search, on the GPU and on the processor.

    python benchmarks/gpu.py --work /tmp/bench                              # all parts; about ten minutes
    python benchmarks/gpu.py --work /tmp/bench --only memory,files
    python benchmarks/gpu.py --work /tmp/bench --table docs/benchmarks.md   # puts the tables into the page

- memory: a base and 3 models of --millions bf16 parameters that live on the GPU, merged there by ``merge_state_dicts``: the
  seconds, and the rate of the least bytes (every input read once, the output written once) next to the rate of a copy within the
  card in the same run.
- files: the same merges by ``alnico merge``, whole processes, with ``--device cpu`` and ``--device cuda``.
- matrices: tsv over 4 matrices of --shape, on the GPU and on the processor's threads, and how far the results differ.
- scoring: the perplexity of SmolLM2-135M in bf16 on both devices.
- search: trials on SmolLM2-135M, and the share of a trial that is not evaluation.

``--device`` names another GPU. Everything is run once before it is measured, so compiling is left out; medians of --runs runs.
Scoring and search need the test line of the README.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import alnico
from alnico.devices import Device, devices_for

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"weights": 0.4},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.5},
}
PARTS = ("memory", "files", "matrices", "scoring", "search")
MODELS = 3
MARK = "<!-- gpu -->", "<!-- /gpu -->"


def seconds_of(call: Callable[[], Any], device: Device, runs: int) -> float:
    """The median of some runs, after one that is not counted."""
    taken = []
    for _ in range(runs + 1):
        wait(device)
        begin = time.perf_counter()
        result = call()
        wait(device)
        taken.append(time.perf_counter() - begin)
        del result
    return statistics.median(taken[1:])


def wait(device: Device) -> None:
    if device.torch_name != "cpu":
        torch.cuda.synchronize(device.torch_name)


def copy_rate(device: Device, count: int, runs: int) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.ones(count, dtype=torch.uint8, device=device.torch_name)
    target = torch.empty_like(source)
    return 2 * count / seconds_of(lambda: target.copy_(source), device, runs)


def state(millions: float, seed: int, device: Device, base: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """A model of some layers, or a fine-tune of the base, in bf16 on a device."""
    generator = torch.Generator(device.torch_name).manual_seed(seed)
    side = 4096 if millions >= 200 else 128
    rows = max(int(millions * 1e6 / side / 8), 1)
    made = {}
    for i in range(8):
        values = torch.randn(rows, side, generator=generator, device=device.torch_name)
        name = f"model.layers.{i}.mlp.up_proj.weight"
        made[name] = (
            (values * 0.02).bfloat16() if base is None else (base[name].float() + values * 0.001).bfloat16()
        )
    return made


def memory(device: Device, millions: float, runs: int) -> list[list[str]]:
    """Merges of models that live on the device."""
    base = state(millions, 0, device, None)
    models = [state(millions, i + 1, device, base) for i in range(MODELS)]
    size = sum(t.numel() * t.element_size() for t in base.values())
    rate = copy_rate(device, max(size, 1 << 20), runs)
    rows = []
    for method, options in METHODS.items():
        on = None if method == "linear" else base

        def merge(method: str = method, options: dict[str, Any] = options, on: Any = on) -> Any:
            return alnico.merge_state_dicts(
                models, method, base=on, device=device.name, unrelated="allow", **options
            )

        taken = seconds_of(merge, device, runs)
        moved = size * (MODELS + 1 + (on is not None))
        rows.append(
            [
                method,
                f"{taken:.4f}",
                f"{moved / taken / 1e9:.0f}",
                f"{rate / 1e9:.0f}",
                f"{moved / taken / rate:.0%}",
            ]
        )
    return rows


def files(work: Path, device: Device, millions: float, runs: int) -> list[list[str]]:
    """Merges from disk to disk, whole processes, in turn."""
    from safetensors.torch import save_file

    cpu = Device("cpu")
    folder = work / f"models-{millions:g}"
    base: dict[str, torch.Tensor] | None = None
    for i, name in enumerate(("base", *(f"m{i}" for i in range(MODELS)))):
        made = state(millions, i, cpu, base)
        base = base or made
        if not (folder / name / "model.safetensors").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_file(made, folder / name / "model.safetensors")
    rows = []
    for method, options in METHODS.items():
        parameters = "".join(f"{'weight' if k == 'weights' else k}: {v}\n  " for k, v in options.items())
        base_line = "" if method == "linear" else f"base_model: {folder / 'base'}\n"
        recipe = work / f"{method}.yml"
        recipe.write_text(
            f"merge_method: {method}\n{base_line}models: [{', '.join(str(folder / f'm{i}') for i in range(MODELS))}]\n"
            + (f"parameters:\n  {parameters.strip()}\n" if parameters else "")
            + "unrelated: allow\n"
        )
        taken: dict[str, list[float]] = {"cpu": [], device.name: []}
        for run in range(runs + 1):
            for name, times in taken.items():
                out = work / "merged"
                shutil.rmtree(out, ignore_errors=True)
                begin = time.perf_counter()
                command = [
                    sys.executable,
                    "-m",
                    "alnico",
                    "merge",
                    str(recipe),
                    str(out),
                    "--device",
                    name,
                    "-q",
                ]
                subprocess.run(command, check=True)
                if run:
                    times.append(time.perf_counter() - begin)
        on_cpu, on_gpu = (statistics.median(times) for times in taken.values())
        rows.append([method, f"{on_cpu:.2f}", f"{on_gpu:.2f}", f"{on_cpu / on_gpu:.2f}"])
    return rows


def matrices(device: Device, shape: tuple[int, int], runs: int) -> list[list[str]]:
    """tsv over whole matrices, on the device and on the processor."""
    generator = torch.Generator().manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(*shape, generator=generator) * 0.02}
    side = min(shape)
    models = []
    for _ in range(4):
        left, right = (torch.randn(n, side, generator=generator) / n**0.5 for n in shape)
        change = (left * torch.arange(1, side + 1) ** -0.5) @ right.T
        models.append({name: values + 0.01 * change for name, values in base.items()})

    def merge(name: str) -> dict[str, torch.Tensor]:
        return alnico.merge_state_dicts(models, "tsv", base=base, device=name, unrelated="allow")  # type: ignore[no-any-return]

    results = {name: merge(name) for name in ("cpu", device.name)}
    on_cpu, on_gpu = (
        seconds_of(lambda name=name: merge(name), where, runs)  # type: ignore[misc]
        for name, where in (("cpu", Device("cpu")), (device.name, device))
    )
    first, second = (next(iter(r.values())).double().cpu() for r in results.values())
    distance = float((first - second).abs().max() / first.abs().max())
    return [
        [
            f"{shape[0]} x {shape[1]} x 4",
            f"{on_cpu:.2f}",
            f"{on_gpu:.2f}",
            f"{on_cpu / on_gpu:.1f}",
            f"{distance:.1e}",
        ]
    ]


def _smollm2(work: Path) -> list[str]:
    from search_speed import NAMES, smollm2

    root = work / "smollm2"
    smollm2(root)
    return [str(root / name) for name in ("base", *NAMES)]


def _text() -> str:
    """A text that every installation has: the docstrings of Python's own library."""
    import argparse as a
    import asyncio as b
    import collections as c
    import decimal as d
    import email as e

    return "\n\n".join((Path(module.__file__ or "")).read_text("utf-8") for module in (a, b, c, d, e))[
        :200_000
    ]


def scoring(work: Path, device: Device, windows: int, runs: int) -> list[list[str]]:
    """The perplexity of SmolLM2 in bf16 on both devices."""
    from alnico.evaluation.perplexity import Perplexity

    model = _smollm2(work)[0]
    task = Perplexity("text", _text(), window=512, limit=windows)
    seconds, values = [], []
    for name, where in (("cpu", Device("cpu")), (device.name, device)):

        def score(name: str = name) -> float:
            card = alnico.evaluate([model], [task], device=name, dtype="bfloat16")
            return card.models[0].scores["text"].value

        values.append(score())
        seconds.append(seconds_of(score, where, runs))
    return [
        [
            f"{windows} windows of 512",
            f"{seconds[0]:.2f}",
            f"{seconds[1]:.2f}",
            f"{seconds[0] / seconds[1]:.1f}",
            f"{values[0]:.3f} and {values[1]:.3f}",
        ]
    ]


def search(work: Path, device: Device, windows: int) -> list[list[str]]:
    """The seconds of a trial that go to making the candidate, and those of its evaluation."""
    from alnico.evaluation.candidates import Candidates
    from alnico.evaluation.perplexity import Perplexity
    from alnico.evaluation.placement import ModulePlacement
    from alnico.recipe.load import load_recipe
    from search_speed import recipes

    base, *models = _smollm2(work)
    task = Perplexity("text", _text(), window=512, limit=windows)
    rows = []
    for kind, recipe_of in recipes(base, models).items():
        making, evaluating = [], []
        with Candidates([base, *models], placement=ModulePlacement.of(device.name)) as candidates:
            for trial in range(8):
                wait(device)
                begin = time.perf_counter()
                candidate = candidates.make(load_recipe({**recipe_of(trial), "unrelated": "allow"}))
                candidate.module("causal")
                wait(device)
                made = time.perf_counter()
                task.evaluate(candidate)
                wait(device)
                making.append(made - begin)
                evaluating.append(time.perf_counter() - made)
        make, score = statistics.median(making[3:]), statistics.median(evaluating[3:])
        rows.append([kind, f"{make:.3f}", f"{score:.3f}", f"{score / (make + score):.0%}"])
    return rows


HEADS: dict[str, tuple[str, list[str]]] = {
    "memory": (
        "In memory, a base and 3 models of {millions:g} M parameters in bf16 on the GPU",
        ["method", "s", "GB/s of the least bytes", "GB/s of a copy", "share"],
    ),
    "files": (
        "From disk to disk, whole processes, the same models",
        ["method", "processor, s", "GPU, s", "x faster"],
    ),
    "matrices": (
        "Whole matrices by tsv",
        ["matrices", "processor, s", "GPU, s", "x faster", "largest difference"],
    ),
    "scoring": (
        "Perplexity of SmolLM2-135M in bf16",
        ["text", "processor, s", "GPU, s", "x faster", "perplexity"],
    ),
    "search": (
        "A trial of a search on SmolLM2-135M",
        ["recipe", "candidate, s", "evaluation, s", "evaluation's share"],
    ),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    before = page.read_text("utf-8")
    after = re.sub(
        f"{re.escape(MARK[0])}.*?{re.escape(MARK[1])}",
        lambda _: f"{MARK[0]}\n{text}\n{MARK[1]}",
        before,
        flags=re.DOTALL,
    )
    if before == after:
        raise SystemExit(f"{page}: has no {MARK[0]} ... {MARK[1]}")
    page.write_text(after, "utf-8")


def run(
    work: Path,
    device: Device,
    *,
    only: Sequence[str] = PARTS,
    millions: float = 1000,
    shape: tuple[int, int] = (4096, 14336),
    windows: int = 64,
    runs: int = 5,
) -> str:
    """Run parts and return their tables."""
    work.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], list[list[str]]]] = {
        "memory": lambda: memory(device, millions, runs),
        "files": lambda: files(work, device, millions, runs),
        "matrices": lambda: matrices(device, shape, runs),
        "scoring": lambda: scoring(work, device, windows, runs),
        "search": lambda: search(work, device, windows),
    }
    texts = [
        f"Measured on {device}, {platform.processor() or platform.machine()}, torch {torch.__version__}."
    ]
    for part in only:
        title, head = HEADS[part]
        made = table(head, parts[part]())
        print(f"{title.format(millions=millions)}\n\n{made}\n", flush=True)
        texts += [f"**{title.format(millions=millions)}**", made]
    return "\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    parser.add_argument("--device", default="cuda", help="the GPU")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--millions", type=float, default=1000, help="parameters of a model, in millions")
    parser.add_argument("--shape", default="4096x14336", help="rows x columns of the whole matrices")
    parser.add_argument("--windows", type=int, default=64, help="windows of text that are scored")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--table", type=Path, help="page that gets the tables, between its marks")
    words = parser.parse_args()
    rows, columns = map(int, words.shape.split("x"))
    text = run(
        words.work,
        devices_for("merging", words.device)[0],
        only=words.only.split(","),
        millions=words.millions,
        shape=(rows, columns),
        windows=words.windows,
        runs=words.runs,
    )
    print(text)
    if words.table is not None:
        put_into(words.table, text)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
