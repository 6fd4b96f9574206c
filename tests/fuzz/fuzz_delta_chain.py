"""Training runs: an anchor and deltas, of which each step is read as a model."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.checkpoint.open_model import open_model
from alnico.errors import AlnicoError
from fuzz.harness import Target, files_of, header_of, put

NAMES = ("anchors/step_0.safetensors", "deltas/step_1.safetensors", "deltas/step_2.safetensors", "deltas/step_4.safetensors", "anchors/step_3.safetensors", "config.json")  # fmt: skip
WIDTHS = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8}


def prepare(folder: Path) -> None:
    for kind in ("anchors", "deltas"):
        (folder / "run" / kind).mkdir(parents=True)


def read(data: bytes, folder: Path) -> None:
    run = folder / "run"
    put(run, files_of(data), NAMES)
    for step in range(6):
        try:
            with open_model(f"{run}@{step}") as model:
                for name in model.tensors:
                    try:
                        model.read(name)
                    except AlnicoError:
                        continue
                model.identity()
        except AlnicoError:
            continue


def seeds() -> list[bytes]:
    anchor = header_of({"w": ("BF16", (4, 6)), "v": ("F32", (3,))}, WIDTHS)
    delta = header_of({"w.indices": ("I32", (1,)), "w.values": ("BF16", (1,))}, WIDTHS)
    whole = header_of({"v": ("F32", (3,)), "w.indices": ("I64", (1,)), "w.values": ("BF16", (1,))}, WIDTHS)
    versions = [
        {**h, "__metadata__": {"model_version": str(v)}} for v, h in ((1, anchor), (2, delta), (3, whole))
    ]
    inputs = [
        {NAMES[0]: anchor, NAMES[1]: delta, NAMES[2]: whole, "config.json": {"model_type": "llama"}},
        dict(zip(NAMES, versions, strict=False)),
        {NAMES[0]: anchor, NAMES[1]: delta, NAMES[3]: delta},
        {NAMES[4]: anchor, NAMES[3]: whole},
    ]
    return [json.dumps(i).encode() for i in inputs]


WORDS = (*NAMES, "w.indices", "w.values", "v.indices", "__metadata__", "model_version", "dtype", "shape", "data_offsets", "I32", "I64", "BF16")  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
