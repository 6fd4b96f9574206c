"""Puts whole matrices on a GPU as torch's tensors, and lets as many threads compute there as its memory holds."""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from alnico.devices import CPU, Device, devices_for, free_bytes
from alnico.errors import ResourceError, RunError, first_line
from alnico.installation import import_extra
from alnico.numerics.arrays import AnyArray, is_numpy, to_numpy, to_torch
from alnico.numerics.decompositions import leading_vectors
from alnico.numerics.dtypes import CONFIG_NAMES, DTYPES, decode
from alnico.numerics.low_rank import Decomposed
from alnico.numerics.sizes import format_size
from alnico.plan.memory import GPU_LIBRARY_BYTES

GPU_SHARE = 0.9
"""The share of a GPU's free memory that matrices take at once: torch's allocations leave gaps."""


GPU_PACKAGES = frozenset({"numba", "numba_cuda", "cuda", "torch"})
"""The packages whose errors are those of a GPU, if they come while a tensor is made on one."""
GPU_ERRORS = ("cuda error", "cublas error", "cusolver error")
"""How plain errors of torch begin that are a GPU's."""


class MatrixGpu:
    """Makes tensors on one GPU. Errors: AlnicoError without torch; ResourceError for a torch that cannot use the GPU."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._torch: Any = import_extra("torch", "work on whole matrices on a GPU", "torch")
        if device.torch_name != "cpu" and not self._torch.cuda.is_available():
            raise ResourceError(
                f"{device}: torch {self._torch.__version__} cannot use it, and computes whole matrices there. Install a build of "
                "torch with CUDA, or choose the device cpu."
            )

    @property
    def bits_from(self) -> str:
        """What decides the bits of a decomposition here, besides the matrices."""
        torch = self._torch
        return f"{self.device.kind} {self.device.model} torch {torch.__version__} {torch.version.cuda}"

    def empty(self, *shape: int, dtype: str = "float64") -> AnyArray:
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device.torch_name)

    def decoded(self, raw: np.ndarray, dtype: str) -> AnyArray:
        """Copy the bytes of some numbers to the GPU; the numbers are exact, in their own dtype or float32.

        Dtypes that are no output's, such as float8, are decoded on the processor.
        """
        if dtype not in CONFIG_NAMES:
            return to_torch(decode(raw, dtype), self.device.torch_name)
        values = raw.view(np.dtype(DTYPES[dtype].storage))
        if dtype == "BF16":  # numpy has no name for it
            return to_torch(values.view(np.int16), self.device.torch_name).view(self._torch.bfloat16)
        return to_torch(values, self.device.torch_name)

    def matrix(self, array: np.ndarray) -> AnyArray:
        """Copy an array to the GPU, in its dtype."""
        return to_torch(array, self.device.torch_name)

    def placed(self, array: AnyArray) -> AnyArray:
        """Copy a matrix of numpy's to the GPU; arrays of other dimensions stay where they are."""
        return to_torch(array, self.device.torch_name) if is_numpy(array) and array.ndim == 2 else array

    def all_finite(self, values: AnyArray) -> AnyArray:
        """Are all values finite? The answer stays on the GPU."""
        return self._torch.isfinite(values).all()

    def compact(self, array: AnyArray) -> AnyArray:
        """Return a matrix on the GPU without the memory of a larger one that it is part of, in one order of its elements.

        Arrays of other dimensions become numpy's.
        """
        if is_numpy(array) or array.ndim != 2:
            return to_numpy(array)
        if not (array.is_contiguous() or array.T.is_contiguous()):
            return array.contiguous()
        is_part = array.untyped_storage().nbytes() > array.numel() * array.element_size()
        return array.clone() if is_part else array


def matrix_gpus(device: str) -> tuple[MatrixGpu, ...]:
    """Return the GPUs that the option ``device`` names for work on whole matrices; none if it names the processor.

    Errors: AlnicoError; ResourceError for a device that does not exist.
    """
    return tuple(MatrixGpu(found) for found in devices_for("merging", device) if found.is_gpu)


def kind_of(gpus: Sequence[MatrixGpu]) -> str:
    """Return the kind of the devices: ``cpu`` if there is no GPU among them."""
    return gpus[0].device.kind if gpus else CPU.kind


