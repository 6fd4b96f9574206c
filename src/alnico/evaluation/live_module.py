"""Binds a transformers module to the memory of a merge, so that the next merge changes it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from alnico.evaluation.loading import load_state
from alnico.evaluation.placement import ON_THE_PROCESSOR, ModulePlacement
from alnico.evaluation.tasks import ModelKind

FOLLOWED = (torch.bfloat16, torch.float16)
"""Dtypes whose values are copied to float32 parameters by the threads that merge, without another pass."""


class LiveModule:
    """A module of a ``kind``, created once from a config and a state; its values follow the state's memory.

    Parameters and buffers with the state's dtype and layout share its memory. For others (a bfloat16 merge is scored in
    float32) ``followers`` lists the memory to fill, by names of the state, during the next merge: arrays, or tensors on a
    GPU. ``shared`` has the names whose memory the module shares. The rest is copied by :meth:`follow`: all of it, if the
    module is on a GPU and the state is not. Names are those
    of the module, with or without the prefix of its base model. Where transformers joins
    or transposes tensors, ``follow`` loads the whole state again. Errors: ModelError for tensors missing in the state.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        state: Mapping[str, torch.Tensor],
        kind: ModelKind,
        label: str,
        *,
        placement: ModulePlacement = ON_THE_PROCESSOR,
    ) -> None:
        self._placement = placement
        self._config = config
        self._kind = kind
        self._label = label
        # A task may ask for its module in inference mode, in which torch makes tensors that can never change.
        with torch.inference_mode(False):
            self.module, missing = load_state(config, state, kind, label, placement=placement)
        self.followers: dict[str, list[np.ndarray | torch.Tensor]] = {}
        self.shared: set[str] = set()
        self._copied: list[tuple[torch.Tensor, str]] = []
        self._is_converted = False
        self._bind(state, missing)

    def follow(self, state_of: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Copy values of the current state that do not follow on their own; it is not asked for if there are none."""
        if not self._is_converted and not self._copied:
            return
        state = state_of()
        with torch.inference_mode(False), torch.no_grad():
            if self._is_converted:
                fresh, _ = load_state(self._config, state, self._kind, self._label, placement=self._placement)
                for own, new in zip(_tensors(self.module).values(), _tensors(fresh).values(), strict=True):
                    own.copy_(new)
            for own, name in self._copied:
                own.copy_(state[name])

    def _bind(self, state: Mapping[str, torch.Tensor], missing: frozenset[str]) -> None:
        saved = dict(self.module.state_dict(keep_vars=True))
        bound: dict[int, str] = {}
        for name, own in saved.items():
            state_name = _state_name(name, state, self.module.base_model_prefix)
            new = state.get(state_name)
            if id(own) in bound or name in missing or not isinstance(own, torch.Tensor):
                continue
            # A tied tensor has two names, and the state may have either or both: the loaded values decide.
            if (
                new is not None
                and new.shape == own.shape
                and torch.equal(own.detach(), new.to(own.device, own.dtype))
            ):
                bound[id(own)] = state_name
        unbound = [
            own
            for name, own in saved.items()
            if id(own) not in bound and name not in missing and isinstance(own, torch.Tensor)
        ]
        if unbound:
            self._is_converted = True
            return
        for own in {id(own): own for own in saved.values()}.values():
            if id(own) not in bound:
                continue
            name = bound[id(own)]
            new = state[name]
            is_copied = self._placement.device.is_gpu and not new.is_cuda
            if own.dtype == new.dtype and own.device == new.device and not is_copied:
                own.data = new
                self.shared.add(name)
            elif (
                not is_copied and own.dtype == torch.float32 and new.dtype in FOLLOWED and own.is_contiguous()
            ):
                flat = own.data.reshape(-1)
                self.followers.setdefault(name, []).append(flat if own.is_cuda else flat.numpy())
            else:
                self._copied.append((own.data, name))


def _state_name(name: str, state: Mapping[str, torch.Tensor], prefix: str) -> str:
    """Return the name of a module's tensor in the state; its own name if the state lacks it."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((n for n in names if n in state), name)


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
