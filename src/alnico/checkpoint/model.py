"""Models on disk: a directory of safetensors shards (with an index or without) or one file.

:class:`Source` is all the rest of alnico sees of a model: named tensors that can be read in part.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import xxhash

from alnico.checkpoint import header as headers
from alnico.checkpoint.files import OpenFiles, open_to_read, read_fully
from alnico.errors import ModelError
from alnico.numerics import dtypes

INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 200_000_000
"""Longest index or config that is read."""


class Tensor(Protocol):
    """What the header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def elements(self) -> int: ...
    @property
    def byte_size(self) -> int: ...


class Source(Protocol):
    """Anything with named tensors that can be read in part."""

    @property
    def label(self) -> str:
        """The model's name in messages, as the recipe writes it."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, in the order in which reading them is fastest."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json``, or an empty mapping."""
        ...

    @property
    def directory(self) -> Path | None:
        """Where the side files (tokenizer, config) lie, if anywhere."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's raw bytes from byte ``offset`` of the tensor on. Safe for threads."""
        ...

    def identity(self) -> list[dict[str, Any]]:
        """What tells this model from a changed one without reading it: a mapping a file."""
        ...

    def paths(self) -> list[Path]:
        """The files it is read from, if it is read from files."""
        ...

    def close(self) -> None:
        """Close the open files."""
        ...


@dataclass(frozen=True)
class Shard:
    """One input file with its checked header; size and mtime are of the moment when the header was read."""

    path: Path
    header: headers.Header
    size: int
    mtime_ns: int
    header_digest: str


