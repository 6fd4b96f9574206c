"""Recipe and headers to a plan."""

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
from alnico.checkpoint.shards import DEFAULT_MAX_SHARD_BYTES, cut
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
from alnico.plan.memory import DEFAULT_BUDGET_BYTES, fit_memory, threads_of
from alnico.plan.norm_weights import group_place, pending_job, read_norms, with_norms
from alnico.plan.sections import REST, ModelPart, Section, Sections, TensorMethod, build_sections
from alnico.plan.statistics_inputs import StatisticsInputs
from alnico.plan.tensor_matching import TensorAction, TensorMatcher, check_factors, check_modules
from alnico.recipe.norm_weight import find_norm_weight, with_equal_weights, with_weights
from alnico.recipe.reference import replace_references, resolve_reference
from alnico.recipe.schema import NormWeight, Recipe
from alnico.vocabulary.build import VocabularyPlan, plan_vocabulary
from alnico.vocabulary.chat_template import chat_template, check_setting
from alnico.vocabulary.remapped_model import mapped
from alnico.vocabulary.tables import tables_of


def build_plan(
    recipe: Recipe,
    *,
    memory_bytes: int = DEFAULT_BUDGET_BYTES,
    threads: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    single_file: str | None = None,
    offline: bool = False,
    open_source: Callable[[str], Source] | None = None,
    strict_license: bool = False,
) -> Plan:
    """Open the models of a recipe (headers only), align them and lay out the output.

    ``single_file`` names the one output file of an OUT that ends in ``.safetensors``. Licences that do not go together are notes, with
    ``strict_license`` a MismatchError. Errors: ModelError, MismatchError,
    MethodError, ResourceError, HubError; see ``errors``. Values are read only where names do not meet
    (packed experts, tied copies), and nothing is written but the hub's cache.
    """
    if recipe.chat_template is not None:
        check_setting(recipe.chat_template)
    references = list(recipe.references)
    opener = open_source or (
        lambda reference: open_model(resolve_reference(reference, recipe.folder), offline=offline)
    )
    sources: list[Source] = []
    try:
        for reference in references:
            try:
                sources.append(opener(reference))
            except ModelError as error:
                raise ModelError(f"{error}{_meant(recipe, reference)}") from None
        for source in sources:
            refuse_adapter(source.label, source.tensors)
        models = model_licences(lineage_of(source) for source in sources)
        if strict_license:
            check_licences(models)
        plan = _plan(recipe, references, sources, memory_bytes, threads, max_shard_bytes, single_file)
        found = licence_conflicts(models)
        return dataclasses.replace(plan, notes=(*plan.notes, *found)) if found else plan
    except BaseException:
        for source in sources:
            source.close()
        raise


def _meant(recipe: Recipe, reference: str) -> str:
    """A hint where a model that is not there is named as the tokenizer alone."""
    if (
        recipe.tokenizer is None
        or reference != recipe.tokenizer.source
        or any(e.reference == reference for e in recipe.entries)
    ):
        return ""
    near = difflib.get_close_matches(reference, ("union", "base"), 1)
    return f" Or did you mean {near[0]}, as the tokenizer?" if near else ""


