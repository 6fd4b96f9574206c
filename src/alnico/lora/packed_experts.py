"""Lays out factors of experts packed into one parameter, as PEFT stores them (``target_parameters``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from alnico.checkpoint.layouts import PACKED


def packed_factors(
    left: np.ndarray, right: np.ndarray, experts: int, *, is_turned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return B and A of PEFT for a stack of matrices ``W[e] = left[e] @ right[e]``.

    ``left`` (experts * rows, r) has the experts below one another, ``right`` (r, experts * columns) side by side. A goes
    through the ranks expert by expert, (experts * r, in), and B through the experts rank by rank, (out, r * experts).
    ``is_turned``: the matrices are stored (in, out), so that the product of B and A is the transpose.

    >>> left, right = np.arange(4.0)[:, None], np.ones((1, 6))  # two experts of (2, 3), of rank 1
    >>> b, a = packed_factors(left, right, 2, is_turned=False)
    >>> b.tolist(), a.shape
    ([[0.0, 2.0], [1.0, 3.0]], (2, 3))
    """
    rank = right.shape[0]
    lefts = left.reshape(experts, -1, rank)
    rights = right.reshape(rank, experts, -1).swapaxes(0, 1)
    if is_turned:
        lefts, rights = rights.swapaxes(1, 2), lefts.swapaxes(1, 2)
    packed_left = lefts.transpose(1, 2, 0).reshape(lefts.shape[1], rank * experts)
    return packed_left, rights.reshape(experts * rank, rights.shape[2])


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """Return how many wrappers of a module lie around that of each of its parameters.

    PEFT wraps a module once for each of its parameters, in the order in which the module has them; the last is outermost.

    >>> depths_of(["layers.0.experts.down_proj", "layers.0.experts.gate_up_proj"])
    {'layers.0.experts.down_proj': 0, 'layers.0.experts.gate_up_proj': 1}
    """
    order = list(PACKED)
    parameters: dict[str, list[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        parameters.setdefault(module, []).append(parameter)
    return {
        f"{module}.{parameter}": depth
        for module, own in parameters.items()
        for depth, parameter in enumerate(sorted(own, key=order.index, reverse=True))
    }


def target_parameters(names: Sequence[str], every: Iterable[str]) -> list[str]:
    """Return names for ``target_parameters``: the last two words where they match only ``names``, else whole names.

    ``every`` are the base's tensors.

    >>> names = ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"]
    >>> target_parameters(names, names), target_parameters(names[:1], names)
    (['experts.down_proj'], ['layers.0.mlp.experts.down_proj'])
    """
    chosen = set(names)
    ambiguous = {_last_words(name) for name in every if name not in chosen}
    return sorted({name if _last_words(name) in ambiguous else _last_words(name) for name in names})


def _last_words(name: str) -> str:
    return ".".join(name.split(".")[-2:])
