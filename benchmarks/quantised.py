"""Merging with a quantised base, beside the same merge with its bf16 copy, in turn, in one process.

    python benchmarks/quantised.py --work /dev/shm/bench
    python benchmarks/quantised.py --work /dev/shm/bench --formats "nf4" "AWQ" --repeat 9

Each format has one matrix of 2048 x 4096, stored under several names. Both merges average the base with the same bf16 model; their
outputs are equal. Prints for each format the medians, their ratio, and the time to read the base alone, for an element.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import alnico
from alnico.checkpoint.source import Model
from made_quantised import FORMATS, QuantisedMatrix, awq, gptq, save_quantised

ROWS, COLUMNS, COPIES = 2048, 4096, 8
BLOCK = 524_288
CHOSEN = (
    "fp8 in blocks", "fp8 of FBGEMM", "fp8 of ComfyUI", "mxfp8", "nvfp4 of ModelOpt", "mxfp4 of compressed-tensors", "mxfp4 of gpt-oss", "int8 by row",
    "int4 in groups", "int4 with an order", "nf4", "nf4 with double quantisation", "int8 of bitsandbytes", "GPTQ", "GPTQ with an order", "AWQ",
)  # fmt: skip
IN_GROUPS_OF_128 = {
    "GPTQ": gptq(group=128), "GPTQ with an order": gptq(group=128, has_order=True), "AWQ": functools.partial(awq, group=128),
}  # fmt: skip
"""Published models have these; those of the tests have groups of 32."""


def make(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """Write a quantised model, its bf16 copy, and another model."""
    random = np.random.default_rng(0)
    one = (FORMATS | IN_GROUPS_OF_128)[kind](random, ROWS, COLUMNS)
    named: dict[str, QuantisedMatrix] = dict.fromkeys((f"layers.{i}.a" for i in range(COPIES)), one)
    base = save_quantised(folder / "base", named, {})
    with alnico.open_model(base) as model:
        values = {name: torch.from_numpy(model.read(name)).to(torch.bfloat16) for name in model.tensors}
    for which in ("copy", "other"):
        (folder / which).mkdir()
        save_file(values, folder / which / "model.safetensors", {"format": "pt"})
    return base, folder / "copy", folder / "other"


def merge(base: Path, other: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    alnico.merge(
        {
            "merge_method": "linear",
            "models": [str(base), str(other)],
            "dtype": "bfloat16",
            "unrelated": "allow",
        },
        out,
    )
    return time.perf_counter() - begin


def read(path: Path) -> float:
    """Read all tensors by blocks; returns the nanoseconds for an element."""
    buffer = np.empty(4 * BLOCK, np.uint8)
    with alnico.open_model(path) as model:
        begin = time.perf_counter()
        for name in model.tensors:
            _read_tensor(model, name, buffer)
        elements = sum(t.elements for t in model.tensors.values())
        return (time.perf_counter() - begin) / elements * 1e9


def _read_tensor(model: Model, name: str, buffer: np.ndarray) -> None:
    size = model.tensors[name].byte_size
    for offset in range(0, size, buffer.size):
        model.read_into(name, offset, memoryview(buffer[: min(buffer.size, size - offset)]))


def measure(runs: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """The medians of alternating runs; the first of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, run in runs.items():
            took = run()
            if number:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs, which are removed"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=CHOSEN, metavar="FORMAT")
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    print(
        "| base | merge s | with its bf16 copy s | ratio | read ns/element |\n| --- | --- | --- | --- | --- |"
    )
    for kind in chosen.formats:
        folder = chosen.work / "quantised"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base, copy, other = make(folder, kind)
        found = measure(
            {
                "quantised": lambda b=base, o=other: merge(b, o, folder / "out"),  # noqa: B023
                "bf16": lambda c=copy, o=other: merge(c, o, folder / "out"),  # noqa: B023
                "reading": lambda b=base: read(b),
            },
            chosen.repeat,
        )
        ratio = found["quantised"] / found["bf16"]
        print(
            f"| {kind} | {found['quantised']:.2f} | {found['bf16']:.2f} | {ratio:.2f} | {found['reading']:.2f} |",
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
