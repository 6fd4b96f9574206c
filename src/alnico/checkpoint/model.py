"""Models: a directory of shards (with an index or without), one file, a repository on the hub, or one of these with an adapter.

Files are safetensors, or pickled by torch; where a directory has both, the safetensors are read. :class:`Source` is all the rest of alnico sees of a model: named tensors that can be read in part.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided

from alnico.checkpoint import header as headers
from alnico.checkpoint.computed import read_computed
from alnico.checkpoint.factors import refuse_adapter
from alnico.checkpoint.files import OpenFiles, check_inside, copy_fully, open_to_read, read_fully, read_small
from alnico.errors import HubError, ModelError
from alnico.numerics import dtypes

if TYPE_CHECKING:
    from alnico.checkpoint.hub import Repository

STEM = "model"
DIFFUSERS_STEM = "diffusion_pytorch_model"
"""What the names of weights begin with, as transformers writes them, and diffusers."""
INDEX = f"{STEM}.safetensors.index.json"
INDICES = (INDEX, f"{DIFFUSERS_STEM}.safetensors.index.json")
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_INDICES = (PICKLE_INDEX, f"{DIFFUSERS_STEM}.bin.index.json")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""What trainers leave beside the weights."""
MAX_JSON_BYTES = 200_000_000
"""Longest index or config that is read."""
MAX_JSON_DEPTH = 100
"""Deepest one: what is done with it is written by recursion, which Python bounds at a thousand calls."""
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where half of a character may stand, as JSON writes it."""


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
class Described:
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
    def origin(self) -> Repository | None:
        """The repository and commit on the hub, of a model that comes from there."""
        ...

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        """Files, with their bytes, that must be fetched before ``tensors`` (and the side files) can be read."""
        ...

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        """Bring files to this machine and check them. ``tell`` gets numbers of bytes, from any thread."""
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
    """A source of files. Made by :func:`open_model`; close it, or use it in ``with``."""

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


class FileModel:
    """A model of one or more files."""

    reading_bytes = 0

    def __init__(self, label: str, location: Path, shards: list[Shard], origin: Repository | None = None) -> None:
        self.label = label
        self.location = location
        self.shards = shards
        self.origin = origin
        self.notes = [note for shard in shards for note in shard.notes]
        self._files = OpenFiles(opened=self._refuse_changed)
        self._gathered: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self._place: dict[str, tuple[Shard, headers.TensorInfo]] = {}
        for shard in shards:
            for tensor in shard.header.tensors:
                if tensor.name in self._place:
                    other = self._place[tensor.name][0].name
                    raise ModelError(
                        f"{location}: tensor {tensor.name!r} is in {other} and in {shard.name}; "
                        "it must be in one file. Remove the file that does not belong to the model."
                    )
                self._place[tensor.name] = (shard, tensor)
        self.tensors: Mapping[str, headers.TensorInfo] = {n: t for n, (_, t) in self._place.items()}

    @property
    def held_bytes(self) -> int:
        """Pickled views that are put in row-major order when they are first read, and kept."""
        return sum(t.byte_size for t in self.tensors.values() if t.strides is not None)

    @property
    def directory(self) -> Path | None:
        return self.location if self.location.is_dir() else None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = config_path(self.location)
        return read_json(path) if path is not None else {}

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        if self.origin is None:
            return {}
        files = list(dict.fromkeys(self._file(self._place[name][0]) for name in tensors))
        return self.origin.absent(files + (self.origin.side_files() if side_files else []))

    def fetch(self, files: Iterable[str], tell: Callable[[int], None] | None = None) -> None:
        if self.origin is None:
            return
        wanted = list(files)
        self.origin.fetch(wanted, tell)
        for shard in self.shards:
            if self._file(shard) in wanted and not same_header(found := open_shard(shard.path), shard):
                raise HubError(
                    f"{self.label}: {shard.path.name} arrived with another header ({found.size} bytes) than the one that was "
                    f"planned with ({shard.size} bytes). Remove {shard.path.resolve()} and merge again."
                )

    def _file(self, shard: Shard) -> str:
        return shard.path.relative_to(self.location).as_posix()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        shard, tensor = self._place[name]
        if tensor.strides is not None:
            buffer[:] = self._in_order(name)[offset : offset + len(buffer)]
        elif not tensor.is_stored_as_is:
            real = np.dtype(dtypes.DTYPES[tensor.dtype].storage)
            read_computed(offset, buffer, real, lambda first, out: self._read_negated(name, first, out))
        else:
            with self._files.descriptor(shard.path) as descriptor:
                read_fully(descriptor, buffer, tensor.begin + offset, shard.path, name)

    def _read_negated(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill ``out`` with elements ``first`` on of a tensor whose values are the negative, or the conjugate, of what is stored."""
        shard, tensor = self._place[name]
        raw = out.view(np.uint8)
        with self._files.descriptor(shard.path) as descriptor:
            read_fully(descriptor, memoryview(raw), tensor.begin + first * out.itemsize, shard.path, name)
        dtypes.negate(raw, tensor.dtype, is_negated=tensor.is_negated, is_conjugated=tensor.is_conjugated)

    def _refuse_changed(self, path: Path, descriptor: int) -> None:
        """Refuse a file that is not the one whose header was read. Errors: ModelError."""
        shard = next(s for s in self.shards if s.path == path)
        status = os.fstat(descriptor)
        # Of the hub, a file may come anew while its model is open: what arrives is checked against its header and hash.
        if status.st_size != shard.size or (self.origin is None and status.st_mtime_ns != shard.mtime_ns):
            raise ModelError(
                f"{path}: was changed after its header was read ({_how_changed(shard.size, status.st_size)}); expected the file as it "
                "was. Run the command again when nobody writes the file."
            )

    def place_of(self, name: str) -> tuple[Path, int] | None:
        """The file of a tensor and the byte where it begins; None for one whose bytes do not lie there as they are read."""
        shard, tensor = self._place[name]
        return (shard.path, tensor.begin) if tensor.is_stored_as_is else None

    def copy_to(self, name: str, offset: int, size: int, descriptor: int, begin: int) -> bool:
        """Copy a tensor's raw bytes into a file without reading them, at its byte ``begin``. Returns False where that cannot be."""
        shard, tensor = self._place[name]
        if not tensor.is_stored_as_is:
            return False
        with self._files.descriptor(shard.path) as source:
            return copy_fully(source, tensor.begin + offset, descriptor, begin, size, shard.path, name)

    def _in_order(self, name: str) -> memoryview:
        """The bytes of a strided view in row-major order."""
        with self._lock:
            if name not in self._gathered:
                shard, tensor = self._place[name]
                span = np.empty(tensor.end - tensor.begin, np.uint8)
                with self._files.descriptor(shard.path) as descriptor:
                    read_fully(descriptor, memoryview(span), tensor.begin, shard.path, name)
                width = dtypes.DTYPES[tensor.dtype].bytes
                assert tensor.strides is not None
                view = as_strided(span.view(f"V{width}"), tensor.shape, [s * width for s in tensor.strides])
                raw = np.ascontiguousarray(view).view(np.uint8).reshape(-1)
                if tensor.is_negated or tensor.is_conjugated:
                    dtypes.negate(raw, tensor.dtype, is_negated=tensor.is_negated, is_conjugated=tensor.is_conjugated)
                self._gathered[name] = memoryview(raw)
            return self._gathered[name]

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self, name)

    def identity(self) -> list[dict[str, Any]]:
        if self.origin is not None:  # the commit says more than a time, which a new download changes
            commit = self.origin.commit
            return [{"file": s.name, "size": s.size, "commit": commit, "header": s.header_digest} for s in self.shards]
        return [{"file": s.name, "size": s.size, "mtime_ns": s.mtime_ns, "header": s.header_digest} for s in self.shards]

    def paths(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FileModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<model {self.label}: {len(self.tensors)} tensors in {len(self.shards)} files>"


def _how_changed(before: int, now: int) -> str:
    return f"it had {before} bytes, now {now}" if before != now else "its time is another"


def changed_since(before: Mapping[Path, tuple[int, int]]) -> str:
    """Say which of some files is not what :func:`states_of` saw, and how; '' if all are."""
    for path, (size, mtime_ns) in before.items():
        try:
            status = path.stat()
        except OSError as error:
            return f"{path} ({error.strerror})"
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
            return f"{path} ({_how_changed(size, status.st_size)})"
    return ""


def states_of(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of files; one that is not there has none. Errors: ModelError."""
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
        found[path] = (status.st_size, status.st_mtime_ns)
    return found


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
        raise ModelError(f"{source.label}: {name}: {tensor.dtype} cannot be read as numbers; it can be copied.")
    values = raw.view(storage).reshape(tensor.shape)
    return values.astype(bool) if tensor.dtype == "BOOL" else values


def unwrapped(source: Source) -> Source:
    """The model as it was opened, without what reads it under other names or with the rows of another vocabulary."""
    while (inner := getattr(source, "unmapped", None)) is not None:
        source = inner
    return source


def open_model(reference: str | os.PathLike[str], *, offline: bool = False, may_be_adapter: bool = False) -> Model:
    """Open a model directory, a file, a model on the hub, or ``base+adapter``; reads headers only, and checks them.

    A path that is there wins over the hub, where models are ``owner/name`` or ``owner/name@revision``, and over the ``+`` of an
    adapter; with ``offline`` only what the hub's cache holds is looked at. With ``may_be_adapter`` the factors of an adapter are
    opened as they are, to be looked at. Errors: ModelError for a path that is not there, files that are no model, those of an adapter, an index that does not fit its files or points outside the directory, a header that lies, a pickle that is
    more than tensors, an adapter that does not fit its base, and quantised weights; HubError.
    """
    label = os.fspath(reference)
    try:
        parts = split_adapter(label, is_path)
        if parts is not None:
            from alnico.checkpoint.adapted import open_adapted  # with what it needs, only where it is used

            return open_adapted(label, *parts, offline=offline)
        model = _open(label, Path(os.path.expanduser(label)), offline)
    except OSError as error:
        raise ModelError(f"{label}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    if is_decodable(model.config):
        from alnico.checkpoint.dequantised import DequantisedModel

        try:
            return DequantisedModel(model)
        except BaseException:
            model.close()
            raise
    try:
        _refuse_quantised(model)
        if not may_be_adapter:
            refuse_adapter(label, model.tensors)
    except BaseException:
        model.close()
        raise
    return model


def open_headers(directory: Path) -> FileModel:
    """Open the files of a directory as they are, also quantised ones, whose tensors are then those of the files. Errors: as for
    :func:`open_model`."""
    try:
        return _open(os.fspath(directory), directory, offline=True)
    except OSError as error:
        raise ModelError(f"{directory}: its files cannot be read ({error.strerror}). Check the path and its permissions.") from None


def is_path(reference: str) -> bool:
    try:
        return Path(os.path.expanduser(reference)).exists()
    except PermissionError:  # in a folder of another user: whoever opens it says so
        return True


def split_adapter(reference: str, is_there: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return (base, adapter) of a reference ``base+adapter``; None for one that is a path as it stands, or has no such parts.

    Each part is a path that is there, or looks like a model on the hub; a ``+`` between two paths wins. The adapter may have a
    weight before it, and the base may have adapters itself: ``base+0.5*a+b`` is ``b`` on ``base+0.5*a``.

    >>> split_adapter("org/a@v1+org/b", lambda path: False), split_adapter("a+b+c", lambda path: path in ("a+b", "c"))
    (('org/a@v1', 'org/b'), ('a+b', 'c'))
    >>> split_adapter("base+0.5*a+-1*b", lambda path: path in ("base", "a", "b"))
    ('base+0.5*a', '-1*b')
    """
    if "+" not in reference or is_there(reference):
        return None

    def is_adapter(part: str) -> bool:
        return is_there(part) or is_there(named := split_weight(part)[1]) or is_hub_reference(named)

    def is_base(part: str) -> bool:
        return is_there(part) or is_hub_reference(part) or split_adapter(part, is_there) is not None

    splits = [(reference[:i], reference[i + 1 :]) for i, c in enumerate(reference) if c == "+"]
    splits = [parts for parts in splits if is_adapter(parts[1]) and is_base(parts[0])]
    return max(splits, key=lambda parts: is_there(parts[0]) + is_there(split_weight(parts[1])[1]), default=None)


WEIGHT = re.compile(r"(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*(?P<adapter>.+)")


def split_weight(adapter: str) -> tuple[float, str]:
    """Return the weight and the path of an adapter as it stands in a reference; a path that is there wins.

    >>> split_weight("0.5*a"), split_weight("org/a")
    ((0.5, 'a'), (1.0, 'org/a'))
    """
    found = None if is_path(adapter) else WEIGHT.fullmatch(adapter)
    return (float(found["weight"]), found["adapter"]) if found else (1.0, adapter)


def is_hub_reference(reference: str) -> bool:
    """Does a reference that is no path here look like ``owner/name`` or ``owner/name@revision``?

    >>> [is_hub_reference(r) for r in ("owner/name", "owner/name@v1", "./name", "name", "a/b/c", "a/b.safetensors", "a/b+c/d")]
    [True, True, False, False, False, False, False]
    """
    name = reference.partition("@")[0]
    is_file = name.endswith((".safetensors", *PICKLES))
    return re.fullmatch(r"[^./~\\+][^/\\+]*/[^./\\+][^/\\+]*", name) is not None and not is_file and "+" not in reference


def _open(label: str, location: Path, offline: bool) -> FileModel:
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
        shards = [open_shard(p) for p in _shard_paths(location, bool(modules))]
        shards += [open_shard(location / folder / name, f"{folder}/") for folder, names in modules.items() for name in names]
        model = FileModel(label, location, shards)
        check_index(model)
        model.notes += unread_weights(label, listed_weights(location), [s.name for s in shards])
    elif location.is_file():
        model = FileModel(label, location, [open_shard(location)])
    elif is_hub_reference(label):
        from alnico.checkpoint.hub import open_from_hub  # with huggingface_hub, only where it is used

        model = open_from_hub(label, offline=offline)
    elif "+" in label:
        raise ModelError(
            f"model {label!r}: no such directory or file, and no base+adapter: expected two paths, or ids of the hub as owner/name. "
            "Check both parts."
        )
    else:
        raise ModelError(
            f"model {label!r}: no such directory or file; expected a directory with safetensors files, one such file, or a "
            "model on the hub as owner/name or owner/name@revision. Check the path, or write the hub's id with its owner."
        )
    return model


def open_shard(path: Path, prefix: str = "") -> Shard:
    """Open one file and check its header. ``prefix`` is put before the names of its tensors."""
    if path.suffix in PICKLES:
        from alnico.checkpoint.pickles import open_pickle

        return prefixed(open_pickle(path), prefix)
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)

        def read(offset: int, count: int) -> bytes:
            data = bytearray(count)
            read_fully(descriptor, memoryview(data), offset, str(path))
            return bytes(data)

        return prefixed(read_shard(path, status.st_size, status.st_mtime_ns, str(path), read), prefix)
    finally:
        os.close(descriptor)


def prefixed(shard: Shard, prefix: str) -> Shard:
    """A file with the folder of its module before the names of its tensors."""
    if not prefix:
        return shard
    return replace(shard, header=headers.prefixed(shard.header, prefix), prefix=prefix)


def config_path(location: Path) -> Path | None:
    """Where the config of a model lies: in its directory, or with sentence-transformers' modules in that of its first transformer."""
    if not location.is_dir():
        return None
    own = location / "config.json"
    if own.exists():
        return own
    from alnico.checkpoint.sidecars import module_folders

    paths = (location / folder / "config.json" for folder in module_folders(location))
    return next((path for path in paths if path.exists() and "model_type" in read_json(path)), None)


def read_shard(path: Path, size: int, mtime_ns: int, where: str, read: Callable[[int, int], bytes]) -> Shard:
    """Read and check the header of a file through ``read(offset, count)``, from wherever it lies."""
    text = read(8, headers.parse_length(read(0, min(8, size)), size, where))
    return Shard(path, headers.parse(text, size, where), size, mtime_ns, xxhash.xxh3_128_hexdigest(text))


def same_header(a: Shard, b: Shard) -> bool:
    return (a.size, a.header_digest) == (b.size, b.header_digest)


def read_json(path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """Read a JSON object; of a file that alnico writes, without a key twice and without NaN. Errors: ModelError naming the file."""
    return parse_json(read_small(path, MAX_JSON_BYTES, "a small JSON file"), path, is_ours=is_ours)


def parse_json(data: bytes, path: Path, *, is_ours: bool = False) -> dict[str, Any]:
    """The JSON object of a file: of bounded depth, and of text that can be written again. Errors: ModelError naming the file."""
    try:
        loaded = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_number) if is_ours else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({str(error)[:120]}). The file is damaged; download it again.") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: holds a JSON {type(loaded).__name__}, expected an object. Check the model.")
    if _is_deep(loaded):
        raise ModelError(
            f"{path}: is nested deeper than {MAX_JSON_DEPTH}; expected a file that describes a model. Check the model."
        )
    if HALF.search(data):
        try:
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ModelError(f"{path}: holds half of a character, expected Unicode text. Get the file from its source.") from None
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level for v in (c.values() if type(c) is dict else c) if type(v) in (dict, list)]
        if not level:
            return False
    return True


