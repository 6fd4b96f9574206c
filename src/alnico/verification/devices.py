"""Chooses the device on which a merge is repeated: one of the kind in its lock, or another with a tolerance"""

from __future__ import annotations

import dataclasses

import numpy as np

from alnico.devices import DEFAULT_DEVICE, devices_for
from alnico.errors import ResourceError
from alnico.numerics.dtypes import DTYPES
from alnico.output.lock import Lock
from alnico.run_options import RunOptions

TOLERANCE = 1
"""Units in the last place by which values of two kinds of devices may differ; see the laws of tests/engine/test_gpu_laws.py."""


def on_device_of(lock: Lock, run: RunOptions) -> tuple[RunOptions, bool]:
    """Return the options to repeat a merge with, and whether its device is of the kind in the lock.

    ``auto`` is the kind in the lock, or the processor if no GPU can be used here. Errors: ResourceError for a device that was
    named and does not exist.
    """
    device = lock.device if run.device == DEFAULT_DEVICE else run.device
    try:
        (first, *_) = devices_for("merging", device)
    except ResourceError:
        if run.device != DEFAULT_DEVICE:
            raise
        return dataclasses.replace(run, device="cpu"), False
    return dataclasses.replace(run, device=device), first.kind == lock.device


def units_apart(first: np.ndarray, second: np.ndarray, dtype: str) -> np.ndarray:
    """Count, for each pair of floating-point numbers in raw bytes, the steps in the last place from one to the other.

    >>> units_apart(np.float32([1.0, -0.0]).view("u1"), np.float32([1.0000001, 1e-45]).view("u1"), "F32")
    array([1, 1], dtype=uint64)
    """
    width = DTYPES[dtype].bytes
    bits = [raw.view(f"<u{width}").astype(np.uint64) for raw in (first, second)]
    sign = np.uint64(1 << (8 * width - 1))
    (a, b), (x, y) = [b & ~sign for b in bits], [b & sign for b in bits]
    steps: np.ndarray = np.where(x == y, np.maximum(a, b) - np.minimum(a, b), a + b)
    return steps
