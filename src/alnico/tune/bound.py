"""A transformers module whose tensors are those of a merge in memory: the next merge in the same memory changes it in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from alnico.tune.subject import load_state
from alnico.tune.tasks import Kind


class BoundModule:
    """A module of a ``kind``, made once from a config and a state, whose values are then kept up with the state's memory.

    Parameters and buffers of the state's dtype and layout are its tensors themselves; others (a merge in bfloat16 is scored in
    float32) are copied by :meth:`follow`. Names are those of the module, with or without the prefix of its base model. Where
    transformers makes one tensor of several, or turns one, ``follow`` loads the whole state anew. Errors: ModelError, for tensors that
    the state lacks.
    """

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], kind: Kind, label: str) -> None:
        self._config = config
        self._state = state
        self._kind = kind
        self._label = label
        self.module, missing = load_state(config, state, kind, label)
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_converted = False
        self._bind(missing)

    def follow(self) -> None:
        """Take over what the state's memory holds now."""
        with torch.no_grad():
            if self._is_converted:
                fresh, _ = load_state(self._config, self._state, self._kind, self._label)
                for own, new in zip(_tensors(self.module).values(), _tensors(fresh).values(), strict=True):
                    own.copy_(new)
            # One thread: 135 M numbers take 30 ms so, and 1 to 2 s in two threads on processors that others use, which wait for one another.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for own, new in self._copied:
                    own.copy_(new)
            finally:
                torch.set_num_threads(threads)

    def _bind(self, missing: frozenset[str]) -> None:
        saved = dict(self.module.state_dict(keep_vars=True))
        bound: dict[int, torch.Tensor] = {}
        for name, own in saved.items():
            found = _named(name, self._state, self.module.base_model_prefix)
            if id(own) in bound or name in missing or not isinstance(own, torch.Tensor):
                continue
            # A tied tensor has two names, and the state may have either or both: what was loaded says which it is.
            if found is not None and found.shape == own.shape and torch.equal(own.detach(), found.to(own.dtype)):
                bound[id(own)] = found
        unbound = [
            own for name, own in saved.items() if id(own) not in bound and name not in missing and isinstance(own, torch.Tensor)
        ]
        if unbound:
            self._is_converted = True
            return
        for own in {id(own): own for own in saved.values()}.values():
            new = bound.get(id(own))
            if new is None:
                continue
            if own.dtype == new.dtype:
                own.data = new
            else:
                self._copied.append((own.data, new))


def _named(name: str, state: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor | None:
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((state[n] for n in names if n in state), None)


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
