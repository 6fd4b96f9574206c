"""Finds the devices of this machine: its processor and its GPUs, and those that the option ``device`` names."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from alnico.errors import AlnicoError, ResourceError, first_line
from alnico.installation import install_hint
from alnico.libraries import without_local_settings
from alnico.numerics.sizes import format_size

Use = Literal["merging", "scoring"]
"""What a device is for. ``auto`` merges on the processor, because a GPU may round the last bit otherwise; it scores
and tunes on a GPU."""

DEFAULT_DEVICE = "auto"

_SPELLING = re.compile(r"auto|cpu|cuda(:(all|[0-9]{1,3}))?")
EXPECTED = "auto, cpu, cuda, cuda:N with the number of a GPU, or cuda:all"


@dataclass(frozen=True)
class Device:
    """The processor, or one GPU. ``torch_name`` is what torch calls it."""

    name: str
    model: str = ""
    total_bytes: int = 0
    torch_name: str = "cpu"

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``: what decides the bits of a merge."""
        return self.name.partition(":")[0]

    @property
    def number(self) -> int:
        """The number of a GPU; 0 for the processor."""
        return int(self.name.partition(":")[2] or 0)

    def __str__(self) -> str:
        if not self.is_gpu:
            return self.name
        return f"{self.name} ({self.model}, {format_size(self.total_bytes)})"


CPU = Device("cpu")

_made: list[tuple[Device, ...]] = []


def checked_device(device: Any) -> str:
    """Return the text of the option ``device``, which may be a ``torch.device``. Opens no device. Errors: AlnicoError.

    >>> checked_device("cuda:1"), checked_device("auto")
    ('cuda:1', 'auto')
    """
    text = str(device)
    if not _SPELLING.fullmatch(text):
        raise AlnicoError(f"device is {text[:100]!r}; expected {EXPECTED}.")
    return text


def devices_for(use: Use, device: str = DEFAULT_DEVICE) -> tuple[Device, ...]:
    """Return the devices that the option names: one, or all GPUs for ``cuda:all``.

    ``auto`` is the processor for merging, and for scoring the first GPU, or the processor if torch finds none.
    Scoring needs a GPU that torch finds; for merging numba-cuda may find it, too. Errors: AlnicoError for an option of
    another form; ResourceError for a device that does not exist, with those that do.
    """
    text = checked_device(device)
    if text == "cpu" or (text == "auto" and use == "merging"):
        return (CPU,)
    if text == "auto":
        return _auto()
    found = _gpus(use, text)
    if text == "cuda:all":
        return found
    number = int(text.partition(":")[2] or 0)
    chosen = [one for one in found if one.number == number]
    if not chosen:
        listed = ", ".join(map(str, (CPU, *found)))
        raise ResourceError(f"device is {text}; this machine has {listed}. Choose one of these.")
    return (chosen[0],)


def devices_here() -> tuple[Device, ...]:
    """Return the processor and all GPUs that can be used; never an error."""
    try:
        return CPU, *_gpus("merging", "cuda")
    except ResourceError:
        return (CPU,)


@contextmanager
def made_gpus(gpus: Sequence[Device]) -> Iterator[None]:
    """Use these GPUs instead of the machine's, in all threads: for tests. Their ``torch_name`` may be ``cpu``."""
    _made.append(tuple(gpus))
    try:
        yield
    finally:
        _made.pop()


def are_made() -> bool:
    """Are the GPUs those of :func:`made_gpus`?"""
    return bool(_made)


def free_bytes(device: Device) -> int:
    """Return the free memory of a GPU; of a made one, all of it."""
    if are_made() or not device.is_gpu:
        return device.total_bytes
    torch, _ = _torch()
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device.number)[0])
    cuda = _numba_cuda()
    with cuda.gpus[device.number]:
        return int(cuda.current_context().get_memory_info().free)


def _auto() -> tuple[Device, ...]:
    if _made:
        return _made[-1][:1] or (CPU,)
    torch, _ = _torch()
    if torch is None or not torch.version.cuda:
        return (CPU,)
    with warnings.catch_warnings():  # torch warns of a driver that is too old; auto then means the processor
        warnings.simplefilter("ignore")
        is_there = torch.cuda.is_available()
    return (_of_torch(torch)[0],) if is_there else (CPU,)


def _gpus(use: Use, asked: str) -> tuple[Device, ...]:
    """Return all GPUs. Errors: ResourceError if there is none, with the reason."""
    if _made:
        if not _made[-1]:
            raise _none(asked, "the machine has no GPU")
        return _made[-1]
    torch, why = _torch()
    if torch is not None:
        found, why = _from_torch(torch)
        if found:
            return found
    if use == "merging":
        found, other = _from_numba()
        if found:
            return found
        why = f"{why}; {other}"
    raise _none(asked, why)


def _none(asked: str, why: str) -> ResourceError:
    return ResourceError(f"device is {asked}; no GPU can be used here ({why}). Choose cpu, or fix that.")


def _torch() -> tuple[Any, str]:
    """Return torch, or None and why there is none."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None, "torch is not installed"
        return None, f"torch cannot be imported: {first_line(error)}"
    except Exception as error:  # an OSError for a library of its own that is missing
        return None, f"torch cannot be imported: {first_line(error)}"
    if not hasattr(torch, "version"):  # a folder of that name
        return None, "torch is not installed"
    return torch, ""


def _from_torch(torch: Any) -> tuple[tuple[Device, ...], str]:
    """Return the GPUs that torch finds, or why it finds none."""
    if not torch.version.cuda:
        return (), f"torch {torch.__version__} is built without CUDA: install a build of torch with it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
        return _of_torch(torch), "torch finds no GPU"
    except (RuntimeError, AssertionError) as error:
        return (), f"torch: {first_line(error)}"


def _of_torch(torch: Any) -> tuple[Device, ...]:
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            Device(f"cuda:{number}", properties.name, int(properties.total_memory), f"cuda:{number}")
        )
    return tuple(found)


def _numba_cuda() -> Any:
    with without_local_settings():
        importlib.import_module("numba_cuda")
        return importlib.import_module("numba.cuda")


def _from_numba() -> tuple[tuple[Device, ...], str]:
    """Return the GPUs that numba-cuda finds, or why it finds none."""
    try:
        cuda = _numba_cuda()
    except ImportError:
        return (), f"numba-cuda is not installed: {install_hint('cuda')}".rstrip(".")
    if cuda.config.ENABLE_CUDASIM:
        return (), "numba-cuda: its simulator is on: unset NUMBA_ENABLE_CUDASIM"
    try:
        found = []
        for number, gpu in enumerate(cuda.list_devices()):
            with gpu:
                total = int(cuda.current_context().get_memory_info().total)
            name = gpu.name.decode() if isinstance(gpu.name, bytes) else str(gpu.name)
            found.append(Device(f"cuda:{number}", name, total, f"cuda:{number}"))
        return tuple(found), "numba-cuda finds no GPU"
    except Exception as error:  # the driver's errors have no common class
        return (), f"numba-cuda: {first_line(error)}"
