"""Builds the plan of a merge from a recipe and the headers of its models."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alnico.checkpoint.factors import is_factor, refuse_adapter
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES, OutputShard, split_into_shards
from alnico.checkpoint.sidecars import check_carried, module_stems, quantiser_files
from alnico.checkpoint.source import Source, unwrap
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel, allow_base_mismatch
from alnico.checkpoint.task_vectors.stored_vector import StoredVector
from alnico.checkpoint.tied_weights import tied_copies
from alnico.checkpoint.untied_model import untie
from alnico.checkpoint.weight_files import is_gguf_file, stem_of
from alnico.devices import Device, devices_for
from alnico.errors import MismatchError, ModelError, RecipeError
from alnico.installation import import_extra
from alnico.numerics.dtypes import MERGEABLE, Q8_0
from alnico.plan import families
from alnico.plan.compatibility import config_notes, quantisation_notes
from alnico.plan.completion import (
    Completion,
    check_completion,
    gives_config,
    plan_completion,
    refuse_complete,
)
from alnico.plan.config import check_layers, layered_config, predictor_notes
from alnico.plan.filters import unmatched_filters
from alnico.plan.job import Job, MemoryPlan, Plan
from alnico.plan.job_builder import JobBuilder
from alnico.plan.left_out import config_without
from alnico.plan.licences import check_licences, licence_conflicts, model_licences
from alnico.plan.memory import fit_memory
from alnico.plan.norm_weights import known_norms, with_norms
from alnico.plan.own_heads import untie_heads
from alnico.plan.sections import Sections, build_sections
from alnico.plan.tensor_matching import check_factors, check_modules
from alnico.recipe.reference import replace_references, resolve_reference
from alnico.recipe.requantise import is_requantising
from alnico.recipe.schema import Recipe, Rule
from alnico.run_options import DEFAULT_RUN, RunOptions
from alnico.vocabulary.chat_template import check_setting, plan_chat_template
from alnico.vocabulary.output_vocabulary import VocabularyPlan, plan_vocabulary
from alnico.vocabulary.remapped_model import remap_rows


def build_plan(
    recipe: Recipe,
    *,
    run: RunOptions = DEFAULT_RUN,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    open_source: Callable[[str], Source] | None = None,
    strict_license: bool = False,
) -> Plan:
    """Open the models of a recipe (headers only), match their tensors and lay out the output.

    ``single_file`` names the one output file of an OUT that ends in ``.safetensors`` or ``.gguf``. Licences that do not go
    together are notes, with ``strict_license`` a MismatchError. Errors: ModelError, MismatchError,
    MethodError, ResourceError, HubError; see ``errors``. Values are read only if names do not match (packed
    experts, tied copies), and nothing is written except the hub's cache.
    """
    if recipe.requantise is not None and not is_requantising(recipe):
        raise RecipeError(
            f"{recipe.name}: has requantise, which rounds a merge in files; expected a recipe without it. Merge by `alnico merge`, or "
            "leave it out."
        )
    devices = devices_for("merging", run.device)
    if recipe.chat_template is not None:
        check_setting(recipe.chat_template)
    references = list(recipe.references)
    opener = open_source or (
        lambda reference: open_model(resolve_reference(reference, recipe.folder), access=run.access)
    )
    sources: list[Source] = []
    try:
        for reference in references:
            try:
                sources.append(_tokenizer_alone(recipe, reference) or opener(reference))
            except ModelError as error:
                raise ModelError(f"{error}{_tokenizer_hint(recipe, reference)}") from None
        if recipe.base_mismatch == "allow":
            allow_base_mismatch(sources)
        if any(map(is_factor, set().union(*(source.tensors for source in sources)))):
            for source in sources:
                refuse_adapter(source.label, source.tensors)
        models = model_licences(lineage_of(source) for source in sources)
        if strict_license:
            check_licences(models)
        plan = _plan(recipe, references, sources, run, devices, max_shard_bytes, single_file)
        license_notes = licence_conflicts(models)
        return dataclasses.replace(plan, notes=(*plan.notes, *license_notes)) if license_notes else plan
    except BaseException:
        for source in sources:
            source.close()
        raise


def _tokenizer_alone(recipe: Recipe, reference: str) -> Source | None:
    """Return the folder of a tokenizer without weights as a model, if a recipe needs nothing else of it."""
    if not _has_approximation(recipe):
        return None
    from alnico.vocabulary.tokenizer_folder import tokenizer_alone

    return tokenizer_alone(recipe, reference, resolve_reference(reference, recipe.folder))


def _has_approximation(recipe: Recipe) -> bool:
    """Do models make rows of tokens that they lack?"""
    return recipe.tokenizer is not None and recipe.tokenizer.approximate is not None


def _tokenizer_hint(recipe: Recipe, reference: str) -> str:
    """Return a hint if a missing model is named only as the tokenizer."""
    if (
        recipe.tokenizer is None
        or reference != recipe.tokenizer.source
        or any(e.reference == reference for e in recipe.entries)
    ):
        return ""
    near = difflib.get_close_matches(reference, ("union", "base"), 1)
    return f" Or did you mean {near[0]} as the tokenizer?" if near else ""


def _plan(
    recipe: Recipe,
    references: list[str],
    sources: list[Source],
    run: RunOptions,
    devices: tuple[Device, ...],
    max_shard_bytes: int,
    single_file: str | None,
) -> Plan:
    is_gguf = is_gguf_file(single_file)
    if is_gguf or recipe.dtype == Q8_0:
        from alnico.plan.gguf_output import check_type

        check_type(recipe, single_file)
    donor = _donor(recipe, references, sources)
    if is_requantising(recipe):
        sources, donor = _requantised_sources(recipe, references, sources), 0
    sources = _adapted_sources(recipe, references, sources, donor)
    if recipe.complete_from:
        check_completion(*_completed(recipe, references, sources))
    if recipe.mixture is not None:
        return _mixture(recipe, references, sources, donor, run, devices, max_shard_bytes, single_file)
    vocabulary = _vocabulary(recipe, references, sources, donor)
    if vocabulary is not None:
        sources = _with_rows(sources, vocabulary, run)
    made_of, names = recipe, sources[donor].tensors
    has_routers = bool(recipe.routers or recipe.calibrate_routers) or any(
        ".gate." in n or "router" in n for n in names
    )
    if has_routers:
        from alnico.plan.routers import merged_routers_note, with_router_rules  # with mixtures of experts

        made_of = with_router_rules(recipe, sources, donor)
    sections = build_sections(made_of, references, sources, donor)
    filter_notes = unmatched_filters(recipe, sections.parts)
    new_rows = [t.rows for t in vocabulary.tables] if vocabulary is not None else ()
    dtype_of = None
    if is_gguf:
        from alnico.plan.gguf_output import computed_dtype

        dtype_of = functools.partial(computed_dtype, recipe)
    builder = JobBuilder(made_of, sources, donor, sections, new_rows, dtype_of)
    jobs = _checked_jobs(builder)
    groups = builder.norm_weight_groups()
    merged = _merged_models(sources, jobs, sections)
    notes = [
        *recipe.notes,
        *filter_notes,
        *(
            note
            for s in (sources[:1] if is_requantising(recipe) else sources)
            for note in getattr(s, "notes", ())
        ),
        *builder.matcher.notes,
        *builder.notes,
        *check_modules(jobs, sources, donor),
        *(
            []
            if is_requantising(recipe)
            else _unused_models(made_of, references, sections, jobs, {group.base for group in groups})
        ),
        *config_notes(merged, sources[donor]),
        *quantisation_notes(merged),
        *_duplicate_models(sources),
    ]
    if has_routers:
        notes += merged_routers_note(recipe, sources, donor, jobs)
    config, files, more_notes = _config_and_files(recipe, sources, donor, sections, jobs, vocabulary)
    if is_requantising(recipe):
        files |= quantiser_files(sources[references.index(recipe.base_model or "")].directory)
    left = vocabulary.excluded if vocabulary is not None else frozenset()
    if recipe.complete_from:
        completion = _completion(recipe, references, sources, donor, jobs, config)
        config, files, left = completion.config, {**completion.files, **files}, left | completion.left
        more_notes += completion.notes
    if builder.left_out:
        config, left_notes = config_without(config, builder.left_out, builder.jobs)
        more_notes += left_notes
    folder = sources[donor].directory
    if folder is not None and single_file is None:
        check_carried(folder, files.keys() | left)
    measured = [
        pending.delta
        for group in groups
        if group.setting.origin != "given"
        for pending in group.tensors.values()
    ]
    if devices[0].is_gpu and any(job.kind == "mix" for job in jobs):
        import_extra("numba_cuda", f"a merge on {devices[0].name}", "cuda")

    def again(plan: Plan, other: Recipe) -> Plan | None:
        made = builder.again(plan.jobs, other)
        if made is None:
            return None
        pinned = _pinned(other, references, sources)
        return dataclasses.replace(
            plan, recipe=pinned, jobs=made, memory=_memory(made, run, sources, devices)
        )

    shards: tuple[OutputShard, ...]
    if is_gguf and single_file is not None:
        from alnico.plan.gguf_output import gguf_shard

        shards = (gguf_shard(recipe, jobs, sources[donor], config, files, left, single_file),)
    else:
        shards = split_into_shards(
            [(j.name, j.dtype, j.shape) for j in jobs],
            max_shard_bytes,
            single_file,
            stem_of(sources[donor]),
            module_stems(sources[donor]),
        )
    plan = Plan(
        recipe=_pinned(recipe, references, sources),
        sources=tuple(sources),
        donor=donor,
        jobs=tuple(jobs),
        dropped=tuple(builder.dropped(jobs)),
        notes=(*notes, *more_notes),
        shards=shards,
        dtype=_only_dtype(jobs),
        memory=_memory([*jobs, *measured], run, sources, devices),
        config=config,
        files=files,
        left=left,
        norm_weight_groups=groups,
        rules=builder.rules(),
        devices=devices,
        again=again if builder.is_plain and not devices[0].is_gpu else None,
    )
    norms = known_norms(plan, (".", recipe.folder))
    return with_norms(plan, norms) if norms else plan


def _memory(
    jobs: Sequence[Job], run: RunOptions, sources: Sequence[Source], devices: Sequence[Device]
) -> MemoryPlan:
    """Fit the jobs of a plan into the budget of its run. Errors: ResourceError."""
    return fit_memory(
        jobs,
        run.memory_bytes,
        run.threads,
        sum(len(s.tensors) for s in sources),
        sources,
        devices,
        keeps_factors=run.factor_cache is not None,
        reserved_bytes=run.reserved_bytes,
    )


def _mixture(
    recipe: Recipe,
    references: list[str],
    sources: list[Source],
    donor: int,
    run: RunOptions,
    devices: tuple[Device, ...],
    max_shard_bytes: int,
    single_file: str | None,
) -> Plan:
    """Return the plan of a mixture of experts."""
    from alnico.plan.mixture import plan_mixture  # few recipes are of mixtures

    if is_gguf_file(single_file):
        raise RecipeError(
            f"{recipe.name}: is of a mixture of experts, which is not written as GGUF; expected a folder, or a .safetensors file. Build a "
            "folder, and merge that into the file: alnico merge FOLDER OUT.gguf."
        )
    mixture = plan_mixture(recipe, references, sources, donor)
    jobs = mixture.jobs
    folder = sources[donor].directory
    if folder is not None and single_file is None:
        check_carried(folder, ())
    return Plan(
        recipe=_pinned(recipe, references, sources),
        sources=tuple(sources),
        donor=donor,
        jobs=tuple(jobs),
        dropped=tuple(mixture.dropped),
        notes=(
            *recipe.notes,
            *mixture.notes,
            *(note for s in sources for note in getattr(s, "notes", ())),
            *_duplicate_models(sources),
        ),
        shards=split_into_shards(
            [(j.name, j.dtype, j.shape) for j in jobs], max_shard_bytes, single_file, stem_of(sources[donor])
        ),
        dtype=_only_dtype(jobs),
        memory=_memory(jobs, run, sources, devices),
        config=mixture.config,
        devices=devices,
    )


def _donor(recipe: Recipe, references: list[str], sources: list[Source]) -> int:
    """Return the position of the model that gives config, tokenizer and side files."""
    if recipe.base_model:
        return references.index(recipe.base_model)
    if recipe.complete_from:
        completing = references.index(recipe.complete_from)
        return completing if gives_config(sources[:1], sources[completing]) else 0
    return 0


def _completed(recipe: Recipe, references: list[str], sources: list[Source]) -> tuple[list[Source], Source]:
    """Return the models that are merged whole, and the one that completes their output."""
    assert recipe.complete_from is not None
    listed = dict.fromkeys(references.index(entry.reference) for entry in recipe.models)
    completing = references.index(recipe.complete_from)
    return [sources[i] for i in listed if i != completing], sources[completing]


def _completion(
    recipe: Recipe,
    references: list[str],
    sources: list[Source],
    donor: int,
    jobs: Sequence[Job],
    config: Mapping[str, Any],
) -> Completion:
    """Return what the model of ``complete_from`` adds. Errors: MismatchError if one model alone lacks nothing."""
    assert recipe.complete_from is not None
    position = references.index(recipe.complete_from)
    own = None if recipe.base_model == recipe.complete_from else sources[0 if donor == position else donor]
    completion = plan_completion(own, sources[position], jobs, position, config, is_donor=donor == position)
    if recipe.base_model is None and len(recipe.models) == 1 and own is not None and not completion.adds:
        refuse_complete(own, sources[position])
    return completion


def _requantised_sources(recipe: Recipe, references: list[str], sources: list[Source]) -> list[Source]:
    """Return the one model in the fp8 of the base, and the base. Errors: MismatchError for a base that is not stored in fp8."""
    base = sources[references.index(recipe.base_model or "")]
    if not isinstance(base, DequantisedModel):
        raise MismatchError(
            f"{base.label}: is not quantised; expected a base that is stored in fp8, for requantise. Leave out requantise."
        )
    from alnico.checkpoint.quantised.requantised_model import RequantisedModel  # with the codes

    return [RequantisedModel(sources[0], base), *sources[1:]]


def _adapted_sources(
    recipe: Recipe, references: list[str], sources: list[Source], donor: int
) -> list[Source]:
    """Return the sources under the donor's tensor names, with heads untied where needed."""
    if recipe.tokenizer is not None and recipe.tokenizer.approximate is not None:
        # A model that only gives tokens, and rows by which others are made, is of any architecture.
        named = {entry.reference for entry in recipe.entries} | {recipe.base_model, recipe.complete_from}
        alone = next((i for i, r in enumerate(references) if r == recipe.tokenizer.source), donor)
        if alone != donor and references[alone] not in named:
            others = [source for i, source in enumerate(sources) if i != alone]
            adapted = _adapted(recipe, others, donor - (alone < donor))
            return [*adapted[:alone], sources[alone], *adapted[alone:]]
    return _adapted(recipe, sources, donor)


