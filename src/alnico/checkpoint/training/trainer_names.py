"""Tells a model's tensors from the rest of what a trainer saves, and removes what it puts before their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alnico.errors import ModelError

TRAINING_STATE = re.compile(
    r"(optim(izers?)?|opt|optimizer_states?|optim_state(_dict)?|optimizer_state_dict|(lr_)?schedulers?|lr_scheduler_states?"
    r"|rng(_states?)?|rng_state_dict|data_?loaders?|train_state|trainer_state|training_state|(grad_|loss_)?scalers?"
    r"|extra_state|callbacks|loops|step|global_step|epoch)(_\d+)?",
    re.IGNORECASE,
)
"""Names of what is no part of a model, where a trainer saves it under a key."""

WRAPPERS = ("app", "state", "state_dict", "checkpoint", "module", "_forward_module")
"""First components of names that are always a wrapper's."""

MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict", "net", "network")
"""Keys under which a trainer saves a model, next to others with tensors."""

UNDER_A_KEY = ("model.model.", "model.lm_head.", "model.transformer.", "model.module.", "model.base_model.")
"""Beginnings of names in which ``model`` is a key of the trainer, not a part of the model."""

FLAT = ("flat_param", "_flat_param")
"""What FSDP calls the tensors of a module in one, in its own state dicts."""

SHOWN = 8


@dataclass(frozen=True)
class ChosenTensors:
    """The tensors of a model among those of a trainer: stored names by the model's names; and what is left out."""

    names: Mapping[str, str]
    removed: str
    left: Sequence[str]

    def notes(self, label: str) -> list[str]:
        """What was removed from the names, and what was left out."""
        notes = []
        if self.removed:
            notes.append(f"{label}: the tensors are those under {self.removed}.")
        if self.left:
            notes.append(
                f"{label}: left out, as they are not tensors of the model: {list_groups(self.left)}."
            )
        return notes


def choose_model(
    stored: Collection[str], paths: Mapping[str, Sequence[object]], part: str, label: str
) -> ChosenTensors:
    """Choose the tensors of a model among the ``stored`` names of a checkpoint.

    ``paths`` are the keys that lead to a name in the trainer's dicts, where the checkpoint says so. ``part`` is the key of what
    to read, where a reference names one. Errors: ModelError for several models, none, or no such key.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    left = []
    for name in stored:
        keys = _keys(name, paths)
        if not part and any(TRAINING_STATE.fullmatch(key) for key in keys or (name,)):
            left.append(name)
        else:
            groups.setdefault(keys, []).append(name)
    chosen = _chosen_group(groups, part, label)
    left += [name for keys, names in groups.items() if keys != chosen for name in names]
    names = groups[chosen]
    prefix = "".join(f"{key}." for key in chosen)
    if not all(name.startswith(prefix) for name in names):  # keys that the names do not begin with
        prefix = ""
    bare = {name: name.removeprefix(prefix) for name in names}
    refuse_flat(names, label)
    more = common_wrapper(list(bare.values()), is_under_key=bool(chosen))
    found = {short.removeprefix(more): name for name, short in bare.items()}
    return ChosenTensors(found, (prefix + more).rstrip("."), left)


def refuse_flat(names: Collection[str], where: str) -> None:
    """Refuse flat parameters of FSDP, which are no tensors of a model. Errors: ModelError."""
    flat = next((name for name in names if name.rpartition(".")[2].startswith(FLAT)), None)
    if flat is not None:
        raise ModelError(
            f"{where}: {flat[:80]} is a flat parameter of FSDP, all tensors of a module in one (LOCAL_STATE_DICT); expected tensors by name. "
            "Save the model with SHARDED_STATE_DICT or FULL_STATE_DICT."
        )


def _keys(name: str, paths: Mapping[str, Sequence[object]]) -> tuple[str, ...]:
    """The keys of dicts above a tensor. Without paths they are those first components of its name that are no model's."""
    path = paths.get(name)
    if path is not None:
        keys = tuple(str(key) for key in path[:-1])
        return keys[: next((i + 1 for i, key in enumerate(keys) if key in MODEL_KEYS), len(keys))]
    first, *rest = name.split(".")
    while first in WRAPPERS and rest:
        first, *rest = rest
    return (first,) if rest and TRAINING_STATE.fullmatch(first) else ()


def _chosen_group(groups: Mapping[tuple[str, ...], Sequence[str]], part: str, label: str) -> tuple[str, ...]:
    if part:
        fitting = [keys for keys in groups if part in (".".join(keys), keys[-1] if keys else "")]
    else:
        fitting = list(groups)
        if len(fitting) > 1:
            models = [keys for keys in groups if keys and keys[-1] in MODEL_KEYS]
            least = min(map(len, models), default=0)
            fitting = [keys for keys in models if len(keys) == least] or fitting
    if len(fitting) == 1:
        return fitting[0]
    found = (
        ", ".join(sorted(".".join(keys) or "no key" for keys in (fitting or groups))[:SHOWN])
        or "nothing but training state"
    )
    expected = f"one model under the key {part}" if part else "one model"
    raise ModelError(
        f"{label}: has tensors under {found}; expected {expected}. Name the one to read: PATH@KEY."
    )


def common_wrapper(names: Sequence[str], *, is_under_key: bool = False) -> str:
    """Return what wrappers put before all names, or an empty text. Under a key of the trainer, ``model.`` is the model's own.

    >>> common_wrapper(["module.a.weight", "module.b.weight"]), common_wrapper(["model.layers.0", "model.norm"])
    ('module.', '')
    >>> common_wrapper(["model.model.norm", "model.lm_head.weight"])
    'model.'
    """
    found = ""
    while True:
        rest = [name.removeprefix(found) for name in names]
        first = rest[0].partition(".")[0]
        if not all(name.startswith(f"{first}.") for name in rest):
            return found
        is_key = first == "model" and not is_under_key and any(name.startswith(UNDER_A_KEY) for name in rest)
        if first not in WRAPPERS and not is_key:
            return found
        found += f"{first}."


def list_groups(names: Sequence[str]) -> str:
    """List names by their first component, with how many each has.

    >>> list_groups(["optimizer.a", "optimizer.b", "step"])
    'optimizer (2), step'
    """
    counts: dict[str, int] = {}
    for name in names:
        first = name.partition(".")[0]
        counts[first] = counts.get(first, 0) + 1
    shown = [f"{name} ({count})" if count > 1 else name for name, count in list(counts.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")
