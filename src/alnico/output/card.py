"""Writes the model card of a merge: its parents, licences, recipe, and how to reproduce it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alnico._version import __version__
from alnico.checkpoint.lineage import LOCK, MODEL_NAME, Lineage, licence_name, lineage_of
from alnico.checkpoint.lora_model import AdaptedModel, repositories
from alnico.checkpoint.remote.open_folder import is_url
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.weight_files import DIFFUSERS_STEM, stem_of
from alnico.installation import public_requirement
from alnico.methods import find
from alnico.output.recipe_file import RECIPE, format_recipe
from alnico.plan.job import Plan
from alnico.plan.licences import licence_conflicts, model_licences
from alnico.recipe.reference import replace_references

CARD_TEMPLATE = """\
---
{front_matter}
---
# A merge of {names}

Merged in weight space with alnico {version} by {methods}

| model | commit | part | licence |
|---|---|---|---|
{parents}
{notes}
{size} `{lock}` holds the hash of every tensor read and written.

## Recipe

```yaml
{recipe}
```

## To make it again

```sh
{install}alnico merge {recipe_file} OUT
```

With alnico {version}, this gives the same weights, bit for bit: `{recipe_file}` is the recipe above{places}
"""


def format_card(plan: Plan) -> str:
    """Return the model card: front matter for hubs, and how the model was made.

    ``base_model`` lists parents on the hub alone, as a path identifies a model for nobody else. The licence
    is the parents' one, if all state the same.
    """
    parents = parents_of(plan)
    names = public_names([parent.source for parent in parents])
    lineages = [lineage_of(parent.source) for parent in parents]
    licence = common_licence(lineages)
    notes = [*_licence_notes(lineages, licence), *_ancestors(names, lineages), *_weights(plan)]
    local = _local_names(parents)
    return CARD_TEMPLATE.format(
        front_matter=_front_matter(plan, parents, licence),
        names=", ".join(names),
        version=__version__,
        install=_install_line(),
        methods=_methods(plan),
        parents="\n".join(map(_parent_row, names, parents, lineages)),
        notes="".join(f"{line}\n" for line in notes),
        size=f"{len(plan.jobs)} tensors, {plan.elements:,} parameters, dtype {plan.dtype or 'mixed'}, seed {plan.recipe.seed}.",
        lock=LOCK,
        recipe=public_recipe(plan),
        recipe_file=RECIPE,
        places=_places(plan, list(local.values())),
    )


def _is_public(source: Source) -> bool:
    """Is a model on the hub or at a URL? An adapter and its base must both be at URLs, or else have other names in the card."""
    source = unwrap(source)
    if isinstance(source, AdaptedModel):
        return all(is_url(part.label) for part in source.parts)
    return source.origin is not None or is_url(source.label)


def _install_line() -> str:
    """The command that installs this version from the public address that it came from; empty without one."""
    requirement = public_requirement()
    return "" if requirement is None else f"pip install '{requirement}'\n"


def _front_matter(plan: Plan, parents: Sequence[Parent], licence: Mapping[str, str]) -> str:
    ids = dict.fromkeys(place.name for parent in parents for place in repositories(parent.source))
    library = _library(plan)
    tasks = {lineage_of(parent.source).task for parent in parents}
    task = tasks.pop() if len(tasks) == 1 else None
    entries: dict[str, Any] = {
        **({"base_model": list(ids), "base_model_relation": "merge"} if ids else {}),
        **({"library_name": library} if library else {}),
        **({"pipeline_tag": task} if task else {}),
        "tags": ["merge", *(["moe"] if plan.recipe.mixture is not None else []), "alnico"],
        **licence,
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).strip()


def _methods(plan: Plan) -> str:
    """The methods that were used, each with its source."""
    names = dict.fromkeys(name for p in (*plan.stages, plan) for name in p.recipe.methods_used)
    mixture = plan.recipe.mixture
    if mixture is not None:
        kind = plan.config.get("model_type")
        return (
            f"building a mixture of type {kind}: {len(mixture.experts)} experts, of which a token passes {mixture.experts_per_token}, with gates by "
            f"{mixture.gate_mode}. Methods: {', '.join(names)}."
        )
    first, *others = (find(name) for name in names)
    if not others:
        return f"`{first.name}`: {first.summary}\n\nMethod: {first.source}."
    lines = [f"- `{method.name}`: {method.summary} {method.source}." for method in (first, *others)]
    return "\n".join([f"{len(lines)} methods, as the recipe below says:", "", *lines])


def _parent_row(name: str, parent: Parent, lineage: Lineage) -> str:
    """A parent's row in the table of models."""
    origin = parent.source.origin
    model, commit = name.replace("|", "\\|"), "at its URL" if is_url(name) else "not from the hub"
    if origin:
        model = f"[{name}](https://huggingface.co/{name}/tree/{origin.commit})"
        commit = f"`{origin.commit[:12]}`"
    licence = licence_name(lineage.licence or common_licence([lineage])) or "not stated in its card"
    return f"| {model} | {commit} | {'; '.join(parent.parts)} | {licence} |"


