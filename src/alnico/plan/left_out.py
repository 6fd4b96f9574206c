"""Makes the config agree with the tensors that rules leave out, as far as it can; notes the rest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from alnico.plan import families
from alnico.plan.layers import count_layers

AVERAGES = re.compile(r"(^|\.)(model_)?ema(\.|$)")
"""Matches names of moving averages of a model's own tensors, which no config describes."""

SHOWN = 3
"""The number of tensors that a note names."""


def config_without(
    config: Mapping[str, Any], left_out: Collection[str], kept: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of an output without the tensors ``left_out``, and notes on it. ``kept`` are its tensors.

    If no layers for multi-token prediction are kept, their number becomes 0. Moving averages need no change. Of all
    other tensors a note says that a program may expect them, since their names do not say which key makes it do so.
    """
    changed = dict(config)
    notes: list[str] = []
    layers = count_layers([*left_out, *kept])

    def predicts(name: str) -> bool:
        return families.is_predictor(name) or layers.predictor_place(name) is not None

    predictors = [name for name in left_out if predicts(name)]
    if predictors and not any(map(predicts, kept)):
        changed, keys = _without_predictors(changed, "")
        notes += [
            f"config.json: {key} is 0 in the output, since rules leave out all tensors for multi-token "
            f"prediction ({_shown(predictors)})."
            for key in keys
        ]
        if keys or not config:
            left_out = [name for name in left_out if name not in predictors]
    others = [name for name in left_out if not AVERAGES.search(name)]
    if others and config:
        keys = [key for key in (*families.VISION_CONFIGS, *families.AUDIO_CONFIGS) if key in config]
        about = f", which has {' and '.join(keys)}," if keys and any(map(families.is_tower, others)) else ""
        notes.append(
            f"config.json{about} is not changed for the tensors that rules leave out ({_shown(others)}): a program that "
            "loads the output may refuse it, or give them random values. Make sure that it does not need them."
        )
    return changed, notes


def _without_predictors(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Return a config with no layers for multi-token prediction, and the keys that were changed."""
    changed = dict(config)
    keys: list[str] = []
    for key, value in config.items():
        if key in families.FURTHER_LAYERS and value:
            changed[key] = 0
            keys.append(place + key)
        elif key in families.TEXT_CONFIGS and isinstance(value, Mapping):
            changed[key], inner = _without_predictors(value, f"{place}{key}.")
            keys += inner
    return changed, keys


def _shown(names: Collection[str]) -> str:
    first = list(names)[:SHOWN]
    return ", ".join(first) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
