"""Computes weights from the norms of task vectors, measured, read from an analysis or given."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.source import Source
from alnico.errors import MethodError, MismatchError, ModelError
from alnico.methods.base import combine
from alnico.plan.job import Input, Job, Norms, NormWeightGroup, PendingJob, Plan
from alnico.plan.layers import layer_position
from alnico.recipe.schema import NormWeight


def pending_job(
    delta: tuple[tuple[Input, ...], Input | None], like: Job, with_weights: Callable[[tuple[float, ...]], Job]
) -> PendingJob:
    """Return a pending job that measures task vectors in float64; the final job resembles ``like``."""
    inputs, base = delta
    merge = combine((1.0,) * len(inputs), is_wide=True)
    return PendingJob(
        dataclasses.replace(
            like, kind="mix", inputs=inputs, base=base, merge=merge, why="", sides=(), matrix=None
        ),
        with_weights,
    )


def group_place(setting: NormWeight, name: str) -> str:
    """Return the group of a tensor: tensors with the same place share a norm.

    >>> group_place(NormWeight(per="layer"), "model.layers.3.mlp.up_proj.weight"), group_place(NormWeight(per="layer"), "lm_head.weight")
    ('model.layers.3', 'in no layer')
    """
    if setting.per == "model":
        return ""
    if setting.per == "tensor":
        return name
    place = layer_position(name)
    return f"{place.stack}{place.layer}" if place is not None else "in no layer"


def with_norms(plan: Plan, norms: Mapping[int, Norms]) -> Plan:
    """Put norms into a plan, by position of their group.

    Errors: MismatchError for a model equal to the base, MethodError.
    """
    groups = list(plan.norm_weight_groups)
    jobs_by_name: dict[str, Job] = {}
    equal: dict[tuple[NormWeight, int], list[str]] = {}
    for i, group_norms in norms.items():
        group = groups[i] = dataclasses.replace(groups[i], norms=group_norms)
        weights = _weights(group, group_norms, plan.sources)
        for name, pending in group.tensors.items():
            try:
                jobs_by_name[name] = pending.with_weights(weights)
            except MethodError as error:
                raise MethodError(f"{name}: {error}") from None
        if any(group_norms) or group.setting.per == "model":
            for model in (m for m, norm in zip(group.models, group_norms, strict=True) if norm == 0):
                equal.setdefault((group.setting, model), []).append(group.place)
    jobs = tuple(jobs_by_name.get(job.name, job) for job in plan.jobs)
    notes = [_note(setting, plan.sources[model].label, places) for (setting, model), places in equal.items()]
    return dataclasses.replace(plan, jobs=jobs, norm_weight_groups=tuple(groups), notes=(*plan.notes, *notes))


def _weights(group: NormWeightGroup, norms: Norms, sources: Sequence[Source]) -> tuple[float, ...]:
    setting = group.setting
    zero = next((m for m, norm in zip(group.models, norms, strict=True) if norm == 0), None)
    if zero is not None and setting.mode != "exp" and (any(norms) or setting.per == "model"):
        assert group.base is not None  # given norms of 0 are mistakes of a recipe
        where = f"{group.place}: " if group.place else ""
        raise MismatchError(
            f"{where}{sources[zero].label} equals {sources[group.base].label}, the base: its L2 norm is 0, "
            f"and mode {setting.mode} divides by it; expected models that differ from the base. Remove the "
            "model, or use mode: exp."
        )
    return setting.weights(norms)


def _note(setting: NormWeight, label: str, places: Sequence[str]) -> str:
    if setting.origin == "given":
        return (
            f"the norm given for {label} is 0, as of a model that equals the base; mode exp gives it the largest "
            "weight."
        )
    where = f" in {places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}" if places[0] else ""
    return (
        f"{label} equals the base{where}, so mode exp gives it the largest weight and the models that differ "
        "smaller ones. Remove it if this is unintended."
    )


def known_norms(plan: Plan, folders: Sequence[str]) -> dict[int, Norms]:
    """Return the norms that need no measuring, by position of their group: those of analyses, and given ones.

    Errors: those of :func:`read_norms`.
    """
    groups = plan.norm_weight_groups
    given = {i: group.setting.norms for i, group in enumerate(groups) if group.setting.origin == "given"}
    analysed = [i for i, group in enumerate(groups) if group.setting.origin == "analysis"]
    return given | read_norms(plan, folders, analysed)


def read_norms(plan: Plan, folders: Sequence[str], positions: Sequence[int]) -> dict[int, Norms]:
    """Read the norms of the groups at ``positions`` from their analyses, searched in ``folders``.

    Norms are summed tensor by tensor, over the same tensors as measured norms. Errors: ModelError for a file
    that is not an analysis; MismatchError for an analysis of another base, or without a model or tensor of
    the merge.
    """
    analyses: dict[str, _MeasuredNorms] = {}
    norms = {}
    for i in positions:
        group = plan.norm_weight_groups[i]
        path = group.setting.path
        if path not in analyses:
            analyses[path] = _read(path, folders)
        norms[i] = analyses[path].norms(group, plan.sources)
    return norms


SUMMARY = "summary.json"
SCHEMA = 1
"""The supported schema of summaries."""


@dataclass(frozen=True)
class _MeasuredNorms:
    """Norms of an analysis: ``norms_of`` maps a tensor to its shape and its L2 norms (or None) by model."""

    file: Path
    base: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    norms_of: Mapping[str, tuple[tuple[int, ...], tuple[float | None, ...]]]

    def norms(self, group: NormWeightGroup, sources: Sequence[Source]) -> Norms:
        assert group.base is not None
        if not _is_same(sources[group.base], self.base):
            raise MismatchError(
                f"{self.file}: its base is {self.base['reference']}, that of the merge is "
                f"{sources[group.base].label}; expected an analysis with the same base. Analyze the models "
                "again."
            )
        places = [self._place(sources[m]) for m in group.models]
        squares: list[list[float]] = [[] for _ in places]
        for name, pending in group.tensors.items():
            delta = pending.delta
            assert delta.base is not None
            shape, norms = self.norms_of.get(delta.base.name, (None, ()))
            same = shape == delta.shape and all(i.name == delta.base.name for i in delta.inputs)
            values = [norms[p] for p in places] if same else [None]
            if None in values:
                raise MismatchError(
                    f"{self.file}: has no norms of {name} as it is merged here; expected every tensor with "
                    "this weight. Use from: l2_norm to measure them during the merge."
                )
            for parts, norm in zip(squares, values, strict=True):
                parts.append(float(norm or 0.0) ** 2)
        return tuple(math.sqrt(math.fsum(parts)) for parts in squares)

    def _place(self, source: Source) -> int:
        for i, model in enumerate(self.models):
            if _is_same(source, model):
                return i
        references = ", ".join(str(m["reference"]) for m in self.models)
        raise MismatchError(
            f"{self.file}: has no model {source.label}; it has {references}. Analyze all models of the merge "
            "together, or use from: l2_norm."
        )


def analysis_files(plan: Plan, folders: Sequence[str]) -> dict[str, Path]:
    """Return the analysis files of norm weights by their path in the recipe, searched in ``folders``."""
    named = dict.fromkeys(w.setting.path for w in plan.norm_weight_groups if w.setting.origin == "analysis")
    return {path: _file_of(path, folders) for path in named}


def _file_of(path: str, folders: Sequence[str]) -> Path:
    places = [Path(folder) / Path(os.path.expanduser(path)) for folder in folders]
    place = next((p for p in places if p.exists()), places[0])
    return place / SUMMARY if place.is_dir() else place


def _read(path: str, folders: Sequence[str]) -> _MeasuredNorms:
    file = _file_of(path, folders)
    data = read_json(file)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ModelError(
            f"{file}: is not an analysis of schema {SCHEMA}; expected the output of `alnico analyze`. "
            "Analyze the models again."
        )
    try:
        norms = {
            str(t["name"]): (
                tuple(t["shape"]),
                tuple(None if c is None else float(c["l2"]) for c in t["changes"]),
            )
            for t in data["tensors"]
        }
        entries = [data["base"], *data["models"]]
        if any(not isinstance(m["reference"], str) for m in entries) or any(
            len(n) != len(entries) - 1 for _, n in norms.values()
        ):
            raise ValueError("models")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{file}: is damaged ({error}). Create it again with `alnico analyze`.") from None
    return _MeasuredNorms(file, entries[0], entries[1:], norms)


def _is_same(source: Source, analysed: Mapping[str, Any]) -> bool:
    """Is a source the model of an analysis: at the same path, or at the same commit on the hub?"""
    reference, commit = str(analysed["reference"]), analysed.get("commit")
    if source.origin is not None:
        return commit == source.origin.commit and reference.partition("@")[0] == source.origin.name
    location = getattr(source, "location", None)
    is_same_path = location is not None and os.path.realpath(location) == os.path.realpath(
        Path(os.path.expanduser(reference))
    )
    return is_same_path or reference == source.label
