"""How fast GGUF is read and written: ``python benchmarks/gguf_speed.py --parameters 0.3``.

In one run, each after the other and all warm: a model read as bf16 safetensors and as GGUF types (into a linear merge of one model at
weight 0.5 with itself, to bf16), and a merge of two bf16 models into Q8_0 beside the copy limit: ``cat INPUTS > /dev/null`` plus writing
as many bytes as the output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]

HIDDEN, LAYERS_OF_A_MILLION = 1024, 12.6
TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q5_K", "IQ4_NL")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--parameters", type=float, default=0.3, help="in 1e9")
    words.add_argument("--runs", type=int, default=5)
    words.add_argument("--folder", type=Path, default=None)
    given = words.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        measure(Path(made), max(int(given.parameters * 1000 / LAYERS_OF_A_MILLION), 1), given.runs)


def measure(folder: Path, layers: int, runs: int) -> None:
    import alnico

    for i in range(2):
        save_llama(folder / f"m{i}", layers, seed=i)
    size = (folder / "m0" / "model.safetensors").stat().st_size
    print(f"{size / 2e9:.2f} G parameters, {runs} alternating runs, medians")
    files = {kind: save_blocks(folder / f"{kind}.gguf", folder / "m0", kind) for kind in TYPES}

    def read(path: Path) -> Callable[[], object]:
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(path), "parameters": {"weight": 0.5}}],
            "dtype": "bfloat16",
            "parameters": {"normalize": False},
        }
        return lambda: alnico.merge(recipe, folder / "out", overwrite=True)

    calls: dict[str, Callable[[], object]] = {"bf16": read(folder / "m0")}
    calls |= {kind: read(path) for kind, path in files.items()}
    merge = {
        "merge_method": "linear",
        "models": [str(folder / f"m{i}") for i in range(2)],
        "unrelated": "allow",
    }
    for dtype in ("q8_0", "bfloat16"):
        calls[f"2 x bf16 to {dtype}.gguf"] = lambda dtype=dtype: alnico.merge(
            merge | {"dtype": dtype}, folder / f"{dtype}.out.gguf", overwrite=True
        )
        calls[f"copy limit of {dtype}"] = lambda dtype=dtype: copy_limit(folder, size, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if run:  # the first one compiles, and warms the cache
                times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| what | seconds | of bf16 | of the copy limit |\n|---|---|---|---|")
    for name, seconds in medians.items():
        limit = medians.get(f"copy limit of {name.split(' to ')[-1].removesuffix('.gguf')}")
        ratios = (
            f"{seconds / medians['bf16']:.2f}" if name in TYPES else "-",
            f"{seconds / limit:.2f}" if limit and " to " in name else "-",
        )
        print(f"| {name} | {seconds:.2f} | {ratios[0]} | {ratios[1]} |")


def save_llama(folder: Path, layers: int, seed: int) -> None:
    """A Llama of random bf16 weights with a small tokenizer."""
    from made import llama_config, llama_shapes, save_file
    from made_gguf import small_keys

    random = np.random.default_rng(seed)
    shapes = llama_shapes(hidden=HIDDEN, layers=layers, vocabulary=256)
    tensors = {n: ("BF16", (random.standard_normal(s, np.float32) * 0.02)) for n, s in shapes.items()}
    save_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps(llama_config(hidden=HIDDEN, layers=layers, vocabulary=256))
    )
    from made_tokenizers import save_tokenizer

    tokens = {token: i for i, token in enumerate(small_keys()["tokenizer.ggml.tokens"])}
    save_tokenizer(folder, tokens, model={"byte_fallback": True})


def save_blocks(path: Path, model: Path, kind: str) -> Path:
    """The model as GGUF with blocks of a type. What is in the blocks does not matter: scales of 0.01, random codes."""
    from alnico.checkpoint.gguf.block_types import BLOCK_TYPES
    from made import read_file
    from made_gguf import gguf_bytes

    block = next(t for t in BLOCK_TYPES.values() if t.name == kind)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
    }  # fmt: skip
    random = np.random.default_rng(0)
    tensors = {}
    for name, (_, values) in read_file(model / "model.safetensors").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if values.ndim < 2:
            tensors[name] = (0, values.shape, values.astype("<f4").tobytes())
            continue
        data = random.integers(0, 255, (values.size // block.elements, block.byte_size), np.uint8)
        scale = np.full(len(data), 0.01, np.float16).view(np.uint8).reshape(-1, 2)
        at = block.byte_size - 2 if kind == "Q6_K" else 0
        data[:, at : at + 2] = scale
        if kind in ("Q4_K", "Q5_K"):
            data[:, 2:4] = scale
        tensors[name] = (block.code, values.shape, data.tobytes())
    config = json.loads((model / "config.json").read_text())
    keys = {
        "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": HIDDEN,
        "llama.block_count": config["num_hidden_layers"], "llama.feed_forward_length": 3 * HIDDEN, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-6, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def copy_limit(folder: Path, size: int, dtype: str) -> None:
    """Read both inputs once, and write as many bytes as the output has."""
    for i in range(2):
        os.system(f"cat {folder / f'm{i}' / 'model.safetensors'} > /dev/null")
    written = size if dtype == "bfloat16" else size // 2 * 34 // 32
    with (folder / "copy").open("wb") as file:
        block = bytes(1 << 20)
        for _ in range(written >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "copy").unlink()


if __name__ == "__main__":
    main()
