"""GPUs for tests: a made one, whose torch device is `cpu`, and the machine's, if torch finds one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from alnico.devices import Device, devices_for, made_gpus

MADE = Device("cuda:0", "Made", 8 << 30)


@pytest.fixture(params=["made", "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torch's name of the GPU that `cuda` means in the test. A made one's tensors do not become numpy's arrays of themselves,
    as those of a GPU do not."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if request.param == "made":
        monkeypatch.setattr(torch.Tensor, "__array__", _refuse)
    with made_gpus([MADE]) if request.param == "made" else nullcontext():
        yield devices_for("merging", "cuda")[0].torch_name


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError("a tensor of a GPU is no array of numpy")
