"""What goes with the weights: the lock, the recipe and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alnico.checkpoint.model import Source
from alnico.engine.journal import Record
from alnico.kernels.shape import ARITHMETIC
from alnico.plan.job import Plan
from alnico.recipe.schema import Recipe

LOCK = "alnico.lock.json"
RECIPE = "mergekit_config.yml"
CARD = "README.md"


def lock_of(plan: Plan, records: Mapping[str, Record], version: str) -> str:
    """Return the lock: what was merged, from what, into what. Equal merges give equal locks.

    Files of inputs are named by their header's hash and size; paths stay as the recipe writes them.
    """
    read: dict[int, dict[str, str]] = {i: {} for i in range(len(plan.sources))}
    for record in records.values():
        for model, name, digest in record.inputs:
            read[model][name] = digest
    lock = {
        "alnico": version,
        "arithmetic": ARITHMETIC,
        "hash": "xxh3-128",
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "inputs": [
            {
                "model": source.label,
                "files": [{k: v for k, v in f.items() if k != "mtime_ns"} for f in source.identity()],
                "tensors": dict(sorted(read[i].items())),
            }
            for i, source in enumerate(plan.sources)
        ],
        "dropped": [{"model": plan.sources[d.model].label, "tensor": d.name, "why": d.why} for d in plan.dropped],
        "output": {
            job.name: {"dtype": job.dtype, "shape": list(job.shape), "do": job.kind, "digest": records[job.name].digest}
            for job in plan.jobs
        },
    }
    return json.dumps(lock, indent=1, ensure_ascii=False) + "\n"


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML: as it was written, or made from its values; with the seed either way."""
    if recipe.text:
        ending = "" if recipe.text.endswith("\n") else "\n"
        return recipe.text + ending + ("" if recipe.seed == recipe.written_seed else f"# run with --seed {recipe.seed}\n")
    return yaml.safe_dump(recipe.canonical(), sort_keys=False)


def card_of(plan: Plan, version: str) -> str:
    """Return the model card: front matter for hubs, and how the model was made."""
    names = [public_name(s) for s in plan.sources]
    licences = {name: licence_of(s) for name, s in zip(names, plan.sources, strict=True)}
    said = {v for v in licences.values() if v}
    front: dict[str, Any] = {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "alnico"],
    }
    if len(said) == 1 and all(licences.values()):
        front["license"] = said.pop()
    method = plan.recipe.merge_method
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "# A merge of " + ", ".join(names),
        "",
        f"Merged in weight space with [alnico](https://pypi.org/project/alnico/) {version}, method `{method}`.",
        "",
        "| model | part | licence |",
        "|---|---|---|",
    ]
    for i, (name, source) in enumerate(zip(names, plan.sources, strict=True)):
        part = "base" if source.label == plan.recipe.base_model else "merged"
        part += "; config, tokenizer" if i == plan.donor else ""
        lines.append(f"| {name} | {part} | {licences[name] or 'not stated in its card'} |")
    lines += [
        "",
        f"{len(plan.jobs)} tensors, {plan.elements:,} parameters, dtype {plan.dtype or 'mixed'}, seed {plan.recipe.seed}. "
        f"`{LOCK}` holds the hash of every tensor read and written.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text(plan.recipe).strip(),
        "```",
        "",
        f"To make it again: `alnico merge {RECIPE} OUT` with the same models.",
        "",
    ]
    return "\n".join(lines)


def public_name(source: Source) -> str:
    """A model's name for a card: a hub id as it is, of a local path only the last part."""
    path = Path(source.label)
    return path.name or path.resolve().name if source.directory is not None or path.exists() else source.label


def licence_of(source: Source) -> str | None:
    """Return the licence that the front matter of a model's card states, if it does."""
    card = source.directory / "README.md" if source.directory else None
    if card is None or not card.is_file() or card.stat().st_size > 10_000_000:
        return None
    text = card.read_text("utf-8", "replace")
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text[3:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
