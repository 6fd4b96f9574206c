"""Locates the tensors in torch's pickles (.bin, .pt, .pth, .ckpt) without running their code.

Neither torch nor any code of the file is run: :mod:`alnico.checkpoint.pickle_parser` knows the few opcodes
and names that state dicts need, and refuses all others. Storages are then byte ranges in the file, in the zip
format (torch 1.6 and later, stored uncompressed) and in the one before it. Tensors are read as from
safetensors: in part, by positioned reads.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, TypeGuard

import numpy as np
import xxhash

from alnico.checkpoint.file_kinds import PICKLE, SNIFFED_BYTES, TORCH_ZIP, ZIP, refuse_other
from alnico.checkpoint.file_part import part_of_file
from alnico.checkpoint.files import open_to_read
from alnico.checkpoint.header import MAX_DIMENSIONS, Header, TensorInfo
from alnico.checkpoint.pickle_parser import (
    MAX_PICKLE_BYTES,
    AllowedGlobal,
    PickledClass,
    PickledObject,
    Unpickler,
    put_pairs,
)
from alnico.checkpoint.source import Shard
from alnico.checkpoint.training.averaged_weights import average_notes, choose_part
from alnico.checkpoint.training.trainer_names import refuse_flat
from alnico.errors import ModelError
from alnico.numerics.dtypes import DTYPES

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers save the state dict, next to an optimizer for example."""

MAX_WRAPPERS = 8
"""Most wrappers to remove around a state dict: a dict may contain itself."""

MAX_EXPANDED_BYTES = 1 << 20
"""Largest view with repeated elements, unless the file is larger: a few bytes could claim any amount of
memory."""

CALLBACKS = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks(\.|$)")
"""Modules whose names are read as plain text and never called."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LOCAL_HEADER = struct.Struct("<26xHH")
"""A zip record's local header; the lengths of its name and its extra field are the last two numbers."""

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
class PickledStorage:
    """Bytes that tensors share. ``count`` counts elements of ``dtype``; or bytes, where the tensors give the
    dtype and this one is ''."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage, in elements. ``attributes`` are the Python attributes set on the tensor."""

    storage: PickledStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_negated: bool = False
    is_conjugated: bool = False
    attributes: tuple[str, ...] = ()


class _NumpyType:
    """A numpy dtype; its byte order is set later."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = "<"


class NumpyArray:
    """A numpy array, such as a saved generator state: not a tensor."""


@dataclass(frozen=True)
class Pickle:
    """What a pickle holds; its tensors are not located yet. ``storages`` are the bytes (begin, end) of each storage in the file."""

    value: Any
    storages: Mapping[str, tuple[int, int]]
    size: int
    mtime_ns: int
    digest: str


def open_pickle(path: Path, part: str = "") -> Shard:
    """Locate the tensors of a pickled checkpoint. Reads the pickle, not the tensors.

    ``part`` is what to read in place of the state dict: ``ema``, or a key. Errors: ModelError for a pickle with anything except tensors and plain values, one without tensors, views
    outside their storage, and damaged files.
    """
    where = str(path)
    loaded = load_pickle(path)
    with damage_refused(where):
        state = _unwrap(loaded.value, where)[0]
        if part:
            value, notes = choose_part(loaded.value, state, part, _is_tensor, where)
            tensors, more = select_tensors(value, where)
        else:
            tensors, more = select_tensors(loaded.value, where)
            notes = average_notes(loaded.value, state, _is_tensor, where)
        refuse_flat(tensors, where)
    return shard_of(path, loaded, tensors, (*more, *notes))


def load_pickle(path: Path, classes: re.Pattern[str] | None = None) -> Pickle:
    """Read the pickle of a torch checkpoint, not its tensors.

    Objects whose class is in a module that ``classes`` matches are read as :class:`PickledObject`. Errors: ModelError.
    """
    with damage_refused(str(path)), os.fdopen(open_to_read(path), "rb") as file:
        status = os.fstat(file.fileno())
        start = file.read(SNIFFED_BYTES)
        refuse_other(start, path, "a torch checkpoint", TORCH_ZIP, PICKLE, ZIP)
        file.seek(0)
        read = _read_zip if start.startswith(b"PK\x03\x04") else _read_legacy
        value, storages, digest = read(file, status.st_size, str(path), classes)
        return Pickle(value, storages, status.st_size, status.st_mtime_ns, digest)


def load_pickle_inside(descriptor: int, begin: int, size: int, where: str, file_size: int) -> Pickle:
    """Read the pickle of a torch checkpoint that is the bytes ``begin`` to ``begin + size`` of a file, which has ``file_size``. Its
    tensors are then located in that file. Errors: ModelError."""
    with damage_refused(where):
        value, places, digest = _read_zip(part_of_file(descriptor, begin, size), size, where, None)
        storages = {key: (begin + first, begin + end) for key, (first, end) in places.items()}
        return Pickle(value, storages, file_size, os.fstat(descriptor).st_mtime_ns, digest)


def shard_of(
    path: Path, loaded: Pickle, tensors: Mapping[str, PickledTensor], notes: tuple[str, ...] = ()
) -> Shard:
    """Locate tensors of a pickle in its file. Errors: ModelError."""
    with damage_refused(str(path)):
        infos = [
            locate_tensor(name, tensor, loaded.storages, loaded.size, str(path))
            for name, tensor in tensors.items()
        ]
    infos.sort(key=lambda t: (t.begin, t.end, t.name))
    return Shard(path, Header(tuple(infos), {}, 0), loaded.size, loaded.mtime_ns, loaded.digest, notes)


def load_objects(data: bytes, where: str, classes: re.Pattern[str]) -> Any:
    """Read a pickle without tensors, such as an index of them; ``classes`` as for :func:`load_pickle`. Errors: ModelError."""
    names = _Storages(where, classes)
    with damage_refused(where):
        return Unpickler(io.BytesIO(data), len(data), names.find, names.persistent, _set_state).load()


@contextmanager
def damage_refused(where: str) -> Iterator[None]:
    """Refuse a checkpoint whose reading fails in any way. Errors: ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, MemoryError) as error:  # a damaged or hostile file may cause any error
        raise ModelError(
            f"{where}: is not a readable torch checkpoint ({type(error).__name__}: {str(error)[:120]}). "
            "The file is damaged or of another format; download it again, or get the model as safetensors."
        ) from None


