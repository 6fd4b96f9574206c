"""Finds the averaged weights (EMA) that a trainer keeps in a checkpoint, and chooses what ``PATH@PART`` names.

Trainers keep an exponential moving average of the weights in several forms:

    ema_state_dict, state_dict_ema, callbacks/EMACallback/...    a state dict under a key that names it
    state_dict with current_model_state and averaging_state      Lightning 2.6: the state dict is the average itself
    model_ema.X in the state dict, X with or without its dots    latent diffusion, timm and others
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alnico.errors import ModelError

AVERAGE = "ema"
"""The part of a checkpoint that is its averaged weights: ``PATH@ema``."""

AVERAGE_KEY = re.compile(
    r"(?<![A-Za-z])ema(?![a-z])|EMA|[Mm]oving_?[Aa]verage|[Ww]eight_?[Aa]verag|(?<![a-z])shadow(?![a-z])"
)
"""What the key of averaged weights has in it."""

NOT_SEARCHED = re.compile(r"optim|sched|loops|hyper|rng|config", re.IGNORECASE)
CURRENT, STATE_OF_AVERAGE = "current_model_state", "averaging_state"
"""Keys next to a state dict that is an average: the weights of the last step, and how many were averaged."""

PREFIXES = ("ema.ema_model.", "ema.module.", "model_ema.", "ema_model.", "ema.")
"""What stands before the names of averaged weights in a state dict."""
COUNTERS = ("decay", "num_updates", "initted", "step", "n_averaged")
"""What an average keeps besides weights."""

RENAMES = (("module.", ""), ("model.", ""), ("", "model."), ("module.", "model."), ("_orig_mod.", ""))
"""Beginnings in place of which a state dict may have others."""

MAX_VISITED = 1_000_000
"""Most keys that are looked at."""
MAX_DEPTH = 6
SHOWN = 8

IsTensor = Callable[[object], bool]


def find_averages(
    loaded: Mapping[Any, Any], state: Mapping[Any, Any], is_tensor: IsTensor
) -> dict[str, dict[str, Any]]:
    """Return the averaged weights in a checkpoint, by the key that they are under; ``state`` is its state dict.

    >>> find_averages({"ema": {"w": 1.0}, "optimizer": {"w": 2.0}}, {}, lambda value: isinstance(value, float))
    {'ema': {'w': 1.0}}
    """
    found: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[tuple[str, ...], Any, bool]] = [((), loaded, False)]
    visited = 0
    while waiting and visited < MAX_VISITED:
        path, value, is_average = waiting.pop()
        visited += len(value)
        for key, inner in value.items():
            if not isinstance(inner, Mapping) or inner is state or NOT_SEARCHED.search(str(key)[:80]):
                continue
            keys, named = (*path, str(key)), is_average or AVERAGE_KEY.search(str(key)[:80]) is not None
            visited += len(inner) if named else 0
            if visited > MAX_VISITED:
                break
            tensors = {n: v for n, v in inner.items() if isinstance(n, str) and is_tensor(v)} if named else {}
            if tensors:
                found[".".join(keys)] = tensors
            elif len(keys) < MAX_DEPTH:
                waiting.append((keys, inner, named))
    for prefix in PREFIXES:
        under = {
            n: v for n, v in state.items() if isinstance(n, str) and n.startswith(prefix) and is_tensor(v)
        }
        if under:
            found[prefix.rstrip(".")] = under
            break
    return found


def is_average_itself(loaded: Any) -> bool:
    """Is the state dict of a checkpoint the average, next to the weights of the last step?"""
    return (
        isinstance(loaded, Mapping)
        and isinstance(loaded.get(CURRENT), Mapping)
        and STATE_OF_AVERAGE in loaded
    )


def average_notes(loaded: Any, state: Mapping[Any, Any], is_tensor: IsTensor, where: str) -> list[str]:
    """Say which weights are read where a checkpoint has averaged ones, too."""
    if is_average_itself(loaded):
        return [
            f"{where}: its state_dict is the running average of the weights. Those of the last step: PATH@{CURRENT}."
        ]
    found = find_averages(loaded, state, is_tensor) if isinstance(loaded, Mapping) else {}
    if not found:
        return []
    return [
        f"{where}: also has averaged weights (EMA) under {_some(list(found))}. To read those: PATH@{AVERAGE}."
    ]


def choose_part(
    loaded: Any, state: Mapping[Any, Any], part: str, is_tensor: IsTensor, where: str
) -> tuple[Mapping[Any, Any], list[str]]:
    """Return what ``part`` names: the averaged weights, or what is under a key; and notes.

    Averaged weights have the names of the state dict, and its values where an average has none, such as buffers. Errors:
    ModelError for a part that is not there, or is there several times.
    """
    if part != AVERAGE:
        chosen = next(_under(loaded, part), None)
        if not isinstance(chosen, Mapping):
            keys = _some([str(key) for key in loaded]) if isinstance(loaded, Mapping) else "none"
            raise ModelError(
                f"{where}: has nothing like a state dict under {part}; expected one of its keys: {keys}. Check the key after @."
            )
        return chosen, [f"{where}: the tensors are those under {part}."]
    if is_average_itself(loaded):
        return state, [f"{where}: the tensors are the running average, which is its state_dict."]
    found = find_averages(loaded, state, is_tensor) if isinstance(loaded, Mapping) else {}
    if len(found) != 1:
        what = f"under {_some(list(found))}" if found else "none"
        raise ModelError(
            f"{where}: averaged weights (EMA): {what}; expected them under one key. "
            f"{'Name the one to read: PATH@KEY.' if found else 'Leave out @ema to read the weights themselves.'}"
        )
    [(key, average)] = found.items()
    root = f"{key.partition('.')[0]}." if all(name.startswith(f"{key}.") for name in average) else None
    others = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and is_tensor(value) and not (root and name.startswith(root))
    }
    named = _like(average, others, key)
    if named is None:
        return average, [
            f"{where}: the tensors are the averaged ones (EMA) under {key}. Their names are not those of the state dict."
        ]
    missing = {name: value for name, value in others.items() if name not in named}
    rest = f" {_some(list(missing))} have no average, and are those of the last step." if missing else ""
    return {**missing, **named}, [f"{where}: the tensors are the averaged ones (EMA) under {key}.{rest}"]


def _like(average: Mapping[str, Any], others: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Averaged weights under the names of the state dict; None if they have other names."""
    prefix = f"{key}." if all(name.startswith(f"{key}.") for name in average) else ""
    bare = {
        name.removeprefix(prefix): value
        for name, value in average.items()
        if name.removeprefix(prefix) not in COUNTERS
    }
    flat = {
        name.removeprefix("model.").replace(".", ""): name for name in others if name.startswith("model.")
    }
    ways: Sequence[Callable[[str], str]] = (
        lambda name: name,
        *(lambda name, old=old, new=new: new + name.removeprefix(old) for old, new in RENAMES),
        lambda name: flat.get(name, name),
    )
    for way in ways:
        named = {way(name): value for name, value in bare.items()}
        if named.keys() <= others.keys() and len(named) == len(bare):
            return named
    return None


def _under(loaded: Any, text: str) -> Iterator[Any]:
    """What dotted keys lead to. A key may have dots of its own."""
    if not isinstance(loaded, Mapping) or text.count(".") > MAX_DEPTH * 4:
        return
    for key, value in loaded.items():
        if text == str(key):
            yield value
        elif text.startswith(f"{key}."):
            yield from _under(value, text[len(str(key)) + 1 :])


def _some(names: Sequence[str]) -> str:
    return ", ".join(n[:80] for n in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
