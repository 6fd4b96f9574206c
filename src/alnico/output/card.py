"""What goes with the weights: the lock, the recipe and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alnico._version import __version__
from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.lineage import LOCK, NAME, Lineage, licence_name, lineage_of
from alnico.checkpoint.lora_model import AdaptedModel, repositories
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.weight_files import DIFFUSERS_STEM, stem_of
from alnico.kernels.constants import ARITHMETIC
from alnico.methods import find
from alnico.output.journal import Record
from alnico.plan.job import Plan
from alnico.plan.licences import licence_conflicts, model_licences
from alnico.recipe.reference import replace_references
from alnico.recipe.schema import Recipe

RECIPE = "mergekit_config.yml"
SEED = re.compile(r"^seed:.*$", re.MULTILINE)
LINE = 200
"""Longest line of a lock that holds more than one entry."""


def lock_of(plan: Plan, records: Mapping[str, Record], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the lock: what was merged, from what, into what. Equal merges give equal locks. ``files`` are those of the output, with
    their sizes and hashes.

    Files of inputs are named by their header's hash and size; paths stay as the recipe writes them. A model of the hub has
    the commit that its revision was; the output of a stage has its own lock.
    """
    read: dict[int, dict[str, str]] = {i: {} for i in range(len(plan.sources))}
    for record in records.values():
        for model, name, digest in record.inputs:
            read[model][name] = digest
    lock = {
        "alnico": __version__,
        "arithmetic": ARITHMETIC,
        "hash": "xxh3-128",
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "inputs": [
            {
                "statistics" if source in plan.statistics else "model": source.label,
                **_repositories(source),
                **_told_of(plan, i),
                "files": [
                    {k: v for k, v in f.items() if k not in ("mtime_ns", "commit")} for f in source.identity()
                ],
                "tensors": dict(sorted(read[i].items())),
            }
            for i, source in enumerate(plan.sources)
        ],
        **({"weights": [w.data(plan.sources) for w in plan.weighings]} if plan.weighings else {}),
        "dropped": [
            {"model": plan.sources[d.model].label, "tensor": d.name, "why": d.why} for d in plan.dropped
        ],
        "output": {
            job.name: {
                "dtype": job.dtype,
                "shape": list(job.shape),
                "do": job.recorded_kind,
                "digest": records[job.name].digest,
            }
            for job in plan.jobs
        },
        "files": files,
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
        parts = [
            f"{pad}{json.dumps(k, ensure_ascii=False)}: {laid_out(v, depth + 1)}" for k, v in value.items()
        ]
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


def _told_of(plan: Plan, model: int) -> dict[str, Any]:
    """Of the output of a stage its lock; of another model what its files say of its licence and its origin."""
    folder = plan.sources[model].directory
    if model >= len(plan.models):
        return {}
    if folder is None or plan.recipe.references[model] not in {p.recipe.stage for p in plan.stages}:
        return lineage_of(plan.sources[model]).data()
    return {"lock": read_json(folder / LOCK)}


def _repositories(source: Source) -> dict[str, Any]:
    """Where on the hub a model comes from; of a base with an adapter there are up to two places."""
    found = [
        {"repository": repository.name, "commit": repository.commit} for repository in repositories(source)
    ]
    return (
        ({"repositories": found} if found else {})
        if isinstance(unwrap(source), AdaptedModel)
        else dict(*found)
    )


def card_of(plan: Plan) -> str:
    """Return the model card: front matter for hubs, and how the model was made.

    ``base_model`` lists parents on the hub alone: a path is nobody's id. The licence is the parents', if all state the same.
    """
    recipe, parents = plan.recipe, parents_of(plan)
    sources = [parent.source for parent in parents]
    names = public_names(sources)
    lineages = [lineage_of(source) for source in sources]
    licences = [lineage.licence or _shared([lineage]) for lineage in lineages]
    agreed = _shared(lineages)
    library = _library(plan)
    front: dict[str, Any] = {"tags": ["merge", "alnico"], **agreed}
    if library:
        front = {"library_name": library, **front}
    ids = [repository.name for source in sources for repository in repositories(source)]
    if ids:
        front = {"base_model": list(dict.fromkeys(ids)), "base_model_relation": "merge", **front}
    used = [
        find(name) for name in dict.fromkeys(m for p in (*plan.stages, plan) for m in p.recipe.methods_used)
    ]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "# A merge of " + ", ".join(names),
        "",
        f"Merged in weight space with [alnico](https://pypi.org/project/alnico/) {__version__} by "
        + (
            f"`{used[0].name}`: {used[0].summary}"
            if len(used) == 1
            else f"{len(used)} methods, as the recipe below says:"
        ),
        "",
        *(
            [f"Method: {used[0].source}."]
            if len(used) == 1
            else [f"- `{m.name}`: {m.summary} {m.source}." for m in used]
        ),
        "",
        "| model | commit | part | licence |",
        "|---|---|---|---|",
    ]
    for name, parent, licence in zip(names, parents, licences, strict=True):
        origin = parent.source.origin
        shown = (
            f"[{name}](https://huggingface.co/{name}/tree/{origin.commit})"
            if origin
            else name.replace("|", "\\|")
        )
        commit = f"`{origin.commit[:12]}`" if origin else "not from the hub"
        lines.append(
            f"| {shown} | {commit} | {'; '.join(parent.parts)} | {licence_name(licence) or 'not stated in its card'} |"
        )
    if not agreed:
        lines += [
            "",
            "The parents do not all state one licence, so this card states none: see theirs before you use the model.",
        ]
    if said := licence_conflicts(model_licences(lineages)):
        lines += ["", *(f"- {line}" for line in said)]
    lines += _ancestors(names, lineages)
    lines += _weights(plan)
    local = {p.reference: n for p, n in zip(parents, names, strict=True) if p.source.origin is None}
    # A reference that is written as a mapping has its paths by themselves.
    parts = {
        part: Path(part).name
        for r in local
        for part in re.split(r"[+@]", r)
        if part != r and Path(part).name != part
    }
    parts |= {
        w.setting.path: Path(w.setting.path).name
        for w in plan.weighings
        if Path(w.setting.path).name != w.setting.path
    }
    parts |= {s.label: Path(s.label).name for s in plan.statistics if Path(s.label).name != s.label}
    lines += [
        "",
        f"{len(plan.jobs)} tensors, {plan.elements:,} parameters, dtype {plan.dtype or 'mixed'}, seed {recipe.seed}. "
        f"`{LOCK}` holds the hash of every tensor read and written.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text(replace_references(recipe, {**parts, **local}) if local or parts else recipe).strip(),
        "```",
        "",
        "## To make it again",
        "",
        "```sh",
        f"pip install alnico=={__version__}",
        f"alnico merge {RECIPE} OUT",
        "```",
        "",
        f"gives the same weights, bit for bit: `{RECIPE}` is the recipe above"
        + (", and names the commits of its models." if not local else ".")
        + (
            f" Its models {', '.join(local.values())} were on the maker's disk: put your own copies in their place."
            if local
            else ""
        )
        + (
            f" The statistics of data that it takes, {', '.join(Path(s.label).name for s in plan.statistics)}, were on the maker's disk, too."
            if plan.statistics
            else ""
        ),
        "",
    ]
    return "\n".join(lines)


