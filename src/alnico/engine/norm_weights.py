"""Measures the norms of task vectors from which weights are derived, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alnico.engine.fetch import fetch_weights
from alnico.engine.measure_plan import measure_tensors
from alnico.engine.relatedness import check_relatedness
from alnico.errors import MethodError
from alnico.events import Measuring, Watcher
from alnico.kernels.facts import Sum
from alnico.notebook import (
    ResultTable,
    name_text,
    names_text,
    never_fails,
    result_html,
    result_line,
)
from alnico.numerics.sizes import count_of
from alnico.plan.job import Norms, Plan
from alnico.plan.norm_weights import with_norms
from alnico.recipe.schema import NormWeight


def square(x: float) -> float:
    """x^2"""
    return x * x


SQUARES = Sum(square)
TOO_LARGE = (
    "the L2 norm of a task vector is beyond float64; expected a finite number. Leave the model out, or give "
    "weights."
)


def measure_norm_weights(
    plan: Plan,
    known: Mapping[int, Norms],
    watch: Watcher | None = None,
    note: Callable[[Mapping[int, Norms]], None] | None = None,
    measure: Callable[[Sequence[int]], Mapping[str, Any]] | None = None,
) -> Plan:
    """Return the settled plan: with the weights that are derived from norms. ``known`` are norms that an
    interrupted run has measured, by the position of their group in ``plan.norm_weight_groups``; ``note`` gets
    the others. ``measure`` returns the squared norms of groups, by tensor; the default measures them in this process.

    Sums are in float64 over fixed leaves and then exact, so threads and blocks do not change them. Errors:
    MismatchError for a model at distance 0 where it cannot be, MethodError, NonFiniteError, and those of
    reading.
    """
    norms = dict(known)
    missing = {i: w for i, w in enumerate(plan.norm_weight_groups) if w.norms is None and i not in norms}
    if missing:
        if watch:
            watch(Measuring(sum(len(w.tensors) for w in missing.values())))
        if measure is None:
            deltas = [t.delta for w in missing.values() for t in w.tensors.values()]
            squares: Mapping[str, Any] = measure_tensors(plan, deltas, SQUARES, TOO_LARGE)
        else:
            squares = measure(tuple(missing))
        for i, weighing in missing.items():
            sums = [squares[name] for name in weighing.tensors]
            norms[i] = tuple(math.sqrt(math.fsum(parts)) for parts in zip(*sums, strict=True))
        if note:
            note({i: norms[i] for i in missing})
    return with_norms(plan, norms) if norms else plan


@dataclass(frozen=True)
class NormWeights:
    """The weights of models: ``norms`` and ``weights`` have a row for each of ``places`` (layers or tensors)
    with one number per model. For weights of whole models, the one place is ''."""

    setting: NormWeight
    base: str
    models: tuple[str, ...]
    places: tuple[str, ...]
    norms: tuple[Norms, ...]
    weights: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...]
    compile_seconds: float = field(default=0.0, compare=False)

    def __repr__(self) -> str:
        if len(self.places) == 1:
            of_models = (
                f"{name_text(m)} {w:.4g}" for m, w in zip(self.models, self.weights[0], strict=False)
            )
            return result_line("weights from norms", names_text(of_models, 8))
        per = self.setting.per
        return result_line(
            "weights from norms",
            count_of(len(self.models), "model"),
            f"one for each of {count_of(len(self.places), per)}",
        )

    @never_fails
    def _repr_html_(self) -> str:
        facts = [("base", self.base), ("mode", self.setting.mode), ("per", self.setting.per)]
        if len(self.places) == 1:
            found = zip(self.models, self.norms[0], self.weights[0], strict=True)
            table = ResultTable(("model", "L2 norm", "weight"), [list(row) for row in found])
        else:
            weights = [[place, *row] for place, row in zip(self.places, self.weights, strict=True)]
            table = ResultTable((self.setting.per, *self.models), weights, "Weights")
        return result_html("Weights from the norms of task vectors", table, *self.notes, facts=facts)

    def data(self) -> dict[str, Any]:
        """All of it as plain data, for ``--json``."""
        rows = zip(self.places, self.norms, self.weights, strict=True)
        parts = [{**({"place": p} if p else {}), "l2_norms": [*n], "weights": [*w]} for p, n, w in rows]
        return {
            "weight": self.setting.data(),
            "base": self.base,
            "models": [*self.models],
            "parts": parts,
            "notes": [*self.notes],
        }


def compute_norm_weights(plan: Plan) -> NormWeights:
    """Measure the norms of a plan and return the weights, without merging. Errors: MethodError if no weight
    depends on norms; those of :func:`measure_norm_weights`."""
    if not plan.norm_weight_groups:
        raise MethodError(
            "weights: nothing depends on them; expected two models or more, with tensors to merge, and a scale other than 0."
        )
    if plan.to_measure:
        fetch_weights(plan)
        plan = measure_norm_weights(check_relatedness(plan), {})
    done = plan.norm_weight_groups
    first = done[0]
    assert first.base is not None
    labels = tuple(plan.sources[m].label for m in first.models)
    norms = tuple(w.norms or () for w in done)
    weights = tuple(w.weights or () for w in done)
    return NormWeights(
        first.setting,
        plan.sources[first.base].label,
        labels,
        tuple(w.place for w in done),
        norms,
        weights,
        plan.notes,
    )
