"""Whole processes in turn: both limits (see processes.py), alnico, an older alnico, mergekit.

    python benchmarks/merge_speed.py --work /tmp/bench                      # 0.6 G parameters, bf16, a base and 3 models
    python benchmarks/merge_speed.py --work /tmp/bench --before OLD/src     # beside another version
    python benchmarks/merge_speed.py --work /tmp/bench --mergekit ENV/bin/mergekit-yaml

Makes Llama-shaped models once (a base and fine-tunes), then alternates the programs; prints medians, spread, CPU time, peak
memory and ratios as a table. The page cache is warm: every file is read once before the first measurement. mergekit runs three
times a method, after the others, and a line under the table says how far its output is from alnico's. Peak memory is the largest resident size; of
mergekit's, the pages of its mapped inputs are a part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from processes import LIMITS, Failed, Run, alternating, beside, cpu, limits, measured, seconds, wall

RANDOM = ("dare_linear", "dare_ties")
BLOCK = 1 << 20


@dataclass(frozen=True)
class Asked:
    """What a recipe asks besides its method: global parameters, whether of a base, and of how many models (None: all)."""

    parameters: str = ""
    has_base: bool = True
    models: int | None = None


RECIPES = {
    "linear": Asked("weight: 1.0", has_base=False),
    "slerp": Asked("t: 0.4", models=1),
    "nuslerp": Asked("weight: 1.0", has_base=False, models=2),
    "karcher": Asked(has_base=False),
    "model_stock": Asked(),
    "task_arithmetic": Asked("weight: 0.5"),
    "ties": Asked("weight: 1.0, density: 0.3"),
    "dare_linear": Asked("weight: 0.5, density: 0.5"),
    "dare_ties": Asked("weight: 0.5, density: 0.5"),
}


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


def make(
    directory: Path, layout: dict[str, tuple[int, ...]], model: int, dtype: str, shard_bytes: int
) -> None:
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
            header[name] = {
                "dtype": dtype,
                "shape": list(layout[name]),
                "data_offsets": [position, position + size],
            }
            position += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for number, name in enumerate(names):
                count = int(np.prod(layout[name]))
                for first in range(0, count, BLOCK):
                    places = np.arange(first, min(first + BLOCK, count)) + number * 7919 & ((1 << 24) - 1)
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


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Map all tensors of a model, flat; BF16 as its bits."""
    found = {}
    for file in directory.glob("*.safetensors"):
        data = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(bytes(data[:8]), "little")
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
                found[name] = data[start + begin : start + end].view(stored)
    return found


def blocks(*flat: np.ndarray) -> Iterator[list[np.ndarray]]:
    """The tensors in float64, a block at a time."""
    for at in range(0, flat[0].size, BLOCK):
        cut = [f[at : at + BLOCK] for f in flat]
        yield [
            ((c.astype(np.uint32) << 16).view(np.float32) if c.dtype == np.uint16 else c).astype(np.float64)
            for c in cut
        ]


def differences(ours: Path, theirs: Path) -> str:
    """How far two outputs are apart, in units of each tensor's largest value: the largest and the mean over all elements."""
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    worst, total, count = 0.0, 0.0, 0
    for name in a:
        top, apart, far = 0.0, 0.0, 0.0
        for x, y in blocks(a[name], b[name]):
            difference = np.abs(x - y)
            top, apart, far = max(top, np.abs(y).max()), apart + difference.sum(), max(far, difference.max())
        worst, total, count = max(worst, far / top), total + apart / top, count + a[name].size
    return f"apart by at most {worst:.1e} of a tensor's largest value, in the mean by {total / count:.1e}"


def moments(ours: Path, theirs: Path, base: Path) -> str:
    """What two random outputs have in common: the share of elements changed, and mean and variance of the change, by tensor."""
    a, b, zero = tensors(ours), tensors(theirs), tensors(base)
    changed, count = np.zeros(2), 0
    ratios, errors = [], []
    for name in a:
        sums, squares, n = np.zeros(2), np.zeros(2), a[name].size
        for x, y, z in blocks(a[name], b[name], zero[name]):
            both = np.stack([x - z, y - z])
            changed += np.count_nonzero(both, axis=1)
            sums, squares = sums + both.sum(1), squares + (both**2).sum(1)
        variance = squares / n - (sums / n) ** 2
        count += n
        errors.append(abs(sums[0] - sums[1]) / n / np.sqrt(variance.sum() / n))
        if n > BLOCK // 4:
            ratios.append(variance[0] / variance[1])
    return (
        f"changed {changed[0] / count:.4f} of the elements, mergekit {changed[1] / count:.4f}; variance of the change in large tensors "
        f"{min(ratios):.4f} to {max(ratios):.4f} of mergekit's; its mean apart by at most {max(errors):.1f} standard errors"
    )


