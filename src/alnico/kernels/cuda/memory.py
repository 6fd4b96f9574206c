"""Holds the memory of a GPU: buffers, copies on each thread's stream, and what kernels of a thread share

Importing this file imports no compiler. :func:`gpu_memory` opens a GPU once per process, and finds out there and then
whether kernels can be compiled and run on it: what is missing is one error before anything is read.

Under ``NUMBA_ENABLE_CUDASIM=1`` (set before numba is imported) the memory of a GPU is numpy's, and kernels run in
numba-cuda's simulator, one at a time, a thread of the GPU after another.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from alnico.devices import Device, are_made
from alnico.errors import AlnicoError, ResourceError, RunError, first_line
from alnico.installation import import_extra
from alnico.libraries import without_local_settings
from alnico.numerics.sizes import format_size

THREADS = 256
"""Threads in a block of a kernel whose threads share nothing."""

BLOCKS_OF_PROCESSOR = 16
"""Blocks for each multiprocessor of the GPU: enough for all to be busy until the end."""

SIMULATED_THREADS = 3
SIMULATED_BLOCKS = 2

_OF_THE_DRIVER = ("numba.cuda.cudadrv", "numba_cuda.", "cuda.")
"""Where the classes of its errors are."""

_open: dict[tuple[int, str], GpuMemory] = {}
_opening = threading.Lock()
_simulating = threading.Lock()
"""Held while the simulator runs a kernel: it runs one at a time."""


class DeviceBytes:
    """Contiguous bytes in the memory of a GPU, sliced as an array is: a slice shares them, and keeps them.

    ``address`` is where they are on the GPU. In the simulator ``array`` holds them.
    """

    __slots__ = ("address", "array", "owner", "size")

    dtype = np.dtype(np.uint8)
    ndim = 1
    itemsize = 1

    def __init__(self, address: int, size: int, owner: Any, array: np.ndarray | None = None) -> None:
        self.address = address
        self.size = size
        self.owner = owner
        self.array = array

    @property
    def nbytes(self) -> int:
        return self.size

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> DeviceBytes:
        start, stop, step = span.indices(self.size)
        if step != 1:
            raise ValueError(f"bytes of a GPU are sliced with step 1, not {step}")
        stop = max(start, stop)
        array = None if self.array is None else self.array[start:stop]
        return DeviceBytes(self.address + start, stop - start, self.owner, array)

    def __repr__(self) -> str:
        return f"DeviceBytes({format_size(self.size)})"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.array is not None:
            raise AttributeError("bytes of the simulator are not on a GPU")
        address = self.address if self.size else 0
        return {"shape": (self.size,), "typestr": "|u1", "data": (address, False), "version": 3}


def gpu_memory(device: Device) -> GpuMemory:
    """Return the memory of a GPU, opened once per process.

    Errors: AlnicoError if numba-cuda is not installed; ResourceError if its driver or its toolkit does not work.
    """
    key = (os.getpid(), device.name)
    with _opening:
        memory = _open.get(key)
        if memory is None:
            memory = _open[key] = GpuMemory(device)
        return memory


class GpuMemory:
    """The memory of one GPU. Safe for threads: each has its own stream, on which its copies and kernels follow each other.

    A thread of Python has no GPU of its own: each call makes this one current while it lasts.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._own = threading.local()
        self.cuda = _numba_cuda(device)
        self.is_simulated = bool(self.cuda.config.ENABLE_CUDASIM)
        self.blocks = SIMULATED_BLOCKS
        if not self.is_simulated:
            if are_made():
                raise AlnicoError(
                    f"{device.name} is made, and numba runs kernels on real GPUs; expected its simulator. Set "
                    "NUMBA_ENABLE_CUDASIM=1 before numba is imported."
                )
            self._open()
        self._try()

    def _open(self) -> None:
        """Find the GPU and the compiler for it. Errors: ResourceError."""
        name = self.device.name
        self.cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small tensors are no mistake
        try:
            gpus = self.cuda.gpus
            if len(gpus) <= self.device.number:
                raise ResourceError(
                    f"{name}: numba-cuda finds {len(gpus)} GPUs; expected this one among them. Choose another device."
                )
            self._gpu = gpus[self.device.number]
            with self._gpu:
                self.blocks = BLOCKS_OF_PROCESSOR * int(self._gpu.MULTIPROCESSOR_COUNT)
        except AlnicoError:
            raise
        except Exception as error:  # the driver's errors have no common class
            raise ResourceError(
                f"{name}: the driver does not work ({first_line(error)}); expected a driver of NVIDIA that numba-cuda can "
                "use. Install or update it, or choose the device cpu."
            ) from error
        try:
            importlib.import_module("numba.cuda.cudadrv.nvvm").NVVM()
            self.cuda.runtime.get_version()  # of NVRTC, which it needs, too
        except Exception as error:
            raise ResourceError(
                f"{name}: kernels cannot be compiled ({first_line(error)}); expected CUDA's toolkit. Run: pip install "
                "'numba-cuda[cu13]', or 'numba-cuda[cu12]' for a driver before 580."
            ) from error

    def _try(self) -> None:
        """Run a kernel whose result is known, and shows how the GPU rounds. Errors: ResourceError."""
        from alnico.kernels.cuda.compiled import compiled
        from alnico.kernels.cuda.source import ROUNDING, rounding_text

        try:
            found = self.mailbox(4 * len(ROUNDING)).view(np.float32)
            found[:] = -1
            numbers = tuple(np.float32(number) for number, _ in ROUNDING)
            self.launch(
                compiled(rounding_text()), [numbers, self.address(found, np.float32)], blocks=1, threads=1
            )
            self.finish()
        except Exception as error:
            raise ResourceError(
                f"{self.device.name}: a kernel does not run there ({first_line(error)}{self._versions()}); expected a driver as "
                "new as the toolkit. Update the driver, or run: pip install 'numba-cuda[cu12]'."
            ) from error
        if found.tolist() != [result for _, result in ROUNDING]:
            raise ResourceError(
                f"{self.device.name}: a kernel gives {found.tolist()} instead of {[result for _, result in ROUNDING]}; expected "
                "numbers rounded as on the processor. Update driver and toolkit, or choose the device cpu."
            )

    def _versions(self) -> str:
        """What driver and toolkit say of themselves, where they do."""
        try:
            driver = importlib.import_module("numba.cuda.cudadrv.driver").driver.get_version()
            toolkit = self.cuda.runtime.get_version()
        except Exception:
            return ""
        return f"; the driver has CUDA {driver[0]}.{driver[1]}, the toolkit {toolkit[0]}.{toolkit[1]}"

    @property
    def free_bytes(self) -> int:
        """Bytes that are free on the GPU."""
        if self.is_simulated:
            return self.device.total_bytes
        with self._gpu:
            return int(self.cuda.current_context().get_memory_info().free)

    def bytes(self, count: int) -> DeviceBytes:
        """Return fresh memory, not cleared. Errors: ResourceError if the GPU has less."""
        if self.is_simulated or not count:
            return DeviceBytes(0, count, None, np.empty(count, np.uint8) if self.is_simulated else None)
        with _reported(self.device, count), self._gpu:
            owner = self.cuda.device_array(count, np.uint8)
            return DeviceBytes(int(owner.__cuda_array_interface__["data"][0]), count, owner)

    def pinned(self, count: int) -> np.ndarray:
        """Return memory of the processor that copies to and from the GPU take without a detour, not cleared."""
        if self.is_simulated or not count:
            return np.empty(count, np.uint8)
        with _reported(self.device), self._gpu:
            pinned: np.ndarray = self.cuda.pinned_array(count, np.uint8)
            return pinned

    def view(self, tensor: Any) -> DeviceBytes:
        """Return the bytes of a contiguous tensor on this GPU (of torch, or with ``__cuda_array_interface__``), not copied.

        What was started on the tensor is waited for. In the simulator: of an array of numpy, or a tensor of torch's on the
        processor.
        """
        if isinstance(tensor, DeviceBytes):
            return tensor
        if hasattr(tensor, "data_ptr"):
            return self._view_of_torch(tensor)
        if self.is_simulated:
            if not tensor.flags.c_contiguous:
                raise ValueError(f"an array of shape {tensor.shape} is not contiguous")
            array = tensor.reshape(-1).view(np.uint8)
            return DeviceBytes(0, array.size, tensor, array)
        with self._gpu:
            array = self.cuda.as_cuda_array(tensor)
            if not array.is_c_contiguous():
                raise ValueError(f"an array of shape {array.shape} is not contiguous")
            return DeviceBytes(int(array.__cuda_array_interface__["data"][0]), array.nbytes, tensor)

    def _view_of_torch(self, tensor: Any) -> DeviceBytes:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
        torch = sys.modules["torch"]
        if self.is_simulated:
            array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            return DeviceBytes(0, array.size, tensor, array)
        torch.cuda.current_stream(tensor.device).synchronize()
        return DeviceBytes(int(tensor.data_ptr()), tensor.numel() * tensor.element_size(), tensor)

    def upload(self, host: np.ndarray, device_bytes: DeviceBytes) -> None:
        """Copy an array of as many bytes to the GPU, on this thread's stream. It must stay until :meth:`finish`."""
        self._copy(host, device_bytes, is_up=True)

    def download(self, device_bytes: DeviceBytes, host: np.ndarray) -> None:
        """Copy bytes of the GPU into an array of as many, on this thread's stream; they are there after :meth:`finish`."""
        self._copy(host, device_bytes, is_up=False)

    def _copy(self, host: np.ndarray, device_bytes: DeviceBytes, *, is_up: bool) -> None:
        if host.nbytes != device_bytes.size or not host.flags.c_contiguous:
            raise ValueError(
                f"{host.nbytes} bytes of shape {host.shape} on the processor, {device_bytes.size} on the GPU; "
                "expected as many, in order"
            )
        if not device_bytes.size:
            return
        flat = host.reshape(-1).view(np.uint8)
        if device_bytes.array is not None:
            if is_up:
                device_bytes.array[:] = flat
            else:
                flat[:] = device_bytes.array
            return
        with _reported(self.device), self._gpu:
            array = self.cuda.as_cuda_array(device_bytes)
            if is_up:
                array.copy_to_device(flat, stream=self._queue().stream)
            else:
                array.copy_to_host(flat, stream=self._queue().stream)

    def finish(self) -> None:
        """Wait until all copies and kernels of this thread have ended."""
        if not self.is_simulated:
            with _reported(self.device), self._gpu:
                self._queue().stream.synchronize()

    def address(self, memory: DeviceBytes | np.ndarray, dtype: Any = np.uint8) -> Any:
        """Return what a kernel calls the bytes of the GPU, or pinned memory, that hold numbers of a dtype."""
        if isinstance(memory, DeviceBytes):
            if memory.array is None:
                return memory.address
            memory = memory.array
        if not self.is_simulated:
            return int(memory.ctypes.data)  # pinned memory has one address for both
        from alnico.kernels.cuda.simulated import Numbers

        return Numbers(memory.view(dtype))

    def table(self, addresses: list[Any], memory: DeviceBytes) -> Any:
        """Put addresses into memory of the GPU (8 bytes each), and return what a kernel calls the table."""
        if self.is_simulated:
            from alnico.kernels.cuda.simulated import Numbers

            return Numbers(addresses)
        self.upload(np.array(addresses, np.int64), memory)
        return memory.address

    def mailbox(self, count: int) -> np.ndarray:
        """Return this thread's pinned memory, of at least ``count`` bytes: what kernels write there is there after
        :meth:`finish`. Each call may return the same memory."""
        queue = self._queue()
        if queue.mailbox.size < count:
            queue.mailbox = self.pinned(max(count, 1 << 16))
        return queue.mailbox[:count]

    def scratch(self, count: int) -> DeviceBytes:
        """Return this thread's working memory on the GPU, of at least ``count`` bytes. Each call may return the same."""
        queue = self._queue()
        if queue.scratch.size < count:
            queue.scratch = self.bytes(max(count, 1 << 16))
        return queue.scratch[:count]

    def launch(
        self, function: Any, arguments: list[Any], *, work: int = 0, blocks: int = 0, threads: int = THREADS
    ) -> None:
        """Start a kernel on this thread's stream: ``blocks`` of ``threads``, or as many as ``work`` needs and keep the
        GPU busy."""
        if self.is_simulated:
            with _simulating:
                function[blocks or SIMULATED_BLOCKS, SIMULATED_THREADS](*arguments)
            return
        blocks = blocks or max(min(self.blocks, -(-work // threads)), 1)
        with _reported(self.device), self._gpu:
            function[blocks, threads, self._queue().stream](*arguments)

    def _queue(self) -> _Queue:
        queue: _Queue | None = getattr(self._own, "queue", None)
        if queue is None:
            nothing = DeviceBytes(0, 0, None, np.empty(0, np.uint8) if self.is_simulated else None)
            queue = self._own.queue = _Queue(self._stream(), np.empty(0, np.uint8), nothing)
        return queue

    def _stream(self) -> Any:
        if self.is_simulated:
            return None
        with self._gpu:
            return self.cuda.stream()


class _Queue:
    """What one thread has on one GPU: a stream, pinned memory and working memory."""

    def __init__(self, stream: Any, mailbox: np.ndarray, scratch: DeviceBytes) -> None:
        self.stream = stream
        self.mailbox = mailbox
        self.scratch = scratch


def _numba_cuda(device: Device) -> Any:
    with without_local_settings():
        import_extra("numba_cuda", f"a merge on {device.name}", "cuda")
        return importlib.import_module("numba.cuda")


@contextmanager
def _reported(device: Device, count: int = 0) -> Iterator[None]:
    """Turn errors of the driver into ours; ``count`` bytes were asked for. Errors: ResourceError, RunError."""
    try:
        yield
    except Exception as error:
        if not any(kind.__module__.startswith(_OF_THE_DRIVER) for kind in type(error).__mro__):
            raise
        reason = first_line(error)
        if "OUT_OF_MEMORY" in reason:
            asked = f"{format_size(count)} of the GPU's memory" if count else "memory of the GPU"
            raise ResourceError(
                f"{device.name}: {asked} cannot be allocated ({reason}); expected it to be free. End other programs that use the "
                "GPU, or choose the device cpu."
            ) from error
        raise RunError(
            f"{device.name}: the driver reports {reason}; expected a GPU that works. Run the same command again, or choose "
            "the device cpu."
        ) from error
