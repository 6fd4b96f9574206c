"""Where the tensors lie in a checkpoint that torch has pickled: ``.bin``, ``.pt``, ``.pth``, ``.ckpt``.

Neither torch nor any code of the file is run. Its pickle is read by an unpickler of ours, :mod:`alnico.checkpoint.pickle_parser`, which
knows the few opcodes and names a state dict is made of and refuses every other. The storages are then ranges of bytes in
the file, in the zip format (torch 1.6 and later, where storages are stored uncompressed) as in the one before it: tensors are
read like those of safetensors, in part and by positioned reads.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import xxhash

from alnico.checkpoint.files import open_to_read
from alnico.checkpoint.header import MAX_DIMENSIONS, Header, TensorInfo
from alnico.checkpoint.pickle_parser import MAX_PICKLE_BYTES, AllowedGlobal, Unpickler, put_pairs
from alnico.checkpoint.source import Shard
from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers put the state dict, beside an optimizer, say."""

MOST_WRAPPED = 8
"""Wrappers around a state dict that are taken off: a dict may hold itself."""

MAX_EXPANDED_BYTES = 1 << 20
"""A view that repeats its elements may be as large as its file, or this if that is more: a few bytes could ask for any memory."""

CALLBACKS = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks(\.|$)")
"""Modules whose names stand for themselves, as text: nothing of them is called."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip record: the lengths of its name and of its extra field are its last numbers."""

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}  # fmt: skip
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint64": "U64", "int32": "I32",
    "uint32": "U32", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes that tensors share. ``dtype`` is empty where the tensor says it; ``count`` counts elements, or bytes then."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class _PickledTensor:
    """A view of a storage, in elements. ``attributes`` are what Python code has set on it beside its values."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_negated: bool = False
    is_conjugated: bool = False
    attributes: tuple[str, ...] = ()


class _NumpyType:
    """A dtype of numpy; its byte order comes after it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = "<"


class _NumpyArray:
    """An array of numpy, as trainers keep the states of generators: it is no tensor."""


def open_pickle(path: Path) -> Shard:
    """Find the tensors of a pickled checkpoint; reads its pickle and no tensor.

    Errors: ModelError for a pickle that asks for anything but tensors and plain values, one without tensors, views outside
    their storage and files that are damaged.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            status = os.fstat(file.fileno())
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            loaded, storages, digest = (_read_zip if is_zip else _read_legacy)(
                file, status.st_size, str(path)
            )
            tensors, notes = _chosen(loaded, str(path))
            infos = [
                _placed(name, tensor, storages, status.st_size, str(path)) for name, tensor in tensors.items()
            ]
    except ModelError:
        raise
    except (Exception, MemoryError) as error:  # whatever a damaged or hostile file makes of the unpickler
        raise ModelError(
            f"{path}: is no checkpoint of torch that can be read ({type(error).__name__}: {str(error)[:120]}). "
            "The file is damaged or something else; download it again, or get the model as safetensors."
        ) from None
    infos.sort(key=lambda t: (t.begin, t.end, t.name))
    return Shard(path, Header(tuple(infos), {}, 0), status.st_size, status.st_mtime_ns, digest, notes)


def _read_zip(file: IO[bytes], size: int, where: str) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """Return what is pickled, the place (begin, end) of each storage in the file, and the pickle's digest."""
    with zipfile.ZipFile(file) as archive:
        records = {r.filename: r for r in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in records):
            raise ModelError(
                f"{where}: is a zip archive without one data.pkl, or a TorchScript program; expected a state dict. "
                "Save the model's state_dict() and give that."
            )
        root = pickles[0].removesuffix("data.pkl")
        most = min(MAX_PICKLE_BYTES, size)
        for name in (pickles[0], f"{root}byteorder"):
            record = records.get(name)
            if record is not None and (record.file_size > most or record.compress_type != zipfile.ZIP_STORED):
                raise ModelError(
                    f"{where}: {name[:80]} has {record.file_size} bytes or is compressed; expected at most {most}, stored as they are. "
                    "Check the model."
                )
        text = archive.read(pickles[0])
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ModelError(
                f"{where}: was written by a big-endian machine, expected little-endian. Convert it to safetensors."
            )
    wanted = _Storages(where)
    loaded = Unpickler(io.BytesIO(text), len(text), wanted.find, wanted.persistent, _build).load()
    places = {}
    for key in wanted.by_key:
        found = records.get(f"{root}data/{key}")
        if found is None or found.compress_type != zipfile.ZIP_STORED:
            raise ModelError(
                f"{where}: storage {key!r} is missing or compressed. The file is damaged; download it again."
            )
        file.seek(found.header_offset)
        begin = (
            found.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
        )
        places[key] = (begin, begin + found.file_size)
    return loaded, places, xxhash.xxh3_128_hexdigest(text)