def _read_zip(
    file: IO[bytes], size: int, where: str, classes: re.Pattern[str] | None
) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """Return the pickled value, the bytes (begin, end) of each storage in the file, and the pickle's
    digest."""
    with zipfile.ZipFile(file) as archive:
        records = {r.filename: r for r in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in records):
            raise ModelError(
                f"{where}: is a zip archive without one data.pkl, or a TorchScript program; expected a state "
                "dict. Save the model's state_dict() and use that file."
            )
        root = pickles[0].removesuffix("data.pkl")
        most = min(MAX_PICKLE_BYTES, size)
        for name in (pickles[0], f"{root}byteorder"):
            record = records.get(name)
            if record is not None and (record.file_size > most or record.compress_type != zipfile.ZIP_STORED):
                raise ModelError(
                    f"{where}: {name[:80]} has {record.file_size} bytes or is compressed; expected at most "
                    f"{most} uncompressed bytes. Check the model."
                )
        text = archive.read(pickles[0])
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ModelError(
                f"{where}: was written by a big-endian machine; expected little-endian. Convert it to "
                "safetensors."
            )
    storages = _Storages(where, classes)
    loaded = Unpickler(io.BytesIO(text), len(text), storages.find, storages.persistent, _set_state).load()
    places = {}
    for key in storages.by_key:
        record = records.get(f"{root}data/{key}")
        if record is None or record.compress_type != zipfile.ZIP_STORED:
            raise ModelError(
                f"{where}: storage {key!r} is missing or compressed. The file is damaged; download it again."
            )
        file.seek(record.header_offset)
        begin = (
            record.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
        )
        places[key] = (begin, begin + record.file_size)
    return loaded, places, xxhash.xxh3_128_hexdigest(text)


def _read_legacy(
    file: IO[bytes], size: int, where: str, classes: re.Pattern[str] | None
) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """Do the same for the format before torch 1.6: five pickles, then each storage's number of elements and
    bytes."""
    storages = _Storages(where, classes)

    def load() -> Any:
        return Unpickler(file, size, storages.find, storages.persistent, _set_state).load()

    if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL or not load().get("little_endian", False):
        raise ModelError(
            f"{where}: is a pickle, but not a torch checkpoint from a little-endian machine. Save the "
            "model's state_dict() with torch, or as safetensors."
        )
    loaded = load()
    keys = load()
    head = file.tell()
    places, position = {}, head
    for key in keys:
        if not isinstance(key, str):
            raise UnpicklingError("a storage whose key is not text")
        file.seek(position)
        storage = storages.by_key[key]
        (count,) = struct.unpack("<q", file.read(8))
        begin = position + 8
        position = begin + storage.count * (DTYPES[storage.dtype].bytes if storage.dtype else 1)
        if count != storage.count:
            raise ModelError(
                f"{where}: storage {key!r} has {count} elements; its tensors claim {storage.count}. The file "
                "is damaged; download it again."
            )
        places[key] = (begin, position)
    file.seek(0)
    return loaded, places, xxhash.xxh3_128_hexdigest(file.read(head))


