"""The same specialists in another shape: task vectors of a low rank, and weights in bfloat16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quality.bench import say
from quality_decoder.questions import QUESTIONS

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One shape. ``base`` is the folder of its base, ``change`` makes a model's tensors from those of the base and its own."""

    name: str
    words: str
    change: Callable[[Tensors, Tensors], Tensors]
    base: str = "base"

    def write(self, work: Path) -> None:
        """Write base and specialists in this shape into the work folder, where they are not there."""
        base = load_file(work / "base" / "model.safetensors")
        pairs = [(f"specialists/{name}", f"specialists-{self.name}/{name}") for name in QUESTIONS]
        for source, target in [*([("base", self.base)] if self.base != "base" else []), *pairs]:
            folder = work / target
            if folder.exists():
                continue
            say(f"{target}: writing")
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(
                work / source, unfinished, ignore=lambda _, names: {n for n in names if n == WEIGHTS}
            )
            own = load_file(work / source / WEIGHTS)
            save_file(self.change(base, own), unfinished / WEIGHTS, {"format": "pt"})
            unfinished.rename(folder)


WEIGHTS = "model.safetensors"


def low_rank(rank: int) -> Callable[[Tensors, Tensors], Tensors]:
    """Cut every matrix's task vector to its ``rank`` largest singular values; vectors and norms are those of the base, as under LoRA."""

    def change(base: Tensors, own: Tensors) -> Tensors:
        return {
            name: tensor + nearest(own[name] - tensor, rank) if tensor.ndim == 2 else tensor
            for name, tensor in base.items()
        }

    return change


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the nearest matrix of a rank, by the eigenvectors of the smaller Gram matrix in float64.

    >>> nearest(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1).round().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    if not matrix.any():
        return matrix
    exact = matrix.double()
    if exact.shape[0] > exact.shape[1]:
        return nearest(matrix.T, rank).T.contiguous()
    largest = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    return (largest @ (largest.T @ exact)).to(matrix.dtype)


def in_bfloat16(_base: Tensors, own: Tensors) -> Tensors:
    """Round every tensor to bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in own.items()}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("rank16", "task vectors cut to rank 16", low_rank(16)),
        Variant("bf16", "base and specialists in bfloat16", in_bfloat16, "base-bf16"),
    )
}
