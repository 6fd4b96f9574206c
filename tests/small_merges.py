"""A merge of few calls that does all that a merge does, for tests that let each of its calls fail or be its last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alnico
from alnico.events import Event, TensorDone
from made import save_model


def made_recipe(root: Path) -> Path:
    """Models in two shards: a tensor of the base that is copied, one that is equal in all, side files, a config that changes, and
    a fact over the model."""
    random = np.random.default_rng(0)
    shapes = {"first": (16, 8), "second": (16, 8), "norm": (8,)}
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for i in range(3):
        tuned = {
            n: ("F32", v + (0.01 * i) * random.standard_normal(v.shape).astype(np.float32))
            for n, v in base.items()
        }
        tensors = {
            **tuned,
            "steps": ("I64", np.arange(2)),
            **({"positions": ("I64", np.arange(6))} if i == 0 else {}),
        }
        folder = save_model(
            root / ("base" if i == 0 else f"tuned-{i - 1}"), tensors, {"torch_dtype": "float32"}, 2
        )
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    path = root / "recipe.yml"
    path.write_text(
        f"merge_method: ties\nbase_model: {root}/base\nmodels: [{root}/tuned-0, {root}/tuned-1]\n"
        "parameters: {density: 0.5, scope: model}\ndtype: bfloat16\nunrelated: allow\n"
    )
    return path


def merged(recipe: Path, out: Path, **options: Any) -> alnico.MergeResult:
    """Merge with one thread, into two shards."""
    return alnico.merge(recipe, out, threads=1, max_shard_size=300, **options)


def interrupted(recipe: Path, out: Path) -> Path:
    """Interrupt a merge after its second tensor; returns the folder of what it has done."""
    done: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.tensor)
            if len(done) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(recipe, out, watch=watch)
    return out.parent / f".{out.name}.alnico-part"


def everything(out: Path) -> dict[str, bytes]:
    """Every file of an output, whatever its name."""
    return (
        {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
        if out.exists()
        else {}
    )


def tensors_in(journal: Path) -> set[str]:
    """The tensors that a journal says are finished: of its whole lines."""
    lines = journal.read_text().split("\n")[1:-1] if journal.exists() else []
    entries = [entry for line in map(json.loads, lines) for entry in line.get("tensors", [line])]
    return {entry["tensor"] for entry in entries if "tensor" in entry}
