"""Whole processes in one run: the limit (reading the inputs and writing as many bytes as the output), alnico, mergekit.

    python benchmarks/merge_speed.py --work /tmp/bench                      # 0.6 G parameters, bf16, a base and 3 models
    python benchmarks/merge_speed.py --work /tmp/bench --mergekit ENV/bin/mergekit-yaml

Makes Llama-shaped models once (a base and fine-tunes), then alternates the programs; prints medians, spread, CPU time, peak
memory and ratios as a table. The page cache is warm: every file is read once before the first measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECIPES = {
    "linear": "merge_method: linear\nmodels:\n{models}",
    "slerp": "merge_method: slerp\nbase_model: {base}\nmodels:\n{one}parameters: {{t: 0.4}}\n",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{models}",
    "ties": "merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters: {{density: 0.3}}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: {base}\nmodels:\n{models}parameters: {{density: 0.5}}\n",
}


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (hidden // 4, hidden),
            at + "self_attn.v_proj.weight": (hidden // 4, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


LAYOUTS = {
    "llama": lambda p: shapes(max(1, round((p - 98e6) / 25.2e6)), 1536, 4096, 32_000),
    "small": lambda p: {f"model.layers.{i}.weight": (round(p / 10_000),) for i in range(10_000)},
    "embedding": lambda _: {"model.embed_tokens.weight": (128_000, 4_096)},
}


def make(directory: Path, layout: dict[str, tuple[int, ...]], model: int, dtype: str, shard_bytes: int) -> None:
    """Write model number ``model``: 0 the base, others the base plus a small change of their own."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32) * 0.02
    change = np.random.default_rng(model).standard_normal(1 << 24).astype(np.float32) * 0.002
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in layout.items():
        size = int(np.prod(shape)) * width
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            size = int(np.prod(layout[name])) * width
            header[name] = {"dtype": dtype, "shape": list(layout[name]), "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for number, name in enumerate(names):
                count = int(np.prod(layout[name]))
                places = (np.arange(count, dtype=np.int64) + number * 7919) & ((1 << 24) - 1)
                values = pool[places] + (change[places] if model else np.float32(0))
                if dtype == "BF16":
                    bits = values.view(np.uint32)
                    out.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())
                else:
                    out.write(values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes())
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = sum(name.endswith("q_proj.weight") for name in layout)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1536, "intermediate_size": 4096,
        "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 3, "vocab_size": 32_000,
        "tie_word_embeddings": False, "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def measured(command: list[str]) -> Run:
    """Run a command to its end. Errors: SystemExit with what it printed."""
    begin = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=subprocess.PIPE)
        assert process.stderr is not None
        text = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}: {text.decode()[-2000:]}")
    return Run(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def seconds(runs: list[Run]) -> str:
    walls = [r.wall for r in runs]
    return f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs; models are kept")
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--layout", choices=LAYOUTS, default="llama")
    parser.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--alnico", default=shutil.which("alnico") or "alnico")
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment of its own; run once a method")
    chosen = parser.parse_args()
    layout = LAYOUTS[chosen.layout](chosen.parameters)
    count = sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"{chosen.layout}-{chosen.dtype}-{count}"
    width = 4 if chosen.dtype == "F32" else 2
    for i in range(chosen.models + 1):
        make(home / f"m{i}", layout, i, chosen.dtype, max(count * width // 3, 1))
    base, tuned = home / "m0", [home / f"m{i + 1}" for i in range(chosen.models)]
    out = home / "out"
    print(f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, {chosen.dtype}, {chosen.models} models\n")
    print("| method | limit s | alnico s | x limit | CPU s | peak MiB | mergekit s | x faster |")
    print("|---|---|---|---|---|---|---|---|")
    for method in chosen.methods.split(","):
        entries = [f"  - model: {p}\n" for p in tuned]
        text = RECIPES[method].format(base=base, models="".join(entries), one=entries[0])
        recipe = home / f"{method}.yml"
        recipe.write_text(text + "dtype: bfloat16\n" if chosen.dtype == "BF16" else text)
        read = [base] * ("base_model" in text) + (tuned[:1] if method == "slerp" else tuned)
        files = " ".join(str(f) for m in read for f in sorted(m.glob("*.safetensors")))
        limit = (
            f"cat {files} > /dev/null; dd if=/dev/zero of={home}/limit bs=4M count={-(-count * width // (4 << 20))} 2> /dev/null"
        )
        measured(["sh", "-c", limit])
        limits, ours = [], []
        for turn in range(chosen.repeat + 1):
            shutil.rmtree(out, ignore_errors=True)
            limits.append(measured(["sh", "-c", f"rm -f {home}/limit; {limit}"]))
            (home / "limit").unlink()
            ours.append(measured([chosen.alnico, "merge", str(recipe), str(out), "--quiet"]))
            if turn == 0:
                limits, ours = [], []  # the first run compiles kernels
        theirs = ""
        ratio = ""
        if chosen.mergekit:
            shutil.rmtree(home / "theirs", ignore_errors=True)
            run = measured([chosen.mergekit, str(recipe), str(home / "theirs"), "--quiet"])
            theirs = f"{run.wall:.1f}"
            ratio = f"{run.wall / statistics.median(r.wall for r in ours):.0f}"
        median = statistics.median
        x = median(r.wall for r in ours) / median(r.wall for r in limits)
        cpu, peak = median(r.cpu for r in ours), max(r.peak for r in ours)
        print(
            f"| {method} | {seconds(limits)} | {seconds(ours)} | {x:.2f} | {cpu:.2f} | {peak >> 20} | {theirs} | {ratio} |",
            flush=True,
        )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
