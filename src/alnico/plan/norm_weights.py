"""Weights that follow from norms: which tensors are measured together, and what becomes of their jobs when the norms are known."""

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
    delta: tuple[tuple[Input, ...], Input], like: Job, made: Callable[[tuple[float, ...]], Job]
) -> PendingJob:
    """What waits for its weights: task vectors, measured in float64, of a tensor that will come out ``like`` this."""
    inputs, base = delta
    merge = combine((1.0,) * len(inputs), is_wide=True)
    return PendingJob(
        dataclasses.replace(
            like, kind="mix", inputs=inputs, base=base, merge=merge, why="", sides=(), matrix=None
        ),
        made,
    )


def group_place(setting: NormWeight, name: str) -> str:
    """What a tensor is measured with: the tensors of the same place.

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
    """Put norms into a plan: of weighings, by their position. Errors: MismatchError for a model at distance 0, MethodError."""
    weighings = list(plan.weighings)
    made: dict[str, Job] = {}
    equal: dict[tuple[NormWeight, int], list[str]] = {}
    for i, found in norms.items():
        weighing = weighings[i] = dataclasses.replace(weighings[i], norms=found)
        weights = _weights(weighing, found, plan.sources)
        for name, waiting in weighing.tensors.items():
            try:
                made[name] = waiting.made(weights)
            except MethodError as error:
                raise MethodError(f"{name}: {error}") from None
        if any(found) or weighing.setting.per == "model":
            for model in (m for m, norm in zip(weighing.models, found, strict=True) if norm == 0):
                equal.setdefault((weighing.setting, model), []).append(weighing.place)
    jobs = tuple(made.get(job.name, job) for job in plan.jobs)
    notes = [_note(plan.sources[model].label, places) for (_, model), places in equal.items()]
    return dataclasses.replace(plan, jobs=jobs, weighings=tuple(weighings), notes=(*plan.notes, *notes))


def _weights(weighing: NormWeightGroup, norms: Norms, sources: Sequence[Source]) -> tuple[float, ...]:
    setting = weighing.setting
    zero = next((m for m, norm in zip(weighing.models, norms, strict=True) if norm == 0), None)
    if zero is not None and setting.mode != "exp" and (any(norms) or setting.per == "model"):
        where = f"{weighing.place}: " if weighing.place else ""
        raise MismatchError(
            f"{where}{sources[zero].label} equals {sources[weighing.base].label}, the base: its L2 norm is 0, by which mode {setting.mode} "
            "divides; expected models that differ from the base. Leave the model out, or choose mode: exp."
        )
    return setting.weights(norms)


def _note(label: str, places: Sequence[str]) -> str:
    where = f" in {places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}" if places[0] else ""
    return (
        f"{label} equals the base{where}, so mode exp gives it the largest weight, and less to the models that do change something. "
        "Leave it out if that is not meant."
    )


def read_norms(plan: Plan, folders: Sequence[str], positions: Sequence[int]) -> dict[int, Norms]:
    """Read the norms of weighings, by their position, from the analyses that they name; ``folders`` are where a path is looked for.

    They are taken tensor by tensor, so that they are over the same tensors as measured ones. Errors: ModelError for a file that is
    no analysis; MismatchError for one of another base, or without a model or tensor.
    """
    analyses: dict[str, _MeasuredNorms] = {}
    found = {}
    for i in positions:
        weighing = plan.weighings[i]
        path = weighing.setting.path
        if path not in analyses:
            analyses[path] = _read(path, folders)
        found[i] = analyses[path].norms(weighing, plan.sources)
    return found


SUMMARY = "summary.json"
SCHEMA = 1
"""Of the summaries of analyses that are read here."""


@dataclass(frozen=True)
class _MeasuredNorms:
    """What is used of an analysis: ``norms_of`` maps tensors to their shape and the L2 norm in each model, None where it has none."""

    file: Path
    base: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    norms_of: Mapping[str, tuple[tuple[int, ...], tuple[float | None, ...]]]

    def norms(self, weighing: NormWeightGroup, sources: Sequence[Source]) -> Norms:
        if not _is_same(sources[weighing.base], self.base):
            raise MismatchError(
                f"{self.file}: its base is {self.base['reference']}, that of the merge is {sources[weighing.base].label}; "
                "expected an analysis from the same base. Analyse the models anew."
            )
        places = [self._place(sources[m]) for m in weighing.models]
        squares: list[list[float]] = [[] for _ in places]
        for name, waiting in weighing.tensors.items():
            delta = waiting.delta
            assert delta.base is not None
            shape, norms = self.norms_of.get(delta.base.name, (None, ()))
            same = shape == delta.shape and all(i.name == delta.base.name for i in delta.inputs)
            given = [norms[p] for p in places] if same else [None]
            if None in given:
                raise MismatchError(
                    f"{self.file}: has no norms of {name} as it is merged here; expected every tensor that has this weight. "
                    "Write from: l2_norm, by which the merge measures them."
                )
            for parts, norm in zip(squares, given, strict=True):
                parts.append(float(norm or 0.0) ** 2)
        return tuple(math.sqrt(math.fsum(parts)) for parts in squares)

    def _place(self, source: Source) -> int:
        for i, model in enumerate(self.models):
            if _is_same(source, model):
                return i
        known = ", ".join(str(m["reference"]) for m in self.models)
        raise MismatchError(
            f"{self.file}: has no model {source.label}; it has {known}. Analyse all models of the merge together, or write from: l2_norm."
        )


def analysis_files(plan: Plan, folders: Sequence[str]) -> dict[str, Path]:
    """The files of the analyses that weights are made from, by the paths that the recipe names; ``folders`` are where a path is looked for."""
    named = dict.fromkeys(w.setting.path for w in plan.weighings if w.setting.origin == "analysis")
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
            f"{file}: is no analysis of schema {SCHEMA}; expected what `alnico analyze` wrote. Analyse the models anew."
        )
    try:
        norms = {
            str(t["name"]): (
                tuple(t["shape"]),
                tuple(None if c is None else float(c["l2"]) for c in t["changes"]),
            )
            for t in data["tensors"]
        }
        named = [data["base"], *data["models"]]
        if any(not isinstance(m["reference"], str) for m in named) or any(
            len(n) != len(named) - 1 for _, n in norms.values()
        ):
            raise ValueError("models")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{file}: is damaged ({error}). Make it anew with `alnico analyze`.") from None
    return _MeasuredNorms(file, named[0], named[1:], norms)


def _is_same(source: Source, analysed: Mapping[str, Any]) -> bool:
    """Is it the model of an analysis: at the same place, or of the hub at the same commit?"""
    reference, commit = str(analysed["reference"]), analysed.get("commit")
    if source.origin is not None:
        return commit == source.origin.commit and reference.partition("@")[0] == source.origin.name
    location = getattr(source, "location", None)
    is_there = location is not None and os.path.realpath(location) == os.path.realpath(
        Path(os.path.expanduser(reference))
    )
    return is_there or reference == source.label
