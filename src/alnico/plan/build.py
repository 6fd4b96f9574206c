"""Builds the plan of a merge from a recipe and the headers of its models."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from alnico.checkpoint.factors import refuse_adapter
from alnico.checkpoint.lineage import lineage_of
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.renamed_model import with_names_of
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES, split_into_shards
from alnico.checkpoint.sidecars import check_carried, modules_of
from alnico.checkpoint.source import Source, Tensor, unwrap
from alnico.checkpoint.tied_weights import tied_copies
from alnico.checkpoint.untied_model import untie
from alnico.checkpoint.weight_files import stem_of
from alnico.errors import MethodError, ModelError
from alnico.methods.base import MatrixMethod, Merge, combine
from alnico.numerics.dtypes import DTYPES, MERGEABLE, promote
from alnico.plan import families
from alnico.plan.compatibility import config_notes
from alnico.plan.config import check_layers, layered_config, predictor_notes
from alnico.plan.filters import unmatched_filters
from alnico.plan.job import Dropped, Input, Job, JobKind, NormWeightGroup, PendingJob, Plan
from alnico.plan.layers import Layers, count_layers, depth_of, layer_position
from alnico.plan.licences import check_licences, licence_conflicts, model_licences
from alnico.plan.memory import fit_memory
from alnico.plan.norm_weights import group_place, pending_job, read_norms, with_norms
from alnico.plan.sections import REST, ModelPart, Section, Sections, TensorMethod, build_sections
from alnico.plan.statistics_inputs import StatisticsInputs
from alnico.plan.tensor_matching import TensorAction, TensorMatcher, check_factors, check_modules
from alnico.recipe.norm_weight import find_norm_weight, with_equal_weights, with_weights
from alnico.recipe.reference import replace_references, resolve_reference
from alnico.recipe.schema import NormWeight, Recipe
from alnico.run_options import DEFAULT_RUN, RunOptions
from alnico.vocabulary.chat_template import chat_template, check_setting
from alnico.vocabulary.output_vocabulary import VocabularyPlan, plan_vocabulary
from alnico.vocabulary.remapped_model import remap_rows
from alnico.vocabulary.tables import find_tables


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

    ``single_file`` names the one output file of an OUT that ends in ``.safetensors``. Licences that do not go
    together are notes, with ``strict_license`` a MismatchError. Errors: ModelError, MismatchError,
    MethodError, ResourceError, HubError; see ``errors``. Values are read only if names do not match (packed
    experts, tied copies), and nothing is written except the hub's cache.
    """
    if recipe.chat_template is not None:
        check_setting(recipe.chat_template)
    references = list(recipe.references)
    opener = open_source or (
        lambda reference: open_model(resolve_reference(reference, recipe.folder), offline=run.offline)
    )
    sources: list[Source] = []
    try:
        for reference in references:
            try:
                sources.append(opener(reference))
            except ModelError as error:
                raise ModelError(f"{error}{_tokenizer_hint(recipe, reference)}") from None
        for source in sources:
            refuse_adapter(source.label, source.tensors)
        models = model_licences(lineage_of(source) for source in sources)
        if strict_license:
            check_licences(models)
        plan = _plan(recipe, references, sources, run, max_shard_bytes, single_file)
        license_notes = licence_conflicts(models)
        return dataclasses.replace(plan, notes=(*plan.notes, *license_notes)) if license_notes else plan
    except BaseException:
        for source in sources:
            source.close()
        raise


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
    max_shard_bytes: int,
    single_file: str | None,
) -> Plan:
    donor = references.index(recipe.base_model) if recipe.base_model else 0
    sources = _adapted_sources(recipe, sources, donor)
    vocabulary = _vocabulary(recipe, references, sources, donor)
    if vocabulary is not None:
        sources = _with_rows(sources, vocabulary)
    sections = build_sections(recipe, references, sources, donor)
    filter_notes = unmatched_filters(recipe, sections.parts)
    new_rows = [t.rows for t in vocabulary.tables] if vocabulary is not None else ()
    builder = _JobBuilder(recipe, sources, donor, sections, new_rows)
    jobs = _checked_jobs(builder)
    notes = [
        *recipe.notes,
        *filter_notes,
        *(note for s in sources for note in getattr(s, "notes", ())),
        *builder.matcher.notes,
        *builder.notes,
        *check_modules(jobs, sources, donor),
        *_unused_models(recipe, references, sections, jobs),
        *config_notes(_merged_models(sources, jobs, sections), sources[donor]),
        *_duplicate_models(sources),
    ]
    config, files, more_notes = _config_and_files(recipe, sources, donor, sections, jobs, vocabulary)
    left = vocabulary.excluded if vocabulary is not None else frozenset()
    folder = sources[donor].directory
    if folder is not None and single_file is None:
        check_carried(folder, files.keys() | left)
    groups = builder.norm_weight_groups()
    measured = [pending.delta for group in groups for pending in group.tensors.values()]
    plan = Plan(
        recipe=_pinned(recipe, references, sources),
        sources=tuple(sources),
        donor=donor,
        jobs=tuple(jobs),
        dropped=tuple(builder.dropped(jobs)),
        notes=(*notes, *more_notes),
        shards=split_into_shards(
            [(j.name, j.dtype, j.shape) for j in jobs],
            max_shard_bytes,
            single_file,
            stem_of(sources[donor]),
            modules_of(sources[donor]),
        ),
        dtype=_only_dtype(jobs),
        memory=fit_memory(
            [*jobs, *measured],
            run.memory_bytes,
            run.threads,
            sum(len(s.tensors) for s in sources),
            sources,
        ),
        config=config,
        files=files,
        left=left,
        norm_weight_groups=groups,
    )
    analysed = [i for i, group in enumerate(groups) if group.setting.origin == "analysis"]
    return with_norms(plan, read_norms(plan, (".", recipe.folder), analysed)) if analysed else plan


