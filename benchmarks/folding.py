"""Folding an adapter into its base, whole processes in turn: both limits (see processes.py), alnico, an older alnico, and PEFT's
merge_and_unload with what loads and saves the model.

    python benchmarks/folding.py --work /tmp/bench --rank 16
    python benchmarks/folding.py --work /tmp/bench --rank 16 --peft     # needs transformers and peft beside alnico

Makes a Llama-shaped base in bf16 and a LoRA adapter of all its linear layers once; then alternates the programs and prints medians,
spread, CPU time, peak memory and ratios. PEFT runs once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np

from merge_speed import LAYOUTS, differences, make, merging
from processes import LIMITS, Failed, alternating, beside, cpu, limits, seconds, wall

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", trust_remote_code=False)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def make_adapter(directory: Path, layout: dict[str, tuple[int, ...]], rank: int, use_dora: bool) -> None:
    """Write an adapter of every linear layer of a Llama, in float32."""
    if (directory / "adapter_config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    header: dict[str, object] = {}
    parts: list[np.ndarray] = []
    position = 0
    for name, shape in layout.items():
        if not name.endswith("_proj.weight"):
            continue
        at = f"base_model.model.{name.removesuffix('.weight')}"
        made = {f"{at}.lora_A.weight": (rank, shape[1]), f"{at}.lora_B.weight": (shape[0], rank)}
        made |= {f"{at}.lora_magnitude_vector": (shape[0],)} if use_dora else {}
        for tensor, size in made.items():
            values = (random.standard_normal(size) * 0.01 + (0.8 if "magnitude" in tensor else 0)).astype(
                np.float32
            )
            header[tensor] = {
                "dtype": "F32",
                "shape": list(size),
                "data_offsets": [position, position + values.nbytes],
            }
            position += values.nbytes
            parts.append(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "adapter_model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for values in parts:
            out.write(values.tobytes())
    modules = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "use_dora": use_dora,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs; models are kept"
    )
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--alnico", default=shutil.which("alnico") or "alnico")
    parser.add_argument(
        "--before", type=Path, help="the src of another version, which runs in turn with this one"
    )
    parser.add_argument("--peft", action="store_true")
    chosen = parser.parse_args()
    layout = LAYOUTS["llama"](chosen.parameters)
    count = sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"llama-BF16-{count}"
    base, adapter = home / "m0", home / f"adapter-{chosen.rank}{'-dora' * chosen.dora}"
    beside(make, base, layout, 0, "BF16", max(count * 2 // 3, 1))
    beside(make_adapter, adapter, layout, chosen.rank, chosen.dora)
    out, peer = home / "folded", home / "peft"
    files = [file for folder in (base, adapter) for file in sorted(folder.glob("*.safetensors"))]
    command = [chosen.alnico, "lora", "fold", str(base), str(adapter), str(out), "--quiet"]
    programs = limits(files, count * 2, home / "limit")
    if chosen.before:
        programs["before"] = merging(command, out, chosen.before)
    programs["alnico"] = merging(command, out)
    found = alternating(programs, chosen.repeat)
    ours = found["alnico"]
    theirs, apart = "| | | ", ""
    if chosen.peft:
        merge = PEFT.format(threads=os.cpu_count())
        run = merging([sys.executable, "-c", merge, str(base), str(adapter), str(peer)], peer)()
        theirs = f"{run.wall:.1f} | {run.cpu:.1f} | {run.peak >> 20} | {run.wall / wall(ours):.0f}"
        apart = f"\nThe outputs are {beside(differences, out, peer)}."
        shutil.rmtree(peer, ignore_errors=True)
    old = "before s | CPU s | " if chosen.before else ""
    print(f"{platform.machine()}, {os.cpu_count()} cores; {count / 1e9:.2f} G parameters, BF16\n")
    print(
        f"| adapter | limit s | synced limit s | {old}alnico s | x limit | x synced | CPU s | peak MiB | PEFT s | CPU s | peak MiB | x faster |"
    )
    print("|---" * (12 + 2 * bool(chosen.before)) + "|")
    x, x_synced = (wall(ours) / wall(found[name]) for name in LIMITS)
    before = f"{seconds(found['before'])} | {cpu(found['before']):.2f} | " if chosen.before else ""
    print(
        f"| rank {chosen.rank}{', DoRA' * chosen.dora} | {' | '.join(seconds(found[name]) for name in LIMITS)} | {before}{seconds(ours)} "
        f"| {x:.2f} | {x_synced:.2f} | {cpu(ours):.2f} | {max(r.peak for r in ours) >> 20} | {theirs} |"
    )
    print(apart)
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
