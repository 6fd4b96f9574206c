"""Relative change by part and layer: the rows and cells of the heat maps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from alnico.analysis.results import Analysis, TensorScope

Cells = Mapping[tuple[str, int], Sequence[tuple[float | None, float]]]


def layer_parts(analysis: Analysis) -> tuple[list[str], Cells]:
    """Return the rows (parts of a layer) and, per (row, layer), each model's relative change and L2 norm.

    Experts are combined. The base's norm of a tensor is the task vector's norm divided by the relative
    change. It is unknown for a tensor that no model changed; such a tensor is left out where it shares a cell
    with others.
    """
    stacks = {_stack(t) for t in analysis.tensors if t.layer is not None}
    order: dict[str, str] = {}
    parts: dict[tuple[str, int], list[TensorScope]] = {}
    for tensor in analysis.tensors:
        if tensor.layer is None:
            continue
        part = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.module).removesuffix(".weight")
        row = part if len(stacks) < 2 else f"{_stack(tensor)}: {part}"
        order.setdefault(row, tensor.group)
        parts.setdefault((row, tensor.layer), []).append(tensor)
    rank = {"attention": 0, "mlp": 1, "other": 2, "norm": 3}
    rows = sorted(order, key=lambda row: rank.get(order[row], 2))
    models = range(len(analysis.models))
    return rows, {place: [_combine(tensors, index) for index in models] for place, tensors in parts.items()}


def _stack(tensor: TensorScope) -> str:
    """Return what precedes a layer's number in a name: ``model.layers``."""
    return tensor.name.removesuffix(tensor.module).rstrip(".").removesuffix(str(tensor.layer)).rstrip(".")


def _combine(tensors: Sequence[TensorScope], index: int) -> tuple[float | None, float]:
    changes = [(change, _base_norm(t)) for t in tensors if (change := t.changes[index])]
    if len(changes) == 1:
        return changes[0][0].relative_l2, changes[0][0].l2
    length = math.hypot(*(c.l2 for c, _ in changes))
    base = math.hypot(*(norm for _, norm in changes))
    share = length / base if base else 0.0 if changes and not length else None
    return share, length


def _base_norm(tensor: TensorScope) -> float:
    return next((c.l2 / c.relative_l2 for c in tensor.changes if c and c.relative_l2), 0.0)


def scale_end(shares: Iterable[float]) -> float:
    """Return the end of a scale: the largest value, or the 98th percentile if a few values are far larger."""
    ordered = sorted(shares)
    high = ordered[int(0.98 * (len(ordered) - 1))]
    return ordered[-1] if ordered[-1] <= 2 * high or high == 0 else high