class _Storages:
    """Collects the storages that a pickle names, and resolves its other names. Objects of ``classes`` are known by name
    only."""

    def __init__(self, where: str, classes: re.Pattern[str] | None = None) -> None:
        self._where = where
        self._classes = classes
        self.by_key: dict[str, PickledStorage] = {}

    def find(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if self._classes is not None:
            if (module, name) in SUBCLASS_NAMES:
                return SUBCLASS_NAMES[module, name]
            if self._classes.match(module):
                return PickledClass(f"{module}.{name}")
        if (module, name) in ALLOWED_NAMES:
            return ALLOWED_NAMES[module, name]
        if CALLBACKS.match(module):  # Lightning saves the state of callbacks under their classes
            return f"{module}.{name}"
        if module == "torch._utils" and name in UNSUPPORTED_TENSORS:
            kind, advice = UNSUPPORTED_TENSORS[name]
            raise ModelError(
                f"{self._where}: holds {kind} ({name}); expected dense tensors with values. {advice}, and "
                "save it again."
            )
        raise ModelError(
            f"{self._where}: its pickle needs {module}.{name}; expected only tensors and plain values. "
            "alnico runs no code from models. Get the model as safetensors, or save its state_dict() on a "
            "machine where you trust the file."
        )

    def persistent(self, identifier: Any) -> PickledStorage:
        kind, dtype, key, _, count, *rest = identifier
        if (
            kind != "storage"
            or not isinstance(dtype, str)
            or not isinstance(key, str)
            or not is_size(count)
            or any(rest)
        ):
            raise UnpicklingError("a storage of an unknown kind")
        storage = PickledStorage(key, dtype, count)
        if self.by_key.setdefault(key, storage) != storage:
            raise UnpicklingError(f"storage {key!r} is described in two ways")
        return storage


def _rebuild(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object = False,
    _hooks: object = None,
    bits: object = None,
) -> PickledTensor:
    return _view(
        storage, storage.dtype if isinstance(storage, PickledStorage) else "", offset, shape, strides, bits
    )


def _rebuild_typed(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    bits: object = None,
) -> PickledTensor:
    return _view(storage, dtype, offset, shape, strides, bits)


def _view(
    storage: object, dtype: object, offset: object, shape: object, strides: object, bits: object
) -> PickledTensor:
    """Build a tensor from a pickle's description; :func:`locate_tensor` checks that it is inside the file.

    ``bits`` is what torch calls metadata: the values are the negative (``neg``) or the complex conjugate
    (``conj``) of the stored ones.
    """
    numbers = [offset]
    for sizes in (shape, strides):
        if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
            raise UnpicklingError(
                f"a tensor without a shape and strides of at most {MAX_DIMENSIONS} dimensions"
            )
        numbers += sizes
    if (
        not isinstance(storage, PickledStorage)
        or not isinstance(dtype, str)
        or not all(map(is_size, numbers))
    ):
        raise UnpicklingError("a tensor without a storage, a dtype and non-negative sizes")
    bits_set = bits or {}
    if (
        not isinstance(bits_set, dict)
        or not set(bits_set) <= {"neg", "conj"}
        or not all(isinstance(v, bool) for v in bits_set.values())
    ):
        raise UnpicklingError("a tensor with metadata other than the bits 'neg' and 'conj'")
    negated, conjugated = bits_set.get("neg", False), bits_set.get("conj", False)
    if (negated and dtype not in NEGATABLE) or (conjugated and dtype != "C64"):
        raise UnpicklingError(f"a tensor of {dtype[:20] or 'bytes'} that is negated or conjugated")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides), negated, conjugated)  # type: ignore[arg-type]  # checked above


