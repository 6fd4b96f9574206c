"""Computes noise from an element's place, so the order of models, tensors and threads never matters.

The uniform number at element ``index`` (row-major, 64 bit) is output ``index`` of SplitMix64 started at ``key``
(Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195), its upper 24 bits as a float32 in [0, 1).
``key`` is a hash of the seed, the output tensor's name and the model's position among the non-base models.
"""

from __future__ import annotations

import numpy as np
import xxhash

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def noise_key(seed: int, tensor: str, position: int) -> int:
    """Return the 64-bit key of one model's noise in one tensor."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{tensor}\0{position}".encode())


def uniform(key: int, start: int, count: int) -> np.ndarray:
    """Return ``count`` uniform float32 in [0, 1), for the elements from ``start`` on.

    >>> uniform(0, 0, 2).round(4)
    array([0.8833, 0.4315], dtype=float32)
    """
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.uint64(key) + index * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
