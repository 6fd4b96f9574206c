"""Small modules in float64 with data, for tests of scores that are functions."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Small:
    """A base, fine-tunes of it (small random changes), and two sets of data with a score for each."""

    def __init__(self, count: int = 3, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.base = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        self.models = [self._tuned(0.3) for _ in range(count)]
        self.data = [(torch.randn(40, 4).double(), torch.randint(0, 3, (40,))) for _ in range(2)]

    def _tuned(self, size: float) -> torch.nn.Module:
        model = copy.deepcopy(self.base)
        with torch.no_grad():
            for value in model.parameters():
                value += size * torch.randn_like(value)
        return model

    def loss(self, module: Any, on: int = 0) -> float:
        x, y = self.data[on]
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(module(x), y))

    def accuracy(self, module: Any, on: int = 0) -> float:
        x, y = self.data[on]
        with torch.no_grad():
            return float((module(x).argmax(1) == y).double().mean())

    def mixed(self, weights: Any) -> torch.nn.Module:
        """The weighted average of the models, in plain torch."""
        total = float(sum(weights))
        states = [model.state_dict() for model in self.models]
        made = copy.deepcopy(self.base)
        made.load_state_dict(
            {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / total for n in states[0]}
        )
        return made

    def added(self, scales: Any) -> torch.nn.Module:
        """The base plus scaled task vectors, in plain torch."""
        base = self.base.state_dict()
        made = copy.deepcopy(self.base)
        made.load_state_dict(
            {
                n: v + sum(c * (m.state_dict()[n] - v) for c, m in zip(scales, self.models, strict=True))
                for n, v in base.items()
            }
        )
        return made


def close(one: Any, other: Any) -> bool:
    a, b = ((x if isinstance(x, dict) else x.state_dict()) for x in (one, other))
    return a.keys() == b.keys() and all(
        torch.allclose(torch.as_tensor(a[n]), torch.as_tensor(b[n]), rtol=0, atol=1e-14) for n in a
    )