def _rebuild_parameter(
    tensor: object, _grad: object = True, _hooks: object = None, state: object = None
) -> object:
    """Return a parameter's tensor, with the names of the attributes in its state."""
    attributes = state[0] if isinstance(state, tuple) and state else state
    if isinstance(tensor, PickledTensor) and isinstance(attributes, dict):
        return replace(tensor, attributes=tuple(str(key)[:80] for key in attributes))
    return tensor


def _rebuild_from_type(rebuild: object, kind: object, arguments: object, state: object) -> object:
    """A tensor with attributes. Subclasses of tensors are refused: their names are not allowed."""
    if rebuild not in PLAIN_REBUILDS or kind != TENSOR or not isinstance(arguments, tuple):
        raise UnpicklingError("a tensor of another type than torch.Tensor")
    return _rebuild_parameter(rebuild.call(*arguments), state=state)


def _rebuild_subclass(rebuild: object, kind: object, arguments: object, state: object) -> object:
    """A tensor of a subclass, such as one rank's part of a distributed tensor, as an object known by its class's name."""
    if not isinstance(kind, PickledClass):
        return _rebuild_from_type(rebuild, kind, arguments, state)
    made = PickledObject(kind.name, arguments if isinstance(arguments, tuple) else ())
    made.state = state
    return made


def _rebuild_wrapper(kind: object, *arguments: object) -> object:
    name = kind.name if isinstance(kind, PickledClass) else "torch.Tensor"
    return PickledObject(name, (kind, *arguments))


def _class_attribute(kind: object, name: object) -> object:
    """A class in a class, or a member of an enumeration, which Python 3.11 pickles so."""
    if not isinstance(kind, PickledClass) or not isinstance(name, str):
        raise UnpicklingError("an attribute of something that is not a known class")
    return PickledClass(f"{kind.name}.{name}")


def _ignore_layout(*_: object) -> None:
    """Ignore a layout: only strided tensors have values here."""


def _rebuild_from_cpu(tensor: object, dtype: object, _device: object, _grad: object) -> object:
    """A tensor that was saved from a device without storages, such as a TPU, through the CPU."""
    if not isinstance(tensor, PickledTensor) or tensor.dtype != dtype:
        raise UnpicklingError("a tensor of a device saved with a different dtype")
    return tensor


def _numpy_type(name: object, *_: object) -> _NumpyType:
    if not isinstance(name, str) or len(name) > MAX_TYPE_NAME:
        raise UnpicklingError("a numpy dtype without a name")
    return _NumpyType(name)


def _numpy_scalar(kind: object, data: object) -> object:
    """The number or text of a numpy scalar."""
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
        raise UnpicklingError("a numpy scalar without a dtype and bytes")
    if kind.name[:1] in ("U", "S"):
        return data.decode("utf-32-le" if kind.name[0] == "U" else "latin1").rstrip("\0")
    if kind.name not in NUMPY_NUMBERS or len(data) != int(kind.name[1:]):
        raise UnpicklingError(f"a numpy scalar that is not a number ({kind.name!r})")
    return np.frombuffer(data, kind.order + kind.name)[0].item()


def _numpy_array(*_: object) -> NumpyArray:
    return NumpyArray()


def _set_state(target: object, state: object) -> None:
    """Apply a pickled state: a numpy dtype takes its byte order from it; numpy arrays and dicts ignore it
    (for a dict it is the metadata of a state dict). It is refused for a tensor: torch would build a different
    tensor from it."""
    if isinstance(target, PickledObject):
        target.state = state
    elif (
        isinstance(target, _NumpyType)
        and isinstance(state, tuple)
        and len(state) > 1
        and state[1] in ("<", ">", "|")
    ):
        target.order = state[1]
    elif not isinstance(target, (dict, _NumpyType, NumpyArray)):
        raise UnpicklingError(f"a state for {_type_of(target)}")


def _type_of(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, PickledTensor):
        return "a tensor"
    if isinstance(value, PickledObject):
        return f"a {value.name[:80]}"
    if isinstance(value, AllowedGlobal):
        return "a name"
    return "a numpy array" if isinstance(value, NumpyArray) else f"a {type(value).__name__}"


def _make_dict(*arguments: Any) -> dict[Any, Any]:
    """Any of Python's dict types as a dict; a default for missing keys is ignored."""
    result: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, dict):
            result |= argument
        elif isinstance(argument, (list, tuple)):
            put_pairs(result, ((pair[0], pair[1]) for pair in argument))
    return result


