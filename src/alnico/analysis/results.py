"""The results of an analysis: for each tensor, group of tensors, layer and the whole model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alnico.checkpoint.json_files import read_json
from alnico.checkpoint.near_paths import suggestion
from alnico.errors import ModelError
from alnico.notebook import ResultTable, name_text, never_fails, result_html, result_line, share_text
from alnico.numerics.arithmetic import ieee_arithmetic
from alnico.numerics.sizes import count_of

SCHEMA = 1
"""The schema of ``summary.json``; raised when a key changes its meaning or is removed."""

SUMMARY = "summary.json"

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The quantiles of a task vector's entries, as shares."""

QUANTILE_ERROR = 2.0**-7
"""The largest relative error of the entries from which quantiles of groups, layers and the whole model are
interpolated (entries below 2^-133 count as 0). Minimum and maximum are exact, and so are all quantiles of
tensors. Entries of a float64 tensor are rounded to float32."""

GROUPS = ("embedding", "attention", "mlp", "norm", "head", "other")


@dataclass(frozen=True)
class DeltaStatistics:
    """Statistics of one model's task vector d = model - base over some elements. Sums are in float64.

    ``l1`` is sum |d|, ``l2`` sqrt(sum d^2); the relative norms are divided by the same norm of the base, None
    where that is 0. ``skewness`` and ``excess_kurtosis`` are m3 / m2^1.5 and m4 / m2^2 - 3 of the entries,
    with m the central moments, and None where all entries are equal; ``std`` is sqrt(m2). ``quantiles`` are
    of the signed entries at :data:`LEVELS`, with linear interpolation. ``unchanged`` is the share of entries
    that are 0. ``effective_sparsity`` is 1 - l1^2 / (elements x l2^2): 0 if all magnitudes are equal, near 1
    if a few entries dominate, 0.36 for a normal distribution; None for a task vector of zeros.
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
    """The overlap of the leading singular vectors of two task vectors: ``||U1^T U2||_F^2 / rank``.

    It is 1 for the same space, 0 for orthogonal ones. ``left`` is for the outputs of a matrix (its rows),
    ``right`` for its inputs. ``rank`` is 8, or less if the smaller side is less or a matrix has fewer
    singular values above 1e-6 of its largest. For several matrices: the mean, and the largest rank.
    """

    left: float
    right: float
    rank: int
    matrices: int


@dataclass(frozen=True)
class Pair:
    """Comparison of the task vectors d1, d2 of two models over some elements.

    ``models`` are positions in ``Analysis.models``. ``cosine`` is d1 d2 / (|d1| |d2|), ``distance`` |d1 -
    d2|. ``sign_conflict`` is the share of opposite signs among the entries that both changed;
    ``weighted_sign_conflict`` weighs each entry by |d1 d2|. The top parameters of a model are, per tensor,
    the ``top_share`` of its entries with the largest |d| (including entries equal to the smallest of them in
    8 significant bits, never entries of 0). ``top_overlap`` is the number of shared top parameters over that
    of the model with fewer, ``top_sign_conflict`` the share of opposite signs among them. None where the
    divisor is 0.
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
    """Results over the elements of one tensor, group, layer or the whole model.

    ``changes`` has one entry per model, None for a model without a comparable tensor here. ``sign_conflict``
    is the share of entries with both signs among those that at least two models changed. ``cancelled`` is the
    share of magnitude lost when the task vectors are added: 1 - sum |d1 + d2 + ...| / sum (|d1| + |d2| +
    ...). Both cover the tensors that at least two models have, and are None where the divisor is 0.
    """

    name: str
    changes: tuple[DeltaStatistics | None, ...]
    pairs: tuple[Pair, ...]
    sign_conflict: float | None
    cancelled: float | None

    def pair(self, first: int, second: int) -> Pair | None:
        """Return the comparison of two models, in either order."""
        return next((p for p in self.pairs if set(p.models) == {first, second}), None)


@dataclass(frozen=True)
class TensorScope(ScopeStatistics):
    """A tensor: its dtype and shape in the base, its group and its layer.

    ``layer`` is the number of the layer, None outside of layers. ``module`` is the name in the layer
    (``self_attn.q_proj.weight``), or the whole name outside of layers.
    """

    dtype: str
    shape: tuple[int, ...]
    group: str
    layer: int | None
    module: str


@dataclass(frozen=True)
class AnalysedModel:
    """A model: ``name`` is short, unique and valid for a folder; ``reference`` is the path or hub id.

    ``commit`` is the commit on the hub. ``layout`` says how its tensor names differ from the base's; '' if
    they do not.
    """

    name: str
    reference: str
    commit: str | None = None
    layout: str = ""


