"""Models in memory: dicts of numpy arrays or torch tensors, and torch modules.

torch is never imported here: what comes from it brings it along.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alnico.checkpoint.source import Origin, TensorSpec
from alnico.errors import AlnicoError, ModelError
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
"""What the safetensors format calls torch's dtypes."""

NUMPY_DTYPES = {
    np.dtype(d.storage): d.name
    for d in DTYPES.values()
    if d.storage and d.kind != "packed" and d.name != "BF16"
} | {
    np.dtype("u1"): "U8",
    np.dtype("u2"): "U16",
    np.dtype("?"): "BOOL",
}

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of tensors."""

PARALLEL = "module."
"""What ``DataParallel`` puts before them."""


class MemoryModel:
    """Tensors in memory as a source. They are read where they lie, never copied as a whole and never written to.

    Values are numpy arrays and torch tensors, of any strides, on any device. ``nominal`` are the dtypes that tensors count as where that
    is not their own. Errors: ModelError for what is neither, or has no values or a dtype that no file could hold.
    """

    held_bytes = 0
    config: Mapping[str, Any] = MappingProxyType({})
    directory: Path | None = None
    origin: Origin | None = None

    def __init__(
        self, label: str, tensors: Mapping[str, Any], nominal: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.label = label
        self._token = uuid.uuid4().hex
        self._flat: dict[str, Any] = {}
        self._strided: dict[str, Any] = {}
        held: dict[str, TensorSpec] = {}
        for name, value in tensors.items():
            try:
                held[name], raw, is_flat = _opened(value, f"{label}: {name}")
            except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
                raise ModelError(
                    f"{label}: {name}: is {_kind(value)} that cannot be read here ({(str(error) or type(error).__name__).splitlines()[0][:200]}); "
                    "expected a plain tensor. Merge outside of FakeTensorMode and other modes of torch."
                ) from None
            held[name] = dataclasses.replace(held[name], nominal=nominal.get(name, held[name].nominal))
            (self._flat if is_flat else self._strided)[name] = raw
        self.tensors: Mapping[str, TensorSpec] = held
        rows = [
            min(t.byte_size, 4 * PIECE + 2 * _row_bytes(t)) for n, t in held.items() if n in self._strided
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
        """The bytes of a tensor where they lie in this machine's memory; None for one that is not contiguous, or elsewhere."""
        raw = self._flat.get(name)
        return raw if isinstance(raw, np.ndarray) else None

    def identity(self) -> list[dict[str, Any]]:
        """Values in memory cannot be told from changed ones without reading them: each source is its own."""
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
    """Return torch. Errors: AlnicoError, saying how it is installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise AlnicoError(
            f"{purpose} needs torch, which is not installed. Say: pip install 'alnico[torch]'"
        ) from None


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
    """Return the tensors of a dict or an ``nn.Module`` by name. Errors: ModelError if it is neither, or has none.

    What ``torch.compile`` puts into names is left out, and what a module keeps beside tensors.
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
                    f"{label}: {name}: is a {type(value).__name__} of tensors, as quantised layers keep their weights; expected weights in "
                    "floating point. Give the module from before it was quantised."
                )
            if not name.endswith("_extra_state") and not is_torch_tensor(value) and _holds_arrays(value):
                raise ModelError(
                    f"{label}: {name}: is {_kind(value)} in the state of a module; expected tensors of torch, which are what is merged. "
                    "Make it a buffer of the module (register_buffer), or merge the dicts of its arrays with merge_state_dicts."
                )
        state = {n: v for n, v in state.items() if is_torch_tensor(v)}
    elif isinstance(model, Mapping):
        state = dict(model)
    else:
        raise ModelError(
            f"{label}: is {_kind(model)}; expected a dict of tensors, an nn.Module or the path of a model."
        )
    if not state:
        raise ModelError(f"{label}: has no tensors; expected a model with some.")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_text(name):
            found = (
                "which is no text that a file could hold"
                if isinstance(name, str)
                else f"of type {type(name).__name__}"
            )
            raise ModelError(f"{label}: has the key {name!r}, {found}; expected names of tensors. Rename it.")
        if (why := why_unreadable(value)) is not None:
            raise ModelError(f"{label}: {name}: {why}")
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if plain.setdefault(name.replace(COMPILED, ""), value) is not value:
            raise ModelError(
                f"{label}: has {name} and {name.replace(COMPILED, '')}, which are one name without what torch.compile adds; expected one of "
                "them. Take one out."
            )
    return plain


def _holds_arrays(value: Any) -> bool:
    """Is a value an array, or does it hold arrays or tensors?"""
    if isinstance(value, Mapping):
        return any(map(_holds_arrays, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_arrays, value))
    return isinstance(value, np.ndarray) or is_torch_tensor(value)