def _make_list(items: object = (), *_: object) -> list[object]:
    """A list, or a set as a list: no tensor is in a set."""
    return [*items] if isinstance(items, (list, tuple)) else []


def _make_size(items: object = ()) -> tuple[object, ...]:
    return tuple(items) if isinstance(items, (list, tuple)) else ()


def _encode_latin1(text: object, encoding: object) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _ignore_device(*_: object) -> None:
    """Ignore a device: tensors are read into memory."""


NEGATABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "C64")
"""Dtypes that torch can negate lazily."""
MAX_TYPE_NAME = 20
NUMPY_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
TENSOR = ".Tensor"
"""Represents the class of tensors, which a pickle names and which is not a dtype."""

PLAIN_REBUILDS = (AllowedGlobal(_rebuild), AllowedGlobal(_rebuild_typed))

ALLOWED_NAMES: dict[tuple[str, str], AllowedGlobal | str] = {
    ("collections", "OrderedDict"): AllowedGlobal(_make_dict),
    ("collections", "Counter"): AllowedGlobal(_make_dict),
    ("collections", "defaultdict"): AllowedGlobal(_make_dict),
    **{
        (module, name): AllowedGlobal(call)
        for module in ("builtins", "__builtin__")
        for name, call in (("set", _make_list), ("dict", _make_dict), ("list", _make_list))
    },
    ("_codecs", "encode"): AllowedGlobal(_encode_latin1),
    ("torch", "Size"): AllowedGlobal(_make_size),
    ("torch", "device"): AllowedGlobal(_ignore_device),
    ("torch", "UntypedStorage"): "",
    ("torch.storage", "UntypedStorage"): "",
    ("torch._utils", "_rebuild_tensor"): AllowedGlobal(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): PLAIN_REBUILDS[0],
    ("torch._utils", "_rebuild_tensor_v3"): PLAIN_REBUILDS[1],
    ("torch._utils", "_rebuild_parameter"): AllowedGlobal(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): AllowedGlobal(_rebuild_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): AllowedGlobal(_rebuild_from_cpu),
    ("torch._tensor", "_rebuild_from_type_v2"): AllowedGlobal(_rebuild_from_type),
    ("torch", "Tensor"): TENSOR,
    ("numpy", "dtype"): AllowedGlobal(_numpy_type),
    ("numpy", "ndarray"): "numpy.ndarray",
    **{
        (f"numpy.{core}.multiarray", name): AllowedGlobal(call)
        for core in ("core", "_core")
        for name, call in (("scalar", _numpy_scalar), ("_reconstruct", _numpy_array))
    },
}

SUBCLASS_NAMES: dict[tuple[str, str], AllowedGlobal] = {
    ("torch._tensor", "_rebuild_from_type_v2"): AllowedGlobal(_rebuild_subclass),
    ("torch._utils", "_rebuild_wrapper_subclass"): AllowedGlobal(_rebuild_wrapper),
    **{(module, "getattr"): AllowedGlobal(_class_attribute) for module in ("builtins", "__builtin__")},
    ("torch.serialization", "_get_layout"): AllowedGlobal(_ignore_layout),
}
"""Names that are allowed besides where objects are known by their class's name."""

UNSUPPORTED_TENSORS = {
    "_rebuild_sparse_tensor": ("a sparse tensor", "Make it dense with to_dense()"),
    "_rebuild_qtensor": ("a quantised tensor", "Use the model in full precision, or dequantize() it"),
    "_rebuild_nested_tensor": ("a nested tensor", "Make it dense with to_padded_tensor()"),
    "_rebuild_meta_tensor_no_storage": (
        "a tensor of the device 'meta', which has no values",
        "Load the model's weights",
    ),
    "_rebuild_wrapper_subclass": ("a tensor of a custom class", "Make it a plain tensor"),
    "_rebuild_device_tensor_from_numpy": ("a tensor stored as a numpy array", "Load it with torch"),
    "_rebuild_xla_tensor": ("a tensor stored as a numpy array", "Load it with torch"),
}
"""Tensors that are not supported, by torch's function in ``torch._utils``: what they are, and what to do."""


def _is_tensor(value: object) -> bool:
    return isinstance(value, PickledTensor)


