"""Makes the gates of a mixture of experts: by ridge regression on statistics, or at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alnico.checkpoint.computed_tensors import ComputedTensors
from alnico.checkpoint.source import read_tensor
from alnico.checkpoint.statistics import StatisticsSource
from alnico.errors import MethodError, MismatchError, RecipeError
from alnico.numerics.blas import one_blas_thread
from alnico.numerics.dtypes import Shape
from alnico.numerics.noise import noise_key, uniform

UNIFORMS = 12
"""How many uniform numbers a random number of a gate is the sum of: the variance of one is 1/12."""


def solve_gates(
    grams: Sequence[np.ndarray], sums: Sequence[np.ndarray], rows: Sequence[float], ridge: float
) -> np.ndarray:
    """Return the gates (experts, hidden) that tell the experts' inputs apart, by ridge regression.

    The rows of ``W`` are the least-squares predictions of "this input is of expert e": with the Gram matrix ``G_e``
    and the sum ``s_e`` of expert e's ``n_e`` inputs, ``A = sum_e G_e / n_e`` and ``B = [s_e / n_e]``,
    ``W = ((A + ridge * mean(diag A) * I)^-1 B)^T``. Each row is divided by its length.
    Shapes: ``grams`` (hidden, hidden) and ``sums`` (hidden,) of each expert, float64.
    Errors: MethodError for inputs that are all 0.
    Differs from the source: each expert counts the same, whatever its number of inputs; ridge is relative to the
    diagonal; there is no bias, as gates have none.
    Source: Fani and Ersoy 2026, DUME, https://arxiv.org/abs/2603.29765.

    >>> solve_gates([np.diag([4.0, 0.0]), np.diag([0.0, 9.0])], [np.array([2.0, 0.0]), np.array([0.0, 3.0])], [1, 1], 0.01)
    array([[1., 0.],
           [0., 1.]])
    """
    total = sum((gram / n for gram, n in zip(grams, rows, strict=True)), np.zeros(()))
    means = np.stack([s / n for s, n in zip(sums, rows, strict=True)], axis=1)
    mean_diagonal = float(total.diagonal().mean())
    if not mean_diagonal > 0 or not math.isfinite(mean_diagonal):
        raise MethodError(
            "the inputs that gates are made from are all 0 or not finite; expected the inputs of each expert. Measure them again."
        )
    total[np.diag_indices(len(total))] += ridge * mean_diagonal
    with one_blas_thread():
        gates = np.linalg.solve(total, means).T
    lengths = np.linalg.norm(gates, axis=1, keepdims=True)
    return np.asarray(gates / np.where(lengths > 0, lengths, 1.0))


def ridge_gates(
    layers: Mapping[str, str],
    statistics: Sequence[StatisticsSource],
    names: Sequence[Callable[[str], str]],
    hidden: int,
    ridge: float,
    scale: float,
) -> ComputedTensors:
    """Return the gates of all layers. ``layers`` maps their names to the tensor whose inputs the gate has, in the base;
    ``names`` gives its name in each expert. Errors: MismatchError for statistics without it."""
    stored: dict[str, list[tuple[str, str, float]]] = {}
    for gate, tensor in layers.items():
        stored[gate] = [_measured(s, name(tensor), hidden) for s, name in zip(statistics, names, strict=True)]

    def make(gate: str) -> np.ndarray:
        places = stored[gate]
        grams = [_read(s, gram) for s, (gram, _, _) in zip(statistics, places, strict=True)]
        sums = [_read(s, total) for s, (_, total, _) in zip(statistics, places, strict=True)]
        try:
            gates = solve_gates(grams, sums, [rows for _, _, rows in places], ridge)
        except (MethodError, np.linalg.LinAlgError) as error:
            raise MethodError(f"{gate}: {error}") from None
        return (scale * gates).astype(np.float32)

    return ComputedTensors(
        "gates by ridge regression",
        {gate: (len(statistics), hidden) for gate in layers},
        make,
        (len(statistics) + 3) * hidden * hidden * 8,
        lambda: [{"ridge": ridge, "scale": scale}],
    )


def _measured(statistics: StatisticsSource, tensor: str, hidden: int) -> tuple[str, str, float]:
    """Return where statistics hold the Gram matrix and the sum of a tensor's inputs, and the number of inputs."""
    entry = statistics.entries.get(tensor)
    if entry is None:
        why = (statistics.left_out or {}).get(tensor, "they do not name it")
        raise MismatchError(
            f"{tensor}: the gram statistics of {statistics.label} have nothing about it ({why}); expected the inputs of every "
            "layer. Measure the expert that names them."
        )
    if "sum" not in entry.parts:
        raise MismatchError(
            f"{statistics.label}: has no sums of inputs, which gates need; it was measured by an older version. Measure again with "
            "`alnico statistics gram`."
        )
    for name, shape in ((entry.stored, (hidden, hidden)), (entry.parts["sum"], (hidden,))):
        held = statistics.tensors[name]
        if held.shape != shape or held.dtype != "F32":
            raise MismatchError(
                f"{tensor}: {name} of {statistics.label} is {held.dtype} {held.shape}; expected F32 {shape}. Use the statistics "
                "of the expert that names them."
            )
    return entry.stored, entry.parts["sum"], statistics.number(tensor, "rows")


def _read(statistics: StatisticsSource, name: str) -> np.ndarray:
    return read_tensor(statistics, name).astype(np.float64)


def random_gates(
    shapes: Mapping[str, Shape], seed: int, scale: float, *, is_uniform: bool
) -> ComputedTensors:
    """Return random gates: nearly normal with variance 1, or uniform within 1 / sqrt(hidden), as torch starts a layer.

    A nearly normal number is the sum of twelve uniform ones less six: exact on every processor, where a logarithm is not.
    """

    def make(gate: str) -> np.ndarray:
        shape = shapes[gate]
        count = math.prod(shape)
        drawn = (1 if is_uniform else UNIFORMS) * count
        numbers = (
            uniform(noise_key(seed, gate, 0), 0, drawn).astype(np.float64).reshape(-1, count).sum(axis=0)
        )
        if is_uniform:
            values = (2 * numbers - 1) / math.sqrt(shape[-1])
        else:
            values = numbers - UNIFORMS / 2
        made: np.ndarray = (scale * values).astype(np.float32).reshape(shape)
        return made

    kind = "uniform" if is_uniform else "normal"
    most = max(map(math.prod, shapes.values()), default=0)
    return ComputedTensors(
        f"random gates ({kind})",
        shapes,
        make,
        most * 8 * (UNIFORMS + 2),
        lambda: [{"seed": seed, "random": kind, "scale": scale}],
    )


def zeros(shapes: Mapping[str, Shape]) -> ComputedTensors:
    """Return tensors of zeros: biases, and the gate of a shared expert that passes half of it."""
    most = max(map(math.prod, shapes.values()), default=0)
    return ComputedTensors("zeros", shapes, lambda name: np.zeros(shapes[name], np.float32), 4 * most, list)


def unmeasured_gates(shapes: Mapping[str, Shape], mode: str) -> ComputedTensors:
    """Return gates that are planned before prompts are measured. Errors: RecipeError where a merge would need them."""

    def refuse(*_: Any) -> Any:
        raise RecipeError(
            f"gate_mode is {mode}: the gates are measured by running base_model on the prompts, which a merge does not do; expected "
            "measured gates. Build the mixture with `alnico moe`, or in Python with alnico.build_mixture."
        )

    return ComputedTensors("gates of prompts", shapes, refuse, 0, refuse)