def _plan(
    recipe: Recipe,
    references: list[str],
    sources: list[Source],
    memory_bytes: int,
    threads: int | None,
    max_shard_bytes: int,
    single_file: str | None,
) -> Plan:
    donor = references.index(recipe.base_model) if recipe.base_model else 0
    sources = untie(sources, [s for s in sources if getattr(s, "unties", False)])
    if not recipe.modules:
        sources = [s if s is sources[donor] else with_names_of(s, sources[donor]) for s in sources]
    if (
        recipe.tokenizer is not None
    ):  # a row that a tied head lacks is that of another's head, not of its embedding
        sources = untie(sources, [sources[donor]])
    spoken = _vocabulary(recipe, references, sources, donor)
    if spoken is not None:
        sources = _with_rows(sources, spoken)
    sections = build_sections(recipe, references, sources, donor)
    idle = unmatched_filters(recipe, sections.parts)
    made = _JobBuilder(
        recipe, sources, donor, sections, [t.rows for t in spoken.tables] if spoken is not None else ()
    )
    jobs = made.all()
    made.sides.check_used()
    check_factors(jobs, sources)
    made.aligner.refuse_nothing(jobs)
    for stack, layers in sections.layers.items():
        check_layers(jobs, stack, layers, sources, donor)
    notes = [
        *recipe.notes,
        *idle,
        *(note for s in sources for note in getattr(s, "notes", ())),
        *made.aligner.notes,
        *made.notes,
    ]
    notes += [*check_modules(jobs, sources, donor), *_unused(recipe, references, sections, jobs)]
    notes += [*config_notes(_together(sources, jobs, sections), sources[donor]), *_same_places(sources)]
    config: Mapping[str, Any] = sources[donor].config
    files: dict[str, bytes] = {}
    if spoken is not None:
        notes += spoken.notes
        config = {**config, **spoken.config} if config else config
        files |= spoken.files
    if recipe.chat_template is not None:
        chat = chat_template(recipe.chat_template, sources, donor, spoken)
        notes += chat.notes
        files |= chat.files
    for stack, layers in sections.layers.items():
        config = layered_config(config, stack, layers, sources, donor, [j.name for j in jobs])
        notes += predictor_notes(jobs, stack, len(layers), sources)
    folder = sources[donor].directory
    if folder is not None and single_file is None:
        check_carried(folder, files.keys() | (spoken.without if spoken is not None else frozenset()))
    dtypes = {j.dtype for j in jobs if j.dtype in MERGEABLE}
    tensors = sum(len(s.tensors) for s in sources)
    commits = {
        r: commit for r, s in zip(references, sources, strict=False) if (commit := _commit(s)) is not None
    }
    weighings = made.weighings()
    plan = Plan(
        replace_references(recipe, commits) if commits else recipe,
        tuple(sources),
        donor,
        tuple(jobs),
        tuple(made.dropped(jobs)),
        tuple(notes),
        cut(
            [(j.name, j.dtype, j.shape) for j in jobs],
            max_shard_bytes,
            single_file,
            stem_of(sources[donor]),
            modules_of(sources[donor]),
        ),
        dtypes.pop() if len(dtypes) == 1 else None,
        fit_memory(
            [*jobs, *(t.delta for w in weighings for t in w.tensors.values())],
            memory_bytes,
            threads_of(threads),
            tensors,
            sources,
        ),
        config,
        files,
        spoken.without if spoken is not None else frozenset(),
        weighings,
    )
    analysed = [i for i, w in enumerate(weighings) if w.setting.origin == "analysis"]
    return with_norms(plan, read_norms(plan, (".", recipe.folder), analysed)) if analysed else plan


def _vocabulary(
    recipe: Recipe, references: list[str], sources: list[Source], donor: int
) -> VocabularyPlan | None:
    """The output's vocabulary, where the recipe asks for one."""
    if recipe.tokenizer is None:
        return None
    models = list(dict.fromkeys(references.index(e.reference) for e in recipe.entries))
    return plan_vocabulary(
        recipe.tokenizer, sources, references, donor, models, has_base=recipe.base_model is not None
    )


def _with_rows(sources: list[Source], vocabulary: VocabularyPlan) -> list[Source]:
    """All models, with the rows of the output's vocabulary."""
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
    made = []
    for i, (source, tables) in enumerate(zip(sources, vocabulary.tables, strict=True)):
        alike = [n for n in tables.rows if n not in vocabulary.apart]
        model = mapped(source, sources, alike, vocabulary.rows[i], ties, tables.turned)
        for name in tables.rows:
            if name in vocabulary.apart:
                model = mapped(model, sources, [name], vocabulary.apart[name][i], ties, tables.turned)
        made.append(model)
    return made


def _commit(source: Source) -> str | None:
    """How a recipe names a model of the hub at its commit; None for one that is not from there."""
    source = unwrap(source)
    if isinstance(source, AdaptedModel):
        parts = [_commit(source.base), _commit(source.adapter.files)]
        return (
            f"{parts[0] or source.base.label}+{source.weighted(parts[1] or source.adapter.label)}"
            if any(parts)
            else None
        )
    return f"{source.origin.name}@{source.origin.commit}" if source.origin is not None else None


def _same_places(sources: list[Source]) -> list[str]:
    """Notes on models that are one under two names: a recipe tells its base by its name."""
    seen: dict[str, str] = {}
    notes = []
    for source in sources:
        location = getattr(source, "location", None)
        if location is None:
            continue
        first = seen.setdefault(os.path.realpath(location), source.label)
        if first != source.label:
            notes.append(
                f"{first} and {source.label} are one model, taken as two. Write its path in one way if that is not meant."
            )
    return notes


