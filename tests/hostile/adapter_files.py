"""Malformed adapters, each with the check that refuses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import made
from alnico.checkpoint.open_adapter import open_adapter
from hostile.malformed import Malformed, Read, reading, save, save_json

BASE = {
    "q.weight": ("F32", (4, 6)),
    "q.bias": ("F32", (4,)),
    "head.weight": ("F32", (5, 4)),
    "n": ("I32", (3,)),
}
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


def overflowing(folder: Path) -> Read:
    read = adapted()(folder)
    values = {name: ("F32", np.full(shape, 1e30, np.float32)) for name, (_, shape) in LORA.items()}
    made.save_file(folder / "adapter" / "adapter_model.safetensors", values)
    return read


def weighted(folder: Path) -> Read:
    adapted()(folder)
    return reading(f"{folder / 'base'}+1e308*{folder / 'adapter'}")


def a_file(folder: Path) -> Read:
    """The weights of an adapter, whose config is next to it."""
    adapted()(folder)
    return reading(f"{folder / 'base'}+{folder / 'adapter' / 'adapter_model.safetensors'}")


def without_config(folder: Path) -> Read:
    read = adapted()(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    return read


def two_files(folder: Path) -> Read:
    """A folder with two files of factors and no config."""
    read = without_config(folder)
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "one.safetensors")
    shutil.copy(folder / "adapter" / "one.safetensors", folder / "adapter" / "two.safetensors")
    return read


P = "base_model.model.experts"
EXPERTS = {f"{P}.lora_A.weight": ("F32", (4, 6)), f"{P}.lora_B.weight": ("F32", (5, 4))}


def packed(base: Mapping[str, Any], targets: list[str], **more: Any):
    """A base with experts in one tensor, and an adapter of two experts' (5, 6) matrices."""

    def make(folder: Path) -> Read:
        read = adapted(target_parameters=targets, tensors=EXPERTS, **more)(folder)
        save(folder / "base" / "model.safetensors", base)
        return read

    return make


PAIR = {"experts.up": ("F32", (2, 5, 6)), "experts.down": ("F32", (2, 5, 6))}
TWICE = {
    "base_model.model.n.original_module.weight": ("F32", (2,)),
    "base_model.model.n.modules_to_save.weight": ("F32", (2,)),
}


ROWS = {"base_model.model.head.token_adapter.trainable_tokens_delta": ("F32", (1, 4))}


def ambiguous(folder: Path) -> Read:
    read = adapted(tensors={"base_model.model.z": ("F32", (2,))})(folder)
    save(folder / "base" / "model.safetensors", {"a.z": ("F32", (2,)), "b.z": ("F32", (2,))})
    return read