def _shard_paths(directory: Path, has_modules: bool) -> list[Path]:
    names = [p.name for p in directory.iterdir() if not p.is_dir()]
    if has_modules and not holds_weights(names):
        return []
    found = shard_names(str(directory), names, directory, lambda name: (directory / name).is_file())
    for name in found:
        check_inside(directory / name, directory)
    return [directory / name for name in found]


def holds_weights(names: Iterable[str]) -> bool:
    """Are there files with weights, of the formats that are read, among some names?"""
    return any(n.endswith((".safetensors", *PICKLES)) and not NO_WEIGHTS.fullmatch(n) and not n.startswith(".") for n in names)


def shard_names(where: str, names: Collection[str], folder: Path, is_there: Callable[[str], bool]) -> list[str]:
    """Tell which of a model's files hold its weights: those of the index, if it has one. Hidden files do not: macOS leaves
    ``._model.safetensors`` on other disks, and no loader reads them. Errors: ModelError."""
    names = [name for name in names if not name.startswith(".")]
    if index := next((i for i in INDICES if i in names), None):
        return _indexed_names(folder / index, is_there)
    usual = [f"{stem}.safetensors" for stem in (STEM, DIFFUSERS_STEM)]
    found = _weights_among(where, [n for n in names if n.endswith(".safetensors")], usual)
    if found:
        return found
    if "adapter_config.json" in names:
        raise ModelError(f"{where}: is a LoRA adapter, expected a whole model. Write it with its base, as BASE+{where}.")
    if index := next((i for i in PICKLE_INDICES if i in names), None):
        return _indexed_names(folder / index, is_there)
    pickles = [n for n in names if n.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(n)]
    found = _weights_among(where, pickles, ["pytorch_model.bin", f"{DIFFUSERS_STEM}.bin"])
    if not found and "model_index.json" in names:
        raise ModelError(
            f"{where}: is a pipeline of diffusers, expected one of its parts. Merge its parts by themselves, each by its folder (unet, "
            "transformer, vae, text_encoder), and put the results into a copy of the pipeline."
        )
    if not found:
        raise ModelError(f"{where}: has no .safetensors or .bin file, expected a model. Check the path.")
    if len(found) > 1 and not SHARD_NAME.fullmatch(found[0]):
        raise ModelError(
            f"{where}: has {len(found)} checkpoints ({', '.join(found[:3])}), expected one, or shards with an index. "
            "Give the path of the file that is meant."
        )
    return found


