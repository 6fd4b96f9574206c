"""GPUs for tests: a made one, whose torch device is `cpu`, and the machine's, if torch finds one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from alnico.devices import Device, devices_for, made_gpus

MADE = Device("cuda:0", "Made", 8 << 30)


@pytest.fixture(params=["made", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """torch's name of the GPU that `cuda` means in the test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    with made_gpus([MADE]) if request.param == "made" else nullcontext():
        yield devices_for("merging", "cuda")[0].torch_name
