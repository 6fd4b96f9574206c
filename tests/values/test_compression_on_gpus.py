"""A task vector that is compressed on a GPU agrees with one that is compressed on the processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alnico import TaskVector
from alnico.devices import made_gpus
from alnico.engine import matrix_gpu
from alnico.errors import ResourceError
from alnico.numerics.arrays import is_numpy, to_numpy
from made_gpus import MADE, gpu

__all__ = ["gpu"]


def vector() -> TaskVector:
    random = np.random.default_rng(0)
    shapes = {"tall": (120, 70), "wide": (40, 90), "experts": (3, 40, 34), "norm": (40,)}
    base = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tuned = {n: v + 0.1 * random.standard_normal(v.shape).astype(np.float32) for n, v in base.items()}
    return TaskVector(tuned, base)


@pytest.mark.parametrize("kept", [{"rank": 0.25}, {"energy": 0.6}], ids=str)
def test_a_compressed_task_vector_agrees_with_the_processors(
    kept: dict[str, float], gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = matrix_gpu.leading_vectors
    monkeypatch.setattr(
        matrix_gpu, "leading_vectors", lambda m, count: seen.append(is_numpy(m)) or real(m, count)
    )
    found = {d: vector().compress(tmp_path / d, device=d, **kept) for d in ("cpu", "cuda")}
    assert seen == [True] * 5 + [False] * 5
    here, there = (TaskVector.load(tmp_path / d).state_dict() for d in ("cpu", "cuda"))
    for name, values in here.items():
        expected = to_numpy(values)
        assert np.abs(to_numpy(there[name]) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert [t.rank for t in found["cuda"].tensors] == [t.rank for t in found["cpu"].tensors]
    assert found["cuda"].error == pytest.approx(found["cpu"].error, rel=1e-6)
    lock = json.loads((tmp_path / "cuda" / "alnico.lock.json").read_text())
    assert lock["options"]["device"] == "cuda"
    assert gpu


def test_a_device_that_does_not_exist_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with (
        made_gpus([MADE]),
        pytest.raises(ResourceError, match=r"^device is cuda:3; this machine has cpu, cuda:0"),
    ):
        vector().compress(tmp_path / "out", rank=0.5, device="cuda:3")
    assert not list(tmp_path.iterdir())
