"""What an analysis found, as values: of each tensor, each group of tensors, each layer and the whole model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.checkpoint.json_files import read_json
from alnico.errors import ModelError
from alnico.numerics.arithmetic import ieee_arithmetic

SCHEMA = 1
"""Of ``summary.json``; raised when a key changes its meaning or goes."""

SUMMARY = "summary.json"

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The quantiles of a task vector's entries that are measured, as shares."""

QUANTILE_ERROR = 2.0**-7
"""How far the entries that the quantiles of groups, layers and the whole model are interpolated from may be off, relative to
themselves (entries below 2^-133 count as 0). The least and the largest are exact, as all quantiles of tensors are; entries of a
float64 tensor are seen as float32."""

GROUPS = ("embedding", "attention", "mlp", "norm", "head", "other")


@dataclass(frozen=True)
class DeltaStatistics:
    """How one model's task vector d = model - base looks over some elements. Sums in float64.

    ``l1`` is sum |d|, ``l2`` sqrt(sum d^2); the relative ones are divided by the same norm of the base, None where that is 0.
    ``skewness`` and ``excess_kurtosis`` are m3 / m2^1.5 and m4 / m2^2 - 3 of the entries, with m the central moments, and None
    where all entries are equal; ``std`` is sqrt(m2). ``quantiles`` are those of the signed entries at :data:`LEVELS`, with linear interpolation.
    ``unchanged`` is the share of entries that are 0. ``effective_sparsity`` is 1 - l1^2 / (elements x l2^2): 0 where all entries
    are of one size, near 1 where few hold it all, 0.36 for a normal distribution; None for a task vector of zeros.
    """

    elements: int
    l1: float
    l2: float
    relative_l1: float | None
    relative_l2: float | None
    max_abs: float
    mean: float
    std: float
    skewness: float | None
    excess_kurtosis: float | None
    quantiles: tuple[float, ...]
    unchanged: float
    effective_sparsity: float | None


@dataclass(frozen=True)
class Subspace:
    """How far the leading singular vectors of two task vectors span the same space: ``||U1^T U2||_F^2 / rank``, 1 the same, 0
    orthogonal; ``left`` for the outputs of a matrix (its rows), ``right`` for its inputs. ``rank`` is 8, or less where the smaller
    side is or where one of them has fewer singular values above 1e-6 of its largest. Of several matrices, the mean, and the largest rank."""

    left: float
    right: float
    rank: int
    matrices: int


@dataclass(frozen=True)
class Pair:
    """How the task vectors d1, d2 of two models (positions in ``Analysis.models``) lie to one another over some elements.

    ``cosine`` is d1 d2 / (|d1| |d2|), ``distance`` |d1 - d2|. ``sign_conflict`` is the share of opposite signs among the
    entries that both changed; ``weighted_sign_conflict`` the same with each entry counted |d1 d2| times. The top parameters of
    a model are, tensor by tensor, the ``top_share`` of its entries with the largest |d| (and those equal to the least of them, to 8
    significant bits; never entries of 0): ``top_overlap`` is the number that both have over that of the model with fewer,
    ``top_sign_conflict`` the share of opposite signs among these. None where there is nothing to divide by.
    """

    models: tuple[int, int]
    cosine: float | None
    distance: float
    sign_conflict: float | None
    weighted_sign_conflict: float | None
    top_overlap: float | None
    top_sign_conflict: float | None
    subspace: Subspace | None


@dataclass(frozen=True)
class ScopeStatistics:
    """What was found over the elements of one tensor, group, layer or the whole model.

    ``changes`` has one for each model, None for a model that none of these tensors could be compared in. ``sign_conflict`` is the
    share of entries with both signs among those that two models or more changed, ``cancelled`` the share of all magnitude that is lost
    when the task vectors are added up: 1 - sum |d1 + d2 + ...| / sum (|d1| + |d2| + ...). Both are over the tensors that two models or
    more have, and None where there is nothing to divide by.
    """

    name: str
    changes: tuple[DeltaStatistics | None, ...]
    pairs: tuple[Pair, ...]
    sign_conflict: float | None
    cancelled: float | None

    def pair(self, one: int, other: int) -> Pair | None:
        """What was found between two models, in either order."""
        return next((p for p in self.pairs if set(p.models) == {one, other}), None)


