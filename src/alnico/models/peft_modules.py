"""Merges the PEFT adapters of a module into its weights, in a copy.

PEFT is never imported here: a module with adapters has imported it already.
"""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import ExitStack
from typing import Any

from alnico.checkpoint.memory_model import TORCH_DTYPES, import_torch, is_torch_tensor
from alnico.errors import ModelError

INSIDE = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT inserts between the name of a module and those of its tensors."""


def _kinds(module: Any) -> set[str]:
    return {c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] == "peft"}


def has_adapters(module: Any) -> bool:
    """Is a module, or a layer in it, wrapped by PEFT?"""
    return any(
        _kinds(m) & {"PeftModel", "BaseTuner", "BaseTunerLayer", "AuxiliaryTrainingWrapper"}
        for m in module.modules()
    )


def without_adapters(module: Any, label: str, *, merge: bool) -> Any:
    """Return a copy of a module without PEFT; with ``merge`` the active adapters are merged into its weights.

    Merging uses float32, or float64 if a tensor has it: ``W + s B A`` for LoRA, and for other kinds what
    PEFT's layers compute. Errors: ModelError for adapters that cannot be merged into weights, are disabled,
    or are on quantised weights.
    """
    layers = [m for m in module.modules() if "BaseTunerLayer" in _kinds(m)]
    _check(module, layers, label)
    plain_module = copy.deepcopy(module)
    if "PeftModel" in _kinds(plain_module):
        plain_module = plain_module.base_model
    if "BaseTuner" in _kinds(plain_module):
        plain_module = plain_module.model
    if merge:
        torch = import_torch("merging adapters")
        real = torch.float64 if any(p.dtype == torch.float64 for p in module.parameters()) else torch.float32
        plain_module._apply(lambda t: t.to(real) if t.is_floating_point() else t)
    try:
        with ExitStack() as plain:
            for kind in {p.device.type for p in module.parameters()} - {"meta"}:
                plain.enter_context(
                    import_torch("merging adapters").autocast(kind, enabled=False)
                )  # the caller's autocast would round products
            plain.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # PEFT warns of what is handled here
            plain_module = _unload(plain_module, merge)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{label}: PEFT cannot merge its adapters into its weights "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); expected adapters that "
            "can be merged, such as LoRA. Pass the module without adapters."
        ) from None
    _untie(plain_module)
    return plain_module


def state_without_adapters(module: Any, label: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a module with its adapters merged, and the dtypes that they count as.

    The names are the base's. Merged tensors count as the dtype that they had; others are the module's own.
    Errors: as for :func:`without_adapters`.
    """
    held: dict[str, list[Any]] = {}
    prefix = ""
    if "PeftModel" in _kinds(module):
        module_inside, prefix = module.base_model, "base_model."
    else:
        module_inside = module
    prefix += "model." if "BaseTuner" in _kinds(module_inside) else ""
    for name, value in module.state_dict().items():
        if is_torch_tensor(value):
            held.setdefault(INSIDE.sub("", name.removeprefix(prefix)), []).append(value)
    state, nominal = {}, {}
    for name, value in without_adapters(module, label, merge=True).state_dict().items():
        if not is_torch_tensor(value):
            continue
        own = held.get(name, [])
        state[name] = next((o for o in own if o.shape == value.shape and bool((o == value).all())), value)
        if state[name] is value and own:
            nominal[name] = TORCH_DTYPES[str(own[-1].dtype).removeprefix("torch.")]
    return state, nominal


def _check(module: Any, layers: list[Any], label: str) -> None:
    if not layers and "PeftModel" in _kinds(module) and "BaseTuner" not in _kinds(module.base_model):
        raise ModelError(
            f"{label}: has an adapter that does not change weights ({type(module).__name__} of PEFT, a "
            "prompt or prefix); expected one that can be merged into them. Pass the module without it."
        )
    if any(getattr(layer, "disable_adapters", False) for layer in layers):
        raise ModelError(
            f"{label}: its adapters are disabled; expected enabled ones. Enable them, or pass the module "
            "without adapters."
        )
    for layer in layers:
        for name, value in layer.get_base_layer().named_parameters(recurse=False):
            if not value.is_floating_point():
                raise ModelError(
                    f"{label}: has adapters on quantised weights ({name} of {type(layer).__name__} is "
                    f"{value.dtype}); expected floating-point weights. Load the base without quantisation "
                    "and put the adapter on it."
                )


def _unload(module: Any, merge: bool) -> Any:
    """Replace the wrappers of PEFT by the layers in them, as its ``merge_and_unload`` does."""
    torch = import_torch("merging adapters")

    def plain(layer: Any) -> Any:
        if hasattr(layer, "get_base_layer"):
            base = layer.get_base_layer()
            for name, value in list(base.named_parameters(recurse=False)):
                # A tied tensor changes only in this layer, because the adapter is only on this layer.
                setattr(
                    base, name, torch.nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
                )
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
        if merge:
            layer.merge()
        return layer.get_base_layer()

    def replace(parent: Any) -> None:
        for name, child in list(parent.named_children()):
            if _kinds(child) & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:
                child = plain(child)
                setattr(parent, name, child)
            replace(child)

    if _kinds(module) & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}:
        module = plain(module)
    replace(module)
    return module


def _untie(module: Any) -> None:
    """Mark the embeddings as untied in the config if an adapter has made them separate tensors."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "tie_word_embeddings", False) and hasattr(module, "get_output_embeddings"):
        ends = (module.get_input_embeddings(), module.get_output_embeddings())
        if (
            all(getattr(end, "weight", None) is not None for end in ends)
            and ends[0].weight is not ends[1].weight
        ):
            config.tie_word_embeddings = False
