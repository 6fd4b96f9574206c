"""Says where modules are loaded for scoring, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from alnico.devices import CPU, DEFAULT_DEVICE, Device, checked_device, devices_for
from alnico.errors import AlnicoError

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the option ``dtype`` of scoring may be. ``auto`` is float32 on the processor and the checkpoint's on a GPU."""


@dataclass(frozen=True)
class ModulePlacement:
    """One device for modules, or several, over which a module that is too large for one is spread.

    A module on the processor is loaded in float32 unless ``dtype`` names another dtype. ``is_chosen``: by ``auto``, and
    not by the caller.
    """

    devices: tuple[Device, ...] = (CPU,)
    dtype: str = "auto"
    is_chosen: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, device: Any = DEFAULT_DEVICE, dtype: Any = "auto") -> ModulePlacement:
        """Return the placement that the options ``device`` and ``dtype`` mean; a dtype may be torch's.

        ``auto`` is the first GPU that torch finds, or the processor: only ``cuda:all`` spreads a module over several. Opens
        no file, so that a device that does not exist is reported first. Errors: AlnicoError, ResourceError.
        """
        text = str(dtype).removeprefix("torch.")
        if text not in DTYPES:
            raise AlnicoError(f"dtype is {text[:100]!r}; expected one of {', '.join(DTYPES)}.")
        return cls(devices_for("scoring", device), text, is_chosen=checked_device(device) == DEFAULT_DEVICE)

    def for_tasks(self, tasks: Iterable[Any]) -> ModulePlacement:
        """Return the placement of models for some tasks: with ``auto``, a function of the caller's keeps them where they are.

        The function may have inputs of its own on the processor, and was written for a module that is there: checkpoints are
        loaded on the processor then, and a module in memory stays on its device. A device that the caller names moves it.
        """
        if self.is_chosen and self.device.is_gpu and any(getattr(t, "is_function", False) for t in tasks):
            return replace(self, devices=(CPU,))
        return self

    @property
    def device(self) -> Device:
        """The first device."""
        return self.devices[0]

    @property
    def torch_dtype(self) -> str | None:
        """What a module is loaded in; None for the checkpoint's own."""
        if self.dtype != "auto":
            return self.dtype
        return None if self.device.is_gpu else "float32"

    @property
    def where(self) -> str:
        """The devices, for results."""
        return ", ".join(map(str, self.devices))

    @property
    def own_or_dtype(self) -> str:
        """The dtype of checkpoints, for results: ``own`` if each keeps its own."""
        return self.torch_dtype or "own"


ON_THE_PROCESSOR = ModulePlacement()
