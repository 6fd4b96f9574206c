"""Recalibrates BatchNorm running statistics, which do not fit the activations of a merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from alnico.checkpoint.memory_model import import_torch
from alnico.errors import AlnicoError, NonFiniteError

if TYPE_CHECKING:
    from torch import nn


def recalibrate_batchnorm(module: nn.Module, batches: Iterable[Any]) -> int:
    """Reset the running statistics of a module's BatchNorm layers and measure them on data; returns the
    number of batches.

    Means and variances become the plain average over all batches, regardless of the layers' momentum. Other
    layers run in evaluation mode, without dropout. The module is called with each batch: a mapping as keyword
    arguments, everything else as the only argument (for a loader of pairs pass ``(inputs for inputs, _ in
    loader)``). Modes and momenta are restored at the end; after an error, the statistics too.

    Errors: AlnicoError without torch, BatchNorm layers or batches; NonFiniteError for statistics that are not
    finite.
    Source: for averaged weights, Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, section 3.2; for
    merged weights, Jordan et al. 2022, https://arxiv.org/abs/2211.08403.
    """
    torch = import_torch("recalibrate_batchnorm")
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
    modes = [(m, m.training) for m in module.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in layers]
    count = 0
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's name for the plain average
            layer.train()
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    module(**batch)
                else:
                    module(batch)
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
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for m, mode in modes:
            m.training = mode
    return count