def _adapted(recipe: Recipe, sources: list[Source], donor: int) -> list[Source]:
    sources = untie(sources, [s for s in sources if getattr(s, "unties", False)])
    if not recipe.modules:
        sources = [s if s is sources[donor] else with_names_of(s, sources[donor]) for s in sources]
    sources = untie_heads(sources, donor)
    if recipe.tokenizer is not None:
        # A row that a tied head lacks comes from another model's head, not from its own embedding.
        sources = untie(sources, [sources[donor]])
    return sources


def _checked_jobs(builder: JobBuilder) -> list[Job]:
    """Build the jobs and check them as a whole. Errors: MismatchError, MethodError."""
    jobs = builder.build()
    builder.statistics.check_used()
    check_factors(jobs, builder.sources)
    builder.matcher.refuse_empty_output(jobs)
    for stack, layers in builder.sections.layers.items():
        check_layers(jobs, stack, layers, builder.sources, builder.donor)
    return jobs


def _config_and_files(
    recipe: Recipe,
    sources: list[Source],
    donor: int,
    sections: Sections,
    jobs: list[Job],
    vocabulary: VocabularyPlan | None,
) -> tuple[Mapping[str, Any], dict[str, bytes], list[str]]:
    """Return the output's config, the side files to write, and notes on both."""
    config: Mapping[str, Any] = sources[donor].config
    files: dict[str, bytes] = {}
    notes: list[str] = []
    if vocabulary is not None:
        notes += vocabulary.notes
        config = {**config, **vocabulary.config} if config else config
        files |= vocabulary.files
    if recipe.chat_template is not None:
        template = plan_chat_template(recipe.chat_template, sources, donor, vocabulary)
        notes += template.notes
        files |= template.files
    for stack, layers in sections.layers.items():
        config = layered_config(config, stack, layers, sources, donor, [j.name for j in jobs])
        notes += predictor_notes(jobs, stack, len(layers), sources)
    return config, files, notes