def _read_legacy(file: IO[bytes], size: int, where: str) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """The same for the format before torch 1.6: five pickles, then for each storage its number of elements and its bytes."""
    wanted = _Storages(where)

    def load() -> Any:
        return Unpickler(file, size, wanted.find, wanted.persistent, _build).load()

    if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL or not load().get("little_endian", False):
        raise ModelError(
            f"{where}: is a pickle, but no checkpoint of torch from a little-endian machine. Save the model's state_dict() with "
            "torch, or as safetensors."
        )
    loaded = load()
    keys = load()
    head = file.tell()
    places, position = {}, head
    for key in keys:
        if not isinstance(key, str):
            raise UnpicklingError("a storage whose key is no text")
        file.seek(position)
        storage = wanted.by_key[key]
        (count,) = struct.unpack("<q", file.read(8))
        begin = position + 8
        position = begin + storage.count * (DTYPES[storage.dtype].bytes if storage.dtype else 1)
        if count != storage.count:
            raise ModelError(
                f"{where}: storage {key!r} has {count} elements, its tensors say {storage.count}. The file is damaged; download it again."
            )
        places[key] = (begin, position)
    file.seek(0)
    return loaded, places, xxhash.xxh3_128_hexdigest(file.read(head))


class _Storages:
    """The storages that a pickle names, and what its other names mean."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.by_key: dict[str, _Storage] = {}

    def find(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if CALLBACKS.match(module):  # Lightning's trainers keep what callbacks know under their classes
            return f"{module}.{name}"
        if module == "torch._utils" and name in OTHER_TENSORS:
            found, advice = OTHER_TENSORS[name]
            raise ModelError(
                f"{self._where}: holds {found} ({name}); expected dense tensors with values. {advice}, and save it again."
            )
        raise ModelError(
            f"{self._where}: its pickle asks for {module}.{name}, expected tensors and plain values alone. alnico runs no code "
            "of a model: get the model as safetensors, or save its state_dict() where you trust the file."
        )

    def persistent(self, identifier: Any) -> _Storage:
        kind, dtype, key, _, count, *rest = identifier
        if (
            kind != "storage"
            or not isinstance(dtype, str)
            or not isinstance(key, str)
            or not _is_size(count)
            or any(rest)
        ):
            raise UnpicklingError("a storage of an unknown kind")
        storage = _Storage(key, dtype, count)
        if self.by_key.setdefault(key, storage) != storage:
            raise UnpicklingError(f"storage {key!r} is two things")
        return storage


def _rebuilt(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object = False,
    _hooks: object = None,
    bits: object = None,
) -> _PickledTensor:
    return _view(
        storage, storage.dtype if isinstance(storage, _Storage) else "", offset, shape, strides, bits
    )


def _rebuilt_typed(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    bits: object = None,
) -> _PickledTensor:
    return _view(storage, dtype, offset, shape, strides, bits)


def _view(
    storage: object, dtype: object, offset: object, shape: object, strides: object, bits: object
) -> _PickledTensor:
    """A tensor of what a pickle says of it; whether it lies in the file is for :func:`_placed`.

    ``bits`` is what torch calls its metadata: the values are the negative (``neg``) or the complex conjugate (``conj``) of what is stored.
    """
    numbers = [offset]
    for listed in (shape, strides):
        if not isinstance(listed, (tuple, list)) or len(listed) > MAX_DIMENSIONS:
            raise UnpicklingError(
                f"a tensor without a shape and strides of at most {MAX_DIMENSIONS} dimensions"
            )
        numbers += listed
    if not isinstance(storage, _Storage) or not isinstance(dtype, str) or not all(map(_is_size, numbers)):
        raise UnpicklingError("a tensor without a storage, a dtype and sizes, none negative")
    said = bits or {}
    if (
        not isinstance(said, dict)
        or not set(said) <= {"neg", "conj"}
        or not all(isinstance(v, bool) for v in said.values())
    ):
        raise UnpicklingError("a tensor with metadata other than the bits 'neg' and 'conj'")
    negated, conjugated = said.get("neg", False), said.get("conj", False)
    if (negated and dtype not in NEGATABLE) or (conjugated and dtype != "C64"):
        raise UnpicklingError(f"a tensor of {dtype[:20] or 'bytes'} that is negated or conjugated")
    return _PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides), negated, conjugated)  # type: ignore[arg-type]  # as was just seen


def _parameter(tensor: object, _grad: object = True, _hooks: object = None, state: object = None) -> object:
    """A parameter is its tensor; what else its state holds is named."""
    held = state[0] if isinstance(state, tuple) and state else state
    if isinstance(tensor, _PickledTensor) and isinstance(held, dict):
        return replace(tensor, attributes=tuple(str(key)[:80] for key in held))
    return tensor


def _of_type(rebuild: object, kind: object, arguments: object, state: object) -> object:
    """A tensor on which attributes were set. Subclasses of tensors have no known name, and are refused by it."""
    if rebuild not in PLAIN_REBUILDS or kind != TENSOR or not isinstance(arguments, tuple):
        raise UnpicklingError("a tensor of another type than torch.Tensor")
    return _parameter(rebuild.call(*arguments), state=state)


def _from_cpu(tensor: object, dtype: object, _device: object, _grad: object) -> object:
    """A tensor that was on a device without storages (a TPU, say), saved by way of the CPU."""
    if not isinstance(tensor, _PickledTensor) or tensor.dtype != dtype:
        raise UnpicklingError("a tensor of a device that was saved with another dtype than its own")
    return tensor


def _numpy_type(name: object, *_: object) -> _NumpyType:
    if not isinstance(name, str) or len(name) > MAX_TYPE_NAME:
        raise UnpicklingError("a dtype of numpy without a name")
    return _NumpyType(name)


def _numpy_scalar(kind: object, data: object) -> object:
    """The number or text that a scalar of numpy is."""
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
        raise UnpicklingError("a scalar of numpy without a dtype and bytes")
    if kind.name[:1] in ("U", "S"):
        return data.decode("utf-32-le" if kind.name[0] == "U" else "latin1").rstrip("\0")
    if kind.name not in NUMPY_NUMBERS or len(data) != int(kind.name[1:]):
        raise UnpicklingError(f"a scalar of numpy that is no number ({kind.name!r})")
    return np.frombuffer(data, kind.order + kind.name)[0].item()


def _numpy_array(*_: object) -> _NumpyArray:
    return _NumpyArray()


def _build(thing: object, state: object) -> None:
    """Take a state for what has one: a dtype of numpy, whose byte order it says, an array of numpy, which is not read, and a dict, of
    which it is no part (it is the metadata of a state dict). A tensor has none: torch would make another tensor of it."""
    if (
        isinstance(thing, _NumpyType)
        and isinstance(state, tuple)
        and len(state) > 1
        and state[1] in ("<", ">", "|")
    ):
        thing.order = state[1]
    elif not isinstance(thing, (dict, _NumpyType, _NumpyArray)):
        raise UnpicklingError(f"a state for {_type_of(thing)}")


def _type_of(value: object) -> str:
    """What a value is, in the words of a message."""
    if isinstance(value, _PickledTensor):
        return "a tensor"
    return "a numpy array" if isinstance(value, _NumpyArray) else f"a {type(value).__name__.strip('_')}"


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """A dict of any of Python's kinds: its pairs, or those of a mapping; that a missing key has a default is of no use here."""
    found: dict[Any, Any] = {}
    for given in arguments:
        if isinstance(given, dict):
            found |= given
        elif isinstance(given, (list, tuple)):
            put_pairs(found, ((pair[0], pair[1]) for pair in given))
    return found


