"""Opens any kind of model: a directory, a file, a model on the hub, or a base with adapters."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from alnico.checkpoint.factors import refuse_adapter
from alnico.checkpoint.file_arguments import model_path
from alnico.checkpoint.file_model import FileModel, check_index, open_shard
from alnico.checkpoint.lora_adapter import Adapter
from alnico.checkpoint.lora_model import AdaptedModel
from alnico.checkpoint.near_paths import near_path, suggestion
from alnico.checkpoint.open_adapter import adapter_names, adapter_of, open_adapter
from alnico.checkpoint.pipelines import is_pipeline
from alnico.checkpoint.quantised.dequantised_model import DequantisedModel, may_be_quantised
from alnico.checkpoint.reference import (
    HUB_ADDRESS,
    check_urls,
    is_at_url,
    is_hub_reference,
    is_path,
    is_store_reference,
    may_hold_model,
    split_adapter,
    split_blocks,
    split_step,
    split_weight,
)
from alnico.checkpoint.remote.open_folder import intended_url
from alnico.checkpoint.source import Model
from alnico.checkpoint.task_vector_file import refuse_task_vector
from alnico.checkpoint.task_vectors.delta_chain import DeltaChain, open_chain
from alnico.checkpoint.task_vectors.equipped_model import EquippedModel
from alnico.checkpoint.task_vectors.manifest import MANIFEST, read_manifest
from alnico.checkpoint.task_vectors.saved_difference import is_saved_difference
from alnico.checkpoint.task_vectors.stored_vector import StoredVector, files_on_hub, open_vector
from alnico.checkpoint.training.open_training import open_trained
from alnico.checkpoint.training.sharded_model import ShardedModel
from alnico.checkpoint.weight_files import GGUF_ENDING, _shard_paths, gguf_path
from alnico.errors import ModelError
from alnico.run_options import OFFLINE, ONLINE, Access


def open_model(
    reference: str | os.PathLike[str], *, access: Access = ONLINE, may_be_adapter: bool = False
) -> Model:
    """Open a model directory, a file (also GGUF), a model on the hub, or ``base+adapter``; reads headers only, and
    checks them.

    An existing path wins over the hub, where models are ``owner/name`` or ``owner/name@revision``, and over
    the ``+`` of an adapter or a task vector. ``RUN@STEP`` is a step of a training run with anchors and deltas; ``PATH@PART`` is a
    part of a trainer's checkpoint, such as ``last.ckpt@ema``, its averaged weights. With ``offline`` only the hub's cache is used. With ``may_be_adapter`` an
    adapter's factors, and the tensors of a task vector, are opened as plain tensors, for inspection. Errors: ModelError for a missing path,
    files that are not a model, an adapter, an index that does not match its files or points outside the
    directory, a wrong header, a pickle with more than tensors, an adapter that does not fit its base, and
    weights that are quantised in a way that is not read; HubError.
    """
    label = model_path(reference, "model")
    try:
        if not is_path(label):
            check_urls(label)
        parts = split_adapter(label, is_path)
        if parts is not None:
            return open_adapted(label, *parts, access=access)
        if not os.path.exists(os.path.expanduser(label)) and (chain := split_step(label)) is not None:
            return open_chain(label, *chain)
        if os.path.lexists(os.path.join(os.path.expanduser(label), MANIFEST)):
            return _inspected(label, access, may_be_adapter)
        location = Path(os.path.expanduser(label))
        if (file := gguf_path(label, location)) is not None:
            from alnico.checkpoint.gguf.open_gguf import open_gguf

            return open_gguf(label, file)
        if label.endswith(GGUF_ENDING) and is_at_url(label):
            from alnico.checkpoint.gguf.open_gguf import open_gguf_at_url

            return open_gguf_at_url(label, access)
        trained = open_trained(label)
        model = _open_files(label, location, access) if trained is None else trained
    except OSError as error:
        raise ModelError(
            f"{label}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None
    opened: Model = model
    try:
        if may_be_quantised(model):
            from alnico.checkpoint.quantised.formats import (
                open_quantised,
                refuse_quantised,
            )  # with all formats

            if isinstance(model, FileModel):
                opened = open_quantised(model)
            else:
                refuse_quantised(model)
        if not may_be_adapter and opened is model:
            refuse_task_vector(model)
            refuse_adapter(label, model.tensors)
    except BaseException:
        model.close()
        raise
    return opened


def _inspected(label: str, access: Access, may_be_adapter: bool) -> Model:
    """Open the stored tensors of a task vector, for inspection. Errors: ModelError where a model is expected."""
    vector = open_vector(label, access=access)
    if not may_be_adapter:
        vector.close()
        base = vector.manifest.base.id
        raise ModelError(
            f"{label}: is a stored task vector{f' of {base}' if base else ''}, a difference of two models; expected a whole model. Put it "
            f"on its base: {base or 'BASE'}+{label}."
        )
    return vector.files


def open_headers(directory: Path) -> FileModel:
    """Open the files of a directory as stored: quantised tensors are not decoded. Errors: as for
    :func:`open_model`."""
    try:
        return _open_files(os.fspath(directory), directory, OFFLINE)
    except OSError as error:
        raise ModelError(
            f"{directory}: its files cannot be read ({error.strerror}). Check the path and its permissions."
        ) from None


def _open_files(label: str, location: Path, access: Access) -> FileModel:
    if location.is_dir():
        from alnico.checkpoint.sidecars import (  # they read JSON by this file
            check_kinds,
            check_links,
            listed_weights,
            module_weights,
            unread_weights,
        )

        check_kinds(location)
        check_links(location)
        modules = module_weights(location)
        own = [] if modules and is_pipeline(location) else _shard_paths(location, bool(modules))
        shards = [open_shard(p) for p in own]
        shards += [
            open_shard(location / folder / name, f"{folder}/")
            for folder, names in modules.items()
            for name in names
        ]
        model = FileModel(label, location, shards)
        check_index(model)
        model.notes += unread_weights(label, listed_weights(location), [s.name for s in shards])
    elif location.is_file():
        if os.path.lexists(location.parent / MANIFEST):
            raise ModelError(
                f"{label}: is a file of a task vector; expected a model. Give the task vector's folder with its base: "
                f"BASE+{location.parent}."
            )
        model = FileModel(label, location, [open_shard(location)])
    elif is_at_url(label):
        from alnico.checkpoint.remote.open_remote_model import open_remote_model

        model = open_remote_model(label, access=access)
    elif is_hub_reference(label):
        from alnico.checkpoint.hub import open_from_hub  # with huggingface_hub, only where it is used

        model = open_from_hub(label, access=access)
        if access.stream:
            from alnico.checkpoint.remote.open_remote_model import stream_weights

            stream_weights(model, access)
    elif "+" in label:
        parts = [split_weight(part)[1] for part in label.split("+")]
        near = {part: near_path(part, accepts=may_hold_model) for part in parts if not is_path(part)}
        hint = "".join(
            f" {part!r} is not there. {f'Did you mean {path}?' if path else 'Check the path.'}"
            for part, path in near.items()
            if path or not (is_hub_reference(part) or is_store_reference(part))
        )
        raise ModelError(
            f"model {label!r}: no such directory or file, and not base+adapter; expected two paths, or hub "
            f"ids as owner/name.{hint or ' Check both parts.'}"
        )
    else:
        otherwise = "Check the path, or write the hub id with its owner."
        if address := HUB_ADDRESS.fullmatch(label):
            revision = f"@{address['revision']}" if address["revision"] not in (None, "main") else ""
            otherwise = f"Write the id in place of the address: {address['id']}{revision}."
        elif (url := intended_url(label)) is not None:
            otherwise = f"A URL has two slashes, and is text, not a Path. Write {url}."
        elif re.search(r"\$\w|\$\{|%\w+%", label):
            otherwise = "Variables are not replaced. Write the path itself."
        raise ModelError(
            f"model {label!r}: no such directory or file; expected a directory with safetensors files, one "
            "such file, or a model on the hub as owner/name or owner/name@revision. "
            f"{suggestion(label, otherwise, accepts=may_hold_model)}"
        )
    return model


def open_adapted(
    label: str, base: str, adapter: str, *, access: Access = ONLINE
) -> AdaptedModel | EquippedModel:
    """Open a base with an adapter or a task vector, which may have a weight before it (``0.5*adapter``), and an adapter also strengths by
    block (``0.5[IN04=0.5,MID=0]*adapter``); reads headers only.

    Errors: ModelError for something that is neither, a config option that this version does not apply,
    tensors that match none of the base's, and shapes that do not fit; MismatchError for a task vector of another base;
    HubError; what :func:`open_model` raises for the base.
    """
    weight, reference = split_weight(adapter)
    blocks = split_blocks(adapter)
    base_model = open_model(base, access=access)
    try:
        files = _open_addition(reference, access)
        try:
            if isinstance(files, StoredVector):
                if blocks:
                    raise ModelError(
                        f"{label}: {reference} is a task vector, and [{blocks}] are strengths of blocks; expected an adapter. Leave them "
                        "out."
                    )
                return EquippedModel(label, base_model, files, weight)
            if blocks:
                from alnico.checkpoint.lora_dialects.block_strengths import parse_blocks, with_strengths

                files = with_strengths(files, parse_blocks(blocks))
            return AdaptedModel(label, base_model, files, weight)
        except BaseException:
            files.close()
            raise
    except BaseException:
        base_model.close()
        raise


def _open_addition(reference: str, access: Access) -> Adapter | StoredVector:
    """Open what is added to a base: an adapter, or a task vector. Errors: ModelError, HubError."""
    path = Path(os.path.expanduser(reference))
    if not path.exists() and (is_at_url(reference) or is_hub_reference(reference)):
        files = _open_addition_elsewhere(reference, access)
        if not (files.location / MANIFEST).exists():
            return adapter_of(files)
        try:
            return StoredVector(reference, files, read_manifest(files.location))
        except BaseException:
            files.close()
            raise
    is_vector = os.path.lexists(path / MANIFEST) or (is_store_reference(reference) and not path.exists())
    if is_vector or (path.exists() and is_saved_difference(path)):
        return open_vector(reference, access=access)
    return open_adapter(reference, access=access)


def _open_addition_elsewhere(reference: str, access: Access) -> FileModel:
    """Open an adapter or a task vector on the hub or at a URL."""

    def choose(where: str, names: Collection[str], folder: Path, exists: Callable[[str], bool]) -> list[str]:
        return (
            files_on_hub(where, names, folder, exists) if MANIFEST in names else adapter_names(where, names)
        )

    if is_at_url(reference):
        from alnico.checkpoint.remote.open_remote_model import open_remote_model

        return open_remote_model(reference, access=access, choose=choose, is_whole=True)
    from alnico.checkpoint.hub import open_from_hub

    return open_from_hub(reference, access=access, choose=choose)


MODEL_TYPES = (FileModel, AdaptedModel, DequantisedModel, EquippedModel, DeltaChain, ShardedModel)


def is_opened_model(value: object) -> bool:
    """Is a value a model that :func:`open_model` opened? The type for GGUF is imported with the first such model."""
    gguf = sys.modules.get("alnico.checkpoint.gguf.gguf_model")
    return isinstance(value, MODEL_TYPES) or (gguf is not None and isinstance(value, gguf.GgufModel))
