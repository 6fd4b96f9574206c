"""What the rest of alnico sees of a model: named tensors that can be read in part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alnico.checkpoint import header as headers
from alnico.errors import ModelError
from alnico.numerics import dtypes


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
    @property
    def nominal(self) -> str:
        """The dtype that the output's is derived from: that of the file, where values are read wider than they are kept."""
        ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A :class:`Tensor` that no file's header describes: one that is computed, gathered, in memory, or not made yet."""

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
        """Where its files lie, or will when they are fetched."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """All files of the commit, with their bytes."""
        ...

    def absent(self, files: Iterable[str]) -> dict[str, int]:
        """Files that are not on this machine yet, with their bytes."""
        ...

    def side_files(self) -> list[str]:
        """The names of the files beside the weights."""
        ...

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Bring files to this machine and check them. ``report`` gets numbers of bytes, from any thread."""
        ...


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

    @property
    def origin(self) -> Origin | None:
        """The repository and commit on the hub, of a model that comes from there."""
        ...

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """Files, with their bytes, that must be fetched before ``tensors`` (and the side files) can be read."""
        ...

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Bring files to this machine and check them. ``report`` gets numbers of bytes, from any thread."""
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

    @property
    def held_bytes(self) -> int:
        """Memory it takes beside its header, as long as it is open: an adapter's factors, say."""
        ...

    @property
    def reading_bytes(self) -> int:
        """Memory that one thread takes while it reads, beside its buffer."""
        ...

    def close(self) -> None:
        """Close the open files."""
        ...


class Model(Source, Protocol):
    """A source of files. Made by :func:`alnico.checkpoint.open_model.open_model`; close it, or use it in ``with``."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The files, with their headers."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of how the files were understood."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor as a numpy array; BF16, F16 and F8 come as float32. Of a model on the hub, its file is fetched.

        Errors: ModelError for a name that is not there or a dtype that numpy cannot hold; HubError.
        """
        ...

    def __enter__(self) -> Model: ...
    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Shard:
    """One input file with its checked header; size and mtime are of the moment when the header was read.

    A file that is still on the hub has the path where it will be, and no mtime. Tensors of a file in a module's folder are named by
    the folder, ``prefix``, and their name in the file: ``2_Dense/linear.weight``.
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
        """The file's name, in a module's folder with the folder."""
        return self.prefix + self.path.name


def read_tensor(source: Source, name: str) -> np.ndarray:
    """Read a whole tensor of any source, as :meth:`Model.read` says."""
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
        raise ModelError(
            f"{source.label}: {name}: {tensor.dtype} cannot be read as numbers; it can be copied."
        )
    values = raw.view(storage).reshape(tensor.shape)
    return values.astype(bool) if tensor.dtype == "BOOL" else values


class SourceWrapper(Protocol):
    """A source that reads another one, ``wrapped``, in a different form. What a wrapper does not define itself comes from there."""

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