def _weights(plan: Plan) -> list[str]:
    """The weights that followed from norms, where they are one a model; of those by layer or tensor, where to find them."""
    if not plan.weighings:
        return []
    whole = [w for w in plan.weighings if not w.place]
    lines = [
        "",
        f"Weights follow from the L2 norms of the task vectors; `{LOCK}` has {'them' if whole else 'those of each part'} in full.",
    ]
    for weighing in whole:
        lines += ["", "| model | L2 norm | weight |", "|---|---|---|"]
        names = public_names([plan.sources[m] for m in weighing.models])
        rows = zip(names, weighing.norms or (), weighing.weights or (), strict=True)
        lines += [
            "| {} | {:.6g} | {:.6f} |".format(name.replace("|", "\\|"), norm, weight)
            for name, norm, weight in rows
        ]
    return lines


@dataclass(frozen=True)
class Parent:
    """A model that a merge, or a stage that leads to it, takes, and what for."""

    reference: str
    source: Source
    parts: tuple[str, ...]


def parents_of(plan: Plan) -> list[Parent]:
    """The models that the output is made of, each once; of a stage's output those that it is made of."""
    plans = {p.recipe.stage: p for p in plan.stages}
    donor = plan
    while (reference := donor.recipe.references[donor.donor]) in plans:
        donor = plans[reference]
    found: dict[str, tuple[Source, dict[str, None]]] = {}
    for made in (*plan.stages, plan):
        used = {i.model for job in made.jobs for i in job.read}
        for i, (reference, source) in enumerate(zip(made.recipe.references, made.models, strict=True)):
            if reference in plans:
                continue
            _, parts = found.setdefault(reference, (source, {}))
            if i in used:
                parts["base" if reference == made.recipe.base_model else "merged"] = None
            if made is donor and i == donor.donor:
                parts["config, tokenizer"] = None
    return [Parent(r, source, tuple(parts) or ("tokens",)) for r, (source, parts) in found.items()]


def public_names(sources: Sequence[Source]) -> list[str]:
    """Names for a card: a hub id as it is, of a local path only the last part; no name twice."""
    names: list[str] = []
    for source in sources:
        source = unwrap(source)
        path = Path(source.label)
        if isinstance(source, AdaptedModel):
            base, adapter = public_names([source.base, source.adapter.files])
            name = f"{base}+{source.weighted(adapter)}"
        else:
            name = source.origin.name if source.origin is not None else path.name or path.resolve().name
        same = sum(n == name or n.startswith(f"{name} (") for n in names) if source.origin is None else 0
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _shared(lineages: Sequence[Lineage]) -> Mapping[str, str]:
    """The licence that all models state which are merged in the end; nothing where one states another, or none."""
    stated = [model.licence for lineage in lineages for model in lineage.stated()]
    return stated[0] if all(licence == stated[0] for licence in stated) else {}


def _ancestors(names: Sequence[str], lineages: Sequence[Lineage]) -> list[str]:
    """What the parents were made of, as far as their cards and locks say."""
    lines: list[str] = []

    def tell(name: str, lineage: Lineage, depth: int) -> None:
        of = [p for p in lineage.parents if NAME.fullmatch(p.name)] if lineage.is_merge else []
        said = [f"a merge of {', '.join(p.name for p in of)}"] if of else []
        said += [f"made from {', '.join(lineage.bases)}"] if lineage.bases else []
        if said:
            lines.append(f"{'  ' * depth}- {name}: {'; '.join(said)}")
        for parent in of:
            tell(parent.name, parent, depth + 1)

    for name, lineage in zip(names, lineages, strict=True):
        tell(name, lineage, 0)
    return ["", "## Lineage", "", "As the parents' own cards and locks say:", "", *lines] if lines else []


def _library(plan: Plan) -> str | None:
    """The library that loads the output, as the hub calls it; None where nothing says so."""
    donor = plan.sources[plan.donor]
    if donor.directory is not None and (donor.directory / "modules.json").exists():
        return "sentence-transformers"
    if stem_of(donor) == DIFFUSERS_STEM:
        return "diffusers"
    return "transformers" if donor.config.get("architectures") or donor.config.get("model_type") else None
