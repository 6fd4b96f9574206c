"""Chooses the device that makes each tensor: the GPU that its inputs live on, else those of the plan in turn"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from alnico.checkpoint.resident_model import torch_place
from alnico.checkpoint.source import Source
from alnico.devices import CPU, Device
from alnico.plan.job import Job, Plan


def devices_of(
    jobs: Iterable[Job], sources: Sequence[Source], devices: Sequence[Device]
) -> dict[str, Device]:
    """Return the device of each job, by the tensor's name. Copies, empty tensors, and matrices whose method does not run on a
    GPU are made on the processor.

    A tensor goes to the device that has the fewest bytes to compute so far, so that several GPUs get equal shares. The
    choice changes no bit.
    """
    chosen: dict[str, Device] = {}
    bytes_of = dict.fromkeys(devices, 0)
    for job in jobs:
        stays = job.matrix is not None and not job.matrix.runs_on_gpu
        if stays or not job.is_computed or not job.elements:
            chosen[job.name] = CPU
            continue
        device = home(job, sources, devices) or min(devices, key=bytes_of.__getitem__)
        bytes_of[device] += job.byte_size + sum(tensor.byte_size for tensor in job.read)
        chosen[job.name] = device
    return chosen


def home(job: Job, sources: Sequence[Source], devices: Sequence[Device]) -> Device | None:
    """Return the GPU of the plan on which an input of a job lives, as a torch tensor; None if none does."""
    gpus = {device.torch_name: device for device in reversed(devices) if device.is_gpu}
    places = (torch_place(sources[tensor.model], tensor.name) for tensor in job.merged) if gpus else ()
    return next((gpus[place] for place in places if place in gpus), None)


def tensors_by_device(plan: Plan) -> dict[Device, int]:
    """Return how many tensors each device makes: the GPUs of a plan, then the processor, which makes copies."""
    places = list(devices_of(plan.jobs, plan.sources, plan.devices).values())
    counted = [*plan.gpus, *([CPU] if CPU in places or not plan.gpus else [])]
    return {device: places.count(device) for device in counted}


def devices_data(plan: Plan) -> list[dict[str, Any]]:
    """Return what each device does and the peak of its memory as plain data, for ``--json``."""
    return [
        {
            "device": device.name,
            **({"model": device.model, "peak_memory_bytes": plan.memory.gpu_bytes} if device.is_gpu else {}),
            "tensors": tensors,
        }
        for device, tensors in tensors_by_device(plan).items()
    ]
