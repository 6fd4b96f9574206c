"""Malformed adapters, each with the check that refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import made
from hostile.malformed import Malformed, Read, reading, save, save_json

BASE = {"q.weight": ("F32", (4, 6)), "q.bias": ("F32", (4,)), "head.weight": ("F32", (5, 4)), "n": ("I32", (3,))}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Q = "base_model.model.q"
LORA = {f"{Q}.lora_A.weight": ("F32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (4, 2))}
SCALED = {f"{Q}.lora_magnitude_vector.weight": ("F32", (4,))}


def adapted(config: Any = None, tensors: Mapping[str, Any] = LORA, **more: Any):
    """The base with an adapter of a config and tensors of zeros."""

    def make(folder: Path) -> Read:
        save(folder / "base" / "model.safetensors", BASE)
        save_json(folder / "adapter" / "adapter_config.json", CONFIG | more if config is None else config)
        save(folder / "adapter" / "adapter_model.safetensors", tensors)
        return reading(f"{folder / 'base'}+{folder / 'adapter'}")

    return make


def infinite(folder: Path) -> Read:
    read = adapted()(folder)
    values = {name: ("F32", np.full(shape, np.inf, np.float32)) for name, (_, shape) in LORA.items()}
    made.save_file(folder / "adapter" / "adapter_model.safetensors", values)
    return read


def a_file(folder: Path) -> Read:
    save(folder / "base" / "model.safetensors", BASE)
    save(folder / "adapter.safetensors", LORA)
    return reading(f"{folder / 'base'}+{folder / 'adapter.safetensors'}")


def without_config(folder: Path) -> Read:
    read = adapted()(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    return read


ADAPTER_FILES = (
    Malformed("has a NaN or an infinity; expected finite numbers. Mend or leave out this adapter", "Mend or leave out this adapter", infinite),
    Malformed("a row of the adapted weight is 0", "a row of the adapted weight is 0", adapted(tensors=LORA | SCALED, use_dora=True)),
    Malformed("is no directory, expected that of a LoRA adapter", "is no directory, expected that of a LoRA adapter", a_file),
    Malformed("has no {}, expected a LoRA adapter as PEFT saves it", "has no adapter_config.json", without_config),
    Malformed("peft_type is {}, expected 'LORA'", "peft_type is 'IA3'", adapted(peft_type="IA3")),
    Malformed("which changes what the adapter does", "which changes what the adapter does", adapted(trainable_token_indices=[1])),
    Malformed("expected a mapping from modules to numbers", "expected a mapping from modules to numbers", adapted(rank_pattern=[1])),
    Malformed("which the base does not have", "which the base does not have", adapted(tensors={"base_model.model.x.weight": ("F32", (2,))})),
    Malformed("the rank or alpha of {} cannot be told", "cannot be told (", adapted(rank_pattern={"(": 2})),
    Malformed("the adapter has {} without its lora_A or lora_B", "without its lora_A or lora_B", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 6))})),
    Malformed("has rank {}, {} says {}; they must agree", "has rank 2, adapter_config.json says 3", adapted(r=3)),
    Malformed("expected numbers in floating point. Use another adapter or base", "expected numbers in floating point", adapted(tensors={f"{Q}.lora_A.weight": ("I32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (4, 2))})),
    Malformed("a vocabulary that was extended must be extended in the base too", "a vocabulary that was extended", adapted(tensors={"base_model.model.head.weight": ("F32", (6, 4))})),
    Malformed("{} | the same", "is (5,), expected the same. Use", adapted(tensors=LORA | {f"{Q}.lora_B.bias": ("F32", (5,))})),
    Malformed("{} | ({}, {})", "expected (4, 2)", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (3, 2))})),
    Malformed("{} | {} columns", "expected 6 columns", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 7)), f"{Q}.lora_B.weight": ("F32", (4, 2))})),
    Malformed("{} | {} numbers", "expected 4 numbers", adapted(tensors=LORA | {f"{Q}.lora_magnitude_vector.weight": ("F32", (5,))}, use_dora=True)),
)  # fmt: skip