def _pinned(recipe: Recipe, references: list[str], sources: list[Source]) -> Recipe:
    """Return the recipe with the commits of models of the hub."""
    commits = {
        reference: commit
        for reference, source in zip(references, sources, strict=False)
        if (commit := _commit(source)) is not None
    }
    return replace_references(recipe, commits) if commits else recipe


def _only_dtype(jobs: list[Job]) -> str | None:
    """Return the dtype of all weights of the output; None if they have several."""
    dtypes = {j.dtype for j in jobs if j.dtype in MERGEABLE}
    return dtypes.pop() if len(dtypes) == 1 else None


def _vocabulary(
    recipe: Recipe, references: list[str], sources: list[Source], donor: int
) -> VocabularyPlan | None:
    """Return the output's vocabulary if the recipe sets one."""
    if recipe.tokenizer is None:
        return None
    models = list(dict.fromkeys(references.index(e.reference) for e in recipe.entries))
    return plan_vocabulary(
        recipe.tokenizer, sources, references, donor, models, has_base=recipe.base_model is not None
    )


def _with_rows(sources: list[Source], vocabulary: VocabularyPlan, run: RunOptions) -> list[Source]:
    """Return all models with the rows of the output's vocabulary."""
    approximation = vocabulary.approximation
    stored = dict.fromkeys(n for tables in vocabulary.tables for n in tables.rows)
    ties: dict[str, str] = {}
    for source in sources:
        ties |= families.tied_heads(
            source.config, source.tensors, [n for n in stored if n not in source.tensors]
        )
        copies = tied_copies(source.config, source.tensors)
        ties |= {
            copy: original
            for copy, original in copies.items()
            if copy in stored and copy not in source.tensors
        }
    mapped_sources = []
    for i, (source, tables) in enumerate(zip(sources, vocabulary.tables, strict=True)):
        shared_tables = [n for n in tables.rows if n not in vocabulary.separate]
        made = (
            approximation.made_rows(sources, i, run.memory_bytes, run.threads)
            if approximation is not None
            else {}
        )
        model = remap_rows(source, sources, shared_tables, vocabulary.rows[i], ties, tables.turned, made)
        for name in tables.rows:
            if name in vocabulary.separate:
                model = remap_rows(
                    model, sources, [name], vocabulary.separate[name][i], ties, tables.turned, made
                )
        mapped_sources.append(model)
    return mapped_sources