@contextmanager
def whole_float32(gpus: Sequence[MatrixGpu]) -> Iterator[None]:
    """Multiply float32 matrices in float32 on GPUs, though the process may have allowed torch fewer digits (TF32)."""
    if not gpus:
        yield
        return
    torch = gpus[0]._torch
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class GpuTurns:
    """Gives each thread its GPU: threads take them in turn."""

    def __init__(self, gpus: Sequence[MatrixGpu]) -> None:
        self.all = gpus
        self._own = threading.local()
        self._turns = itertools.count()

    def mine(self) -> MatrixGpu | None:
        """Return the GPU of this thread; None if there is none."""
        if not self.all:
            return None
        if not hasattr(self._own, "gpu"):
            self._own.gpu = self.all[next(self._turns) % len(self.all)]
        gpu: MatrixGpu = self._own.gpu
        return gpu


class MatrixRoom:
    """The memory of the GPUs of a run, shared by its threads."""

    def __init__(self) -> None:
        self._used: dict[Device, int] = {}
        self._free: dict[Device, int] = {}
        self._changed = threading.Condition()

    @contextmanager
    def taken(
        self,
        device: Device,
        name: str,
        needed: int,
        check: Callable[[], None] = lambda: None,
        *,
        reports: bool = True,
    ) -> Iterator[None]:
        """Wait until the GPU has room for ``needed`` bytes, and compute on it in a stream of this thread.

        ``check`` is called while waiting. Errors: ResourceError if the matrix ``name`` does not fit after all; numpy's
        LinAlgError for torch's; RunError if the GPU fails otherwise, unless the caller reports that (``reports`` is False).
        """
        with self._changed:
            if not self._used.get(device):
                self._free[device] = int(GPU_SHARE * free_bytes(device))
            while self._used.get(device) and self._used[device] + needed > self._free[device]:
                check()
                self._changed.wait(0.1)
            self._used[device] = self._used.get(device, 0) + needed
        torch: Any = importlib.import_module("torch")
        try:
            with _stream(torch, device):
                yield
        except getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError) as error:
            raise ResourceError(
                f"{name}: as a whole matrix it needs about {format_size(needed)} of {device}, whose memory is full "
                f"({str(error).partition('.')[0]}). End other programs that use the GPU, or choose the device cpu."
            ) from None
        except torch.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError from error
        except Exception as error:
            if not reports or not is_of_gpu(error):
                raise
            raise RunError(
                f"{name}: {device} failed ({first_line(error)}). Run the same again; if it fails again, end other programs that use "
                "the GPU, or choose the device cpu."
            ) from error
        finally:
            with self._changed:
                self._used[device] -= needed
                if not self._used[device] and device.torch_name != "cpu":
                    torch.cuda.empty_cache()  # for the kernels of other tensors, which do not allocate by torch
                self._changed.notify_all()


def is_of_gpu(error: BaseException) -> bool:
    """Is an error one of a GPU's driver, or of a library that computes on it? torch has plain ones for some."""
    is_plain = isinstance(error, RuntimeError) and str(error).lower().startswith(GPU_ERRORS)
    return is_plain or any(kind.__module__.partition(".")[0] in GPU_PACKAGES for kind in type(error).__mro__)


class Decomposer:
    """Finds leading singular vectors of matrices in memory: on the GPUs of a run, or on the processor."""

    def __init__(self, gpus: Sequence[MatrixGpu]) -> None:
        self._gpus = GpuTurns(gpus)
        self._room = MatrixRoom()

    def leading(self, name: str, matrix: np.ndarray, count: int, check: Callable[[], None]) -> Decomposed:
        """Return the leading ``count`` singular vectors, as numpy's arrays. Errors: those of :meth:`MatrixRoom.taken`."""
        gpu = self._gpus.mine()
        if gpu is None:
            return leading_vectors(matrix, count)
        rows, columns = matrix.shape
        numbers = 2 * rows * columns + 6 * min(rows, columns) ** 2 + count * (rows + columns)
        with self._room.taken(gpu.device, name, GPU_LIBRARY_BYTES + 8 * numbers, check):
            return leading_vectors(gpu.matrix(matrix), count).to_numpy()


_streams = threading.local()


@contextmanager
def _stream(torch: Any, device: Device) -> Iterator[None]:
    """Compute in this thread's own stream, so that threads do not wait for each other's matrices.

    It begins when the tensors that the caller has on the GPU are computed: torch's own streams do not wait for them.
    """
    if device.torch_name == "cpu":
        yield
        return
    own: dict[str, Any] = _streams.__dict__
    with torch.cuda.device(device.torch_name):
        if device.name not in own:
            own[device.name] = torch.cuda.Stream()
        own[device.name].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own[device.name]):
            yield