class SafetensorsModel:
    """A model of one or more safetensors files. Made by :func:`open_model`; close it, or use it in ``with``."""

    def __init__(self, label: str, location: Path, shards: list[Shard]) -> None:
        self.label = label
        self.location = location
        self.shards = shards
        self._files = OpenFiles()
        self._place: dict[str, tuple[Shard, headers.TensorInfo]] = {}
        for shard in shards:
            for tensor in shard.header.tensors:
                if tensor.name in self._place:
                    other = self._place[tensor.name][0].path.name
                    raise ModelError(
                        f"{location}: tensor {tensor.name!r} is in {other} and in {shard.path.name}; "
                        "it must be in one file. Remove the file that does not belong to the model."
                    )
                self._place[tensor.name] = (shard, tensor)
        self.tensors: Mapping[str, headers.TensorInfo] = {n: t for n, (_, t) in self._place.items()}

    @property
    def directory(self) -> Path | None:
        return self.location if self.location.is_dir() else None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = self.location / "config.json"
        return read_json(path) if self.location.is_dir() and path.exists() else {}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        shard, tensor = self._place[name]
        with self._files.descriptor(shard.path) as descriptor:
            read_fully(descriptor, buffer, tensor.begin + offset, f"{shard.path}: {name}")

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor as a numpy array; BF16 and F16 come as float32.

        Errors: ModelError for a name that is not there or a dtype that numpy cannot hold.
        """
        if name not in self._place:
            raise ModelError(f"{self.label}: has no tensor {name!r}. `alnico inspect` lists the tensors.")
        tensor = self._place[name][1]
        raw = np.empty(tensor.byte_size, np.uint8)
        self.read_into(name, 0, memoryview(raw))
        if tensor.dtype in dtypes.MERGEABLE:
            return dtypes.decode(raw, tensor.dtype).reshape(tensor.shape)
        storage = dtypes.DTYPES[tensor.dtype].storage
        if storage is None or dtypes.DTYPES[tensor.dtype].kind == "packed":
            raise ModelError(f"{self.label}: {name}: {tensor.dtype} cannot be read as numbers; it can be copied.")
        values = raw.view(storage).reshape(tensor.shape)
        return values.astype(bool) if tensor.dtype == "BOOL" else values

    def identity(self) -> list[dict[str, Any]]:
        return [{"file": s.path.name, "size": s.size, "mtime_ns": s.mtime_ns, "header": s.header_digest} for s in self.shards]

    def paths(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> SafetensorsModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors in {len(self.shards)} files>"


def open_model(reference: str | os.PathLike[str]) -> SafetensorsModel:
    """Open a model directory or a ``.safetensors`` file; reads headers only, and checks them.

    Errors: ModelError for a path that is not there, files that are no safetensors model, an index that does not fit
    its files or points outside the directory, a header that lies, and quantised weights.
    """
    label = os.fspath(reference)
    try:
        model = _open(label, Path(os.path.expanduser(label)))
    except OSError as error:
        raise ModelError(f"{label}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    _refuse_quantised(model)
    return model


def _open(label: str, location: Path) -> SafetensorsModel:
    if location.is_dir():
        model = SafetensorsModel(label, location, [open_shard(p) for p in _shard_paths(location)])
        _check_index(model)
    elif location.is_file():
        if location.suffix in PICKLES:
            raise ModelError(_pickle_message(location))
        model = SafetensorsModel(label, location, [open_shard(location)])
    else:
        raise ModelError(
            f"model {label!r}: no such directory or file; expected a directory with safetensors files, or one such file. "
            "Hub ids are not fetched by this version (planned for 0.2): download the model and give its path."
        )
    return model


def open_shard(path: Path) -> Shard:
    """Open one safetensors file and check its header."""
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        prefix = bytearray(min(8, status.st_size))
        read_fully(descriptor, memoryview(prefix), 0, str(path))
        length = headers.parse_length(bytes(prefix), status.st_size, str(path))
        text = bytearray(length)
        read_fully(descriptor, memoryview(text), 8, str(path))
    finally:
        os.close(descriptor)
    header = headers.parse(bytes(text), status.st_size, str(path))
    return Shard(path, header, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(text))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Errors: ModelError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than {MAX_JSON_BYTES} bytes; expected a small JSON file. Check the model.")
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({str(error)[:120]}). The file is damaged; download it again.") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: holds a JSON {type(loaded).__name__}, expected an object. Check the model.")
    return loaded


def _shard_paths(directory: Path) -> list[Path]:
    if (directory / INDEX).exists():
        return _indexed_paths(directory)
    names = sorted(p.name for p in directory.iterdir() if p.suffix == ".safetensors" and not p.is_dir())
    if "model.safetensors" in names:
        return [directory / "model.safetensors"]
    numbered = {name: match for name in names if (match := SHARD_NAME.fullmatch(name))}
    if numbered:
        return [directory / name for name in _complete_set(directory, numbered)]
    names = [n for n in names if not n.startswith("adapter_")]
    if names:
        return [directory / name for name in names]
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory}: is a LoRA adapter, expected a whole model. Adapters are planned for 0.6: fold it into its base first."
        )
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ModelError(_pickle_message(directory / pickles[0]))
    raise ModelError(f"{directory}: has no .safetensors file, expected a model. Check the path.")


def _complete_set(directory: Path, numbered: dict[str, re.Match[str]]) -> list[str]:
    first = next(iter(numbered.values()))
    stem, count = first["stem"], max(1, int(first["count"]))
    expected = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    missing = [name for name in expected if name not in numbered]
    surplus = [name for name in numbered if name not in expected]
    if missing or surplus:
        what = f"misses {missing[0]}" if missing else f"has {surplus[0]} beside {expected[0]}"
        raise ModelError(
            f"{directory}: {what}; expected the {count} shards of one model, or an index ({INDEX}). Complete the download."
        )
    return expected


def _indexed_paths(directory: Path) -> list[Path]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index}: has no weight_map from tensor names to files. Get the index from the model's source.")
    for tensor, name in weight_map.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
            raise ModelError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, outside the model's directory; "
                "expected a file inside it. Do not use this model: its index is hostile or damaged."
            )
    paths = [directory / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if path.suffix in PICKLES:
            raise ModelError(_pickle_message(path))
        if not path.is_file():
            raise ModelError(f"{index}: names {path.name}, which is not there. Complete the download.")
    return paths


def _check_index(model: SafetensorsModel) -> None:
    index = model.location / INDEX
    if not index.exists():
        return
    weight_map = read_json(index)["weight_map"]
    held = {t.name: s.path for s in model.shards for t in s.header.tensors}
    for tensor, name in weight_map.items():
        if held.get(tensor) != model.location / name:
            raise ModelError(
                f"{index}: says that {tensor!r} is in {name}, which does not hold it. "
                "Index and shards are of different downloads; download the model again."
            )
    unlisted = [tensor for tensor in held if tensor not in weight_map]
    if unlisted:
        raise ModelError(
            f"{held[unlisted[0]]}: holds {unlisted[0]!r}, which {INDEX} does not list ({len(unlisted)} such tensors). "
            "Index and shards are of different downloads; download the model again."
        )


def _refuse_quantised(model: SafetensorsModel) -> None:
    quantisation = model.config.get("quantization_config")
    scales = [n for n in model.tensors if n.endswith((".weight_scale_inv", ".weight_scale", ".qweight", ".absmax"))]
    if quantisation is None and not scales:
        return
    found = f"it has {scales[0]!r}" if scales else "config.json has a quantization_config"
    if isinstance(quantisation, dict):
        found = f"config.json says {quantisation.get('quant_method')!r}"
    raise ModelError(
        f"{model.label}: its weights are quantised ({found}); merging needs values in floating point. "
        "Quantised models are planned for 0.6; use the full-precision model."
    )


def _pickle_message(path: Path) -> str:
    return (
        f"{path}: is a pickle checkpoint, expected .safetensors. "
        "Reading these files is planned for 0.3, with the extra [torch]; convert the model to safetensors."
    )