@dataclass(frozen=True)
class Skipped:
    """A tensor that could not be compared with the base's, and why.

    ``model`` is a reference, or None for a tensor of the base that is never compared, such as integers.
    """

    tensor: str
    model: str | None
    elements: int
    reason: str


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis.

    ``whole`` covers all tensors, ``groups`` those of :data:`GROUPS` that the model has, ``layers`` each layer
    number, over all stacks of layers.
    """

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
    compile_seconds: float = field(default=0.0, compare=False)
    """Seconds of ``seconds`` in which kernels were compiled, which the next run loads."""

    def data(self) -> dict[str, Any]:
        """Return plain data: the contents of ``summary.json``, documented in docs/analysis.md."""
        fields = dataclasses.asdict(self)
        del fields["compile_seconds"]
        fields["layers"] = {str(number): scope for number, scope in fields["layers"].items()}
        return {
            "schema": SCHEMA,
            "levels": list(LEVELS),
            "quantile_error": {"tensors": 0.0, "others": QUANTILE_ERROR},
            **fields,
        }

    def plot(
        self,
        name: str = "map",
        *,
        models: Any = None,
        over: str | int | None = None,
        measure: str | None = None,
        figsize: tuple[float, float] | None = None,
        ax: Any = None,
        dark: bool = False,
    ) -> Any:
        """Draw a picture and return it as a matplotlib figure, which a notebook shows; it is none of pyplot's.

        ``name`` is ``map`` (base and models as points to scale), ``heat`` (relative change by part and layer),
        ``bars`` and ``norms`` (relative change and L2 norm by group), a measure of the pairs (``cosine``, ``conflict``,
        ``weighted_conflict``, ``overlap``, ``top_conflict``, ``subspace``), ``layers`` (such a ``measure`` by layer),
        ``together`` (conflict among all models by layer), ``boxes`` or ``histogram`` (the entries of the task vectors).
        ``models`` chooses models by name or position. ``over`` is ``whole``, a group such as ``mlp``, or a layer's
        number, for pairs and entries. ``figsize`` is in inches; ``ax`` are axes to draw in; ``dark`` takes the colours
        of the dark page. Needs the extra ``[report]``. Errors: AlnicoError, also for an unknown name.
        """
        from alnico.analysis.pictures import plot_analysis

        return plot_analysis(
            self, name, models=models, over=over, measure=measure, figsize=figsize, ax=ax, dark=dark
        )

    def __repr__(self) -> str:
        changes = [
            f"{name_text(m.name)} {'not comparable' if c is None else share_text(c.relative_l2)}"
            for m, c in zip(self.models[:6], self.whole.changes, strict=False)
        ]
        more = f", and {len(self.models) - 6:,} more" if len(self.models) > 6 else ""
        return result_line(
            f"analysis of {count_of(len(self.models), 'model')} of the base {name_text(self.base.name)}",
            f"relative change {', '.join(changes)}{more}",
            count_of(len(self.tensors), "tensor"),
        )

    @never_fails
    def _repr_html_(self) -> str:
        from alnico.analysis.pictures import inline_analysis

        rows = [
            [
                i + 1,
                m.name,
                *(
                    (None,) * 4
                    if c is None
                    else (share_text(c.relative_l2), c.l2, share_text(c.unchanged), c.max_abs)
                ),
            ]
            for i, (m, c) in enumerate(zip(self.models, self.whole.changes, strict=True))
        ]
        pairs = [
            [
                " and ".join(str(i + 1) for i in p.models),
                p.cosine,
                share_text(p.sign_conflict),
                share_text(p.top_overlap),
            ]
            for p in self.whole.pairs
        ]
        return result_html(
            "Analysis of task vectors",
            ResultTable(("", "model", "relative change", "L2 norm", "unchanged", "largest change"), rows),
            *([ResultTable(("models", "cosine", "sign conflict", "top overlap"), pairs)] if pairs else []),
            facts=[
                ("base", self.base.name),
                ("tensors", len(self.tensors)),
                ("not compared", len(self.skipped)),
            ],
            picture=lambda: inline_analysis(self),
        )


@ieee_arithmetic()
def read_analysis(path: str | os.PathLike[str]) -> Analysis:
    """Read an analysis from the folder of a report, or from its ``summary.json``. Errors: ModelError."""
    place = Path(path)
    if not place.exists():
        raise ModelError(
            f"{place}: no such file or folder; expected an analysis by `alnico analyze`. "
            f"{suggestion(place, 'Check the path.')}"
        )
    file = place / SUMMARY if place.is_dir() else place
    data = read_json(file)
    if data.get("schema") != SCHEMA:
        raise ModelError(
            f"{file}: is not an analysis of schema {SCHEMA} (schema {json.dumps(data.get('schema'))}). "
            "Create it with `alnico analyze`."
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
        raise ModelError(f"{file}: is damaged ({error}). Create it again with `alnico analyze`.") from None


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