def _commit(source: Source) -> str | None:
    """Return the reference of a model of the hub at its commit, and of a task vector of the store at its version; None for
    other models."""
    source = unwrap(source)
    if isinstance(source, (AdaptedModel, EquippedModel)):
        added = source.adapter if isinstance(source, AdaptedModel) else source.vector
        pinned = added.pinned if isinstance(added, StoredVector) and added.pinned != added.label else None
        parts = [_commit(source.base), _commit(added.files) or pinned]
        return (
            f"{parts[0] or source.base.label}+{source.weighted(parts[1] or added.label)}"
            if any(parts)
            else None
        )
    return f"{source.origin.name}@{source.origin.commit}" if source.origin is not None else None


def _duplicate_models(sources: list[Source]) -> list[str]:
    """Return notes on a model under two names: a recipe identifies its base by name."""
    seen: dict[str, str] = {}
    notes = []
    for source in sources:
        location = getattr(source, "location", None)
        if location is None:
            continue
        first = seen.setdefault(os.path.realpath(location), source.label)
        if first != source.label:
            notes.append(
                f"{first} and {source.label} are the same model, merged as two. Use one path for it if this "
                "is unintended."
            )
    return notes


def _merged_models(sources: list[Source], jobs: list[Job], sections: Sections) -> list[Source]:
    """Return the models that are merged with others and those whose layers are combined by slices."""
    used = {
        i.model
        for job in jobs
        if job.is_computed and len({i.model for i in job.merged}) > 1
        for i in job.merged
    }
    used |= {layer.model for layers in sections.layers.values() for layer in layers}
    return [sources[m] for m in sorted(used)]