def _licence_notes(lineages: Sequence[Lineage], licence: Mapping[str, str]) -> list[str]:
    lines = []
    if not licence:
        lines += [
            "",
            "The parents do not all state one licence, so this card states none: see theirs before you use the model.",
        ]
    if conflicts := licence_conflicts(model_licences(lineages)):
        lines += ["", *(f"- {line}" for line in conflicts), "", "This is not legal advice."]
    return lines


def _local_names(parents: Sequence[Parent]) -> dict[str, str]:
    """Public names of the models on this disk, by reference."""
    names = public_names([parent.source for parent in parents])
    return {p.reference: name for p, name in zip(parents, names, strict=True) if not _is_public(p.source)}


def public_recipe(plan: Plan) -> str:
    """Return the recipe without the paths of this disk: only their last parts."""
    local = _local_names(parents_of(plan))
    # A reference that is written as a mapping has its paths apart.
    paths = [part for reference in local for part in re.split(r"[+@]", reference) if part != reference]
    paths += [weighing.setting.path for weighing in plan.norm_weight_groups]
    paths += [source.label for source in _statistics(plan)]
    names = {**{path: Path(path).name for path in paths if Path(path).name != path}, **local}
    return format_recipe(replace_references(plan.recipe, names) if names else plan.recipe).strip()


def _statistics(plan: Plan) -> list[Source]:
    """The statistics that lie in files. A plan may make others itself."""
    return [source for source in plan.statistics if source.paths()]


def _places(plan: Plan, local: Sequence[str]) -> str:
    """Where the models and statistics are that the recipe takes."""
    if local:
        text = (
            f". Its models {', '.join(local)} were on the maker's disk: put your own copies in their place."
        )
    else:
        text = ", and names the commits of its models."
    if statistics := _statistics(plan):
        names = ", ".join(Path(source.label).name for source in statistics)
        text += f" The statistics of data that it takes, {names}, were on the maker's disk, too."
    return text


def _weights(plan: Plan) -> list[str]:
    """The weights that were derived from norms, if they hold for whole models; for those by layer or tensor,
    where to find them."""
    if not plan.norm_weight_groups:
        return []
    of_models = [group for group in plan.norm_weight_groups if not group.place]
    lines = [
        "",
        f"Weights follow from the L2 norms of the task vectors; `{LOCK}` has {'them' if of_models else 'those of each part'} in full.",
    ]
    for group in of_models:
        lines += ["", "| model | L2 norm | weight |", "|---|---|---|"]
        names = public_names([plan.sources[m] for m in group.models])
        rows = zip(names, group.norms or (), group.weights or (), strict=True)
        lines += [
            "| {} | {:.6g} | {:.6f} |".format(name.replace("|", "\\|"), norm, weight)
            for name, norm, weight in rows
        ]
    return lines


