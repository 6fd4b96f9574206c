"""Opens LoRA adapters: PEFT's folders, and files of other programs that have no config."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from alnico.checkpoint.factors import adapter_factors
from alnico.checkpoint.file_kinds import kind_by_name
from alnico.checkpoint.file_model import FileModel, open_shard
from alnico.checkpoint.files import check_inside
from alnico.checkpoint.lora_adapter import CONFIG, WEIGHTS, Adapter, checked_config
from alnico.checkpoint.near_paths import suggestion
from alnico.checkpoint.reference import PICKLES, is_at_url, is_hub_reference
from alnico.checkpoint.sidecars import check_kinds
from alnico.checkpoint.weight_files import DIFFUSERS_STEM, SHARD_NAME, STEM, holds_weights
from alnico.errors import ModelError
from alnico.run_options import ONLINE, Access

DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""The file of a LoRA folder that diffusers writes. It has no config."""


def open_adapter(reference: str, *, access: Access = ONLINE) -> Adapter:
    """Open a LoRA adapter: a directory as PEFT saves it, or a file of kohya, ComfyUI, diffusers and others, also on the hub.

    Reads headers, and of a file without a config its alphas, and checks them.
    Errors: ModelError for something that is not an adapter, a config option that is not supported, a missing
    factor, a rank that differs between config and tensors, or names that mix the dialects of several programs; HubError.
    """
    try:
        files = _open(reference, access)
    except OSError as error:
        raise ModelError(
            f"adapter {reference}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    return adapter_of(files)


def adapter_of(files: FileModel) -> Adapter:
    """Return an adapter of its files, which are closed if it is none. Errors: ModelError, as for :func:`open_adapter`."""
    try:
        if os.path.lexists(files.location / CONFIG):
            return Adapter(files, checked_config(files))
        if not is_lora_file(files.tensors):
            raise ModelError(
                f"{files.label}: has no {CONFIG} and no factors of LoRA; expected a LoRA adapter. It is a whole model: merge "
                "it by a recipe, or make an adapter of it with `alnico lora extract`."
            )
        from alnico.checkpoint.lora_dialects.dialect_adapter import adapter_without_config

        return adapter_without_config(files)
    except BaseException:
        files.close()
        raise


def is_lora_file(names: Collection[str]) -> bool:
    """Are these the names of the tensors of a LoRA file, and not of a model?

    >>> is_lora_file(["lora_unet_q.diff"]), is_lora_file(["q.lora_A.weight", "q.lora_B.weight"]), is_lora_file(["q.weight"]), is_lora_file([])
    (True, True, False, False)
    """
    if adapter_factors(names):
        return True
    from alnico.checkpoint.lora_dialects.factor_names import split_ending

    return bool(names) and all(map(split_ending, names))


def _open(reference: str, access: Access) -> FileModel:
    location = Path(os.path.expanduser(reference))
    if location.is_dir():
        check_kinds(location)
        names = adapter_names(reference, [p.name for p in location.iterdir()])
        for name in (CONFIG, *names):
            check_inside(location / name, location)
        return FileModel(reference, location, [open_shard(location / n) for n in names])
    if location.is_file() and not _is_of_peft(location):
        return FileModel(reference, location, [open_shard(location)])
    if not location.exists() and is_at_url(reference):
        from alnico.checkpoint.remote.open_remote_model import open_remote_model

        return open_remote_model(
            reference,
            access=access,
            choose=lambda where, names, *_: adapter_names(where, names),
            is_whole=True,
        )
    if not location.exists() and is_hub_reference(reference):
        from alnico.checkpoint.hub import open_from_hub

        return open_from_hub(
            reference, access=access, choose=lambda where, names, *_: adapter_names(where, names)
        )
    advice = suggestion(reference, "Check the path.", accepts=Path.is_dir)
    if location.is_file():
        advice = f"Give the folder: {location.parent}."
    raise ModelError(
        f"{reference}: is not a directory; expected that of a LoRA adapter, with {CONFIG} and {WEIGHTS[0]}, or a file of "
        f"LoRA factors. {advice}"
    )


def _is_of_peft(path: Path) -> bool:
    """Is a file the weights of a PEFT adapter, whose config is next to it?"""
    return path.name in WEIGHTS and (path.parent / CONFIG).is_file()


def adapter_names(where: str, names: Collection[str]) -> list[str]:
    """Return the names of the weight files of an adapter, among those of a folder. Errors: ModelError."""
    weights = [n for n in WEIGHTS if n in names]
    if CONFIG in names and weights:
        return weights[:1]
    alone = _without_config(names) if CONFIG not in names else []
    if len(alone) == 1:
        return alone
    if alone:
        raise ModelError(
            f"{where}: has no {CONFIG} and {len(alone)} files of weights ({', '.join(sorted(alone)[:3])}); expected one LoRA file, or one "
            f"named {DIFFUSERS_WEIGHTS[0]}. Give the path of the file to use; of a repository on the hub, download it first."
        )
    lacking = CONFIG if CONFIG not in names else f"{WEIGHTS[0]} and no {WEIGHTS[1]}"
    advice = "Check the path."
    if CONFIG not in names and holds_weights(n for n in names if n not in WEIGHTS):
        advice = (
            "It is a whole model: merge it by a recipe, or make an adapter of it with `alnico lora extract`."
        )
    elif (unread := kind_by_name(names)) is not None:
        advice = f"It has {unread[0]}, {unread[1].name}: use the adapter that it was converted from."
    raise ModelError(f"{where}: has no {lacking}, expected a LoRA adapter as PEFT saves it. {advice}")


def _without_config(names: Collection[str]) -> list[str]:
    """Return the file of LoRA factors in a folder without a config: the one that diffusers writes, or all that may be one."""
    named = [n for n in DIFFUSERS_WEIGHTS if n in names]
    if named:
        return named[:1]
    weights = [
        n
        for n in names
        if n.endswith((".safetensors", *PICKLES))
        and holds_weights([n])
        and n not in WEIGHTS
        and not n.startswith((f"{STEM}.", f"{DIFFUSERS_STEM}."))
        and not SHARD_NAME.fullmatch(n)
    ]
    return weights if "config.json" not in names else []
