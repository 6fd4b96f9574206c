"""Recalibrates BatchNorm running statistics, which do not fit the activations of a merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.memory_model import import_torch, is_torch_tensor
from alnico.devices import DEFAULT_DEVICE, checked_device, devices_for
from alnico.errors import AlnicoError, NonFiniteError, ResourceError
from alnico.evaluation.batches import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn


def recalibrate_batchnorm(module: nn.Module, batches: Iterable[Any], *, device: Any = DEFAULT_DEVICE) -> int:
    """Reset the running statistics of a module's BatchNorm layers and measure them on data; returns the
    number of batches.

    Means and variances become the plain average over all batches, regardless of the layers' momentum. Other
    layers run in evaluation mode, without dropout. The module is called with each batch: a mapping as keyword
    arguments, everything else as the only argument (for a loader of pairs pass ``(inputs for inputs, _ in
    loader)``). Modes and momenta are restored at the end; after an error, the statistics too.

    Tensors of a batch are moved to the module's device. ``auto`` leaves the module where it is; another ``device`` has it
    until the end. A batch that does not fit the memory is an error: its halves would have other variances.

    Errors: AlnicoError without torch, BatchNorm layers or batches; NonFiniteError for statistics that are not
    finite; ResourceError for a device that does not exist, and for a batch that does not fit it.
    Source: for averaged weights, Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2; for
    merged weights, Jordan et al. 2022, https://arxiv.org/abs/2211.08403.
    """
    torch = import_torch("recalibrate_batchnorm")
    asked = checked_device(device)
    place = None if asked == DEFAULT_DEVICE else devices_for("scoring", asked)[0]
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    scripts = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]
    if any(name.endswith("running_mean") for script in scripts for name, _ in script.named_buffers()):
        raise AlnicoError(
            f"recalibrate_batchnorm: {type(module).__name__} has BatchNorm layers in TorchScript, whose "
            "momentum cannot be changed; expected layers of torch.nn. Recalibrate the module before "
            "torch.jit.script or torch.jit.trace."
        )
    if not layers:
        raise AlnicoError(
            f"recalibrate_batchnorm: {type(module).__name__} has no BatchNorm layer with running statistics; "
            "expected at least one. Do not recalibrate this module."
        )
    homes = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    first = next(iter(homes))
    if place is not None and len(homes) > 1:
        raise AlnicoError(
            f"recalibrate_batchnorm: {type(module).__name__} lies on {' and '.join(sorted(map(str, homes)))}; expected one "
            "device that it can be moved from. Leave device out: the module then stays where it is."
        )
    modes = [(m, m.training) for m in module.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in layers]
    count = 0
    try:
        if place is not None:
            module.to(place.torch_name)
            homes = {torch.device(place.torch_name)}
        home = next(iter(homes)) if len(homes) == 1 else None
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's name for the plain average
            layer.train()
        with torch.no_grad():
            for batch in batches:
                _run(module, _moved(batch, home), count + 1)
                count += 1
        if not count:
            raise AlnicoError(
                "recalibrate_batchnorm: there are no batches; expected at least one. Give batches of the "
                "model's inputs."
            )
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")) and not bool(buffer.isfinite().all()):
                raise NonFiniteError(
                    f"recalibrate_batchnorm: {name} becomes NaN or infinite on these batches, first at "
                    f"{(~buffer.isfinite()).nonzero()[0].tolist()}; expected finite numbers. Look for NaN in "
                    "the module and the batches."
                )
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, value in buffers.items():
                layer.get_buffer(name).copy_(value)
        raise
    finally:
        if place is not None:
            module.to(first)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for m, mode in modes:
            m.training = mode
    return count


def _moved(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with its tensors on a device; None leaves them."""
    if device is None:
        return batch
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch.to(device) if is_torch_tensor(batch) else batch


def _run(module: nn.Module, batch: Any, number: int) -> None:
    """Call a module with a batch. Errors: ResourceError if it does not fit the memory."""
    try:
        if isinstance(batch, Mapping):
            module(**batch)
        else:
            module(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"recalibrate_batchnorm: the memory is too small for batch {number}; expected room for it. Give smaller batches: "
            "the halves of a batch would have other variances, so it is not halved."
        ) from None
