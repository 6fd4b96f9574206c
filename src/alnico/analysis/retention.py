"""What a merged model kept of its parents: it is analysed as one more model beside them, and the rest follows from its pairs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from alnico.analysis.common_tensors import model_of, names_of
from alnico.analysis.measure import analyze_sources
from alnico.analysis.results import AnalysedModel, Analysis, ScopeStatistics, TensorScope
from alnico.analysis.scores import Accuracy, ScoreTable, accuracies
from alnico.checkpoint.source import Source
from alnico.errors import HubError, ModelError, OutputError, RecipeError
from alnico.folders import open_new, write_new
from alnico.output.recipe_file import RECIPE
from alnico.recipe.load import load_recipe
from alnico.recipe.reference import resolve_reference

JSON = "kept.json"
CSV = "kept.csv"

SCHEMA = 1
"""Of ``kept.json``; raised when a key changes its meaning or goes."""

SINGULAR = 1e-9
"""Smallest eigenvalue of the parents' cosines, to their largest, with which they count as different directions."""


@dataclass(frozen=True)
class ParentRetention:
    """What is left of one parent in the merged model, over the elements of a scope. m and p are their task vectors.

    ``distance`` is |merged - parent|, ``relative_distance`` that over the base's norm (the merged model's, where there is no base). ``projection`` is m p / |p|^2:
    1 where all of p is in m, 0 where nothing is; what other parents have in common with p counts too. ``weight`` is p's in the
    sum of the parents' task vectors that is nearest to m (least squares), which takes the others out. ``sign_agreement`` is the share of equal signs among the entries
    that both changed. ``top_kept`` is the share of p's top parameters (see :class:`alnico.analysis.results.Pair`) that are among m's. None where there is nothing to
    divide by, and, but for distances, without a base.
    """

    distance: float
    relative_distance: float | None
    projection: float | None = None
    weight: float | None = None
    sign_agreement: float | None = None
    top_kept: float | None = None


@dataclass(frozen=True)
class KeptScope:
    """What was kept in a group, a layer or the whole model. ``distance`` is |merged - base|, ``relative_distance`` that over the base's norm.

    ``outside`` is the share of the merged task vector's length that is in no sum of the parents' task vectors. ``parents`` has None
    for a parent that none of these tensors could be compared with.
    """

    name: str
    distance: float | None
    relative_distance: float | None
    outside: float | None
    parents: tuple[ParentRetention | None, ...]


@dataclass(frozen=True)
class Retention:
    """What a merged model kept of its parents, as a whole, by group and by layer; and of their scores, where these are given.

    ``base`` is None where none is known: then only distances are. ``notes`` say what a person should know of how it was found.
    """

    version: str
    base: AnalysedModel | None
    parents: tuple[AnalysedModel, ...]
    merged: AnalysedModel
    top_share: float
    whole: KeptScope
    groups: Mapping[str, KeptScope]
    layers: Mapping[int, KeptScope]
    scores: tuple[Accuracy, ...]
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """All of it as plain data: what ``kept.json`` holds."""
        found = asdict(self)
        return {
            "schema": SCHEMA,
            **found,
            "layers": {str(number): scope for number, scope in found["layers"].items()},
        }

    def scopes(self) -> list[tuple[str, KeptScope]]:
        """All scopes with what each is: ``whole``, ``group`` or ``layer``."""
        of_groups = [("group", scope) for scope in self.groups.values()]
        return [("whole", self.whole), *of_groups, *(("layer", scope) for scope in self.layers.values())]


def write_kept(found: Retention, folder: Path) -> None:
    """Write ``kept.json``, all of it, and ``kept.csv``, a line for each scope and parent, into a folder that is there. Errors: OutputError."""
    try:
        write_new(folder / JSON, json.dumps(found.data(), indent=1, ensure_ascii=False) + "\n")
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
            for kind, scope in found.scopes():
                for parent, share in zip(found.parents, scope.parents, strict=True):
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


def kept(analysis: Analysis, merged: int) -> Retention:
    """Say what the model at position ``merged`` of an analysis kept of the others, its parents."""
    parents = tuple(i for i in range(len(analysis.models)) if i != merged)

    def found(scope: ScopeStatistics, tensors: Sequence[TensorScope]) -> KeptScope:
        change = scope.changes[merged]
        weights, outside = _decomposed(tensors, merged, parents)
        shares = tuple(
            _of_parent(scope, tensors, merged, p, weights.get(p), analysis.top_share) for p in parents
        )
        distance, relative = (None, None) if change is None else (change.l2, change.relative_l2)
        return KeptScope(scope.name, distance, relative, outside, shares)

    tensors = analysis.tensors
    return Retention(
        version=analysis.version,
        base=analysis.base,
        parents=tuple(analysis.models[p] for p in parents),
        merged=analysis.models[merged],
        top_share=analysis.top_share,
        whole=found(analysis.whole, tensors),
        groups={
            name: found(scope, [t for t in tensors if t.group == name])
            for name, scope in analysis.groups.items()
        },
        layers={
            number: found(scope, [t for t in tensors if t.layer == number])
            for number, scope in analysis.layers.items()
        },
        scores=(),
        notes=(),
    )


def kept_without_base(analysis: Analysis) -> Retention:
    """Say how far a merged model is from its parents: from an analysis of the parents in which it stands as the base."""

    def found(scope: ScopeStatistics) -> KeptScope:
        distances = tuple(None if c is None else ParentRetention(c.l2, c.relative_l2) for c in scope.changes)
        return KeptScope(scope.name, None, None, None, distances)

    return Retention(
        version=analysis.version,
        base=None,
        parents=analysis.models,
        merged=analysis.base,
        top_share=analysis.top_share,
        whole=found(analysis.whole),
        groups={name: found(scope) for name, scope in analysis.groups.items()},
        layers={number: found(scope) for number, scope in analysis.layers.items()},
        scores=(),
        notes=(),
    )