def _listing(items: object = (), *_: object) -> list[object]:
    """A list, or a set, whose members need not be told apart."""
    return [*items] if isinstance(items, (list, tuple)) else []


def _size(items: object = ()) -> tuple[object, ...]:
    return tuple(items) if isinstance(items, (list, tuple)) else ()


def _latin(text: object, encoding: object) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _nothing(*_: object) -> None:
    """A device: tensors are read to memory wherever they were."""


NEGATABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "C64")
"""Dtypes of which torch makes the negative."""
MAX_TYPE_NAME = 20
NUMPY_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
TENSOR = ".Tensor"
"""Stands for the class of tensors, which is a name in pickles and no dtype."""

PLAIN_REBUILDS = (AllowedGlobal(_rebuilt), AllowedGlobal(_rebuilt_typed))

KNOWN: dict[tuple[str, str], AllowedGlobal | str] = {
    ("collections", "OrderedDict"): AllowedGlobal(_mapping),
    ("collections", "Counter"): AllowedGlobal(_mapping),
    ("collections", "defaultdict"): AllowedGlobal(_mapping),
    **{
        (module, name): AllowedGlobal(call)
        for module in ("builtins", "__builtin__")
        for name, call in (("set", _listing), ("dict", _mapping), ("list", _listing))
    },
    ("_codecs", "encode"): AllowedGlobal(_latin),
    ("torch", "Size"): AllowedGlobal(_size),
    ("torch", "device"): AllowedGlobal(_nothing),
    ("torch", "UntypedStorage"): "",
    ("torch.storage", "UntypedStorage"): "",
    ("torch._utils", "_rebuild_tensor"): AllowedGlobal(_rebuilt),
    ("torch._utils", "_rebuild_tensor_v2"): PLAIN_REBUILDS[0],
    ("torch._utils", "_rebuild_tensor_v3"): PLAIN_REBUILDS[1],
    ("torch._utils", "_rebuild_parameter"): AllowedGlobal(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): AllowedGlobal(_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): AllowedGlobal(_from_cpu),
    ("torch._tensor", "_rebuild_from_type_v2"): AllowedGlobal(_of_type),
    ("torch", "Tensor"): TENSOR,
    ("numpy", "dtype"): AllowedGlobal(_numpy_type),
    ("numpy", "ndarray"): "numpy.ndarray",
    **{
        (f"numpy.{core}.multiarray", name): AllowedGlobal(call)
        for core in ("core", "_core")
        for name, call in (("scalar", _numpy_scalar), ("_reconstruct", _numpy_array))
    },
}

