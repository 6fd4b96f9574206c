"""Builds the jobs of a plan: what is merged, copied or compared for every output tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.source import Source, Tensor
from alnico.errors import MethodError
from alnico.methods.base import MatrixMethod, Merge, combine
from alnico.numerics.dtypes import DTYPES, MERGEABLE, promote
from alnico.plan import families
from alnico.plan.job import Dropped, Input, Job, JobKind, NormWeightGroup, PendingJob, RuleUse
from alnico.plan.layers import Layers, count_layers, depth_of, layer_position
from alnico.plan.norm_weights import group_place, pending_job
from alnico.plan.sections import REST, ModelPart, Section, Sections, TensorMethod
from alnico.plan.statistics_inputs import StatisticsInputs
from alnico.plan.tensor_matching import TensorAction, TensorMatcher
from alnico.recipe.norm_weight import find_norm_weight, with_equal_weights, with_weights
from alnico.recipe.schema import NormWeight, Recipe
from alnico.vocabulary.tables import find_tables

if TYPE_CHECKING:
    from alnico.plan.protection import ProtectedJobs

IDENTITY = combine((1.0,), fixes_equal_inputs=True)
"""Converts a tensor to another dtype. One for all, so that all have one kernel."""


@dataclass(frozen=True)
class _MatchedTensor:
    """An output tensor with its section, its method, and what happens to it."""

    name: str
    section: Section
    method: TensorMethod
    action: TensorAction


class JobBuilder:
    """Builds the jobs of all sections, in the order of the donor's tensors, then of the other models'.

    ``dtype_of`` says in which dtype a tensor is written, if it is not the recipe's; None leaves it to the models.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: list[Source],
        donor: int,
        sections: Sections,
        new_rows: Sequence[Collection[str]] = (),
        dtype_of: Callable[[Tensor], str | None] | None = None,
    ) -> None:
        self.recipe = recipe
        self._dtype_of = dtype_of or (lambda _: recipe.dtype)
        self.sources = sources
        self.donor = donor
        self.sections = sections
        self.matcher = TensorMatcher(sources, donor, recipe.missing)
        self.statistics = StatisticsInputs(sources, recipe.folder, new_rows)
        self.jobs: dict[str, Job] = {}
        self._rules: dict[str, int] = {}
        """Positions of the rules that make tensors, by the tensors' names."""
        self._left_out: dict[str, int] = {}
        """Positions of the rules that drop tensors, by the tensors' names."""
        self.notes: list[str] = []
        self._merges: dict[Any, Merge | MatrixMethod] = {}
        self._checked: dict[tuple[int, str], Merge] = {}
        self._constant_options: dict[tuple[int, int], dict[str, Any]] = {}
        self._pending: dict[tuple[NormWeight, tuple[int, ...], int | None, str], dict[str, PendingJob]] = {}
        self._protected: ProtectedJobs | None = None
        if recipe.protect is not None:
            from alnico.plan.protection import ProtectedJobs  # most recipes protect nothing

            (section,) = sections.parts  # a recipe that protects has no slices and no modules
            anchor = section.part_of(recipe.protect.model or recipe.base_model or "")
            self._protected = ProtectedJobs(recipe.protect, self.statistics, anchor)

    def build(self) -> list[Job]:
        """Return the jobs. Errors: MismatchError with all tensors that do not match, MethodError."""
        matched: list[_MatchedTensor] = []
        for section in self.sections.parts:
            for name in section.names:
                if section.drops(name):
                    self._leave_out(name, section)
                    continue
                chosen = section.method_for(name)
                action = self.matcher.match(name, section, chosen)
                if action is not None:
                    matched.append(_MatchedTensor(name, section, chosen, action))
        if not self.matcher.problems and self.recipe.tokenizer is None:
            is_completed = self.recipe.complete_from is not None and not self.recipe.base_model
            own = (
                0 if is_completed else self.donor
            )  # the first model has its tokenizer, even if its config is completed
            self.matcher.check_vocabularies(self._models_with_embeddings(matched), own)
        self.matcher.refuse()
        positions = {id(rule): i for i, rule in enumerate(self.recipe.methods)}
        for tensor in matched:
            self.jobs[tensor.name] = self._job(tensor)
            if tensor.method.rule is not None:
                self._rules[tensor.name] = positions[id(tensor.method.rule)]
        if self._protected is not None:
            self.notes += self._protected.notes()
        self._note_gradients(matched)
        self._note_statistics(matched)
        self._note_heads()
        self._note_shapes()
        if self.sections.layers:
            return self._in_layer_order()
        order = dict.fromkeys(
            n for s in (self.sources[self.donor], *self.sources) for n in s.tensors if n in self.jobs
        )
        return [self.jobs[name] for name in (*order, *(n for n in self.jobs if n not in order))]

    def _leave_out(self, name: str, section: Section) -> None:
        """Drop a tensor of all models, as a rule says."""
        position = next(i for i, rule in enumerate(self.recipe.methods) if rule is section.rule_of(name))
        self.matcher.leave_out(name, section, f"methods[{position}] drops it")
        self._left_out[name] = position

    def _note_gradients(self, matched: Sequence[_MatchedTensor]) -> None:
        """Note that tensors outside of layers get a gradient's first value, even those after the layers."""
        names = [
            t.name
            for t in matched
            if t.action.kind == "merged" and self._layers.place(t.name) is None and t.section.varies(t.method)
            if t.section.options(t.name, t.method) != t.section.options(t.name, t.method, 1.0)
        ]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.notes.append(
                f"{shown}: outside of the layers, so the first value of each gradient applies, as in "
                "mergekit."
            )

    def _note_statistics(self, matched: Sequence[_MatchedTensor]) -> None:
        """Note that merged BatchNorm statistics do not describe the merged model."""
        count = sum(
            t.action.kind == "merged" and len(t.method.needed) > 1 and t.name.endswith(families.STATISTICS)
            for t in matched
        )
        if count:
            self.notes.append(
                f"the running statistics of {count} BatchNorm layers are merged like weights and do "
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

    def _note_shapes(self) -> None:
        """Note tensors that rules make in another shape than the model has whose config the output has."""
        donor = self.sources[self.donor]
        others = [
            name
            for name in self._rules
            if name in donor.tensors and donor.tensors[name].shape != self.jobs[name].shape
        ]
        if others and not self.sections.layers:
            name = others[0]
            more = f" There are {len(others)} such tensors." if len(others) > 1 else ""
            self.notes.append(
                f"{name}: a rule makes it {self.jobs[name].shape}, and it is {donor.tensors[name].shape} in "
                f"{donor.label}, whose config the output has. Make sure that the output can be loaded.{more}"
            )

    @property
    def left_out(self) -> Collection[str]:
        """The tensors of the output that rules drop, in order."""
        return self._left_out.keys()

    def rules(self) -> tuple[RuleUse, ...]:
        """Return what each rule does: its tensors, and the models that they are read from."""
        jobs: dict[int, list[Job]] = {}
        for name, position in self._rules.items():
            jobs.setdefault(position, []).append(self.jobs[name])
        counts = Counter(self._left_out.values())
        return tuple(
            RuleUse(
                rule.filter,
                rule.merge_method,
                len(made := jobs.get(i, [])) + counts[i],
                tuple(dict.fromkeys(given.model for job in made for given in job.inputs)),
                next((job.base.model for job in made if job.base is not None), None),
            )
            for i, rule in enumerate(self.recipe.methods)
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
        rule = self._rules.get(name)
        if rule is not None and self.recipe.methods[rule].models:
            return f"methods[{rule}] merges other models there"
        if place is not None and is_listed:
            return "the recipe copies another model there"
        if place is not None and any(place.stack == stack for stack in self.sections.layers):
            return "its layer is not in a slice"
        if name in by_name:
            return f"the output has it from {self.sources[by_name[name].inputs[0].model].label}"
        return "no part of the recipe uses it"

    def _models_with_embeddings(self, matched: Sequence[_MatchedTensor]) -> list[int]:
        """Return the models whose vocabularies must agree: those with embeddings, or all if unclear."""
        rows = {n for s in self.sources for n in find_tables(s).rows}
        tables = [t for t in matched if t.name in rows] or matched
        used = [[t.action.origin] if t.action.origin is not None else t.method.needed for t in tables]
        return list(dict.fromkeys(p.model for parts in used for p in parts))

    def _in_layer_order(self) -> list[Job]:
        """Return the jobs before the layers, then those of the layers in order, then those after them."""

        def order(name: str) -> tuple[int, int]:
            position = self._layers.place(name)
            if position is not None and position.stack in self.sections.layers:
                return 1, position.layer
            is_first = families.comes_first(name) and self._layers.predictor_place(name) is None
            return (0 if is_first else 2), 0

        return sorted(self.jobs.values(), key=lambda job: order(job.name))

    def _job(self, matched: _MatchedTensor) -> Job:
        name, section, chosen, action = matched.name, matched.section, matched.method, matched.action
        if action.origin is not None:
            job = self._copy_job(name, action.origin, action.why)
            is_known = self._protected is None or name in self._protected.anchor.names
            return self._protect(job) if is_known else job
        if action.kind == "buffer":
            inputs = tuple(self._input(p, name) for p in chosen.needed)
            kind: JobKind = "equal" if len(inputs) > 1 else "copy"
            why = f"{inputs[0].dtype}, must be equal in all models" if kind == "equal" else ""
            return new_job(kind, name, inputs[0].dtype, self._tensor(chosen.needed[0], name), inputs, why=why)
        try:
            options = self._options(name, section, chosen)
            setting = find_norm_weight(options, [p.entry for p in chosen.parts], chosen.named_base)
            if setting is not None:
                return self._norm_weighted(name, section, chosen, options, setting)
            return self._protect(self._mixed(name, section, chosen, options))
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
        if not (dtype := dtype or self._dtype_of(self._tensor(chosen.parts[0], name))):
            parts = (*chosen.parts, *([chosen.base] if chosen.base is not None else []))
            dtype = promote([self._tensor(p, name).nominal for p in parts])
        tensor = self._tensor(chosen.parts[0], name)
        if isinstance(merge, Merge):
            job = new_job(
                "mix",
                name,
                dtype,
                tensor,
                inputs,
                base=base,
                merge=merge,
                why=applied.why,
                sides=applied.sides,
            )
            if (id(merge), job.real) not in self._checked:  # tensors with equal options share it
                merge.check_numbers(job.real)
                self._checked[id(merge), job.real] = merge
            return job
        return new_job(
            "matrix",
            name,
            dtype,
            tensor,
            inputs,
            base=base,
            matrix=merge,
            why=applied.why,
            sides=applied.sides,
        )

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
        assert base is not None or setting.origin == "given"
        if (
            len(with_norm) > 1
            and setting.scale != 0
            and (isinstance(merge, MatrixMethod) or merge.copies is None)
        ):
            of_base = None if base is None else self._input(base, name)
            delta = tuple(self._input(p, name) for p in with_norm), of_base
            models = tuple(p.model for p in with_norm)
            key = setting, models, None if base is None else base.model, group_place(setting, name)
            self._pending.setdefault(key, {})[name] = pending_job(
                delta,
                job,
                lambda weights: self._protect(
                    self._mixed(name, section, chosen, with_weights(options, weights), job.dtype)
                ),
            )
        return self._protect(job)

    def _protect(self, job: Job) -> Job:
        """Return the job that keeps what the protected model gives, if the recipe protects one."""
        return job if self._protected is None else self._protected.protect(job)

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

    def again(self, jobs: Sequence[Job], recipe: Recipe) -> tuple[Job, ...] | None:
        """Return the jobs of a recipe that differs from the own one in numbers alone, which are the same for all tensors.

        None if some tensor is made in another way by these numbers. Errors: MethodError.
        """
        (section,) = self.sections.parts
        ((_, before),) = self._merges.items()
        parts = {
            id(part): dataclasses.replace(part, entry=entry)
            for part, entry in zip(section.listed, recipe.models, strict=True)
        }
        fresh = dataclasses.replace(
            section,
            listed=tuple(parts.values()),
            base=parts.get(id(section.base), section.base),
            shared=(recipe.parameters,),
            _methods={},
            _rules_by_name={},
            _parts={},
        )
        name = next(job.name for job in jobs if job.merge is before)
        chosen = fresh.method_for(name)
        merge = chosen.method.bind(fresh.options(name, chosen), len(chosen.parts), in_places=True)
        if not isinstance(merge, Merge) or merge.copies is not None:
            return None
        if isinstance(before, Merge) and _is_same(merge.mix, before.mix):
            merge = dataclasses.replace(merge, mix=before.mix)  # its kernel is known
        for real in {job.real for job in jobs if job.merge is before}:
            merge.check_numbers(real)
        made = tuple(dataclasses.replace(job, merge=merge) if job.merge is before else job for job in jobs)
        return made if all(new.real == job.real for new, job in zip(made, jobs, strict=True)) else None

    @property
    def is_plain(self) -> bool:
        """Does one method make all tensors that are mixed, with the same numbers, and without statistics?"""
        merges = list(self._merges.values())
        return (
            len(self.sections.parts) == len(merges) == 1
            and not self.recipe.methods
            and not self._pending
            and self._protected is None
            and isinstance(merges[0], Merge)
            and merges[0].copies is None
            and any(job.merge is merges[0] for job in self.jobs.values())
        )

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
        return copied(name, source, tensor, dtype or self._dtype_of(tensor) or tensor.nominal, why)

    def _tensor(self, part: ModelPart, name: str) -> Tensor:
        return self.sources[part.model].tensors[part.names[name]]

    def _input(self, part: ModelPart, name: str, digest: str = "") -> Input:
        own = part.names[name]
        tensor = self.sources[part.model].tensors[own]
        return Input(part.model, own, tensor.dtype, tensor.byte_size, digest)


def _is_same(equation: Callable[..., float], other: Callable[..., float]) -> bool:
    """Were two functions made by one definition, with the same objects around it?"""
    code, captured = (
        [getattr(f, "__code__", f) for f in (equation, other)],
        [[cell.cell_contents for cell in getattr(f, "__closure__", None) or ()] for f in (equation, other)],
    )
    return code[0] is code[1] and all(a is b for a, b in zip(*captured, strict=True))


def copied(name: str, source: Input, tensor: Tensor, dtype: str, why: str) -> Job:
    """Return the job that copies a tensor of one model, rounded to ``dtype`` if that is another one."""
    if tensor.dtype in MERGEABLE and tensor.dtype != dtype:
        return new_job("mix", name, dtype, tensor, (source,), merge=IDENTITY, why=f"{why}, as {dtype}")
    return new_job("copy", name, tensor.dtype, tensor, (source,), why=why)


def new_job(
    kind: JobKind,
    name: str,
    dtype: str,
    tensor: Tensor,
    inputs: tuple[Input, ...],
    *,
    base: Input | None = None,
    merge: Merge | None = None,
    why: str = "",
    sides: tuple[Input, ...] = (),
    matrix: MatrixMethod | None = None,
) -> Job:
    size = tensor.byte_size if kind not in ("mix", "matrix") else tensor.elements * DTYPES[dtype].bytes
    return Job(
        kind, name, dtype, tensor.shape, tensor.elements, size, inputs, base, merge, why, sides, matrix
    )