def _weights_among(where: str, names: Collection[str], usual: Sequence[str]) -> list[str]:
    """The files that hold the weights, of files of one format; none if there are none."""
    weights = sorted(n for n in names if not n.startswith("adapter_"))
    if whole := next((name for name in usual if name in weights), None):
        return [whole]
    numbered = {name: match for name in weights if (match := SHARD_NAME.fullmatch(name))}
    return _complete_set(where, numbered) if numbered else weights


def _complete_set(where: str, numbered: dict[str, re.Match[str]]) -> list[str]:
    first = next(iter(numbered.values()))
    stem, count, suffix = first["stem"], max(1, int(first["count"])), first["suffix"]
    expected = [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
    missing = [name for name in expected if name not in numbered]
    surplus = [name for name in numbered if name not in expected]
    if missing or surplus:
        what = f"misses {missing[0]}" if missing else f"has {surplus[0]} beside {expected[0]}"
        raise ModelError(
            f"{where}: {what}; expected the {count} shards of one model, or an index ({INDEX}). Complete the download."
        )
    return expected


def _indexed_names(index: Path, is_there: Callable[[str], bool]) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index}: has no weight_map from tensor names to files. Get the index from the model's source.")
    for tensor, name in weight_map.items():
        if not is_inside(name):
            raise ModelError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, outside the model's directory; "
                "expected a file inside it. Do not use this model: its index is hostile or damaged."
            )
    names = sorted(set(weight_map.values()))
    if (forgotten := _forgotten(names, is_there)) is not None:
        raise ModelError(
            f"{index}: does not list {forgotten}, which lies beside it and is one of the shards of {names[0]}; expected all of them. Index and "
            "shards are of different downloads; download the model again, or remove the file that is no part of the model."
        )
    for name in names:
        if not is_there(name):
            raise ModelError(f"{index}: names {PurePosixPath(name).name}, which is not there. Complete the download.")
    return names


