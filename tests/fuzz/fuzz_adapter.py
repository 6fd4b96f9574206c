"""An adapter on its base: its config, and the names and shapes of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.checkpoint.open_model import open_model
from fuzz.harness import Target, files_of, header_of, put, put_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WIDTHS = {"F32": 4, "BF16": 2}
BASE = {
    "model.q.weight": ("F32", (4, 6)),
    "model.q.bias": ("F32", (4,)),
    "model.embed.weight": ("F32", (5, 4)),
    "head.weight": ("F32", (5, 4)),
}
MOST_READ = 1 << 16


def prepare(folder: Path) -> None:
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    put_header(folder / "base" / "model.safetensors", header_of(BASE, WIDTHS))


def read(data: bytes, folder: Path) -> None:
    put(folder / "adapter", files_of(data), (CONFIG, WEIGHTS))
    with open_model(f"{folder / 'base'}+{folder / 'adapter'}") as opened:
        assert opened.held_bytes >= 0
        for name, tensor in opened.tensors.items():
            if tensor.byte_size <= MOST_READ:
                opened.read(name)


def seeds() -> list[bytes]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": "base", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    q = "base_model.model.model.q"
    lora = {f"{q}.lora_A.weight": ("F32", (2, 6)), f"{q}.lora_B.weight": ("F32", (4, 2))}
    embed = {
        "base_model.model.model.embed.lora_embedding_A": ("F32", (2, 5)),
        "base_model.model.model.embed.lora_embedding_B": ("F32", (4, 2)),
    }
    saved = {"base_model.model.head.weight": ("F32", (5, 4))}
    inputs = [
        {CONFIG: config, WEIGHTS: header_of(lora, WIDTHS)},
        {CONFIG: {**config, "use_rslora": True, "rank_pattern": {"q": 2}, "alpha_pattern": {".*": 8}}, WEIGHTS: header_of({**lora, **saved}, WIDTHS)},
        {CONFIG: config, WEIGHTS: header_of(embed, WIDTHS)},
        {CONFIG: {**config, "use_dora": True}, WEIGHTS: header_of({**lora, f"{q}.lora_magnitude_vector.weight": ("F32", (4,))}, WIDTHS)},
        {CONFIG: {**config, "bias": "lora_only", "lora_bias": True}, WEIGHTS: header_of({**lora, f"{q}.lora_B.bias": ("F32", (4,))}, WIDTHS)},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    "peft_type", "LORA", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "init_lora_weights", "modules_to_save", "dtype", "shape", "data_offsets", "F32", "BF16", "I64", ".lora_A.weight", ".lora_B.weight",
    ".lora_B.bias", ".lora_embedding_A", ".lora_magnitude_vector", ".base_layer", ".default", CONFIG, WEIGHTS,
)  # fmt: skip
TARGET = Target(read, seeds, WORDS, prepare)
