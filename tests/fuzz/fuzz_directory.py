"""A model's directory: indices, config, what is carried beside the weights, the card; and links out of it."""

from __future__ import annotations

import json
from pathlib import Path

from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.sidecars import copy_side_files
from fuzz.harness import Target, files_of, header_of, put, put_header

NAMES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "config.json",
    "modules.json",
    "README.md",
    "model_index.json",
)
SHARDS = {"a.safetensors": "w", "deep/b.safetensors": "v", "1_Pooling/model.safetensors": "p"}


def prepare(folder: Path) -> None:
    model = folder / "allowed" / "model"
    for file, tensor in {**SHARDS, "../../secret/s.safetensors": "s"}.items():
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        put_header(model / file, header_of({tensor: ("F32", (2,))}, {"F32": 4}))
    (model / "link.safetensors").symlink_to(folder / "secret" / "s.safetensors")
    (model / "leads-out").symlink_to(folder / "secret", target_is_directory=True)


def read(data: bytes, folder: Path) -> None:
    model, out = folder / "allowed" / "model", folder / "allowed" / "out"
    put(model, files_of(data), NAMES)
    with open_model(model) as opened:
        for name in opened.tensors:
            opened.read(name)
        assert "s" not in opened.tensors, "a tensor from outside"
        lineage_of(opened)
        out.mkdir(exist_ok=True)
        copy_side_files(model, out)
    secret = (folder / "secret" / "s.safetensors").read_bytes()
    assert not any(p.read_bytes() == secret for p in out.rglob("*") if p.is_file()), (
        "a file from outside was copied"
    )


def seeds() -> list[bytes]:
    index = {"weight_map": {tensor: file for file, tensor in SHARDS.items()}, "metadata": {"total_size": 24}}
    front = "---\nlicense: other\nlicense_name: x\ntags: [a, b]\n---\n# A model\n"
    inputs = [
        {NAMES[0]: index, NAMES[2]: {"model_type": "llama", "quantization_config": {"quant_method": "x"}}},
        {NAMES[0]: index, NAMES[2]: {"model_type": "llama"}, NAMES[3]: [{"path": "1_Pooling", "type": "x"}], NAMES[4]: front},
        {NAMES[0]: {"weight_map": {"s": "../../secret/s.safetensors"}}},
        {NAMES[0]: {"weight_map": {"s": "link.safetensors"}}},
        {NAMES[0]: {"weight_map": {"s": "leads-out/s.safetensors"}}},
        {NAMES[0]: {"weight_map": {"w": "a.safetensors"}}, NAMES[3]: [{"path": "leads-out"}], NAMES[4]: front},
    ]  # fmt: skip
    return [json.dumps(i).encode() for i in inputs]


WORDS = (
    *NAMES,
    *SHARDS,
    *SHARDS.values(),
    "s",
    "link.safetensors",
    "leads-out",
    "leads-out/s.safetensors",
    "weight_map",
    "path",
    "license",
    "../../secret/s.safetensors",
)
TARGET = Target(read, seeds, WORDS, prepare)
