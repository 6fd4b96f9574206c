"""Statistics made up for a tensor of a model: what the tests write into files, and the references compute with."""

from __future__ import annotations

import zlib

import numpy as np


def random_of(kind: str, shape: tuple[int, ...], model: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(kind.encode()), model, *shape])


def fisher(shape: tuple[int, ...], model: int) -> np.ndarray:
    """Squares over many orders of magnitude, some of them 0 in all models."""
    found = np.exp(3 * random_of("fisher", shape, model).standard_normal(shape) - 12).astype(np.float32)
    found.reshape(-1)[::7] = 0
    return found


ROWS = (50, 20, 30)
"""Rows that the Gram matrices of the models are of."""


def gram(shape: tuple[int, ...], model: int) -> np.ndarray:
    """Inputs with a common direction, so that what is off the diagonal counts."""
    random = random_of("gram", shape, model)
    x = random.standard_normal((ROWS[model], shape[-1])) + random.standard_normal(shape[-1])
    return (x.T @ x).astype(np.float32)


def squares(shape: tuple[int, ...], model: int) -> np.ndarray:
    """Sums of squares of what multiplies each entry of a vector, some of them 0 in all models."""
    found = np.exp(random_of("squares", shape, model).standard_normal(shape)).astype(np.float32)
    found.reshape(-1)[::7] = 0
    return found