def differing(folder: Path) -> Read:
    """An embedding and a head that the adapter says are tied, and that differ."""
    saved = {f"base_model.model.{m}.weight": ("F32", (5, 4)) for m in ("embed_tokens", "lm_head")}
    read = adapted(tensors=saved, modules_to_save=["embed_tokens"], ensure_weight_tying=True)(folder)
    save(folder / "base" / "model.safetensors", {"embed_tokens.weight": ("F32", (5, 4))})
    save_json(
        folder / "base" / "config.json", {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    )
    values = {
        name: ("F32", np.full(shape, float(i), np.float32))
        for i, (name, (_, shape)) in enumerate(saved.items())
    }
    made.save_file(folder / "adapter" / "adapter_model.safetensors", values)
    return read


def other_factors(folder: Path) -> Read:
    """Factors of an embedding, and others of a head that is tied to it."""
    at, head = "base_model.model.embed_tokens", "base_model.model.lm_head"
    factors = {
        f"{at}.lora_embedding_A": (2, 5),
        f"{at}.lora_embedding_B": (4, 2),
        f"{head}.lora_A.weight": (2, 4),
        f"{head}.lora_B.weight": (5, 2),
    }
    read = differing(folder)
    save_json(
        folder / "adapter" / "adapter_config.json",
        CONFIG | {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    )
    values = {
        name: ("F32", np.full(shape, float(i), np.float32)) for i, (name, shape) in enumerate(factors.items())
    }
    made.save_file(folder / "adapter" / "adapter_model.safetensors", values)
    return read


def joined(folder: Path) -> Read:
    """A base that stores q, k and v in one matrix, and an adapter of q that is for another width."""
    q = "base_model.model.x.q_proj.lora_"
    read = adapted(tensors={f"{q}A.weight": ("F32", (2, 5)), f"{q}B.weight": ("F32", (2, 2))})(folder)
    save(folder / "base" / "model.safetensors", {"x.Wqkv.weight": ("F32", (6, 4))})
    save_json(folder / "base" / "config.json", {"model_type": "nomic_bert"})
    return read


def slow_pattern(folder: Path) -> Read:
    """A pattern that follows a long name again and again."""
    head = f"base_model.model.{'x' * 8_000}"
    return adapted(
        tensors={f"{head}.lora_A.weight": ("F32", (2, 6)), f"{head}.lora_B.weight": ("F32", (4, 2))},
        rank_pattern={"(x*y|)" * 200: 2},
    )(folder)


def no_name(_: Path) -> Read:
    return lambda: open_adapter("x" * 5000)


ADAPTER_FILES = (
    Malformed("adapter {}: cannot be read", "cannot be read (File name too long)", no_name),
    Malformed("the rank is {}", "the rank is '2'", adapted(rank_pattern={"q": "2"})),
    Malformed("no adapter says which factors are whose", "a pattern matches only one of up and down", packed(PAIR, ["experts.up", "experts.down"], rank_pattern={"up": 1})),
    Malformed("alpha is {}", "alpha is inf", adapted(config=json.dumps(CONFIG | {"lora_alpha": 1}).replace('"lora_alpha": 1', '"lora_alpha": 1e400'))),
    Malformed("has the pattern {}, which {}", "rank_pattern has the pattern", adapted(rank_pattern={r"(.*)(.*)\1": 2})),
    Malformed("the pattern {} of {} {}", "of rank_pattern takes too many steps", slow_pattern),
    Malformed("has {} patterns for {} tensors", "has 257 patterns for 2 tensors", adapted(rank_pattern={f"q[{i}]": 2 for i in range(257)})),
    Malformed("which its scale depends on", "has no lora_alpha", adapted(config={"peft_type": "LORA", "r": 2})),
    Malformed("target_parameters is {}, expected a list of names", "expected a list of names", adapted(target_parameters={"q": 1})),
    Malformed("both replace", "both replace 'n.weight'", adapted(tensors=LORA | TWICE)),
    Malformed("holds no tensors; expected the factors", "holds no tensors; expected", adapted(tensors={})),
    Malformed("{} is {}, expected floating-point numbers. Use another adapter.", "is I32, expected floating-point numbers. Use another adapter.", adapted(tensors={f"{Q}.lora_A.weight": ("I32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (4, 2))})),
    Malformed("expected matrices of rank", "expected matrices of rank", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (4, 3))})),
    Malformed("whose shapes are equal; the adapter does not say which", "whose shapes are equal", packed(PAIR, ["experts.up", "experts.down"])),
    Malformed("{}: {} belongs to {} of {}, as {} matrices of", "as 2 matrices of (5, 6)", packed({"experts.up": ("F32", (2, 5, 7))}, ["experts.up"])),
    Malformed("{}: {}{} has {}; expected finite numbers. Fix this adapter or leave it out", "Fix this adapter or leave it out", infinite),
    Malformed("Choose a smaller weight for the adapter, or fix", "is inf in", overflowing),
    Malformed("is computed in float32 with the weight {}", "is computed in float32 with the weight 1e+308", weighted),
    Malformed("a row of the adapted weight is 0", "a row of the adapted weight is 0", adapted(tensors=LORA | SCALED, use_dora=True)),
    Malformed("is not a directory; expected that of a LoRA adapter", "is not a directory; expected that of a LoRA adapter", a_file),
    Malformed("has no {}, expected a LoRA adapter as PEFT saves it", "has no adapter_config.json", without_config),
    Malformed("has no {} and {} files of weights", "has no adapter_config.json and 2 files of weights", two_files),
    Malformed("peft_type is {}, expected 'LORA'", "peft_type is 'IA3'", adapted(peft_type="IA3")),
    Malformed("which changes what the adapter does", "which changes what the adapter does", adapted(layer_replication=[[0, 1]])),
    Malformed("expected a mapping from modules to numbers", "expected a mapping from modules to numbers", adapted(rank_pattern=[1])),
    Malformed("has no such tensor. {}", "and has no such tensor", adapted(tensors={"base_model.model.hea.weight": ("F32", (2,))})),
    Malformed("of the base; expected one", "may be a.z or b.z of the base", ambiguous),
    Malformed("both change {}; expected one", "both change q.weight", adapted(tensors=LORA | {n.replace("q.", "base.q."): t for n, t in LORA.items()})),
    Malformed("{} holds rows of {}, which the adapter also changes as a whole", "which the adapter also changes as a whole", adapted(tensors=LORA | {f"{Q}.token_adapter.trainable_tokens_delta": ("F32", (1, 6))}, trainable_token_indices=[1])),
    Malformed("trainable_token_indices names {} for {}", "trainable_token_indices names [-1] for head", adapted(tensors=ROWS, trainable_token_indices=[-1])),
    Malformed("trainable_token_indices names {} rows", "trainable_token_indices names 2 rows", adapted(tensors=ROWS, trainable_token_indices=[0, 1])),
    Malformed("{} | rows of {}, with row numbers below its number of rows", "with row numbers below its number of rows", adapted(tensors=ROWS, trainable_token_indices=[5])),
    Malformed("differ, but replace tensors that are tied", "replace tensors that are tied", differing),
    Malformed("{} | as many columns as {}", "as many columns as x.Wqkv.weight", joined),
    Malformed("differ, but are factors of one tied tensor", "are factors of one tied tensor", other_factors),
    Malformed("the rank or alpha of {} cannot be determined", "cannot be determined (", adapted(lora_alpha=[])),
    Malformed("the adapter has {} without its lora_A or lora_B", "without its lora_A or lora_B", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 6))})),
    Malformed("has rank {}, {} says {}; they must agree", "has rank 2, adapter_config.json says 3", adapted(r=3)),
    Malformed("expected floating-point numbers. Use another adapter or base", "q.base_layer.weight is I32; expected floating-point numbers", adapted(tensors={"base_model.model.q.lora_A.weight": ("F32", (2, 6)), "base_model.model.q.lora_B.weight": ("F32", (4, 2)), "base_model.model.q.base_layer.weight": ("I32", (4, 6))})),
    Malformed("if the vocabulary was extended, extend it in the base too", "if the vocabulary was extended", adapted(tensors={"base_model.model.head.weight": ("F32", (6, 4))})),
    Malformed("{} | the same", "is (5,); expected the same. If", adapted(tensors=LORA | {f"{Q}.lora_B.bias": ("F32", (5,))})),
    Malformed("{} | ({}, {})", "expected (4, 2)", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 6)), f"{Q}.lora_B.weight": ("F32", (3, 2))})),
    Malformed("{} | {} columns", "expected 6 columns", adapted(tensors={f"{Q}.lora_A.weight": ("F32", (2, 7)), f"{Q}.lora_B.weight": ("F32", (4, 2))})),
    Malformed("{} | {} numbers", "expected 4 numbers", adapted(tensors=LORA | {f"{Q}.lora_magnitude_vector.weight": ("F32", (5,))}, use_dora=True)),
)  # fmt: skip