def _forgotten(names: Sequence[str], is_there: Callable[[str], bool]) -> str | None:
    """A shard of the set that an index lists, which lies there and is not listed."""
    for stem, count, suffix in dict.fromkeys((m["stem"], m["count"], m["suffix"]) for n in names if (m := SHARD_NAME.fullmatch(n))):
        expected = (f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))
        found = next((name for name in expected if name not in names and is_there(name)), None)
        if found is not None:
            return found
    return None


def is_inside(name: str) -> bool:
    """Does a relative name stay inside the folder it is relative to?"""
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def check_index(model: FileModel) -> None:
    """Refuse an index that does not say what the headers say. Errors: ModelError."""
    for prefix in dict.fromkeys(shard.prefix for shard in model.shards):
        _check_index([shard for shard in model.shards if shard.prefix == prefix], prefix, model.location / prefix)


def _check_index(shards: Sequence[Shard], prefix: str, folder: Path) -> None:
    is_pickled = any(shard.path.suffix in PICKLES for shard in shards)
    names = (*INDICES, *PICKLE_INDICES) if is_pickled else INDICES
    index = next((path for name in names if (path := folder / name).exists()), None)
    if index is None:
        return
    weight_map = read_json(index)["weight_map"]
    held = {t.name.removeprefix(prefix): s.path for s in shards for t in s.header.tensors}
    paths = {name: folder / name for name in set(weight_map.values())}
    for tensor, name in weight_map.items():
        if held.get(tensor) != paths[name]:
            raise ModelError(
                f"{index}: says that {tensor!r} is in {name}, which does not hold it. "
                "Index and shards are of different downloads; download the model again."
            )
    unlisted = [tensor for tensor in held if tensor not in weight_map]
    if unlisted:
        raise ModelError(
            f"{held[unlisted[0]]}: holds {unlisted[0]!r}, which {index.name} does not list ({len(unlisted)} such tensors). "
            "Index and shards are of different downloads; download the model again."
        )


