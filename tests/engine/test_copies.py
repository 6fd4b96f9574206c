"""What is copied is the same with and without the system's help."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alnico


def test_copies_are_the_same_where_the_system_cannot_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0)
    tensors = {f"layers.{i}.w": values.normal(size=(300, 401)).astype(np.float32) for i in range(3)}
    (tmp_path / "a").mkdir()
    save_file({**tensors, "count": np.arange(5)}, tmp_path / "a" / "model.safetensors")
    recipe = {"merge_method": "passthrough", "models": [str(tmp_path / "a")]}
    made = alnico.merge(recipe, tmp_path / "with")

    def refused(*_: int) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    again = alnico.merge(recipe, tmp_path / "without")
    assert made.digests == again.digests
    for folder in ("with", "without"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(np.array_equal(found[name], tensor) for name, tensor in tensors.items())
    assert {job.kind for job in made.plan.jobs} == {"copy"}
