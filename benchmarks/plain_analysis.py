"""The plain way to analyse task vectors: all models in float32 in memory, tensor by tensor with torch and numpy.

    python benchmarks/plain_analysis.py sorted OUT.json BASE MODEL...

`torch` takes torch.quantile, np.quantile where torch refuses (above 16.7 million elements), and torch.kthvalue. `sorted` knows numpy
well: one np.sort for all quantiles, np.partition for the threshold. Sums are in float64; both cores work where torch and numpy use them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
TOP = 0.2
RANK = 8
LIMIT_OF_TORCH = 1 << 24
SMALLER_SIDE = 512
MOST_ELEMENTS = 1 << 22
WAYS = ("torch", "sorted")


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {
        n: t.float() for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def quantiles(d: torch.Tensor, way: str) -> list[float]:
    if way == "sorted":
        ordered = np.sort(d.numpy())
        places = np.array(LEVELS) * (d.numel() - 1)
        below, above = (
            ordered[p.astype(int)].astype(np.float64) for p in (np.floor(places), np.ceil(places))
        )
        return list((below + (above - below) * (places % 1)).tolist())
    if d.numel() < LIMIT_OF_TORCH:
        return list(torch.quantile(d, torch.tensor(LEVELS)).tolist())
    return list(np.quantile(d.numpy(), LEVELS).tolist())


def top(d: torch.Tensor, way: str) -> torch.Tensor:
    """Which entries have the largest magnitudes."""
    magnitudes = d.abs()
    kth = d.numel() - max(1, int(TOP * d.numel()))
    if way == "sorted":
        return magnitudes >= float(np.partition(magnitudes.numpy(), kth)[kth])
    return magnitudes >= magnitudes.kthvalue(kth + 1).values


def change(d: torch.Tensor, base: torch.Tensor, way: str) -> dict[str, Any]:
    exact = d.double()
    l1, l2, mean = float(exact.abs().sum()), float(exact.norm()), exact.mean()
    central = exact - mean
    squares = central * central
    m2 = float(squares.mean())
    return {
        "l1": l1,
        "l2": l2,
        "relative_l1": l1 / float(base.abs().sum(dtype=torch.float64)),
        "relative_l2": l2 / float(base.double().norm()),
        "max_abs": float(d.abs().max()),
        "mean": float(mean),
        "std": m2**0.5,
        "skewness": float((squares * central).mean()) / m2**1.5,
        "excess_kurtosis": float((squares * squares).mean()) / m2**2 - 3,
        "quantiles": quantiles(d, way),
        "unchanged": int((d == 0).sum()) / d.numel(),
        "effective_sparsity": 1 - l1**2 / (d.numel() * l2**2),
    }


def pair(
    one: torch.Tensor, other: torch.Tensor, norms: float, top_one: torch.Tensor, top_other: torch.Tensor
) -> dict[str, float]:
    product = one.double() * other.double()
    opposite = product < 0
    magnitude = product.abs()
    common = top_one & top_other
    return {
        "cosine": float(product.sum()) / norms,
        "distance": float((one - other).double().norm()),
        "sign_conflict": int(opposite.sum()) / int((product != 0).sum()),
        "weighted_sign_conflict": float(magnitude[opposite].sum() / magnitude.sum()),
        "top_overlap": int(common.sum()) / min(int(top_one.sum()), int(top_other.sum())),
        "top_sign_conflict": int((common & opposite).sum()) / int(common.sum()),
    }


def singular(d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading singular vectors."""
    left, _, right = torch.linalg.svd(d, full_matrices=False)
    return left[:, :RANK], right[:RANK].T


def analyse(base: Path, models: list[Path], way: str) -> dict[str, Any]:
    zeros, loaded = load(base), [load(m) for m in models]
    found = {}
    for name, zero in zeros.items():
        deltas = [m[name] - zero for m in loaded]
        flat = [d.flatten() for d in deltas]
        changes = [change(d, zero, way) for d in flat]
        tops = [top(d, way) for d in flat]
        is_compared = zero.ndim == 2 and min(zero.shape) <= SMALLER_SIDE and zero.numel() <= MOST_ELEMENTS
        spaces = [singular(d) for d in deltas] if is_compared else []
        pairs = []
        for i, j in itertools.combinations(range(len(models)), 2):
            here: dict[str, Any] = pair(
                flat[i], flat[j], changes[i]["l2"] * changes[j]["l2"], tops[i], tops[j]
            )
            if spaces:
                sides = zip(("left", "right"), spaces[i], spaces[j], strict=True)
                here["subspace"] = {side: float(((a.T @ b) ** 2).sum()) / RANK for side, a, b in sides}
            pairs.append(here)
        found[name] = {"changes": changes, "pairs": pairs}
    return found


if __name__ == "__main__":
    chosen, out, *paths = sys.argv[1:]
    Path(out).write_text(json.dumps(analyse(Path(paths[0]), [Path(p) for p in paths[1:]], chosen)))
