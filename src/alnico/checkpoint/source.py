"""Protocols of a model as everything else sees it: named tensors that can be read in part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint import header as headers
from alnico.errors import ModelError, NonFiniteError
from alnico.numerics import dtypes


class Tensor(Protocol):
    """What a header says about a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def elements(self) -> int: ...
    @property
    def byte_size(self) -> int: ...
    @property
    def nominal(self) -> str:
        """The dtype that the output's is derived from: the file's, where values are read in a wider dtype
        than stored."""
        ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A :class:`Tensor` without a header in a file: computed, gathered, in memory, or not written yet."""

    dtype: str
    shape: tuple[int, ...]
    nominal: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_size(self) -> int:
        return self.elements * dtypes.DTYPES[self.dtype].bits // 8


class Origin(Protocol):
    """Where a model comes from: a repository on the hub, at one commit."""

    @property
    def name(self) -> str: ...
    @property
    def commit(self) -> str: ...
    @property
    def folder(self) -> Path:
        """The folder of its files, also before they are downloaded."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """All files of the commit, with their sizes in bytes."""
        ...

    def absent(self, files: Iterable[str]) -> dict[str, int]:
        """Those of the files that are not on this machine yet, with their sizes in bytes."""
        ...

    def side_files(self) -> list[str]:
        """The names of the files other than weights."""
        ...

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Download files and check them. ``report`` receives numbers of bytes, from any thread."""
        ...


class Source(Protocol):
    """Anything with named tensors that can be read in part."""

    @property
    def label(self) -> str:
        """The model's name in messages, as written in the recipe."""
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
        """The folder of the side files (tokenizer, config), if there is one."""
        ...

    @property
    def origin(self) -> Origin | None:
        """The hub repository and commit of a model that comes from there."""
        ...

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """Files, with their sizes in bytes, to fetch before ``tensors`` (and the side files) can be read."""
        ...

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Download files and check them. ``report`` receives numbers of bytes, from any thread."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's raw bytes, from byte ``offset`` of the tensor on. Thread-safe."""
        ...

    def identity(self) -> list[dict[str, Any]]:
        """A mapping per file that identifies this version of the model without reading it."""
        ...

    def paths(self) -> list[Path]:
        """The files that it is read from, if any."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that it holds while open, besides headers: an adapter's factors, for example."""
        ...

    @property
    def reading_bytes(self) -> int:
        """Memory that one thread needs to read, besides its buffer."""
        ...

    def close(self) -> None:
        """Close the open files."""
        ...


class Model(Source, Protocol):
    """A source in files. Made by :func:`alnico.checkpoint.open_model.open_model`; close it, or use it in
    ``with``."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The files, with their headers."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for the user on how the files were read."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor as a numpy array; BF16, F16 and F8 become float32. Downloads the file of a
        model on the hub.

        Errors: ModelError for an unknown name or a dtype that numpy cannot hold; HubError.
        """
        ...

    def __enter__(self) -> Model: ...
    def __exit__(self, *_: object) -> None: ...


class FactorSource(Source, Protocol):
    """The tensors of an adapter: in files, in memory, or computed from those."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The files, with their headers."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for the user on how the files were read."""
        ...


@dataclass(frozen=True)
class Shard:
    """One input file with its checked header; size and mtime are those at the time the header was read.

    A file that is still on the hub has its future path and no mtime. Tensors of a file in a module's folder
    have the folder, ``prefix``, before their name in the file: ``2_Dense/linear.weight``.
    """

    path: Path
    header: headers.Header
    size: int
    mtime_ns: int
    header_digest: str
    notes: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def name(self) -> str:
        """The file's name, with its folder if it is in a module's folder."""
        return self.prefix + self.path.name


def read_tensor(source: Source, name: str) -> np.ndarray:
    """Read a whole tensor of any source, as :meth:`Model.read` does."""
    if name not in source.tensors:
        raise ModelError(f"{source.label}: has no tensor {name!r}. `alnico inspect` lists the tensors.")
    tensor = source.tensors[name]
    source.fetch(source.absent([name], False))
    raw = np.empty(tensor.byte_size, np.uint8)
    source.read_into(name, 0, memoryview(raw))
    if tensor.dtype in dtypes.MERGEABLE:
        return dtypes.decode(raw, tensor.dtype).reshape(tensor.shape)
    storage = dtypes.DTYPES[tensor.dtype].storage
    if storage is None or dtypes.DTYPES[tensor.dtype].kind == "packed":
        raise ModelError(f"{source.label}: {name}: {tensor.dtype} cannot be read as numbers, only copied.")
    values = raw.view(storage).reshape(tensor.shape)
    return values.astype(bool) if tensor.dtype == "BOOL" else values


def read_finite(source: Source, name: str, dtype: np.dtype[Any]) -> np.ndarray:
    """Read a tensor of an adapter in ``dtype``. Errors: NonFiniteError, naming tensor and index, for a NaN or an infinity."""
    values = read_tensor(source, name).astype(dtype)
    if not np.isfinite(values).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(values))[0]]
        value = "NaN" if np.isnan(values[tuple(index)]) else "an infinity"
        raise NonFiniteError(
            f"{source.label}: {name}{index or ''} has {value}; expected finite numbers. Fix this adapter "
            "or leave it out."
        )
    return values


class SourceWrapper(Protocol):
    """A source that reads another one, ``wrapped``, in a different form. What a wrapper does not define
    itself comes from there."""

    wrapped: Source

    @property
    def label(self) -> str:
        return self.wrapped.label

    @property
    def config(self) -> Mapping[str, Any]:
        return self.wrapped.config

    @property
    def directory(self) -> Path | None:
        return self.wrapped.directory

    @property
    def location(self) -> Path | None:
        return getattr(self.wrapped, "location", None)

    @property
    def origin(self) -> Origin | None:
        return self.wrapped.origin

    @property
    def held_bytes(self) -> int:
        return self.wrapped.held_bytes

    @property
    def reading_bytes(self) -> int:
        return self.wrapped.reading_bytes

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        self.wrapped.fetch(files, report)

    def paths(self) -> list[Path]:
        return self.wrapped.paths()

    def close(self) -> None:
        self.wrapped.close()


def unwrap(source: Source) -> Source:
    """Return the model as it was opened, without any :class:`SourceWrapper` around it."""
    while (inner := getattr(source, "wrapped", None)) is not None:
        source = inner
    return source