def keep_sources(
    parents: Sequence[Source],
    merged: Source,
    base: Source | None,
    *,
    scores: ScoreTable | None = None,
    notes: Sequence[str] = (),
    **measuring: Any,
) -> tuple[Retention, Analysis]:
    """Analyse a merged model beside its parents, and say what it kept of them; ``measuring`` goes to :func:`analyze_sources`.

    Errors: those of it, and of :func:`alnico.analysis.scores.accuracies`, before anything is measured.
    """
    models = [*parents, merged]
    *of_parents, of_merged = (
        model_of(source, name) for source, name in zip(models, names_of(models), strict=True)
    )
    of_base = model_of(base, names_of([base])[0]) if base is not None else None
    kept_scores = accuracies(scores or {}, of_parents, of_merged, of_base)
    if base is None:
        analysis = analyze_sources(merged, parents, **measuring)
        found = replace(kept_without_base(analysis), parents=tuple(of_parents), merged=of_merged)
    else:
        analysis = analyze_sources(base, models, **measuring)
        found = kept(analysis, len(parents))
    return replace(found, scores=kept_scores, notes=tuple(notes)), analysis


def recorded_base(merged: Source) -> tuple[str | None, str]:
    """The base that a merged model's own recipe names, as a reference to open; and, where there is none, why.

    The recipe is ``mergekit_config.yml`` beside the weights, as alnico and mergekit leave it.
    """
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
    return resolve_reference(recipe.base_model, str(folder)), ""


def base_of(merged: Source, opening: Callable[[str], Source]) -> tuple[Source | None, tuple[str, ...]]:
    """Open the base that a merged model records; where that cannot be, None with a note that says why."""
    reference, why = recorded_base(merged)
    if reference is not None:
        try:
            return opening(reference), ()
        except (ModelError, HubError) as error:
            why = (
                f"the base that {RECIPE} of {merged.label} names cannot be opened ({str(error).rstrip('.')})"
            )
    return None, (f"only distances are known: {why}. Give the base with --base.",)


def _of_parent(
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
    length = math.fsum(_product(t, parent, parent) for t in both)
    tops = [(_tops(t, merged, top_share), _tops(t, parent, top_share), t.pair(merged, parent)) for t in both]
    shared = math.fsum(
        (p.top_overlap or 0.0) * min(ours, theirs) for ours, theirs, p in tops if p is not None
    )
    of_parent = sum(theirs for _, theirs, _ in tops)
    norm = _base_norm(scope, (parent, merged))
    return ParentRetention(
        distance=pair.distance,
        relative_distance=0.0 if pair.distance == 0 else pair.distance / norm if norm else None,
        projection=math.fsum(_product(t, merged, parent) for t in both) / length if length else None,
        weight=weight,
        sign_agreement=None if pair.sign_conflict is None else 1 - pair.sign_conflict,
        top_kept=shared / of_parent if of_parent else None,
    )


def _tops(tensor: TensorScope, model: int, top_share: float) -> int:
    """How many top parameters a model has in a tensor, but for those that equal the least of them: of a task vector with many
    entries of 0 (trimmed, or with a few layers trained) fewer than ``top_share``, and the overlap is over the fewer."""
    change = tensor.changes[model]
    if change is None:
        return 0
    return min(max(1, int(top_share * change.elements)), round((1 - change.unchanged) * change.elements))


def _product(tensor: TensorScope, one: int, other: int) -> float:
    """The inner product of two task vectors in a tensor."""
    a, b = tensor.changes[one], tensor.changes[other]
    if a is None or b is None:
        return 0.0
    if one == other:
        return a.l2 * a.l2
    pair = tensor.pair(one, other)
    return a.l2 * b.l2 * pair.cosine if pair is not None and pair.cosine is not None else 0.0


def _base_norm(scope: ScopeStatistics, models: Sequence[int]) -> float | None:
    changes = [scope.changes[m] for m in models]
    return next((c.l2 / c.relative_l2 for c in changes if c is not None and c.relative_l2), None)


def _decomposed(
    tensors: Sequence[TensorScope], merged: int, parents: Sequence[int]
) -> tuple[dict[int, float], float | None]:
    """The weights of the parents in the sum of their task vectors nearest to the merged one, and the share of its length that is
    outside of all such sums; over the tensors that it and every parent with any of them has."""
    holders = [p for p in parents if any(t.changes[p] is not None for t in tensors)]
    common = [t for t in tensors if all(t.changes[m] is not None for m in (*holders, merged))]
    lengths = {m: math.sqrt(math.fsum(_product(t, m, m) for t in common)) for m in (*holders, merged)}
    moved = [p for p in holders if lengths[p]]
    if not moved or not lengths[merged]:
        return dict.fromkeys(moved, 0.0), None

    def cosine(one: int, other: int) -> float:
        return math.fsum(_product(t, one, other) for t in common) / lengths[one] / lengths[other]

    among = np.array([[cosine(p, q) for q in moved] for p in moved])
    towards = np.array([cosine(p, merged) for p in moved])
    values, vectors = np.linalg.eigh(among)
    used = values > SINGULAR * values[-1]
    solution = vectors[:, used] @ ((vectors[:, used].T @ towards) / values[used])
    outside = math.sqrt(max(0.0, 1.0 - float(solution @ towards)))
    return {p: float(x) * lengths[merged] / lengths[p] for p, x in zip(moved, solution, strict=True)}, outside
