"""Refuses GPUs that are too small for a module, its gradients and sums of them, before these are computed."""

from __future__ import annotations

from collections.abc import Mapping

from alnico.devices import free_bytes
from alnico.errors import ResourceError
from alnico.evaluation.module_places import room_advice
from alnico.evaluation.placement import ModulePlacement
from alnico.numerics.sizes import format_size


def check_room(
    what: str, needs: Mapping[str, int], dtype: str, placement: ModulePlacement, *, workers: int = 0
) -> None:
    """Refuse GPUs without room for what is needed: bytes by what takes them, besides the inputs. ``workers`` are those of a
    search.

    Errors: ResourceError.
    """
    gpus = placement.devices
    if not placement.device.is_gpu or sum(needs.values()) <= sum(map(free_bytes, gpus)):
        return
    *others, last = (f"{format_size(size)} for {name}" for name, size in needs.items())
    parts = f"{', '.join(others)} and {last}" if others else last
    has = " and ".join(f"{gpu} has {format_size(free_bytes(gpu))} free" for gpu in gpus)
    raise ResourceError(
        f"{what}: needs {format_size(sum(needs.values()))} of GPU memory besides its inputs ({parts}, in "
        f"{dtype}), and {has}; expected room for all of it. {room_advice(gpus, dtype, workers=workers)}"
    )
