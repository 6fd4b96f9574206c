"""Malformed LoRA files without a config, each with the check that refuses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import made
from hostile.malformed import Malformed, Read, reading, save
from hostile.vector_files import write

BASE = {
    "mid_block.q.weight": ("F32", (4, 6)),
    "mid_block.q.bias": ("F32", (4,)),
    "mid_block.n.weight": ("I32", (4, 6)),
    "a.b_c.weight": ("F32", (4, 6)),
    "a_b.c.weight": ("F32", (4, 6)),
}
Q = "lora_unet_mid_block_q"
LORA = {f"{Q}.lora_down.weight": ("F32", (2, 6)), f"{Q}.lora_up.weight": ("F32", (4, 2))}
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def named(module: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The factors of LORA for another module."""
    return {module + name.removeprefix(Q): shape for name, shape in LORA.items()}


def adapted(tensors: Shapes, alpha: float | None = None, **metadata: Any):
    """The base with a file of tensors of zeros, an alpha, and a header's config."""

    def make(folder: Path) -> Read:
        save(folder / "base" / "model.safetensors", BASE)
        values: dict[str, Any] = {name: (dtype, np.zeros(shape)) for name, (dtype, shape) in tensors.items()}
        if alpha is not None:
            values[f"{Q}.alpha"] = ("F32", np.array(alpha, np.float32))
        stated = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {"format": "pt"}
        made.save_file(folder / "a.safetensors", values, stated)
        return reading(f"{folder / 'base'}+{folder / 'a.safetensors'}")

    return make


def a_model(folder: Path) -> Read:
    save(folder / "base" / "model.safetensors", BASE)
    save(folder / "a.safetensors", BASE)
    return reading(f"{folder / 'base'}+{folder / 'a.safetensors'}")


def with_blocks(folder: Path) -> Read:
    """A stored task vector with strengths of blocks before it."""
    write(folder)
    return reading(f"{folder / 'base'}+1[MID=0]*{folder / 'vector'}")


UNET = "unet.mid_block.q"
OF_DIFFUSERS = {f"{UNET}.lora_A.weight": ("F32", (2, 6)), f"{UNET}.lora_B.weight": ("F32", (4, 2))}
HADA = {
    f"{Q}.hada_{n}": ("F32", s)
    for n, s in (("w1_a", (4, 2)), ("w1_b", (2, 6)), ("w2_a", (4, 2)), ("w2_b", (2, 6)))
}

LORA_FILES = (
    Malformed("has no {} and no factors of LoRA; expected a LoRA adapter", "and no factors of LoRA", a_model),
    Malformed("has PEFT's names, such as {}", "has PEFT's names", adapted(named("base_model.model.q"))),
    Malformed("is of a kind that is not applied here", "is of a kind that is not applied here", adapted({**LORA, f"{Q}.oft_blocks": ("F32", (2, 2))})),
    Malformed("{} and {} are for one module, {}; expected one", "are for one module", adapted({**LORA, **HADA})),
    Malformed("mixes the names of several programs", "mixes the names of several programs", adapted({**LORA, **named("unet.other")})),
    Malformed("expected floating-point numbers, at least one", "expected floating-point numbers, at least one", adapted({**LORA, f"{Q}.lora_up.weight": ("I32", (4, 2))})),
    Malformed("and not all factors; expected {}", "and not all factors", adapted({f"{Q}.lora_up.weight": ("F32", (4, 2))})),
    Malformed("expected factors of {} that fit together", "expected factors of LoRA that fit together", adapted({**LORA, f"{Q}.lora_up.weight": ("F32", (4, 3))})),
    Malformed("{} is {} of {}; expected one number", "expected one number", adapted({**LORA, f"{Q}.alpha": ("F32", (2,))})),
    Malformed("expected a finite number, which the factors are scaled by", "is inf; expected a finite number", adapted(LORA, alpha=np.inf)),
    Malformed("states no rank and alpha of {}", "states no rank and alpha of unet.mid_block.q", adapted(OF_DIFFUSERS, **{"unet.r": "2", "unet.lora_alpha": 2})),
    Malformed("states the rank {} of {}, whose factors have {}", "states the rank 3 of unet.mid_block.q", adapted(OF_DIFFUSERS, **{"unet.r": 3, "unet.lora_alpha": 2})),
    Malformed("and {} are for one tensor, {}; expected one update", "are for one tensor, mid_block.q.weight", adapted({**OF_DIFFUSERS, **{n.removeprefix("unet."): s for n, s in OF_DIFFUSERS.items()}})),
    Malformed("modules of {} match nothing in {}", "1 of 1 modules of", adapted(named("lora_unet_nothing"))),
    Malformed("fits {} in the base; expected one fit", "a_b_c fits a.b_c.weight and a_b.c.weight", adapted(named("lora_unet_a_b_c"))),
    Malformed("the adapter's {} is {}; expected one shape", "mid_block.q.bias is F32 of (4,) in the base", adapted({**LORA, f"{Q}.diff_b": ("F32", (5,))})),
    Malformed("the adapter's {} is for {}; expected one shape", "is for (4, 7); expected one shape", adapted({**LORA, f"{Q}.lora_down.weight": ("F32", (2, 7))})),
    Malformed("in the base; expected floating-point numbers, which the adapter changes", "mid_block.n.weight is I32 in the base", adapted(named("lora_unet_mid_block_n"))),
    Malformed("norms of DoRA, for {} of {}", "has 5 norms of DoRA", adapted({**LORA, f"{Q}.dora_scale": ("F32", (5, 1))})),
    Malformed("is a task vector, and [{}] are strengths of blocks", "are strengths of blocks", with_blocks),
)  # fmt: skip
