"""Measures what a merged model kept of its parents, from one analysis of all of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from alnico.analysis.common_tensors import model_of, names_of
from alnico.analysis.measure import analyze_sources
from alnico.analysis.model_map import ModelMap, map_models
from alnico.analysis.results import AnalysedModel, Analysis, ScopeStatistics, TensorScope
from alnico.analysis.scores import Accuracy, ScoreTable, accuracies
from alnico.checkpoint.memory_model import MemoryModel
from alnico.checkpoint.source import Source, unwrap
from alnico.errors import HubError, ModelError, OutputError, RecipeError
from alnico.folders import open_new, write_new
from alnico.notebook import (
    ResultTable,
    name_text,
    names_text,
    never_fails,
    result_html,
    result_line,
    share_text,
)
from alnico.output.recipe_file import RECIPE
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import resolve_reference

JSON = "retention.json"
CSV = "retention.csv"

SCHEMA = 1
"""Version of ``retention.json``; raised when a key changes its meaning or is removed."""

SINGULAR = 1e-9
"""Smallest eigenvalue of the parents' cosine matrix, relative to the largest, that counts as a direction."""


@dataclass(frozen=True)
class ParentRetention:
    """What a merged model kept of one parent, over the elements of a scope. m and p are their task vectors.

    ``distance`` is |merged - parent|; ``relative_distance`` is that over the base's norm, or over the merged
    model's without a base. ``projection`` is m p / |p|^2: 1 if all of p is in m, 0 if none of it is; what
    other parents have in common with p counts too. ``weight`` is the coefficient of p in the sum of the
    parents' task vectors that is nearest to m (least squares), which removes the effect of the other parents.
    ``sign_agreement`` is the share of equal signs among the entries that both changed. ``top_kept`` is the
    share of p's top parameters (see :class:`alnico.analysis.results.Pair`) that are among m's. A value is
    None where the divisor is 0 and, except for the distances, without a base.
    """

    distance: float
    relative_distance: float | None
    projection: float | None = None
    weight: float | None = None
    sign_agreement: float | None = None
    top_kept: float | None = None


@dataclass(frozen=True)
class ScopeRetention:
    """What was kept in a group, a layer or the whole model.

    ``distance`` is |merged - base|, ``relative_distance`` that over the base's norm. ``outside`` is the share
    of the merged task vector's length that no sum of the parents' task vectors explains. ``parents`` has None
    for a parent that could not be compared in any of these tensors.
    """

    name: str
    distance: float | None
    relative_distance: float | None
    outside: float | None
    parents: tuple[ParentRetention | None, ...]