def _adapted_sources(recipe: Recipe, sources: list[Source], donor: int) -> list[Source]:
    """Return the sources under the donor's tensor names, with heads untied where needed."""
    sources = untie(sources, [s for s in sources if getattr(s, "unties", False)])
    if not recipe.modules:
        sources = [s if s is sources[donor] else with_names_of(s, sources[donor]) for s in sources]
    if recipe.tokenizer is not None:
        # A row that a tied head lacks comes from another model's head, not from its own embedding.
        sources = untie(sources, [sources[donor]])
    return sources


def _checked_jobs(builder: _JobBuilder) -> list[Job]:
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
        template = chat_template(recipe.chat_template, sources, donor, vocabulary)
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


def _with_rows(sources: list[Source], vocabulary: VocabularyPlan) -> list[Source]:
    """Return all models with the rows of the output's vocabulary."""
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
        model = remap_rows(source, sources, shared_tables, vocabulary.rows[i], ties, tables.turned)
        for name in tables.rows:
            if name in vocabulary.separate:
                model = remap_rows(model, sources, [name], vocabulary.separate[name][i], ties, tables.turned)
        mapped_sources.append(model)
    return mapped_sources


def _commit(source: Source) -> str | None:
    """Return the reference of a model of the hub at its commit; None for other models."""
    source = unwrap(source)
    if isinstance(source, AdaptedModel):
        parts = [_commit(source.base), _commit(source.adapter.files)]
        return (
            f"{parts[0] or source.base.label}+{source.weighted(parts[1] or source.adapter.label)}"
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


def _unused_models(recipe: Recipe, references: list[str], sections: Sections, jobs: list[Job]) -> list[str]:
    """Return notes on models that contribute no tensor."""
    used = {i.model for job in jobs for i in job.read}
    methods = dict.fromkeys(s.merge_method for s in sections.parts)
    listed = {p.model for s in sections.parts for p in s.listed}
    tokenizer_models = recipe.tokenizer.references if recipe.tokenizer is not None else ()
    return [
        f"{reference} is not merged by {' and '.join(methods)}; the output only has its config, tokenizer "
        "and side files."
        for i, reference in enumerate(references)
        if i not in used
        and i not in listed
        and (reference not in tokenizer_models or reference == recipe.base_model)
    ]


class _JobBuilder:
    """Builds the jobs of all sections, in the order of the donor's tensors, then of the other models'."""

    def __init__(
        self,
        recipe: Recipe,
        sources: list[Source],
        donor: int,
        sections: Sections,
        new_rows: Sequence[Collection[str]] = (),
    ) -> None:
        self.recipe = recipe
        self.sources = sources
        self.donor = donor
        self.sections = sections
        self.matcher = TensorMatcher(sources, donor, recipe.missing)
        self.statistics = StatisticsInputs(sources, recipe.folder, new_rows)
        self.jobs: dict[str, Job] = {}
        self.notes: list[str] = []
        self._merges: dict[Any, Merge | MatrixMethod] = {}
        self._constant_options: dict[tuple[int, int], dict[str, Any]] = {}
        self._pending: dict[tuple[NormWeight, tuple[int, ...], int, str], dict[str, PendingJob]] = {}

    def build(self) -> list[Job]:
        """Return the jobs. Errors: MismatchError with all tensors that do not match, MethodError."""
        planned: list[tuple[str, Section, TensorMethod, TensorAction]] = []
        for section in self.sections.parts:
            for name in section.names:
                chosen = section.method_for(name)
                action = self.matcher.match(name, section, chosen)
                if action is not None:
                    planned.append((name, section, chosen, action))
        if not self.matcher.problems and self.recipe.tokenizer is None:
            self.matcher.check_vocabularies(self._models_with_embeddings(planned))
        self.matcher.refuse()
        for name, section, chosen, action in planned:
            self.jobs[name] = self._job(name, section, chosen, action)
        self._note_gradients(planned)
        self._note_statistics(planned)
        self._note_heads()
        if self.sections.layers:
            return self._in_layer_order()
        order = dict.fromkeys(
            n for s in (self.sources[self.donor], *self.sources) for n in s.tensors if n in self.jobs
        )
        return [self.jobs[name] for name in (*order, *(n for n in self.jobs if n not in order))]

    def _note_gradients(self, planned: Sequence[tuple[str, Section, TensorMethod, TensorAction]]) -> None:
        """Note that tensors outside of layers get a gradient's first value, even those after the layers."""
        names = [
            name
            for name, section, chosen, action in planned
            if action.kind == "merged" and self._layers.place(name) is None and section.varies(chosen)
            if section.options(name, chosen) != section.options(name, chosen, 1.0)
        ]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.notes.append(
                f"{shown}: outside of the layers, so the first value of each gradient applies, as in "
                "mergekit."
            )

    def _note_statistics(self, planned: Sequence[tuple[str, Section, TensorMethod, TensorAction]]) -> None:
        """Note that merged BatchNorm statistics do not describe the merged model."""
        merged = [
            n
            for n, _, a, f in planned
            if f.kind == "merged" and len(a.needed) > 1 and n.endswith(families.STATISTICS)
        ]
        if merged:
            self.notes.append(
                f"the running statistics of {len(merged)} BatchNorm layers are merged like weights and do "
                "not match the merged model's activations. Recalibrate them on data with "
                "alnico.recalibrate_batchnorm."
            )

    def _note_heads(self) -> None:
        """Note a head that the config ties but that is written because every model stores it."""
        for head, embedding in self.matcher.tied.items():
            pair = [self.jobs[name] for name in (head, embedding) if name in self.jobs]
            if len(pair) == 2 and (pair[0].kind, pair[0].inputs[0].model) != (
                "copy",
                pair[1].inputs[0].model,
            ):
                self.notes.append(
                    f"{head}: all models store it, but config.json ties it to {embedding}; both are written, "
                    "and programs may load either. Use the same method and parameters for both, or set "
                    "tie_word_embeddings to false in the output's config.json."
                )

    def dropped(self, jobs: list[Job]) -> list[Dropped]:
        """Return the tensors of the merged models that are not in the output, and why."""
        reasons = {(m, n): why for m, n, why in self.matcher.dropped}
        read = {(i.model, i.name) for job in jobs for i in job.merged}
        if self.sections.layers or self.recipe.methods or self.recipe.modules:
            by_name = {job.name: job for job in jobs}
            listed = {(p.model, n) for s in self.sections.parts for p in s.listed for n in p.names.values()}
            for model in sorted({m for m, _ in read}):
                for name in self.sources[model].tensors:
                    if (model, name) not in read and (model, name) not in reasons:
                        reasons[model, name] = self._why_not(name, by_name, is_listed=(model, name) in listed)
        return [Dropped(m, n, self.sources[m].tensors[n].byte_size, why) for (m, n), why in reasons.items()]

    def _why_not(self, name: str, by_name: Mapping[str, Job], *, is_listed: bool) -> str:
        place = layer_position(name)
        if place is not None and is_listed:
            return "the recipe copies another model there"
        if place is not None and any(place.stack == stack for stack in self.sections.layers):
            return "its layer is not in a slice"
        if name in by_name:
            return f"the output has it from {self.sources[by_name[name].inputs[0].model].label}"
        return "no part of the recipe uses it"

    def _models_with_embeddings(
        self, planned: Sequence[tuple[str, Section, TensorMethod, TensorAction]]
    ) -> list[int]:
        """Return the models whose vocabularies must agree: those with embeddings, or all if unclear."""
        rows = {n for s in self.sources for n in find_tables(s).rows}
        of_rows = [f for f in planned if f[0] in rows]
        chosen = of_rows or planned
        used = [[f.origin] if f.origin is not None else a.needed for _, _, a, f in chosen]
        return list(dict.fromkeys(p.model for parts in used for p in parts))

    def _in_layer_order(self) -> list[Job]:
        """Return the jobs before the layers, then those of the layers in order, then those after them."""

        def place(name: str) -> tuple[int, int]:
            position = self._layers.place(name)
            if position is not None and position.stack in self.sections.layers:
                return 1, position.layer
            is_first = families.comes_first(name) and self._layers.predictor_place(name) is None
            return (0 if is_first else 2), 0

        return sorted(self.jobs.values(), key=lambda job: place(job.name))

    def _job(self, name: str, section: Section, chosen: TensorMethod, action: TensorAction) -> Job:
        if action.origin is not None:
            return self._copy_job(name, action.origin, action.why)
        if action.kind == "buffer":
            inputs = tuple(self._input(p, name) for p in chosen.needed)
            kind: JobKind = "equal" if len(inputs) > 1 else "copy"
            why = f"{inputs[0].dtype}, must be equal in all models" if kind == "equal" else ""
            return _new_job(
                kind, name, inputs[0].dtype, self._tensor(chosen.needed[0], name), inputs, why=why
            )
        try:
            options = self._options(name, section, chosen)
            setting = find_norm_weight(options, [p.entry for p in chosen.parts], section.named_base)
            if setting is not None:
                return self._norm_weighted(name, section, chosen, options, setting)
            return self._mixed(name, section, chosen, options)
        except MethodError as error:
            raise MethodError(f"{name}: {error}") from None

    def _mixed(
        self,
        name: str,
        section: Section,
        chosen: TensorMethod,
        options: Mapping[str, Any],
        dtype: str | None = None,
    ) -> Job:
        """Return the job of a method; a copy if the method returns one model unchanged.

        ``dtype`` overrides the output dtype.
        """
        applied = self.statistics.bind(name, chosen, options, self._merge(chosen, options))
        merge = applied.merge
        if isinstance(merge, Merge) and merge.copies is not None:
            origin = chosen.base if merge.copies == "base" else chosen.parts[merge.copies]
            assert origin is not None
            why = f"the recipe copies {self.sources[origin.model].label}"
            return self._copy_job(name, origin, section.label if section.label == REST else why, dtype)
        digests = applied.digests or ("",) * len(chosen.parts)
        inputs = tuple(self._input(p, name, digest) for p, digest in zip(chosen.parts, digests, strict=True))
        base = self._input(chosen.base, name) if chosen.base is not None else None
        parts = (*chosen.parts, *([chosen.base] if chosen.base is not None else []))
        dtype = dtype or self.recipe.dtype or promote([self._tensor(p, name).nominal for p in parts])
        tensor = self._tensor(chosen.parts[0], name)
        if isinstance(merge, Merge):
            job = _new_job("mix", name, dtype, tensor, inputs, base, merge, applied.why, applied.sides)
            merge.check_numbers(job.real)
            return job
        return _new_job("matrix", name, dtype, tensor, inputs, base, None, applied.why, applied.sides, merge)

    def _norm_weighted(
        self, name: str, section: Section, chosen: TensorMethod, options: dict[str, Any], setting: NormWeight
    ) -> Job:
        """Return the job with equal weights; register it for norms if they can change it."""
        equal = with_equal_weights(options, setting)
        merge = self._merge(chosen, equal)
        job = self._mixed(name, section, chosen, equal)
        with_norm = [
            p for p, w in zip(chosen.parts, options["weight"], strict=True) if isinstance(w, NormWeight)
        ]
        base = chosen.base if chosen.base is not None else chosen.measured_from
        assert base is not None
        if (
            len(with_norm) > 1
            and setting.scale != 0
            and (isinstance(merge, MatrixMethod) or merge.copies is None)
        ):
            delta = tuple(self._input(p, name) for p in with_norm), self._input(base, name)
            key = setting, tuple(p.model for p in with_norm), base.model, group_place(setting, name)
            self._pending.setdefault(key, {})[name] = pending_job(
                delta,
                job,
                lambda weights: self._mixed(name, section, chosen, with_weights(options, weights), job.dtype),
            )
        return job

    def norm_weight_groups(self) -> tuple[NormWeightGroup, ...]:
        return tuple(NormWeightGroup(*key, tensors) for key, tensors in self._pending.items())

    def _options(self, name: str, section: Section, chosen: TensorMethod) -> dict[str, Any]:
        """Return the options of the method at one tensor; shared by all tensors if they do not vary."""
        lines = self.recipe.lines
        constant = None if section.varies(chosen) or lines is not None else (id(section), id(chosen))
        if constant is not None and constant in self._constant_options:
            return self._constant_options[constant]
        options: dict[str, Any] = section.options(name, chosen)
        if lines is not None and chosen.method.space == "delta" and "scale" in chosen.method.options:
            options["scale"] = float(
                options.get("scale", chosen.method.options["scale"].default)
            ) * self._lines_factor(name)
        if constant is not None:
            self._constant_options[constant] = options
        return options

    def _merge(self, chosen: TensorMethod, options: Mapping[str, Any]) -> Merge | MatrixMethod:
        """Bind the method to its options; tensors with equal options share the result."""
        key = (chosen.method.name, tuple(options.items()), len(chosen.parts))
        if key not in self._merges:
            self._merges[key] = chosen.method.bind(options, len(chosen.parts), in_places=True)
        return self._merges[key]

    def _lines_factor(self, name: str) -> float:
        """Return the factor of LiNeS at a tensor's depth in the whole model."""
        lines = self.recipe.lines
        assert lines is not None
        place = self._layers.place(name)
        if place is None:
            is_first = families.comes_first(name) and self._layers.predictor_place(name) is None
            return lines.alpha if is_first else lines.alpha + lines.beta
        return lines.alpha + lines.beta * depth_of(place.layer, self._layers.counts[place.stack])

    @functools.cached_property
    def _layers(self) -> Layers:
        return count_layers(n for section in self.sections.parts for n in section.names)

    def _copy_job(self, name: str, origin: ModelPart, why: str, dtype: str | None = None) -> Job:
        tensor = self._tensor(origin, name)
        source = self._input(origin, name)
        dtype = dtype or self.recipe.dtype or tensor.nominal
        if tensor.dtype in MERGEABLE and tensor.dtype != dtype:
            identity = combine((1.0,), fixes_equal_inputs=True)
            return _new_job("mix", name, dtype, tensor, (source,), None, identity, f"{why}, as {dtype}")
        return _new_job("copy", name, tensor.dtype, tensor, (source,), why=why)

    def _tensor(self, part: ModelPart, name: str) -> Tensor:
        return self.sources[part.model].tensors[part.names[name]]

    def _input(self, part: ModelPart, name: str, digest: str = "") -> Input:
        tensor = self._tensor(part, name)
        return Input(part.model, part.names[name], tensor.dtype, tensor.byte_size, digest)


def _new_job(
    kind: JobKind,
    name: str,
    dtype: str,
    tensor: Tensor,
    inputs: tuple[Input, ...],
    base: Input | None = None,
    merge: Merge | None = None,
    why: str = "",
    sides: tuple[Input, ...] = (),
    whole: MatrixMethod | None = None,
) -> Job:
    size = tensor.byte_size if kind not in ("mix", "matrix") else tensor.elements * DTYPES[dtype].bytes
    return Job(kind, name, dtype, tensor.shape, tensor.elements, size, inputs, base, merge, why, sides, whole)