def _unused_models(
    recipe: Recipe, references: list[str], sections: Sections, jobs: list[Job], measured: set[int | None]
) -> list[str]:
    """Return notes on models that contribute no tensor. ``measured`` are the bases of norms."""
    used = {i.model for job in jobs for i in job.read}
    methods = dict.fromkeys(s.merge_method for s in sections.parts)
    listed = {p.model for s in sections.parts for p in s.listed}
    of_rules = {r: i for i, rule in enumerate(recipe.methods) for r in _models_of(rule)}
    tokenizer_models = recipe.tokenizer.references if recipe.tokenizer is not None else ()
    read = [r for i, r in enumerate(references) if i in used]
    parts = {r for r in references if any(one.startswith(f"{r}+") for one in read)}  # of base+vector
    notes = [
        f"{reference} is not merged by {' and '.join(methods)}; the output only has its config, tokenizer "
        "and side files."
        for i, reference in enumerate(references)
        if i not in used
        and i not in listed
        and (reference not in of_rules or reference == recipe.base_model)
        and (reference not in tokenizer_models or reference == recipe.base_model)
        and reference not in parts
        and reference not in parts
        and reference != recipe.complete_from
    ]
    notes += [
        f"{reference} is named by methods[{of_rules[reference]}] alone, which uses none of its tensors."
        for i, reference in enumerate(references)
        if i not in used | measured | listed and reference in of_rules and reference != recipe.base_model
    ]
    if of_rules:
        notes += [
            f"{reference} is listed, but rules under methods make all tensors, without it."
            for i, reference in enumerate(references)
            if i not in used and i in listed
        ]
    return notes


def _models_of(rule: Rule) -> list[str]:
    """Return the models and the base that a rule names itself."""
    return [*(entry.reference for entry in rule.models), *([rule.base_model] if rule.base_model else [])]