@dataclass(frozen=True)
class TensorScope(ScopeStatistics):
    """A tensor: with its dtype and shape in the base, its group, and its place: the layer's number and its name in the layer
    (``self_attn.q_proj.weight``), or None and its whole name."""

    dtype: str
    shape: tuple[int, ...]
    group: str
    layer: int | None
    module: str


@dataclass(frozen=True)
class AnalysedModel:
    """A model: ``name`` is short and unique, good for a folder; ``reference`` is the path or hub id; ``commit`` that on the hub.

    ``layout`` says how its names differ from the base's, under which it was read; '' where they do not.
    """

    name: str
    reference: str
    commit: str | None = None
    layout: str = ""


@dataclass(frozen=True)
class Skipped:
    """A tensor of a model, by its reference, that could not be compared with the base's, and why. ``model`` is None for
    a tensor of the base that none is compared with: integers, say."""

    tensor: str
    model: str | None
    elements: int
    reason: str


@dataclass(frozen=True)
class Analysis:
    """All that was found. ``whole`` is over all tensors; ``groups`` has those of :data:`GROUPS` that the model has, ``layers`` one
    for each number of a layer, over all stacks of layers."""

    version: str
    base: AnalysedModel
    models: tuple[AnalysedModel, ...]
    top_share: float
    whole: ScopeStatistics
    groups: Mapping[str, ScopeStatistics]
    layers: Mapping[int, ScopeStatistics]
    tensors: tuple[TensorScope, ...]
    skipped: tuple[Skipped, ...]
    seconds: float

    def data(self) -> dict[str, Any]:
        """All of it as plain data: what ``summary.json`` holds (its keys are documented in docs/analysis.md)."""
        found = dataclasses.asdict(self)
        found["layers"] = {str(number): scope for number, scope in found["layers"].items()}
        return {
            "schema": SCHEMA,
            "levels": list(LEVELS),
            "quantile_error": {"tensors": 0.0, "others": QUANTILE_ERROR},
            **found,
        }


@ieee_arithmetic()
def read_analysis(path: str | os.PathLike[str]) -> Analysis:
    """Read an analysis that was written: the folder of a report, or its ``summary.json``. Errors: ModelError."""
    place = Path(path)
    file = place / SUMMARY if place.is_dir() else place
    data = read_json(file)
    if data.get("schema") != SCHEMA:
        raise ModelError(
            f"{file}: is no analysis of schema {SCHEMA} (schema {json.dumps(data.get('schema'))}). Make it with `alnico analyze`."
        )
    try:
        return Analysis(
            version=data["version"],
            base=AnalysedModel(**data["base"]),
            models=tuple(AnalysedModel(**m) for m in data["models"]),
            top_share=data["top_share"],
            whole=_scope(data["whole"]),
            groups={name: _scope(s) for name, s in data["groups"].items()},
            layers={int(number): _scope(s) for number, s in data["layers"].items()},
            tensors=tuple(_tensor(t) for t in data["tensors"]),
            skipped=tuple(Skipped(**s) for s in data["skipped"]),
            seconds=data["seconds"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: is damaged ({error}). Make it anew with `alnico analyze`.") from None


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    changes = tuple(
        None if c is None else DeltaStatistics(**{**c, "quantiles": tuple(c["quantiles"])})
        for c in data["changes"]
    )
    pairs = tuple(
        Pair(
            **{
                **p,
                "models": tuple(p["models"]),
                "subspace": None if p["subspace"] is None else Subspace(**p["subspace"]),
            }
        )
        for p in data["pairs"]
    )
    return {**data, "changes": changes, "pairs": pairs}


def _scope(data: Mapping[str, Any]) -> ScopeStatistics:
    return ScopeStatistics(**_parts(data))


def _tensor(data: Mapping[str, Any]) -> TensorScope:
    return TensorScope(**{**_parts(data), "shape": tuple(data["shape"])})
