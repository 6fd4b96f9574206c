"""Wraps models in memory as sources: dicts of numpy arrays or torch tensors, and torch modules.

Never imports torch: values from torch mean that it is already imported.
"""

from __future__ import annotations

import dataclasses
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, Shard, TensorSpec
from alnico.errors import AlnicoError, ModelError
from alnico.installation import import_extra
from alnico.numerics.digest import PIECE
from alnico.numerics.dtypes import DTYPES

TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "uint64": "U64",
    "int32": "I32",
    "uint32": "U32",
    "int16": "I16",
    "uint16": "U16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
}
"""The safetensors names of torch's dtypes."""

NUMPY_DTYPES = {
    np.dtype(d.storage): d.name
    for d in DTYPES.values()
    if d.storage and d.kind != "packed" and d.name != "BF16"
} | {
    np.dtype("u1"): "U8",
    np.dtype("u2"): "U16",
    np.dtype("?"): "BOOL",
}

COMPILE_PREFIX = "_orig_mod."
"""What ``torch.compile`` inserts into the names of tensors."""

PARALLEL_PREFIX = "module."
"""What ``DataParallel`` puts before the names of tensors."""


class MemoryModel:
    """Tensors in memory as a source. They are read in place, never copied as a whole and never written to.

    Values are numpy arrays and torch tensors, of any strides, on any device. ``nominal`` maps tensors to the
    dtype they count as, if it is not their own. Errors: ModelError for a value that is neither, has no
    values, or has a dtype that files cannot store.
    """

    held_bytes = 0
    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None
    shards: Sequence[Shard] = ()
    notes: Sequence[str] = ()

    def __init__(
        self, label: str, tensors: Mapping[str, Any], nominal: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.label = label
        self._token = uuid.uuid4().hex
        self._flat: dict[str, Any] = {}
        self._strided: dict[str, Any] = {}
        self.torch_places: dict[str, str] = {}
        """By the names of contiguous torch tensors, what torch calls their device."""
        specs: dict[str, TensorSpec] = {}
        for name, value in tensors.items():
            try:
                specs[name], raw, is_flat = _describe(value, f"{label}: {name}")
            except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
                raise ModelError(
                    f"{label}: {name}: is {_type_of(value)} that cannot be read here "
                    f"({(str(error) or type(error).__name__).splitlines()[0][:200]}); expected a plain "
                    "tensor. Merge outside FakeTensorMode and torch's other modes."
                ) from None
            specs[name] = dataclasses.replace(specs[name], nominal=nominal.get(name, specs[name].nominal))
            (self._flat if is_flat else self._strided)[name] = raw
            if is_flat and is_torch_tensor(value) and value.numel():
                self.torch_places[name] = str(value.device)
        self.tensors: Mapping[str, TensorSpec] = specs
        rows = [
            min(t.byte_size, 4 * PIECE + 2 * _row_bytes(t)) for n, t in specs.items() if n in self._strided
        ]
        self.reading_bytes = max(rows, default=0)

    def absent(self, tensors: Iterable[str], side_files: bool) -> Mapping[str, int]:
        return {}

    def fetch(self, files: Iterable[str], report: Callable[[int], None] | None = None) -> None:
        """Nothing is ever absent."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        size = len(buffer)
        if name in self._flat:
            part = self._flat[name][offset : offset + size]
        elif size:
            row = _row_bytes(self.tensors[name])  # the rows around the block are made contiguous
            first, last = offset // row, -(-(offset + size) // row)
            part = _bytes_of(self._strided[name][first:last])[offset - first * row :][:size]
        if not size:
            return
        if isinstance(part, np.ndarray):
            np.frombuffer(buffer, np.uint8)[:] = part
        else:
            torch = sys.modules["torch"]
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(part)

    def flat(self, name: str) -> np.ndarray | None:
        """The bytes of a tensor in CPU memory, without a copy; None for one that is not contiguous or on
        another device."""
        raw = self._flat.get(name)
        return raw if isinstance(raw, np.ndarray) else None

    def raw(self, name: str) -> Any:
        """The bytes of a contiguous tensor without a copy, as a flat array or torch tensor on its device."""
        return self._flat[name]

    def identity(self) -> list[dict[str, Any]]:
        """A token of this object: changed values in memory cannot be detected without reading them."""
        return [{"memory": self._token}]

    def paths(self) -> list[Path]:
        return []

    def close(self) -> None:
        """Nothing is open."""


def is_torch_tensor(value: object) -> bool:
    return any(c.__module__ == "torch" and c.__name__ == "Tensor" for c in type(value).__mro__)


def is_torch_module(value: object) -> bool:
    return any(
        c.__module__ == "torch.nn.modules.module" and c.__name__ == "Module" for c in type(value).__mro__
    )


def import_torch(purpose: str) -> Any:
    """Return torch. Errors: AlnicoError, with the command that installs it."""
    return import_extra("torch", purpose, "torch")


def unwrap_module(module: Any) -> Any:
    """Return the module inside ``torch.compile`` and ``DataParallel`` wrappers."""
    while True:
        children = dict(module.named_children())
        names = [c.__name__ for c in type(module).__mro__]
        inner = "_orig_mod" if "OptimizedModule" in names else "module"
        if inner not in children or not {"OptimizedModule", "DataParallel", "DistributedDataParallel"} & set(
            names
        ):
            return module
        module = children[inner]


def state_dict_of(model: Any, label: str) -> dict[str, Any]:
    """Return the tensors of a dict or an ``nn.Module`` by name. Errors: ModelError if it is neither, or has
    none.

    Leaves out what ``torch.compile`` inserts into names, and a module's state other than tensors.
    """
    if is_torch_module(model):
        state = unwrap_module(model).state_dict()
        for name, value in state.items():
            if (
                not name.endswith("_extra_state")
                and isinstance(value, (tuple, list))
                and any(map(is_torch_tensor, value))
            ):
                raise ModelError(
                    f"{label}: {name}: is a {type(value).__name__} of tensors, as quantised layers store "
                    "their weights; expected floating-point weights. Use the module from before "
                    "quantisation."
                )
            if not name.endswith("_extra_state") and not is_torch_tensor(value) and _holds_arrays(value):
                raise ModelError(
                    f"{label}: {name}: is {_type_of(value)} in the state of a module; expected torch "
                    "tensors. Make it a buffer of the module (register_buffer), or merge the dicts of its "
                    "arrays with merge_state_dicts."
                )
        state = {n: v for n, v in state.items() if is_torch_tensor(v)}
    elif isinstance(model, Mapping):
        state = dict(model)
    else:
        raise ModelError(
            f"{label}: is {_type_of(model)}; expected a dict of tensors, an nn.Module or the path of a model."
        )
    if not state:
        raise ModelError(f"{label}: has no tensors; expected a model with tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_text(name):
            reason = (
                "which is not valid Unicode text"
                if isinstance(name, str)
                else f"of type {type(name).__name__}"
            )
            raise ModelError(f"{label}: has the key {name!r}, {reason}; expected tensor names. Rename it.")
        if (why := why_unreadable(value)) is not None:
            raise ModelError(f"{label}: {name}: {why}")
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if plain.setdefault(name.replace(COMPILE_PREFIX, ""), value) is not value:
            raise ModelError(
                f"{label}: has {name} and {name.replace(COMPILE_PREFIX, '')}, which are the same name "
                "without torch.compile's prefix; expected one of them. Remove one."
            )
    return plain


def _holds_arrays(value: Any) -> bool:
    """Is a value an array, or does it contain arrays or tensors?"""
    if isinstance(value, Mapping):
        return any(map(_holds_arrays, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_arrays, value))
    return isinstance(value, np.ndarray) or is_torch_tensor(value)


def _is_text(name: str) -> bool:
    """Can a name be written to a file? Unpaired surrogates cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unreadable(value: Any) -> str | None:
    """Say why a value that looks like a tensor cannot be read, what was expected and what to do; None if it
    can."""
    # Naming numpy.ma imports it, which takes longer than merging a small network.
    is_subclass = isinstance(value, np.ndarray) and type(value) is not np.ndarray
    if is_subclass and isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        return (
            f"is an array with {int(np.ma.getmaskarray(value).sum())} masked values; expected a value for "
            "every element. Fill them with numpy.ma.filled, or use .data for the values under the mask."
        )
    if not is_torch_tensor(value):
        return None
    torch = sys.modules["torch"]
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return (
            "is an uninitialised parameter of a lazy module; expected one with values. Run the module once, "
            "or load its weights."
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return (
            "is a tensor inside torch.func (vmap, grad, jvp), which has no values of its own; expected a "
            "plain tensor. Merge outside it."
        )
    if value.is_nested:
        return (
            "is a nested tensor, of several shapes; expected one dense tensor. Pass its parts (.unbind()) "
            "under separate names, or pad it."
        )
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"is {_type_of(value)}, whose values cannot be read directly; expected a plain tensor. Pass the "
            "plain form: .full_tensor() of a DTensor, .dequantize() of quantised weights, real weights for "
            "a fake tensor."
        )
    return None


def strip_parallel_prefix(
    states: Sequence[dict[str, Any]], others: Sequence[Collection[str]] = ()
) -> list[dict[str, Any]]:
    """Remove ``module.`` from the names of models where every name has it, if another model does not have it.

    ``others`` are the names of models that are not in memory.
    """
    wrapped = [all(n.startswith(PARALLEL_PREFIX) for n in names) for names in (*states, *others)]
    if all(wrapped):
        return list(states)
    return [
        {n.removeprefix(PARALLEL_PREFIX): v for n, v in s.items()} if w else s
        for s, w in zip(states, wrapped, strict=False)
    ]


def shared_tensors(
    states: Sequence[Mapping[str, Any]], others: Sequence[Collection[str]] = ()
) -> dict[str, str]:
    """Map names to the earlier name whose memory they share, if they share it in every model that has both.

    A model that has only the earlier name agrees, as files do (``others`` are their names). A name that is
    tied in one model and a separate tensor in another is not tied.
    """
    tied: dict[str, str] = {}
    addresses = [{n: _address(v) for n, v in state.items()} for state in states]
    for by_name in addresses:
        first: dict[Any, str] = {}
        for name, address in by_name.items():
            if address is not None and first.setdefault(address, name) != name:
                tied.setdefault(name, first[address])
    return {
        name: to
        for name, to in tied.items()
        if to not in tied
        and all(to in p and (name not in p or (p[name] is not None and p[name] == p[to])) for p in addresses)
        and all(to in names and name not in names for names in others)
    }


def to_numpy(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """View raw bytes as an array. Errors: AlnicoError for a dtype that numpy lacks."""
    numpy_dtype = next((n for n, name in NUMPY_DTYPES.items() if name == dtype), None)
    if numpy_dtype is None:
        raise AlnicoError(f"numpy has no dtype for {dtype}. Pass torch tensors, or choose dtype float32.")
    return raw.view(numpy_dtype).reshape(shape)


def to_torch(raw: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """View raw bytes as a torch tensor: an array on the CPU, a torch tensor of bytes on its device."""
    torch = import_torch("a result as torch tensors")
    kind = getattr(torch, next(n for n, name in TORCH_DTYPES.items() if name == dtype))
    flat = raw if is_torch_tensor(raw) else torch.from_numpy(raw)
    if not flat.numel():
        return torch.empty(shape, dtype=kind, device=flat.device)
    return flat.view(kind).reshape(shape)


def _describe(value: Any, where: str) -> tuple[TensorSpec, Any, bool]:
    """Describe a tensor, and return what it is read from: its bytes if it is contiguous, otherwise itself."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = NUMPY_DTYPES.get(value.dtype)
        raw: Any = np.asarray(value)
    elif is_torch_tensor(value):
        torch = sys.modules["torch"]
        value = _plain(value)
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            problem = (
                "is quantised"
                if value.is_quantized
                else f"is on {value.device.type}, with the layout {value.layout}"
            )
            raise ModelError(
                f"{where}: {problem}; expected a dense tensor with values. Load the model's weights."
            )
        dtype = TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        raw = value.detach().resolve_conj().resolve_neg()
        if dtype is not None and raw.device.type == "cpu":
            # numpy lacks bfloat16 and float8: view them as integers of the same size.
            raw = (
                raw.numpy()
                if dtype == "C64"
                else raw.view(getattr(torch, f"int{DTYPES[dtype].bits}")).numpy()
            )
    else:
        raise ModelError(
            f"{where}: is {_type_of(value)}; expected a numpy array or a torch tensor. "
            "Pass only tensors: from a training checkpoint, its state_dict."
        )
    if dtype is None:
        raise ModelError(
            f"{where}: has the dtype {value.dtype}; expected one of {', '.join(TORCH_DTYPES)}. Convert the "
            "tensor."
        )
    is_flat = raw.flags.c_contiguous if isinstance(raw, np.ndarray) else raw.is_contiguous()
    return TensorSpec(dtype, tuple(value.shape), dtype), _bytes_of(raw) if is_flat else raw, is_flat


def _plain(value: Any) -> Any:
    """Return a subclass of torch's tensor as a plain tensor, without calling its methods."""
    torch = sys.modules["torch"]
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.as_subclass(value, torch.Tensor)


def _bytes_of(value: Any) -> Any:
    """The bytes of an array or tensor in row-major order, flat; a view if it is contiguous."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return value.contiguous().reshape(-1).view(sys.modules["torch"].uint8)


def _row_bytes(tensor: TensorSpec) -> int:
    return tensor.byte_size // tensor.shape[0] if tensor.elements and tensor.shape else 0


def _address(value: Any) -> Any:
    """The memory of a tensor: equal for two names of one tensor. None for an empty tensor."""
    if isinstance(value, np.ndarray):
        return (value.ctypes.data, value.shape, value.strides, str(value.dtype)) if value.size else None
    if (
        is_torch_tensor(value)
        and value.layout == sys.modules["torch"].strided
        and value.numel()
        and value.device.type != "meta"
    ):
        lazy = (value.is_neg(), value.is_conj())  # a tensor and its negative may share memory
        return (
            value.data_ptr(),
            tuple(value.shape),
            value.stride(),
            str(value.dtype),
            str(value.device),
            *lazy,
        )
    return None


def _type_of(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
