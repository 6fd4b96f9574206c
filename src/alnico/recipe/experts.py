"""Defines Mixture and its experts: the checked content of a recipe that builds a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "ridge", "random", "uniform_random"]
"""How gates are made. ``hidden_last`` is mergekit's other name for ``hidden``."""

GATE_MODES: tuple[GateMode, ...] = get_args(GateMode)
OF_PROMPTS: tuple[GateMode, ...] = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
"""The modes that measure prompts."""

OutsideExperts = Literal["base", "average"]

SHARPNESS = 10.0
"""The default of ``gate_scale`` for gates by ridge regression: 1 / 0.1, DUME's temperature."""


@dataclass(frozen=True)
class Expert:
    """One expert: the MLPs of a model, or of the average of several."""

    models: tuple[str, ...]
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float = 1.0
    rank: float = 1.0
    """The share of singular vectors of the task vector that is kept; 1 keeps the expert as it is."""
    gram: str | None = None

    def data(self) -> dict[str, Any]:
        """Return the expert as a recipe writes it."""
        named: dict[str, Any] = (
            {"source_model": self.models[0]}
            if len(self.models) == 1
            else {"source_models": list(self.models)}
        )
        named |= {"positive_prompts": list(self.positive_prompts)} if self.positive_prompts else {}
        named |= {"negative_prompts": list(self.negative_prompts)} if self.negative_prompts else {}
        named |= {"residual_scale": self.residual_scale} if self.residual_scale != 1 else {}
        named |= {"rank": self.rank} if self.rank != 1 else {}
        return named | ({"gram": self.gram} if self.gram is not None else {})


@dataclass(frozen=True)
class Mixture:
    """What a mixture is built of, besides the base: ``experts`` of which a token passes ``experts_per_token``, and
    ``shared`` ones that every token passes."""

    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    architecture: str | None = None
    experts_per_token: int = 2
    gate_mode: GateMode = "hidden"
    gates: str | None = None
    gate_scale: float = 1.0
    ridge: float = 0.01
    others: OutsideExperts = "base"

    @property
    def references(self) -> tuple[str, ...]:
        """The models of all experts, without repetition."""
        return tuple(dict.fromkeys(m for e in (*self.experts, *self.shared) for m in e.models))

    @property
    def is_averaged(self) -> bool:
        """Is anything an average of several models?"""
        all_of = (*self.experts, *self.shared)
        return (self.others == "average" and len(self.experts) > 1) or any(len(e.models) > 1 for e in all_of)

    @property
    def methods_used(self) -> tuple[str, ...]:
        """The merge methods by which tensors are made."""
        low_rank = any(expert.rank != 1 for expert in (*self.experts, *self.shared))
        return (
            "passthrough",
            *(["linear"] if self.is_averaged else []),
            *(["svd"] if low_rank else []),
        )

    def data(self) -> dict[str, Any]:
        """Return the mixture as a recipe writes it, without what other recipes have, too."""
        default = SHARPNESS if self.gate_mode == "ridge" else 1.0
        return {
            "experts": [expert.data() for expert in self.experts],
            **({"shared_experts": [expert.data() for expert in self.shared]} if self.shared else {}),
            **({"architecture": self.architecture} if self.architecture else {}),
            "experts_per_token": self.experts_per_token,
            "gate_mode": self.gate_mode,
            **({"gates": self.gates} if self.gates is not None else {}),
            **({"gate_scale": self.gate_scale} if self.gate_scale != default else {}),
            **({"ridge": self.ridge} if self.ridge != 0.01 else {}),
            **({"others": self.others} if self.others != "base" else {}),
        }