def _together(sources: list[Source], jobs: list[Job], sections: Sections) -> list[Source]:
    """The models that are merged with others, tensor by tensor, and those whose layers are put together."""
    used = {
        i.model
        for job in jobs
        if job.is_computed and len({i.model for i in job.merged}) > 1
        for i in job.merged
    }
    used |= {layer.model for layers in sections.layers.values() for layer in layers}
    return [sources[m] for m in sorted(used)]


def _unused(recipe: Recipe, references: list[str], sections: Sections, jobs: list[Job]) -> list[str]:
    """Notes on models that give no tensor."""
    used = {i.model for job in jobs for i in job.read}
    methods = dict.fromkeys(s.merge_method for s in sections.parts)
    listed = {p.model for s in sections.parts for p in s.listed}
    spoken = recipe.tokenizer.references if recipe.tokenizer is not None else ()
    return [
        f"{reference} is not merged by {' and '.join(methods)}; the output has its config, tokenizer and side files."
        for i, reference in enumerate(references)
        if i not in used and i not in listed and (reference not in spoken or reference == recipe.base_model)
    ]


class _JobBuilder:
    """Makes the jobs of a recipe's sections, in the order of the donor's tensors, then of the others'."""

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
        self.aligner = TensorMatcher(sources, donor, recipe.missing)
        self.sides = StatisticsInputs(sources, recipe.folder, new_rows)
        self.jobs: dict[str, Job] = {}
        self.notes: list[str] = []
        self._bound: dict[Any, Merge | MatrixMethod] = {}
        self._constant: dict[tuple[int, int], dict[str, Any]] = {}
        self._weighed: dict[tuple[NormWeight, tuple[int, ...], int, str], dict[str, PendingJob]] = {}

    def all(self) -> list[Job]:
        """Return the jobs. Errors: MismatchError with all that does not fit, MethodError."""
        fated: list[tuple[str, Section, TensorMethod, TensorAction]] = []
        for section in self.sections.parts:
            for name in section.names:
                asked = section.asked(name)
                fate = self.aligner.fate(name, section, asked)
                if fate is not None:
                    fated.append((name, section, asked, fate))
        if not self.aligner.problems and self.recipe.tokenizer is None:
            self.aligner.vocabularies(self._speaking(fated))
        self.aligner.refuse()
        for name, section, asked, fate in fated:
            self.jobs[name] = self._job(name, section, asked, fate)
        self._note_gradients(fated)
        self._note_statistics(fated)
        self._note_heads()
        if self.sections.layers:
            return self._in_layer_order()
        order = dict.fromkeys(
            n for s in (self.sources[self.donor], *self.sources) for n in s.tensors if n in self.jobs
        )
        return [self.jobs[name] for name in (*order, *(n for n in self.jobs if n not in order))]

    def _note_gradients(self, fated: Sequence[tuple[str, Section, TensorMethod, TensorAction]]) -> None:
        """Tensors in no layer take a gradient's first value, also those that come after the layers."""
        found = [
            name
            for name, section, asked, fate in fated
            if fate.kind == "merged" and self._layers.place(name) is None and section.varies(asked)
            if section.options(name, asked) != section.options(name, asked, 1.0)
        ]
        if found:
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            self.notes.append(
                f"{shown}: in no layer, so the first value of each gradient is taken, as in mergekit."
            )

    def _note_statistics(self, fated: Sequence[tuple[str, Section, TensorMethod, TensorAction]]) -> None:
        merged = [
            n
            for n, _, a, f in fated
            if f.kind == "merged" and len(a.needed) > 1 and n.endswith(families.STATISTICS)
        ]
        if merged:
            self.notes.append(
                f"the running statistics of {len(merged)} BatchNorm layers are merged like weights, which is not what the merged "
                "model's activations have: recalibrate them on data with alnico.recalibrate_batchnorm."
            )

    def _note_heads(self) -> None:
        """A head that the config ties, and that is written all the same because every model stores it."""
        for head, embedding in self.aligner.tied.items():
            pair = [self.jobs[name] for name in (head, embedding) if name in self.jobs]
            if len(pair) == 2 and (pair[0].kind, pair[0].inputs[0].model) != (
                "copy",
                pair[1].inputs[0].model,
            ):
                self.notes.append(
                    f"{head}: all models store it, and config.json ties it to {embedding}; both are written, and a program may take "
                    "either. Give both the same method and parameters, or set tie_word_embeddings to false in the output's config.json."
                )

    def dropped(self, jobs: list[Job]) -> list[Dropped]:
        """What of the models that are used is not in the output, and why."""
        told = {(m, n): why for m, n, why in self.aligner.dropped}
        read = {(i.model, i.name) for job in jobs for i in job.merged}
        if self.sections.layers or self.recipe.methods or self.recipe.modules:
            made = {job.name: job for job in jobs}
            listed = {(p.model, n) for s in self.sections.parts for p in s.listed for n in p.names.values()}
            for model in sorted({m for m, _ in read}):
                for name in self.sources[model].tensors:
                    if (model, name) not in read and (model, name) not in told:
                        told[model, name] = self._why_not(name, made, is_listed=(model, name) in listed)
        return [Dropped(m, n, self.sources[m].tensors[n].byte_size, why) for (m, n), why in told.items()]

    def _why_not(self, name: str, made: Mapping[str, Job], *, is_listed: bool) -> str:
        place = layer_position(name)
        if place is not None and is_listed:
            return "the recipe leaves another model there as it is"
        if place is not None and any(place.stack == stack for stack in self.sections.layers):
            return "its layer is in no slice"
        if name in made:
            return f"the output has that of {self.sources[made[name].inputs[0].model].label}"
        return "the recipe asks for nothing that has it"

    def _speaking(self, fated: Sequence[tuple[str, Section, TensorMethod, TensorAction]]) -> list[int]:
        """The models whose vocabularies must agree: those that give rows of embeddings; all, where no name tells which these are."""
        rows = {n for s in self.sources for n in tables_of(s).rows}
        of_rows = [f for f in fated if f[0] in rows]
        chosen = of_rows or fated
        given = [[f.origin] if f.origin is not None else a.needed for _, _, a, f in chosen]
        return list(dict.fromkeys(p.model for parts in given for p in parts))

    def _in_layer_order(self) -> list[Job]:
        """What comes before the layers, the layers by number, what comes after them."""

        def place(name: str) -> tuple[int, int]:
            found = self._layers.place(name)
            if found is not None and found.stack in self.sections.layers:
                return 1, found.layer
            is_first = families.comes_first(name) and self._layers.further(name) is None
            return (0 if is_first else 2), 0

        return sorted(self.jobs.values(), key=lambda job: place(job.name))

    def _job(self, name: str, section: Section, asked: TensorMethod, fate: TensorAction) -> Job:
        if fate.origin is not None:
            return self._copied(name, fate.origin, fate.why)
        if fate.kind == "buffer":
            inputs = tuple(self._input(p, name) for p in asked.needed)
            kind: JobKind = "equal" if len(inputs) > 1 else "copy"
            why = f"{inputs[0].dtype}, must be equal in all models" if kind == "equal" else ""
            return _made(kind, name, inputs[0].dtype, self._tensor(asked.needed[0], name), inputs, why=why)
        try:
            options = self._options(name, section, asked)
            setting = find_norm_weight(options, [p.entry for p in asked.values], section.named_base)
            if setting is not None:
                return self._weighable(name, section, asked, options, setting)
            return self._mixed(name, section, asked, options)
        except MethodError as error:
            raise MethodError(f"{name}: {error}") from None

    def _mixed(
        self,
        name: str,
        section: Section,
        asked: TensorMethod,
        options: Mapping[str, Any],
        dtype: str | None = None,
    ) -> Job:
        """The job of a method on all its models, a copy where it leaves one of them as it is. ``dtype`` is the output's, if it is set."""
        applied = self.sides.applied(name, asked, options, self._merge(asked, options))
        merge = applied.merge
        if isinstance(merge, Merge) and merge.copies is not None:
            origin = asked.base if merge.copies == "base" else asked.values[merge.copies]
            assert origin is not None
            why = f"the recipe leaves {self.sources[origin.model].label} as it is"
            return self._copied(name, origin, section.label if section.label == REST else why, dtype)
        digests = applied.digests or ("",) * len(asked.values)
        inputs = tuple(self._input(p, name, digest) for p, digest in zip(asked.values, digests, strict=True))
        base = self._input(asked.base, name) if asked.base is not None else None
        parts = (*asked.values, *([asked.base] if asked.base is not None else []))
        dtype = dtype or self.recipe.dtype or promote([self._tensor(p, name).nominal for p in parts])
        tensor = self._tensor(asked.values[0], name)
        if isinstance(merge, Merge):
            job = _made("mix", name, dtype, tensor, inputs, base, merge, applied.why, applied.sides)
            merge.check_numbers(job.real)
            return job
        return _made("matrix", name, dtype, tensor, inputs, base, None, applied.why, applied.sides, merge)

    def _weighable(
        self, name: str, section: Section, asked: TensorMethod, options: dict[str, Any], setting: NormWeight
    ) -> Job:
        """The job with equal weights, and what it becomes when the norms are known, if these make a difference."""
        equal = with_equal_weights(options, setting)
        merge = self._merge(asked, equal)
        job = self._mixed(name, section, asked, equal)
        weighed = [
            p for p, w in zip(asked.values, options["weight"], strict=True) if isinstance(w, NormWeight)
        ]
        base = asked.base if asked.base is not None else asked.measured_from
        assert base is not None
        if (
            len(weighed) > 1
            and setting.scale != 0
            and (isinstance(merge, MatrixMethod) or merge.copies is None)
        ):
            delta = tuple(self._input(p, name) for p in weighed), self._input(base, name)
            key = setting, tuple(p.model for p in weighed), base.model, group_place(setting, name)
            self._weighed.setdefault(key, {})[name] = pending_job(
                delta,
                job,
                lambda weights: self._mixed(name, section, asked, with_weights(options, weights), job.dtype),
            )
        return job

    def weighings(self) -> tuple[NormWeightGroup, ...]:
        return tuple(NormWeightGroup(*key, tensors) for key, tensors in self._weighed.items())

    def _options(self, name: str, section: Section, asked: TensorMethod) -> dict[str, Any]:
        """The options of the method at one tensor."""
        lines = self.recipe.lines
        constant = None if section.varies(asked) or lines is not None else (id(section), id(asked))
        if constant is not None and constant in self._constant:
            return self._constant[constant]
        options: dict[str, Any] = section.options(name, asked)
        if lines is not None and asked.method.space == "delta" and "scale" in asked.method.options:
            options["scale"] = float(
                options.get("scale", asked.method.options["scale"].default)
            ) * self._line(name)
        if constant is not None:
            self._constant[constant] = options
        return options

    def _merge(self, asked: TensorMethod, options: Mapping[str, Any]) -> Merge | MatrixMethod:
        """The method with its options; tensors with the same options share it."""
        key = (asked.method.name, tuple(options.items()), len(asked.values))
        if key not in self._bound:
            self._bound[key] = asked.method.bind(options, len(asked.values), in_places=True)
        return self._bound[key]

    def _line(self, name: str) -> float:
        """LiNeS: the factor on the merged task vector at a tensor's depth in the whole model."""
        lines = self.recipe.lines
        assert lines is not None
        place = self._layers.place(name)
        if place is None:
            is_first = families.comes_first(name) and self._layers.further(name) is None
            return lines.alpha if is_first else lines.alpha + lines.beta
        return lines.alpha + lines.beta * depth_of(place.layer, self._layers.counts[place.stack])

    @functools.cached_property
    def _layers(self) -> Layers:
        return count_layers(n for section in self.sections.parts for n in section.names)

    def _copied(self, name: str, origin: ModelPart, why: str, dtype: str | None = None) -> Job:
        tensor = self._tensor(origin, name)
        source = self._input(origin, name)
        dtype = dtype or self.recipe.dtype or tensor.nominal
        if tensor.dtype in MERGEABLE and tensor.dtype != dtype:
            identity = combine((1.0,), fixes_equal_inputs=True)
            return _made("mix", name, dtype, tensor, (source,), None, identity, f"{why}, as {dtype}")
        return _made("copy", name, tensor.dtype, tensor, (source,), why=why)

    def _tensor(self, part: ModelPart, name: str) -> Tensor:
        return self.sources[part.model].tensors[part.names[name]]

    def _input(self, part: ModelPart, name: str, digest: str = "") -> Input:
        tensor = self._tensor(part, name)
        return Input(part.model, part.names[name], tensor.dtype, tensor.byte_size, digest)


def _made(
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