@dataclass(frozen=True)
class Parent:
    """An input model of a merge, or of one of its stages, and its part in the merge."""

    reference: str
    source: Source
    parts: tuple[str, ...]


def parents_of(plan: Plan) -> list[Parent]:
    """List the models that the output is made of, each once. A stage's output counts as the models that it is
    made of."""
    plans = {p.recipe.stage: p for p in plan.stages}
    donor = plan
    while (reference := donor.recipe.references[donor.donor]) in plans:
        donor = plans[reference]
    models: dict[str, tuple[Source, dict[str, None]]] = {}
    for stage in (*plan.stages, plan):
        used = {i.model for job in stage.jobs for i in job.read}
        merged = {i.model for job in stage.jobs for i in job.inputs}
        for i, (reference, source) in enumerate(zip(stage.recipe.references, stage.models, strict=True)):
            if reference in plans:
                continue
            _, parts = models.setdefault(reference, (source, {}))
            is_measured = i in {group.base for group in stage.norm_weight_groups}
            if i in used or (is_measured and reference != stage.recipe.base_model):
                is_base = reference == stage.recipe.base_model
                parts["base" if is_base else "merged" if i in merged else "base of some tensors"] = None
            if reference == stage.recipe.complete_from:
                parts.pop("merged", None)
                parts["completes the output"] = None
            if stage is donor and i == donor.donor:
                parts["config, tokenizer"] = None
    return [Parent(r, source, tuple(parts) or ("tokens",)) for r, (source, parts) in models.items()]


def public_names(sources: Sequence[Source]) -> list[str]:
    """Return names for a card: hub ids, and the last part of local paths; no name twice."""
    names: list[str] = []
    for source in sources:
        source = unwrap(source)
        path = Path(source.label)
        if isinstance(source, AdaptedModel):
            base, adapter = public_names([source.base, source.adapter.files])
            name = f"{base}+{source.weighted(adapter)}"
        elif isinstance(source, EquippedModel):
            (base,), origin = public_names([source.base]), source.vector.origin
            name = f"{base}+{source.weighted(origin.name if origin is not None else source.vector.manifest.name)}"
        else:
            name = source.origin.name if source.origin is not None else path.name or path.resolve().name
            name = source.label if is_url(source.label) else name
        is_local = source.origin is None and not is_url(name)
        same = sum(n == name or n.startswith(f"{name} (") for n in names) if is_local else 0
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def common_licence(lineages: Sequence[Lineage]) -> Mapping[str, str]:
    """The licence, if all models that are merged in the end state the same one."""
    stated = [model.licence for lineage in lineages for model in lineage.stated()]
    return stated[0] if all(licence == stated[0] for licence in stated) else {}


def _ancestors(names: Sequence[str], lineages: Sequence[Lineage]) -> list[str]:
    """The models that the parents were made of, as far as their cards and locks state them."""
    lines: list[str] = []

    def add(name: str, lineage: Lineage, depth: int) -> None:
        parents = [p for p in lineage.parents if MODEL_NAME.fullmatch(p.name)] if lineage.is_merge else []
        origins = [f"a merge of {', '.join(p.name for p in parents)}"] if parents else []
        origins += [f"made from {', '.join(lineage.bases)}"] if lineage.bases else []
        if origins:
            lines.append(f"{'  ' * depth}- {name}: {'; '.join(origins)}")
        for parent in parents:
            add(parent.name, parent, depth + 1)

    for name, lineage in zip(names, lineages, strict=True):
        add(name, lineage, 0)
    return ["", "## Lineage", "", "As the parents' own cards and locks say:", "", *lines] if lines else []


def _library(plan: Plan) -> str | None:
    """The library that loads the output, as the hub calls it; None if unknown."""
    donor = plan.sources[plan.donor]
    if donor.directory is not None and (donor.directory / "modules.json").exists():
        return "sentence-transformers"
    if stem_of(donor) == DIFFUSERS_STEM:
        return "diffusers"
    return "transformers" if donor.config.get("architectures") or donor.config.get("model_type") else None
