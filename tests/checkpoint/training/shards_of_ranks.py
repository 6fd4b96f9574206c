"""Checkpoints that four processes write with torch, made once for all tests that read them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

WRITER = Path(__file__).parent / "write_shards.py"
RANKS = 4


def written_shards() -> Path:
    """The folder with all checkpoints of ``write_shards.py``. Tests read it, and copy what they change."""
    folder, output = _write()
    assert not output, output[-3000:]
    return folder


@functools.cache
def _write() -> tuple[Path, str]:
    """Run the writers; returns the folder, and what they print if one of them fails."""
    folder = tempfile.TemporaryDirectory(prefix="alnico-shards-")
    KEPT.append(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WRITER), str(rank), folder.name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    failed = [output for process, output in zip(running, outputs, strict=True) if process.returncode]
    return Path(folder.name), "\n".join(failed)


KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that are removed when the tests end."""


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def stored(model, name: str) -> bytes:
    """The bytes of a tensor as a source gives them."""
    buffer = bytearray(model.tensors[name].byte_size)
    model.read_into(name, 0, memoryview(buffer))
    return bytes(buffer)


def assert_same_model(model, expected: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Names, shapes and every bit are the same; and so is any range of bytes."""
    assert set(model.tensors) == set(expected)
    draw = np.random.default_rng(seed)
    for name, tensor in expected.items():
        data = raw(tensor)
        assert model.tensors[name].shape == tuple(tensor.shape), name
        assert stored(model, name) == data, name
        for _ in range(12):
            first, last = sorted(draw.integers(0, len(data) + 1, 2))
            part = bytearray(int(last - first))
            model.read_into(name, int(first), memoryview(part))
            assert part == data[first:last], (name, first, last)
