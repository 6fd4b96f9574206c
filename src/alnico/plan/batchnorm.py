"""What is special about BatchNorm's buffers: statistics of activations, which averaging weights does not average."""

from __future__ import annotations

from collections.abc import Iterable


def is_count(name: str) -> bool:
    """Is this buffer a count of batches, which models need not agree on?"""
    return name.rpartition(".")[2] == "num_batches_tracked"


def statistics_note(merged: Iterable[str]) -> list[str]:
    """A note if running statistics are among the merged tensors."""
    layers = sum(1 for name in merged if name.rpartition(".")[2] == "running_var")
    if not layers:
        return []
    return [
        f"the running statistics of {layers} BatchNorm layers are merged like weights, which is not what the merged model's "
        "activations have: recalibrate them on data with alnico.recalibrate_batchnorm."
    ]
