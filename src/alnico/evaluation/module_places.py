"""Chooses the GPUs on which a module lies, from the sizes in its headers, before it is loaded."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alnico.checkpoint.source import Source
from alnico.devices import Device, are_made, devices_for, free_bytes
from alnico.errors import ResourceError
from alnico.evaluation.placement import ModulePlacement
from alnico.installation import import_extra
from alnico.numerics.dtypes import CONFIG_NAMES, DTYPES, FLOAT8, Shape
from alnico.numerics.sizes import format_size

RESERVED_SHARE = 0.1
"""The share of a GPU's memory that is left for what a module computes. Batches shrink where that is too little."""

StoredSizes = Mapping[str, tuple[str, Shape]]
"""The dtype, as in headers, and the shape of tensors by name."""


def stored_sizes(model: Source) -> StoredSizes:
    """Return the dtypes and shapes of a checkpoint's tensors."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model.tensors.items()}


def own_dtype(stored: StoredSizes) -> str:
    """Return the name in torch of the dtype that most elements of a checkpoint have; float8 counts as bfloat16.

    >>> own_dtype({"w": ("BF16", (4, 4)), "norm": ("F32", (4,)), "steps": ("I64", (90,))})
    'bfloat16'
    """
    elements: dict[str, int] = {}
    for dtype, shape in stored.values():
        name = CONFIG_NAMES["BF16"] if dtype in FLOAT8 else CONFIG_NAMES.get(dtype)
        if name is not None:
            elements[name] = elements.get(name, 0) + math.prod(shape)
    return max(elements, key=lambda name: elements[name], default="float32")


def needed_bytes(stored: StoredSizes, dtype: str) -> int:
    """Return the size of a checkpoint's tensors whose floating-point values have a dtype; others keep theirs.

    >>> needed_bytes({"w": ("F32", (4, 4)), "steps": ("I64", (3,))}, "bfloat16")
    56
    """
    bits = DTYPES[next(header for header, name in CONFIG_NAMES.items() if name == dtype)].bits
    return sum(
        math.prod(shape) * (bits if one in CONFIG_NAMES or one in FLOAT8 else DTYPES[one].bits) // 8
        for one, shape in stored.values()
    )


def device_map(
    module: Any, needed: int, dtype: str, placement: ModulePlacement, label: str
) -> dict[str, str]:
    """Return where the parts of a module lie: the torch name of a device by the name of a part; "" is the whole.

    The whole module goes to the first GPU with room for ``needed`` bytes. Otherwise accelerate spreads it over all of
    them, in the order of its layers, without cutting one. ``module`` may be on ``meta``; its tensors have the ``dtype``
    that is loaded. Errors: ResourceError if the GPUs have no room for it.
    """
    free = [_free_bytes(gpu) for gpu in placement.devices]
    return places(module, needed, dtype, placement.devices, free, label)


def places(
    module: Any, needed: int, dtype: str, gpus: Sequence[Device], free: Sequence[int], label: str
) -> dict[str, str]:
    """Compute what :func:`device_map` returns, for GPUs with so many ``free`` bytes."""
    rooms = [
        max(0, left - int(RESERVED_SHARE * gpu.total_bytes)) for gpu, left in zip(gpus, free, strict=True)
    ]
    for gpu, room in zip(gpus, rooms, strict=True):
        if needed <= room:
            return {"": gpu.torch_name}
    if len(gpus) > 1:
        found = _spread(module, dtype, rooms)
        if all(isinstance(place, int) for place in found.values()):
            return {part: gpus[place].torch_name for part, place in found.items()}
    raise _no_room(needed, dtype, gpus, rooms, label)


def _spread(module: Any, dtype: str, rooms: Sequence[int]) -> dict[str, Any]:
    """Return the number of the GPU of each part of a module; "disk" for a part that has no room."""
    accelerate = import_extra("accelerate", "a model on several GPUs", "eval")
    torch = import_extra("torch", "a model on several GPUs", "eval")
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    # accelerate keeps room for one more layer on the first device, for layers that lie on a disk. Here none does, so its
    # first device is one without memory.
    log = logging.getLogger("accelerate.utils.modeling")
    was_disabled, log.disabled = log.disabled, True  # it knows no such device
    try:
        found = accelerate.infer_auto_device_map(
            module,
            max_memory=dict(enumerate([0, *rooms])),
            no_split_module_classes=list(getattr(module, "_no_split_modules", None) or ()),
            dtype=getattr(torch, dtype),
        )
    finally:
        log.disabled = was_disabled
    return {part: place - 1 if isinstance(place, int) else place for part, place in found.items()}


def _no_room(
    needed: int, dtype: str, gpus: Sequence[Device], rooms: Sequence[int], label: str
) -> ResourceError:
    has = " and ".join(
        f"{gpu} has room for {format_size(room)}" for gpu, room in zip(gpus, rooms, strict=True)
    )
    return ResourceError(
        f"{label}: needs {format_size(needed)} of GPU memory in {dtype}, and {has}; expected room for the whole "
        f"model. {room_advice(gpus, dtype)}"
    )


def room_advice(gpus: Sequence[Device], dtype: str, *, workers: int = 0) -> str:
    """Return what to do where GPUs have too little room for a module in a dtype; ``workers`` are those of a search."""
    choices = "device cpu"
    if len(gpus) == 1 and workers <= 1 and _count_gpus() > 1:
        everything = "device cuda:all with 1 worker" if workers else "device cuda:all"
        choices = f"{everything}, which spreads the module over all GPUs, or cpu"
    smaller = ", or dtype bfloat16" if dtype in ("float32", "float64") else ""
    return f"{'Use fewer workers, or choose' if workers > 1 else 'Choose'} {choices}{smaller}."


def _count_gpus() -> int:
    try:
        return len(devices_for("scoring", "cuda:all"))
    except ResourceError:
        return 0


def _free_bytes(gpu: Device) -> int:
    """Return the free memory of a GPU, with what torch keeps of modules that are gone."""
    if not are_made():
        torch = import_extra("torch", "a model on a GPU", "eval")
        gc.collect()
        torch.cuda.empty_cache()
    return free_bytes(gpu)


def converted(module: Any, placement: ModulePlacement) -> Any:
    """Return a module in the dtype that a placement names, if it names one."""
    if placement.dtype == "auto":
        return module
    return module.to(getattr(import_extra("torch", "a module in memory", "eval"), placement.dtype))


def moved(module: Any, placement: ModulePlacement, label: str) -> Any:
    """Move a copy of a caller's module to the GPU of a placement, in its dtype. Returns the module.

    On the processor a module stays on its device unless that is a GPU and the caller named the processor. Only a dtype that the placement names changes the
    module's own. Errors: ResourceError for a module that the GPUs have no room for.
    """
    torch = import_extra("torch", "a module in memory", "eval")
    module = converted(module, placement)
    tensors = list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
    if not placement.device.is_gpu:
        is_moved = not placement.is_chosen and any(t.is_cuda for t in tensors)
        return module.to("cpu") if is_moved else module
    floats = [str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()]
    dtype = max(floats, key=floats.count, default="float32")
    if all(t.is_cuda and t.device == torch.device(placement.device.torch_name) for t in tensors):
        return module
    where = device_map(module, sum(t.numel() * t.element_size() for t in tensors), dtype, placement, label)
    if "" in where:
        return module.to(where[""])
    return import_extra("accelerate", "a model on several GPUs", "eval").dispatch_model(module, where)