@dataclass(frozen=True)
class Retention:
    """What a merged model kept of its parents and of their scores: as a whole, by group and by layer.

    ``base`` is None if it is unknown; then only distances are measured. ``notes`` explain limits of the
    measurement. ``map`` has base, parents and merge as points in a plane. ``by_model`` has every score by task, then
    by model.
    """

    version: str
    base: AnalysedModel | None
    parents: tuple[AnalysedModel, ...]
    merged: AnalysedModel
    top_share: float
    whole: ScopeRetention
    groups: Mapping[str, ScopeRetention]
    layers: Mapping[int, ScopeRetention]
    scores: tuple[Accuracy, ...]
    notes: tuple[str, ...]
    map: ModelMap | None = None
    by_model: ScoreTable = field(default_factory=dict)
    compile_seconds: float = field(default=0.0, compare=False)

    def data(self) -> dict[str, Any]:
        """Return everything as plain data: the content of ``retention.json``."""
        values = asdict(self)
        del values["compile_seconds"]
        if not self.by_model:
            del values["by_model"]
        return {
            "schema": SCHEMA,
            **values,
            "layers": {str(number): scope for number, scope in values["layers"].items()},
        }

    def plot(
        self,
        name: str = "map",
        *,
        parents: Any = None,
        measure: str | None = None,
        figsize: tuple[float, float] | None = None,
        ax: Any = None,
        dark: bool = False,
    ) -> Any:
        """Draw a picture and return it as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        ``name`` is ``map`` (base, parents and merge as points to scale), ``kept`` (a ``measure`` by group),
        ``layers`` (a ``measure`` by layer) or ``scores``. A ``measure`` is ``projection``, ``weight``, ``top_kept``,
        ``signs``, ``distance`` or ``relative_distance``. ``parents`` chooses parents by name or position. ``figsize`` is
        in inches; ``ax`` are axes to draw in; ``dark`` takes the colours of the dark page. Needs the extra
        ``[report]``. Errors: AlnicoError, also for an unknown name.
        """
        from alnico.analysis.retention_pictures import plot_retention

        return plot_retention(self, name, parents=parents, measure=measure, figsize=figsize, ax=ax, dark=dark)

    def __repr__(self) -> str:
        if self.base is None:
            of_parents = [
                f"{name_text(p.name)} at distance {'unknown' if s is None else format(s.distance, '.4g')}"
                for p, s in zip(self.parents, self.whole.parents, strict=True)
            ]
        else:
            of_parents = [
                f"{name_text(p.name)} {'unknown' if s is None or s.projection is None else format(s.projection, '.3g')}"
                for p, s in zip(self.parents, self.whole.parents, strict=True)
            ]
        return result_line(
            f"comparison of {name_text(self.merged.name)} with its parents",
            f"{'' if self.base is None else 'projection on '}{names_text(of_parents, 6)}",
            f"kept of the best score: {names_text((f'{s.task} {share_text(s.kept)}' for s in self.scores), 6)}"
            if self.scores
            else "",
        )

    @never_fails
    def _repr_html_(self) -> str:
        from alnico.analysis.retention_pictures import inline_retention

        columns = ["", "parent", "distance", "relative"]
        if self.base is not None:
            columns += ["projection", "weight", "signs agree", "top kept"]
        rows: list[list[Any]] = []
        for i, (parent, s) in enumerate(zip(self.parents, self.whole.parents, strict=True)):
            row: list[Any] = [i + 1, parent.name]
            if s is not None:
                row += [
                    s.distance,
                    share_text(s.relative_distance),
                    s.projection,
                    s.weight,
                    share_text(s.sign_agreement),
                    share_text(s.top_kept),
                ]
            rows.append([*row, *(None,) * len(columns)][: len(columns)])
        scores = [
            [s.task, s.merged, s.best, s.of_best, s.of_base, share_text(s.kept), share_text(s.gain_kept)]
            for s in self.scores
        ]
        return result_html(
            f"What {name_text(self.merged.name)} kept of its parents",
            ResultTable(columns, rows),
            *(
                [
                    ResultTable(
                        ("task", "merged", "best parent", "its score", "base", "kept", "of its gain"), scores
                    )
                ]
                if scores
                else []
            ),
            *self.notes,
            facts=[
                ("base", "unknown" if self.base is None else self.base.name),
                ("outside of all parents", share_text(self.whole.outside)),
            ],
            picture=lambda: inline_retention(self),
        )

    def scopes(self) -> list[tuple[str, ScopeRetention]]:
        """Return all scopes, each with its kind: ``whole``, ``group`` or ``layer``."""
        of_groups = [("group", scope) for scope in self.groups.values()]
        return [("whole", self.whole), *of_groups, *(("layer", scope) for scope in self.layers.values())]


def write_retention(retention: Retention, folder: Path) -> None:
    """Write ``retention.json``, with everything, and ``retention.csv``, with one line per scope and parent.

    Errors: OutputError.
    """
    try:
        write_new(folder / JSON, json.dumps(retention.data(), indent=1, ensure_ascii=False) + "\n")
        with open_new(folder / CSV) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                [
                    "scope",
                    "name",
                    "parent",
                    *(f.name for f in fields(ParentRetention)),
                    "merged_from_base",
                    "outside",
                ]
            )
            for kind, scope in retention.scopes():
                for parent, share in zip(retention.parents, scope.parents, strict=True):
                    if share is not None:
                        writer.writerow(
                            [
                                kind,
                                scope.name,
                                parent.name,
                                *asdict(share).values(),
                                scope.distance,
                                scope.outside,
                            ]
                        )
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror}). Make room or choose another folder."
        ) from None


