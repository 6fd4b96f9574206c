"""Caches compiled kernels: object code in files of a private folder.

The files hold code that is run, so the folder and each file in it must be owned by the user of this process
and not be writable by others. Both are checked by the descriptors that are then read: nothing can be put in
their place between the check and the use. A file is believed if its hash is that of its key, its symbol and
its code, and if the code is an object file that defines the symbol. Whatever is wrong with the cache costs a
compilation and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from alnico.folders import Folder, open_to_write, private_cache, reach, read_private

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

MAGIC = b"alnico kernel 2\n"
KIND = "kernels"
"""The folder in the cache."""

SUFFIX = ".kernel"
SPENT = ".spent"
"""Ends the name of a file that holds a number of seconds as text."""

MAKING = ".making"
"""Ends the name of the file that a process locks while it compiles a kernel."""

LONGEST_WAIT = 120.0
"""Seconds that a process waits for another that compiles the same kernel."""

MOST_BYTES = 64 << 20
"""The largest size that is read; kernels take tens of kilobytes."""


def read_kernel(key: str) -> tuple[str, bytes] | None:
    """Return the symbol and the object code under a key; None if there are none that can be trusted."""
    data = _read(key + SUFFIX)
    return None if data is None else _unpacked(key, data)


def write_kernel(key: str, name: str, code: bytes) -> bool:
    """Store a kernel under a key in one step; return whether it is stored. If that fails, on a full disk for
    example, nothing is stored."""
    return _write(key + SUFFIX, _packed(key, name, code))


@contextlib.contextmanager
def making_kernel(key: str) -> Iterator[None]:
    """Wait until no other process of this machine makes the kernel under a key, then keep others from making it in a block.

    The system ends the lock of a process that dies. Where files cannot be locked, or another process takes too long, nothing
    is waited for: then the kernel is made twice.
    """
    with private_cache(KIND) as folder:
        descriptor = None if folder is None or fcntl is None else _locked(key + MAKING, folder)
        try:
            yield
        finally:
            if folder is not None and descriptor is not None:
                name, directory = reach(folder.path / (key + MAKING), folder)
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
                os.close(descriptor)


def _locked(name: str, folder: Folder) -> int | None:
    """The descriptor of a file that this process has locked; None if it cannot."""
    try:
        descriptor = open_to_write(folder.path / name, folder, flags=os.O_CREAT, mode=0o600)
    except OSError:
        return None
    end = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.02)
                continue
        except OSError:  # a disk without locks
            pass
        else:
            return descriptor
        os.close(descriptor)
        return None


def read_spent(key: str) -> float:
    """Return the seconds that a kernel has run without being compiled, over all runs, as far as they are recorded."""
    try:
        seconds = float((_read(key + SPENT) or b"0").decode("ascii"))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def write_spent(key: str, seconds: float) -> None:
    """Record what :func:`read_spent` returns."""
    _write(key + SPENT, f"{seconds:.3f}".encode("ascii"))


def _read(file_name: str) -> bytes | None:
    """The bytes of a file of the cache; None if there is none that can be trusted. A longer file has another hash, then."""
    with private_cache(KIND) as folder:
        return None if folder is None else read_private(file_name, folder, MOST_BYTES)


def _write(file_name: str, data: bytes) -> bool:
    """Store a file in one step; return whether it is stored."""
    with private_cache(KIND) as folder:
        if folder is None:
            return False
        path = folder.path / file_name
        temporary = folder.path / f"{secrets.token_hex(8)}.tmp"
        (old, directory), (new, _) = reach(temporary, folder), reach(path, folder)
        try:
            descriptor = open_to_write(temporary, folder, flags=os.O_CREAT | os.O_EXCL, mode=0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(old, new, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                os.unlink(old, dir_fd=directory)
        except OSError:  # a full, read-only or vanished cache costs time, not the merge
            return False
    return True


def cache_directory() -> Path | None:
    """Return the private directory of compiled kernels, created if needed; None if none can be trusted.

    Where: :func:`alnico.folders.cache_path`.
    """
    with private_cache(KIND) as folder:
        return None if folder is None else folder.path


def _packed(key: str, name: str, code: bytes) -> bytes:
    rest = name.encode("ascii") + b"\n" + code
    return MAGIC + _hash(key, rest) + rest


def _unpacked(key: str, data: bytes) -> tuple[str, bytes] | None:
    """The symbol and the code packed under a key; None for other data."""
    head, digest, rest = data[: len(MAGIC)], data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if head != MAGIC or _hash(key, rest) != digest:
        return None
    name, _, code = rest.partition(b"\n")
    # LLVM aborts the process on an invalid object file, and calls address 0 for a missing symbol.
    with contextlib.suppress(struct.error, UnicodeDecodeError):
        if sys.platform != "linux" or _defines(code, name):
            return name.decode("ascii"), code
    return None


def _hash(key: str, rest: bytes) -> bytes:
    return hashlib.sha256(key.encode("ascii") + b"\0" + rest).digest()


def _defines(code: bytes, name: bytes) -> bool:
    """Whether this is a complete object file (ELF, 64 bits) that defines a symbol. Errors: struct.error."""
    order = {b"\x7fELF\x02\x01": "<", b"\x7fELF\x02\x02": ">"}.get(code[:6])
    if order is None or not name:
        return False
    (begin,) = struct.unpack_from(f"{order}Q", code, 40)
    width, count, _ = struct.unpack_from(f"{order}HHH", code, 58)
    if width != 64 or begin + width * count > len(code):
        return False
    # Of each section: its kind, place, size and the section of its names.
    sections = [struct.unpack_from(f"{order}4xI16xQQI", code, begin + width * i) for i in range(count)]
    if any(
        at + size > len(code) for kind, at, size, _ in sections if kind != 8
    ):  # 8: without bytes in the file
        return False
    is_defined = False
    for _, at, size, link in (s for s in sections if s[0] == 2):  # 2: a table of symbols
        if link >= count:
            return False
        _, names, length, _ = sections[link]
        for place in range(at, at + size - size % 24, 24):
            first, section = struct.unpack_from(f"{order}I2xH", code, place)
            if first >= length:
                return False
            is_defined |= bool(section) and code.startswith(name + b"\0", names + first)
    return is_defined