def _unwrap(loaded: Any, where: str) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    """Return the state dict in what was saved, its wrappers, and the names of what is next to it. Errors: ModelError."""
    wrappers: list[str] = []
    ignored: list[str] = []
    while isinstance(loaded, Mapping):
        wrapper = next((w for w in WRAPPERS if isinstance(loaded.get(w), Mapping)), None)
        if wrapper is None:
            break
        ignored += [".".join([*wrappers, str(key)]) for key in loaded if key != wrapper]
        wrappers.append(wrapper)
        loaded = loaded[wrapper]
        if len(wrappers) > MAX_WRAPPERS:
            raise ModelError(
                f"{where}: its tensors are inside more than {MAX_WRAPPERS} wrappers, "
                f"{'.'.join(wrappers[:3])} and so on; expected a state dict in one or two. Save the "
                "model's state_dict() and use that file."
            )
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{where}: holds {_type_of(loaded)}; expected tensors by name. Save the model's state_dict() and "
            "use that file."
        )
    return loaded, wrappers, ignored


def select_tensors(loaded: Any, where: str) -> tuple[dict[str, PickledTensor], tuple[str, ...]]:
    """Return the tensors of the state dict, without wrappers, and notes on what was left out."""
    loaded, wrappers, ignored = _unwrap(loaded, where)
    tensors = {
        key: value
        for key, value in loaded.items()
        if isinstance(key, str) and isinstance(value, PickledTensor)
    }
    arrays = [str(key) for key, value in loaded.items() if isinstance(value, NumpyArray)]
    if arrays:
        raise ModelError(
            f"{where}: {arrays[0][:80]} is a numpy array; expected a tensor. Convert it with "
            "torch.from_numpy and save again."
        )
    ignored += [".".join([*wrappers, str(key)]) for key in loaded if key not in tensors]
    if not tensors:
        keys_text = f"its keys: {', '.join(map(str, list(loaded)[:5]))}"[:120] if loaded else "it is empty"
        raise ModelError(
            f"{where}: holds no tensors by name ({keys_text}). Save the model's state_dict() and use that "
            "file."
        )
    notes = []
    if wrappers:
        notes.append(f"{where}: the tensors are those under {'.'.join(wrappers)}.")
    if ignored:
        notes.append(f"{where}: left out, as they are not tensors of the model: {list_some(ignored)}.")
    if attributes := [f"{name}.{a}" for name, tensor in tensors.items() for a in tensor.attributes]:
        notes.append(
            f"{where}: left out, as they are attributes of tensors, which tensor files cannot store: "
            f"{list_some(attributes)}."
        )
    return tensors, tuple(notes)


def list_some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def locate_tensor(
    name: str, tensor: PickledTensor, storages: Mapping[str, tuple[int, int]], size: int, where: str
) -> TensorInfo:
    """Return where a tensor is in the file, after checking that."""

    def refuse(actual: str, expected: str) -> ModelError:
        return ModelError(
            f"{where}: tensor {name[:80]!r} has {actual}; expected {expected}. Get the file from its source."
        )

    if any("\ud800" <= c <= "\udfff" for c in name):
        raise refuse("an unpaired surrogate in its name", "Unicode text")
    if tensor.dtype not in DTYPES:
        raise refuse("no dtype", f"one of {', '.join(DTYPES)}")
    shape, strides, width = tensor.shape, tensor.strides, DTYPES[tensor.dtype].bytes
    if len(shape) != len(strides):
        raise refuse(
            f"the shape {str(shape)[:80]} with strides {str(strides)[:80]}", "a stride for each size"
        )
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    begin, end = storages[tensor.storage.key]
    available = min(
        (end - begin) // width,
        tensor.storage.count if tensor.storage.dtype else tensor.storage.count // width,
    )
    if end > size:
        raise ModelError(
            f"{where}: storage of {name[:80]!r} ends at byte {end}, the file has {size}. The file is "
            "truncated; download it again."
        )
    if tensor.offset + span > available:
        raise refuse(f"elements to {tensor.offset + span} of its storage", f"at most {available}")
    most = max(size, MAX_EXPANDED_BYTES)
    if math.prod(shape) * width > most:
        raise refuse(f"{math.prod(shape) * width} bytes of repeated elements", f"at most {most}")
    first = begin + tensor.offset * width
    is_in_order = 0 in shape or all(
        n == 1 or s == c for n, s, c in zip(shape, strides, _contiguous(shape), strict=True)
    )
    view_strides = None if is_in_order else strides
    return TensorInfo(
        name,
        tensor.dtype,
        shape,
        first,
        first + span * width,
        view_strides,
        tensor.is_negated,
        tensor.is_conjugated,
    )


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