def merging(command: list[str], out: Path, source: Path | None = None) -> Callable[[], Run]:
    """A program that merges into a new folder."""

    def run() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        return measured(command, source)

    return run


def write_recipe(
    home: Path, method: str, base: Path, tuned: list[Path], dtype: str
) -> tuple[Path, list[Path]]:
    """Write a recipe for a method; returns it, and the weight files that it reads."""
    asked = RECIPES[method]
    recipe = home / f"{method}.yml"
    recipe.write_text(
        f"merge_method: {method}\n"
        + f"base_model: {base}\n" * asked.has_base
        + "models:\n"
        + "".join(f"  - model: {p}\n" for p in tuned[: asked.models])
        + f"parameters: {{{asked.parameters}}}\n" * bool(asked.parameters)
        + f"dtype: { {'BF16': 'bfloat16', 'F16': 'float16', 'F32': 'float32'}[dtype] }\n"
    )
    read = [base] * asked.has_base + tuned[: asked.models]
    return recipe, [file for model in read for file in sorted(model.glob("*.safetensors"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs; models are kept"
    )
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--layout", choices=LAYOUTS, default="llama")
    parser.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--alnico", default=shutil.which("alnico") or "alnico")
    parser.add_argument(
        "--before", type=Path, help="the src of another version, which runs in turn with this one"
    )
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--mergekit-repeat", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.mergekit and chosen.layout != "llama":
        parser.error(
            f"mergekit merges no model of the layout {chosen.layout}: it looks for the tensors of a Llama; leave --mergekit out"
        )
    layout = LAYOUTS[chosen.layout](chosen.parameters)
    count = sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"{chosen.layout}-{chosen.dtype}-{count}"
    width = 4 if chosen.dtype == "F32" else 2
    for i in range(chosen.models + 1):
        beside(make, home / f"m{i}", layout, i, chosen.dtype, max(count * width // 3, 1))
    base, tuned = home / "m0", [home / f"m{i + 1}" for i in range(chosen.models)]
    out = home / "out"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, {chosen.dtype}, {chosen.models} models\n"
    )
    old = "before s | CPU s | " if chosen.before else ""
    print(
        f"| method | limit s | synced limit s | {old}alnico s | x limit | x synced | CPU s | peak MiB | mergekit s | CPU s | peak MiB | x faster |"
    )
    print("|---" * (12 + 2 * bool(chosen.before)) + "|")
    remarks = []
    for method in chosen.methods.split(","):
        recipe, files = write_recipe(home, method, base, tuned, chosen.dtype)
        command = [chosen.alnico, "merge", str(recipe), str(out), "--quiet"]
        programs = limits(files, count * width, home / "limit")
        if chosen.before:
            programs["before"] = merging(command, out, chosen.before)
        programs["alnico"] = merging(command, out)
        found = alternating(programs, chosen.repeat)
        ours = found["alnico"]
        theirs = "| | | "
        if chosen.mergekit:
            other = home / "theirs"
            bare = ["--quiet", "--no-write-model-card", "--no-copy-tokenizer"]  # no tokenizer, and no network
            try:
                peer = merging([chosen.mergekit, str(recipe), str(other), *bare], other)
                runs = [peer() for _ in range(chosen.mergekit_repeat)]
                peak = max(r.peak for r in runs)
                theirs = f"{seconds(runs)} | {cpu(runs):.1f} | {peak >> 20} | {wall(runs) / wall(ours):.0f}"
                apart = (
                    beside(moments, out, other, base) if method in RANDOM else beside(differences, out, other)
                )
                remarks.append(f"{method}: {apart}.")
            except Failed as error:
                remarks.append(f"{method}: mergekit failed. {error}")
            shutil.rmtree(other, ignore_errors=True)
        limit, synced = (seconds(found[name]) for name in LIMITS)
        x, x_synced = (wall(ours) / wall(found[name]) for name in LIMITS)
        before = f"{seconds(found['before'])} | {cpu(found['before']):.2f} | " if chosen.before else ""
        print(
            f"| {method} | {limit} | {synced} | {before}{seconds(ours)} | {x:.2f} | {x_synced:.2f} | {cpu(ours):.2f} "
            f"| {max(r.peak for r in ours) >> 20} | {theirs} |",
            flush=True,
        )
    print("\n" + "\n".join(remarks))
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
