"""Analyses of models that never were, of any number of models and layers, quickly; with names as they are found on the hub."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alnico.analysis.results import (
    GROUPS,
    LEVELS,
    AnalysedModel,
    Analysis,
    DeltaStatistics,
    Pair,
    ScopeStatistics,
    Skipped,
    Subspace,
    TensorScope,
)
from alnico.analysis.suggest_rules import Suggestion

MODULES = {
    "self_attn.q_proj.weight": ("attention", 1.3),
    "self_attn.k_proj.weight": ("attention", 0.8),
    "self_attn.v_proj.weight": ("attention", 0.9),
    "self_attn.o_proj.weight": ("attention", 1.1),
    "mlp.gate_proj.weight": ("mlp", 1.4),
    "mlp.up_proj.weight": ("mlp", 1.5),
    "mlp.down_proj.weight": ("mlp", 1.2),
    "input_layernorm.weight": ("norm", 0.15),
    "post_attention_layernorm.weight": ("norm", 0.2),
}
"""Of a layer: its group and how far it moves."""

NAMES = (
    "coder",
    "math-instruct",
    "med",
    "wizardlm-13b-uncensored-reasoning-v1.2",
    "law",
    "chat",
    "translate-de-en",
    "agent",
)
NORMAL = (-4.2, -2.326, -1.645, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.645, 2.326, 4.4)
"""A normal distribution's quantiles at the levels that are measured, with ends as of a large sample."""


def made_analysis(
    models: int, layers: int, names: Sequence[str] = NAMES, skipped: Sequence[Skipped] | None = None
) -> Analysis:
    """Make an analysis: relative changes of about 0.1 to 5 %, the second model frozen below the middle layer, no two numbers alike."""
    rng = np.random.default_rng(models * 1000 + layers)
    sizes = 10.0 ** -rng.uniform(2.5, 4.0, models)

    def change(elements: int, strength: Sequence[float]) -> tuple[DeltaStatistics, ...]:
        return tuple(_change(elements, float(s), rng) for s in strength)

    def tensor(
        name: str, group: str, layer: int | None, module: str, shape: tuple[int, ...], pull: float
    ) -> TensorScope:
        depth = 1.0 if layer is None else 0.4 + 1.2 * (layer / max(layers - 1, 1)) ** 2
        strength = sizes * pull * depth * rng.uniform(0.7, 1.4, models)
        if layer is not None and layer < layers // 2 and models > 1:
            strength[1] = 0.0
        changes = change(int(np.prod(shape)), strength)
        subspace = (
            Subspace(float(rng.uniform(0.05, 0.4)), float(rng.uniform(0.05, 0.5)), 8, 1)
            if len(shape) == 2
            else None
        )
        pairs = _pairs(changes, rng, 0.0 if layer is None else layer / layers, subspace)
        return TensorScope(name, changes, pairs, *_together(rng, models), "BF16", shape, group, layer, module)

    tensors = [
        tensor(
            "model.embed_tokens.weight", "embedding", None, "model.embed_tokens.weight", (32000, 4096), 0.1
        )
    ]
    for layer in range(layers):
        for module, (group, pull) in MODULES.items():
            shape = (4096,) if group == "norm" else (11008, 4096) if group == "mlp" else (4096, 4096)
            tensors.append(tensor(f"model.layers.{layer}.{module}", group, layer, module, shape, pull))
    tensors.append(tensor("model.norm.weight", "norm", None, "model.norm.weight", (4096,), 0.1))
    tensors.append(tensor("lm_head.weight", "head", None, "lm_head.weight", (32000, 4096), 0.3))

    def scope(name: str, parts: Sequence[TensorScope], depth: float) -> ScopeStatistics:
        elements = sum(t.changes[0].elements for t in parts if t.changes[0])
        strength = [
            max((t.changes[m].std for t in parts if t.changes[m]), default=0.0) for m in range(models)
        ]  # type: ignore[union-attr]
        changes = change(elements, strength)
        return ScopeStatistics(
            name,
            changes,
            _pairs(changes, rng, depth, Subspace(0.21, 0.34, 8, len(parts))),
            *_together(rng, models),
        )

    groups = {
        g: scope(g, [t for t in tensors if t.group == g], 0.5)
        for g in GROUPS
        if any(t.group == g for t in tensors)
    }
    by_layer = {n: scope(str(n), [t for t in tensors if t.layer == n], n / layers) for n in range(layers)}
    reasons = (
        Skipped("lm_head.bias", NAMES[0], 32000, "the base has no tensor of this name"),
        Skipped("model.rotary_emb.inv_freq", None, 64, "I64 is no float dtype"),
    )
    return Analysis(
        version="0.1.0",
        base=AnalysedModel(
            "Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf", "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1"
        ),
        models=tuple(
            AnalysedModel(names[m % len(names)], f"some-owner/{names[m % len(names)]}") for m in range(models)
        ),
        top_share=0.2,
        whole=scope("whole", tensors, 0.4),
        groups=groups,
        layers=by_layer,
        tensors=tuple(tensors),
        skipped=tuple(reasons if skipped is None else skipped),
        seconds=12.3,
    )


def suggestion(reason: str) -> Suggestion:
    """A suggestion with a recipe of a comment, a key and this reason."""
    return Suggestion("apart", "ties", "# Suggested by alnico.\nmerge_method: ties\n", (), (reason,), ())


def _change(elements: int, std: float, rng: np.random.Generator) -> DeltaStatistics:
    """A task vector of about normal entries with this standard deviation, some of them 0; the base's entries are about 0.03."""
    if std == 0:
        return DeltaStatistics(
            elements, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None, (0.0,) * len(LEVELS), 1.0, None
        )
    tail = float(rng.uniform(1.0, 3.0))
    quantiles = tuple(q * std * (tail if abs(q) > 2 else 1.0) for q in NORMAL)
    l1, l2 = elements * 0.8 * std, elements**0.5 * std
    unchanged = float(rng.uniform(0.001, 0.3))
    return DeltaStatistics(
        elements, l1, l2, std / 0.03, std / 0.03, max(abs(q) for q in quantiles), std * float(rng.normal()) * 0.01, std,
        float(rng.normal()) * 0.1, tail, quantiles, unchanged, 0.36 + 0.5 * unchanged,
    )  # fmt: skip


def _pairs(
    changes: Sequence[DeltaStatistics], rng: np.random.Generator, depth: float, subspace: Subspace | None
) -> tuple[Pair, ...]:
    found = []
    for one in range(len(changes)):
        for other in range(one + 1, len(changes)):
            if not changes[one].l2 or not changes[other].l2:
                found.append(
                    Pair(
                        (one, other), None, changes[one].l2 + changes[other].l2, None, None, None, None, None
                    )
                )
                continue
            cosine = float(
                np.clip(0.5 * np.sin(one + 2.0 * other) + 0.3 * depth + 0.03 * rng.normal(), -0.95, 0.95)
            )
            conflict = float(np.clip(0.5 - cosine / 3 + 0.01 * rng.normal(), 0, 1))
            apart = float(np.hypot(changes[one].l2, changes[other].l2))
            found.append(
                Pair(
                    (one, other),
                    cosine,
                    apart,
                    conflict,
                    conflict * 0.8,
                    0.2 + 0.3 * abs(cosine),
                    conflict * 0.9,
                    subspace,
                )
            )
    return tuple(found)


def _together(rng: np.random.Generator, models: int) -> tuple[float | None, float | None]:
    return (float(rng.uniform(0.4, 0.7)), float(rng.uniform(0.3, 0.5))) if models > 1 else (None, 0.0)