OTHER_TENSORS = {
    "_rebuild_sparse_tensor": ("a sparse tensor", "Make it dense with to_dense()"),
    "_rebuild_qtensor": ("a quantised tensor", "Use the model in full precision, or dequantize() it"),
    "_rebuild_nested_tensor": ("a nested tensor", "Make it dense with to_padded_tensor()"),
    "_rebuild_meta_tensor_no_storage": (
        "a tensor of the device 'meta', which has no values",
        "Load the model's weights",
    ),
    "_rebuild_wrapper_subclass": ("a tensor of a class of its own", "Make it a plain tensor"),
    "_rebuild_device_tensor_from_numpy": ("a tensor as an array of numpy", "Load it with torch"),
    "_rebuild_xla_tensor": ("a tensor as an array of numpy", "Load it with torch"),
}
"""What else torch makes tensors of, by its functions in ``torch._utils``: what it is, and what to do."""


def _chosen(loaded: Any, where: str) -> tuple[dict[str, _PickledTensor], tuple[str, ...]]:
    """The tensors of the state dict, unwrapped, and notes on what else there was."""
    inside: list[str] = []
    ignored: list[str] = []
    while isinstance(loaded, Mapping):
        wrapper = next((w for w in WRAPPERS if isinstance(loaded.get(w), Mapping)), None)
        if wrapper is None:
            break
        ignored += [".".join([*inside, str(key)]) for key in loaded if key != wrapper]
        inside.append(wrapper)
        loaded = loaded[wrapper]
        if len(inside) > MOST_WRAPPED:
            raise ModelError(
                f"{where}: its tensors lie in more than {MOST_WRAPPED} wrappers, {'.'.join(inside[:3])} and so on; expected a state "
                "dict in one or two. Save the model's state_dict() and give that."
            )
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{where}: holds {_type_of(loaded)}; expected tensors by name. Save the model's state_dict() and give that."
        )
    tensors = {
        key: value
        for key, value in loaded.items()
        if isinstance(key, str) and isinstance(value, _PickledTensor)
    }
    arrays = [str(key) for key, value in loaded.items() if isinstance(value, _NumpyArray)]
    if arrays:
        raise ModelError(
            f"{where}: {arrays[0][:80]} is an array of numpy, expected a tensor. Make a tensor of it with torch.from_numpy, and save again."
        )
    ignored += [".".join([*inside, str(key)]) for key in loaded if key not in tensors]
    if not tensors:
        held = f"its keys: {', '.join(map(str, list(loaded)[:5]))}"[:120] if loaded else "it is empty"
        raise ModelError(
            f"{where}: holds no tensors by name ({held}). Save the model's state_dict() and give that."
        )
    notes = []
    if inside:
        notes.append(f"{where}: the tensors are those under {'.'.join(inside)}.")
    if ignored:
        notes.append(f"{where}: left out, since they are no tensors of the model: {_some(ignored)}.")
    if attributes := [f"{name}.{a}" for name, tensor in tensors.items() for a in tensor.attributes]:
        notes.append(
            f"{where}: left out, since they are attributes of tensors, which no file of tensors has: {_some(attributes)}."
        )
    return tensors, tuple(notes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _placed(
    name: str, tensor: _PickledTensor, storages: Mapping[str, tuple[int, int]], size: int, where: str
) -> TensorInfo:
    """Where a tensor lies in the file, checked."""

    def refuse(found: str, expected: str) -> ModelError:
        return ModelError(
            f"{where}: tensor {name[:80]!r} has {found}; expected {expected}. Get the file from its source."
        )

    if any("\ud800" <= c <= "\udfff" for c in name):
        raise refuse("half of a character in its name", "Unicode text")
    if tensor.dtype not in DTYPES:
        raise refuse("no dtype", f"one of {', '.join(DTYPES)}")
    shape, strides, width = tensor.shape, tensor.strides, DTYPES[tensor.dtype].bytes
    if len(shape) != len(strides):
        raise refuse(
            f"the shape {str(shape)[:80]} with strides {str(strides)[:80]}", "a stride for each size"
        )
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    begin, end = storages[tensor.storage.key]
    held = min(
        (end - begin) // width,
        tensor.storage.count if tensor.storage.dtype else tensor.storage.count // width,
    )
    if end > size:
        raise ModelError(
            f"{where}: storage of {name[:80]!r} ends at byte {end}, the file has {size}. It is cut; download it again."
        )
    if tensor.offset + span > held:
        raise refuse(f"elements to {tensor.offset + span} of its storage", f"at most {held}")
    most = max(size, MAX_EXPANDED_BYTES)
    if math.prod(shape) * width > most:
        raise refuse(
            f"{math.prod(shape) * width} bytes, elements of its storage again and again", f"at most {most}"
        )
    first = begin + tensor.offset * width
    is_in_order = 0 in shape or all(
        n == 1 or s == c for n, s, c in zip(shape, strides, _contiguous(shape), strict=True)
    )
    stored = None if is_in_order else strides
    return TensorInfo(
        name,
        tensor.dtype,
        shape,
        first,
        first + span * width,
        stored,
        tensor.is_negated,
        tensor.is_conjugated,
    )


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