def measure_retention(analysis: Analysis, merged: int) -> Retention:
    """Measure what the model at position ``merged`` of an analysis kept of the others, its parents."""
    parents = tuple(i for i in range(len(analysis.models)) if i != merged)

    def measure(scope: ScopeStatistics, tensors: Sequence[TensorScope]) -> ScopeRetention:
        change = scope.changes[merged]
        weights, outside = _decompose(tensors, merged, parents)
        shares = tuple(
            _measure_parent(scope, tensors, merged, p, weights.get(p), analysis.top_share) for p in parents
        )
        distance, relative = (None, None) if change is None else (change.l2, change.relative_l2)
        return ScopeRetention(scope.name, distance, relative, outside, shares)

    tensors = analysis.tensors
    return Retention(
        version=analysis.version,
        base=analysis.base,
        parents=tuple(analysis.models[p] for p in parents),
        merged=analysis.models[merged],
        top_share=analysis.top_share,
        whole=measure(analysis.whole, tensors),
        groups={
            name: measure(scope, [t for t in tensors if t.group == name])
            for name, scope in analysis.groups.items()
        },
        layers={
            number: measure(scope, [t for t in tensors if t.layer == number])
            for number, scope in analysis.layers.items()
        },
        scores=(),
        notes=(),
        map=map_models(analysis, merged=merged),
    )


def measure_distances(analysis: Analysis) -> Retention:
    """Measure how far a merged model is from its parents; the analysis has it in place of the base."""

    def measure(scope: ScopeStatistics) -> ScopeRetention:
        distances = tuple(None if c is None else ParentRetention(c.l2, c.relative_l2) for c in scope.changes)
        return ScopeRetention(scope.name, None, None, None, distances)

    return Retention(
        version=analysis.version,
        base=None,
        parents=analysis.models,
        merged=analysis.base,
        top_share=analysis.top_share,
        whole=measure(analysis.whole),
        groups={name: measure(scope) for name, scope in analysis.groups.items()},
        layers={number: measure(scope) for number, scope in analysis.layers.items()},
        scores=(),
        notes=(),
        map=map_models(analysis, has_base=False),
    )


def compare_sources(
    parents: Sequence[Source],
    merged: Source,
    base: Source | None,
    *,
    scores: ScoreTable | None = None,
    notes: Sequence[str] = (),
    names: Sequence[str] = (),
    **measuring: Any,
) -> tuple[Retention, Analysis]:
    """Analyze a merged model and its parents, and measure what it kept of them.

    ``names`` are those of the parents in the result, by default short forms of their labels.
    ``measuring`` goes to :func:`analyze_sources`. Errors: as for that function; as for
    :func:`alnico.analysis.scores.accuracies`, before anything is measured.
    """
    models = [*parents, merged]
    every_name = names_of(models, [*names, *names_of([merged])] if names else ())
    *of_parents, of_merged = (model_of(source, name) for source, name in zip(models, every_name, strict=True))
    of_base = model_of(base, names_of([base])[0]) if base is not None else None
    rated = accuracies(scores or {}, of_parents, of_merged, of_base)
    if base is None:
        analysis = analyze_sources(merged, parents, names=every_name[:-1], **measuring)
        retention = replace(measure_distances(analysis), parents=tuple(of_parents), merged=of_merged)
    else:
        analysis = analyze_sources(base, models, names=every_name, **measuring)
        retention = measure_retention(analysis, len(parents))
    return replace(retention, scores=rated, notes=tuple(notes), by_model=scores or {}), analysis


def recorded_base(merged: Source) -> tuple[str | None, str]:
    """Return the base in a merged model's recipe, as a reference to open, or None and the reason.

    The recipe is ``mergekit_config.yml`` next to the weights, as alnico and mergekit write it.
    """
    if isinstance(unwrap(merged), MemoryModel):
        return None, f"{merged.label} is in memory, where nothing names its base"
    folder = merged.directory
    if merged.origin is not None and RECIPE in merged.origin.sizes:
        merged.origin.fetch([RECIPE])
    if folder is None or not (folder / RECIPE).is_file():
        return None, f"{merged.label} has no {RECIPE} that names its base"
    try:
        recipe = load_recipe(folder / RECIPE)
    except RecipeError as error:
        return None, f"{folder / RECIPE} cannot be read: {str(error).splitlines()[0]}"
    if recipe.base_model is None:
        return None, f"{folder / RECIPE} names no base"
    try:
        return resolve_reference(recipe.base_model, str(folder)), ""
    except ModelError as error:
        return None, f"{folder / RECIPE} names a base that is not there ({str(error).rstrip('.')})"