def _is_text(name: str) -> bool:
    """Can a name be written to a file? Halves of surrogate pairs cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def why_unreadable(value: Any) -> str | None:
    """Say why a value that looks like a tensor has no plain values, what was expected, and what to do; None if it has."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        return (
            f"is an array with {int(np.ma.getmaskarray(value).sum())} masked values; expected a value for every element. "
            "Fill them with numpy.ma.filled, or give .data for the values under the mask."
        )
    if not is_torch_tensor(value):
        return None
    torch = sys.modules["torch"]
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        return "is a parameter without values of a lazy module; expected one with values. Run the module once, or load its weights."
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "is a tensor inside of torch.func (vmap, grad, jvp), which has no values of its own; expected a plain tensor. Merge outside of it."
    if value.is_nested:
        return "is a nested tensor, of several shapes; expected one dense tensor. Give its parts (.unbind()) names of their own, or pad it."
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"is {_kind(value)}, a kind of tensor whose values cannot be read as they lie; expected a plain tensor. "
            "Give what it stands for: .full_tensor() of a DTensor, .dequantize() of quantised weights, real weights for a fake tensor."
        )
    return None


def strip_parallel_prefix(
    states: Sequence[dict[str, Any]], others: Sequence[Collection[str]] = ()
) -> list[dict[str, Any]]:
    """Take ``module.`` off the names of the models that have it before every name, if another model has it not.

    ``others`` are the names of models that are not in memory.
    """
    wrapped = [all(n.startswith(PARALLEL) for n in names) for names in (*states, *others)]
    if all(wrapped):
        return list(states)
    return [
        {n.removeprefix(PARALLEL): v for n, v in s.items()} if w else s
        for s, w in zip(states, wrapped, strict=False)
    ]


def shared_tensors(
    states: Sequence[Mapping[str, Any]], others: Sequence[Collection[str]] = ()
) -> dict[str, str]:
    """Map names to the earlier name whose memory they share, where that is so in every model that has both.

    A model that has the earlier name alone, as files do (``others`` are their names), agrees. What is tied in one model
    and a tensor of its own in another is not tied.
    """
    tied: dict[str, str] = {}
    places = [{n: _place(v) for n, v in state.items()} for state in states]
    for place in places:
        first: dict[Any, str] = {}
        for name, where in place.items():
            if where is not None and first.setdefault(where, name) != name:
                tied.setdefault(name, first[where])
    return {
        name: to
        for name, to in tied.items()
        if to not in tied
        and all(to in p and (name not in p or (p[name] is not None and p[name] == p[to])) for p in places)
        and all(to in names and name not in names for names in others)
    }


def to_numpy(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """View raw bytes as an array. Errors: AlnicoError for a dtype that numpy has not."""
    found = next((n for n, name in NUMPY_DTYPES.items() if name == dtype), None)
    if found is None:
        raise AlnicoError(f"numpy has no dtype for {dtype}. Give torch tensors, or ask for dtype float32.")
    return raw.view(found).reshape(shape)


def to_torch(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Any:
    """View raw bytes as a torch tensor on the CPU."""
    torch = import_torch("a result as torch tensors")
    kind = getattr(torch, next(n for n, name in TORCH_DTYPES.items() if name == dtype))
    return torch.from_numpy(raw).view(kind).reshape(shape) if raw.size else torch.empty(shape, dtype=kind)


def _opened(value: Any, where: str) -> tuple[TensorSpec, Any, bool]:
    """Describe a tensor, and give what it is read from: its bytes, flat, if it is contiguous, else itself."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = NUMPY_DTYPES.get(value.dtype)
        raw: Any = np.asarray(value)
    elif is_torch_tensor(value):
        torch = sys.modules["torch"]
        value = _plain(value)
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            found = (
                "is quantised"
                if value.is_quantized
                else f"is on {value.device.type}, laid out as {value.layout}"
            )
            raise ModelError(
                f"{where}: {found}; expected a dense tensor with values. Load the model's weights."
            )
        dtype = TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        raw = value.detach().resolve_conj().resolve_neg()
        if dtype is not None and raw.device.type == "cpu":
            # numpy has neither bfloat16 nor float8; integers of the same size show the same bytes, whatever the strides.
            raw = (
                raw.numpy()
                if dtype == "C64"
                else raw.view(getattr(torch, f"int{DTYPES[dtype].bits}")).numpy()
            )
    else:
        raise ModelError(
            f"{where}: is {_kind(value)}; expected a numpy array or a torch tensor. "
            "Give tensors alone: of a training checkpoint, its state_dict."
        )
    if dtype is None:
        raise ModelError(
            f"{where}: has the dtype {value.dtype}; expected one of {', '.join(TORCH_DTYPES)}. Convert the tensor."
        )
    is_flat = raw.flags.c_contiguous if isinstance(raw, np.ndarray) else raw.is_contiguous()
    return TensorSpec(dtype, tuple(value.shape), dtype), _bytes_of(raw) if is_flat else raw, is_flat


def _plain(value: Any) -> Any:
    """The tensor that a subclass of torch's is, whatever its methods say of it."""
    torch = sys.modules["torch"]
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.as_subclass(value, torch.Tensor)


def _bytes_of(value: Any) -> Any:
    """The bytes of an array or tensor in order, as one dimension; a view if it is contiguous."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return value.contiguous().reshape(-1).view(sys.modules["torch"].uint8)


def _row_bytes(tensor: TensorSpec) -> int:
    return tensor.byte_size // tensor.shape[0] if tensor.elements and tensor.shape else 0


def _place(value: Any) -> Any:
    """Where a tensor lies: equal for two names of one. None for an empty one, which lies nowhere."""
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


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
