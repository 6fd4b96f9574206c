"""What goes with the weights: the lock, the recipe and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alnico.checkpoint.adapter import AdaptedModel, repositories
from alnico.checkpoint.model import Source
from alnico.engine.journal import Record
from alnico.kernels.shape import ARITHMETIC
from alnico.methods import find
from alnico.plan.build import pinned
from alnico.plan.job import Plan
from alnico.recipe.schema import Recipe

LOCK = "alnico.lock.json"
RECIPE = "mergekit_config.yml"
CARD = "README.md"
SEED = re.compile(r"^seed:.*$", re.MULTILINE)
LINE = 200
"""Longest line of a lock that holds more than one entry."""
WORD = re.compile(r"[\w.+-]{1,80}")
"""A licence's name, safe in a table."""


def lock_of(plan: Plan, records: Mapping[str, Record], version: str) -> str:
    """Return the lock: what was merged, from what, into what. Equal merges give equal locks.

    Files of inputs are named by their header's hash and size; paths stay as the recipe writes them. A model of the hub has
    the commit that its revision was.
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
                **_repositories(source),
                "files": [{k: v for k, v in f.items() if k not in ("mtime_ns", "commit")} for f in source.identity()],
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
    return laid_out(lock) + "\n"


def laid_out(value: Any, depth: int = 0) -> str:
    """Return JSON with a line for each entry that fits one: a tensor, say.

    ``json.dumps`` with an indent is written in Python and takes 75 us a tensor, as long as merging a small one.
    """
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LINE or not isinstance(value, (dict, list)):
        return text
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(k, ensure_ascii=False)}: {laid_out(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(pad + laid_out(v, depth + 1) for v in value) + "\n" + " " * depth + "]"


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML that makes the same merge: as it was written, with the seed that was used, or made from its values."""
    if recipe.text:
        text = recipe.text + ("" if recipe.text.endswith("\n") else "\n")
        if recipe.seed == recipe.written_seed:
            return text
        given = yaml.safe_load(text)
        seeded = SEED.sub(f"seed: {recipe.seed}", text) if "seed" in given else f"{text}seed: {recipe.seed}\n"
        if _reads_as(seeded, {**given, "seed": recipe.seed}):
            return seeded
    return yaml.safe_dump(recipe.canonical(), sort_keys=False)


def _reads_as(text: str, expected: Mapping[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(text) == expected)
    except yaml.YAMLError:
        return False


def _repositories(source: Source) -> dict[str, Any]:
    """Where on the hub a model comes from; of a base with an adapter there are up to two places."""
    found = [{"repository": repository.name, "commit": repository.commit} for repository in repositories(source)]
    return ({"repositories": found} if found else {}) if isinstance(source, AdaptedModel) else dict(*found)


def card_of(plan: Plan, version: str) -> str:
    """Return the model card: front matter for hubs, and how the model was made.

    ``base_model`` lists parents on the hub alone: a path is nobody's id. The licence is the parents', if all state the same.
    """
    recipe, method = plan.recipe, find(plan.recipe.merge_method)
    names = public_names(plan.sources)
    licences = [licence_of(source) for source in plan.sources]
    origins = [source.origin for source in plan.sources]
    agreed = licences[0] if licences[0] and all(licence == licences[0] for licence in licences) else {}
    library = _library(plan)
    front: dict[str, Any] = {"tags": ["merge", "alnico"], **agreed}
    if library:
        front = {"library_name": library, **front}
    parents = [repository.name for source in plan.sources for repository in repositories(source)]
    if parents:
        front = {"base_model": list(dict.fromkeys(parents)), "base_model_relation": "merge", **front}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "# A merge of " + ", ".join(names),
        "",
        f"Merged in weight space with [alnico](https://pypi.org/project/alnico/) {version} by `{method.name}`: {method.summary}",
        "",
        f"Method: {method.source}.",
        "",
        "| model | commit | part | licence |",
        "|---|---|---|---|",
    ]
    for i, (name, origin, reference) in enumerate(zip(names, origins, recipe.references, strict=True)):
        part = "base" if reference == recipe.base_model else "merged"
        part += "; config, tokenizer" if i == plan.donor else ""
        shown = f"[{name}](https://huggingface.co/{name}/tree/{origin.commit})" if origin else name.replace("|", "\\|")
        commit = f"`{origin.commit[:12]}`" if origin else "not from the hub"
        lines.append(f"| {shown} | {commit} | {part} | {_licence_name(licences[i]) or 'not stated in its card'} |")
    if not agreed:
        lines += ["", "The parents do not all state one licence, so this card states none: see theirs before you use the model."]
    local = {r: n for r, n, o in zip(recipe.references, names, origins, strict=True) if o is None}
    lines += [
        "",
        f"{len(plan.jobs)} tensors, {plan.elements:,} parameters, dtype {plan.dtype or 'mixed'}, seed {recipe.seed}. "
        f"`{LOCK}` holds the hash of every tensor read and written.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text(pinned(recipe, local) if local else recipe).strip(),
        "```",
        "",
        "## To make it again",
        "",
        "```sh",
        f"pip install alnico=={version}",
        f"alnico merge {RECIPE} OUT",
        "```",
        "",
        f"gives the same weights, bit for bit: `{RECIPE}` is the recipe above"
        + (", and names the commits of its models." if not local else ".")
        + (
            f" Its models {', '.join(local.values())} were on the maker's disk: put your own copies in their place."
            if local
            else ""
        ),
        "",
    ]
    return "\n".join(lines)


def public_names(sources: Sequence[Source]) -> list[str]:
    """Names for a card: a hub id as it is, of a local path only the last part; no name twice."""
    names: list[str] = []
    for source in sources:
        path = Path(source.label)
        if isinstance(source, AdaptedModel):
            name = "+".join(public_names([source.base, source.adapter]))
        else:
            name = source.origin.name if source.origin is not None else path.name or path.resolve().name
        same = sum(n == name or n.startswith(f"{name} (") for n in names) if source.origin is None else 0
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def licence_of(source: Source) -> dict[str, str]:
    """Return ``license`` (and ``license_name``, ``license_link``) as the front matter of a model's card states them."""
    card = source.directory / CARD if source.directory else None
    if card is None or not card.is_file() or card.stat().st_size > 10_000_000:
        return {}
    text = card.read_text("utf-8", "replace")
    if not text.startswith("---"):
        return {}
    try:
        front = yaml.safe_load(text[3:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(front, dict) or not isinstance(front.get("license"), str) or not WORD.fullmatch(front["license"]):
        return {}
    more = ("license_name", "license_link") if front["license"] == "other" else ()
    return {"license": front["license"]} | {k: front[k] for k in more if isinstance(front.get(k), str)}


def _licence_name(licence: Mapping[str, str]) -> str | None:
    name = licence.get("license_name", "")
    return name if WORD.fullmatch(name) else licence.get("license")


def _library(plan: Plan) -> str | None:
    """The library that loads the output, as the hub calls it; None where nothing says so."""
    donor = plan.sources[plan.donor]
    if donor.directory is not None and (donor.directory / "modules.json").exists():
        return "sentence-transformers"
    return "transformers" if donor.config.get("architectures") or donor.config.get("model_type") else None