def open_recorded_base(
    merged: Source, open_source: Callable[[str], Source]
) -> tuple[Source | None, tuple[str, ...]]:
    """Open the base that a merged model records; return None and the reason if that fails."""
    reference, why = recorded_base(merged)
    if reference is not None:
        try:
            return open_source(reference), ()
        except (ModelError, HubError) as error:
            why = (
                f"the base that {RECIPE} of {merged.label} names cannot be opened ({str(error).rstrip('.')})"
            )
    return None, (f"only distances are known: {why}. Give the base (base=; --base in the command).",)


def _measure_parent(
    scope: ScopeStatistics,
    tensors: Sequence[TensorScope],
    merged: int,
    parent: int,
    weight: float | None,
    top_share: float,
) -> ParentRetention | None:
    pair = scope.pair(merged, parent)
    if pair is None:
        return None
    both = [t for t in tensors if t.pair(merged, parent) is not None]
    length = math.fsum(_inner_product(t, parent, parent) for t in both)
    tops = [
        (_count_tops(t, merged, top_share), _count_tops(t, parent, top_share), t.pair(merged, parent))
        for t in both
    ]
    shared = math.fsum(
        (p.top_overlap or 0.0) * min(ours, theirs) for ours, theirs, p in tops if p is not None
    )
    of_parent = sum(theirs for _, theirs, _ in tops)
    norm = _base_norm(scope, (parent, merged))
    return ParentRetention(
        distance=pair.distance,
        relative_distance=0.0 if pair.distance == 0 else pair.distance / norm if norm else None,
        projection=math.fsum(_inner_product(t, merged, parent) for t in both) / length if length else None,
        weight=weight,
        sign_agreement=None if pair.sign_conflict is None else 1 - pair.sign_conflict,
        top_kept=shared / of_parent if of_parent else None,
    )


def _count_tops(tensor: TensorScope, model: int, top_share: float) -> int:
    """Count the top parameters of a model in a tensor, without those that equal the smallest of them.

    A task vector with many zeros (trimmed, or with few trained layers) has fewer than ``top_share``; the
    overlap is then over the fewer.
    """
    change = tensor.changes[model]
    if change is None:
        return 0
    return min(max(1, int(top_share * change.elements)), round((1 - change.unchanged) * change.elements))


def _inner_product(tensor: TensorScope, first: int, second: int) -> float:
    """Return the inner product of two task vectors in a tensor."""
    a, b = tensor.changes[first], tensor.changes[second]
    if a is None or b is None:
        return 0.0
    if first == second:
        return a.l2 * a.l2
    pair = tensor.pair(first, second)
    return a.l2 * b.l2 * pair.cosine if pair is not None and pair.cosine is not None else 0.0


def _base_norm(scope: ScopeStatistics, models: Sequence[int]) -> float | None:
    changes = [scope.changes[m] for m in models]
    return next((c.l2 / c.relative_l2 for c in changes if c is not None and c.relative_l2), None)


def _decompose(
    tensors: Sequence[TensorScope], merged: int, parents: Sequence[int]
) -> tuple[dict[int, float], float | None]:
    """Return the weights of the parents, and the share of the merged task vector's length outside their sum.

    The weights are those of the sum of the parents' task vectors that is nearest to the merged one, over the
    tensors that the merged model has in common with every parent that has any of them.
    """
    holders = [p for p in parents if any(t.changes[p] is not None for t in tensors)]
    common = [t for t in tensors if all(t.changes[m] is not None for m in (*holders, merged))]
    lengths = {m: math.sqrt(math.fsum(_inner_product(t, m, m) for t in common)) for m in (*holders, merged)}
    changed = [p for p in holders if lengths[p]]
    if not changed or not lengths[merged]:
        return dict.fromkeys(changed, 0.0), None

    def cosine(first: int, second: int) -> float:
        return math.fsum(_inner_product(t, first, second) for t in common) / lengths[first] / lengths[second]

    among = np.array([[cosine(p, q) for q in changed] for p in changed])
    towards = np.array([cosine(p, merged) for p in changed])
    values, vectors = np.linalg.eigh(among)
    used = values > SINGULAR * values[-1]
    solution = vectors[:, used] @ ((vectors[:, used].T @ towards) / values[used])
    outside = math.sqrt(max(0.0, 1.0 - float(solution @ towards)))
    return {
        p: float(x) * lengths[merged] / lengths[p] for p, x in zip(changed, solution, strict=True)
    }, outside