def stem_of(source: Source) -> str:
    """What the names of a model's weights begin with: diffusers', if the config says that it loads the model, or without a config its
    files are called so; else that of transformers."""
    if source.config:
        return DIFFUSERS_STEM if "_diffusers_version" in source.config else STEM
    return DIFFUSERS_STEM if any(path.name.startswith(DIFFUSERS_STEM) for path in source.paths()) else STEM


def is_decodable(config: Mapping[str, Any]) -> bool:
    """Does a config say fp8 with scales of blocks, which are decoded while they are read?"""
    told = config.get("quantization_config")
    return isinstance(told, dict) and told.get("quant_method") == "fp8" and told.get("weight_block_size") is not None


def _refuse_quantised(model: FileModel) -> None:
    quantisation = model.config.get("quantization_config")
    scales = [n for n in model.tensors if n.endswith((".weight_scale_inv", ".weight_scale", ".qweight", ".absmax"))]
    if quantisation is None and not scales:
        return
    found = f"it has {scales[0]!r}" if scales else "config.json has a quantization_config"
    if isinstance(quantisation, dict):
        found = f"config.json says {quantisation.get('quant_method')!r}"
    raise ModelError(
        f"{model.label}: its weights are quantised ({found}); merging needs values in floating point. "
        "Use the full-precision model; of quantised ones, fp8 with scales of blocks is decoded."
    )
