"""Holds the options that many functions share: their defaults, checks and help texts."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

from alnico.devices import DEFAULT_DEVICE, checked_device
from alnico.errors import AlnicoError, OutputError
from alnico.events import Event, Watcher
from alnico.numerics.sizes import bytes_of

DEFAULT_BUDGET_BYTES = 2 << 30

DEFAULT_DOWNLOAD_CACHE_BYTES = 50 << 30

MOST_THREADS = 1024

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How a URL begins, also one that was made a path; a drive of Windows has one letter."""

Size = int | str
"""A number of bytes, or text such as ``2GiB``."""


@dataclass(frozen=True)
class Access:
    """How models that are not on this machine may be read.

    ``offline`` uses no network. ``stream`` reads models of the hub by ranges, and keeps no weights on the disk. ``download_cache``
    is the folder that keeps the parts of remote models that were read, up to ``download_cache_bytes``; None keeps nothing.
    """

    offline: bool = False
    stream: bool = False
    download_cache: Path | None = None
    download_cache_bytes: int = DEFAULT_DOWNLOAD_CACHE_BYTES


ONLINE, OFFLINE = Access(), Access(offline=True)


@dataclass(frozen=True)
class RunOptions:
    """What every run needs, checked: its memory budget, its threads, whether it may use the network, and who watches it.

    ``factor_cache`` is the folder that keeps what methods compute from whole matrices; None keeps nothing in files.
    ``device`` is the option of that name, checked in its form; :func:`alnico.devices.devices_for` finds what it names.
    ``has_default_threads``: nobody gave a number, so that nodes of a cluster take theirs.
    ``ray`` is the address of a Ray cluster, '' for the one that Ray finds or starts; None computes on this machine.
    ``stream`` reads models of the hub by ranges. ``download_cache`` is the folder that keeps what is read of models at URLs, up to
    ``download_cache_bytes``; None keeps nothing in files. ``reserved_bytes`` of the memory budget are kept for other work than
    merging, such as uploads.
    """

    memory_bytes: int = DEFAULT_BUDGET_BYTES
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    offline: bool = False
    watch: Watcher | None = None
    factor_cache: Path | None = None
    device: str = DEFAULT_DEVICE
    ray: str | None = None
    stream: bool = False
    download_cache: Path | None = None
    download_cache_bytes: int = DEFAULT_DOWNLOAD_CACHE_BYTES
    reserved_bytes: int = 0
    has_default_threads: bool = False

    @classmethod
    def of(
        cls,
        *,
        memory: Size = DEFAULT_BUDGET_BYTES,
        threads: int | None = None,
        offline: bool = False,
        watch: Watcher | None = None,
        processes: int = 1,
        factor_cache: str | os.PathLike[str] | None = None,
        device: Any = DEFAULT_DEVICE,
        ray: str | bool | None = None,
        stream: bool = False,
        download_cache: str | os.PathLike[str] | None = None,
        download_cache_size: Size = DEFAULT_DOWNLOAD_CACHE_BYTES,
    ) -> RunOptions:
        """Check the options that a caller gave. The default threads are those of the processors, shared by ``processes``.

        Errors: AlnicoError for a size, a number of threads or a device that is not one.
        """
        has_default_threads = threads is None
        if threads is None:
            threads = max((os.cpu_count() or 1) // processes, 1)
        return cls(
            bytes_of(memory),
            checked_count(threads, "threads"),
            offline,
            watch,
            checked_folder(factor_cache, "--factor-cache"),
            checked_device(device),
            checked_ray(ray),
            stream,
            checked_folder(download_cache, "--download-cache"),
            bytes_of(download_cache_size),
            has_default_threads=has_default_threads,
        )

    @property
    def access(self) -> Access:
        """How models that are not on this machine may be read."""
        return Access(self.offline, self.stream, self.download_cache, self.download_cache_bytes)

    def report(self, event: Event) -> None:
        """Pass an event to the caller."""
        if self.watch is not None:
            self.watch(event)


DEFAULT_RUN = RunOptions()


def checked_ray(ray: str | bool | None) -> str | None:
    """Return the address of a Ray cluster: '' for the one that Ray finds or starts, None for this machine alone.

    Errors: AlnicoError.

    >>> checked_ray(True), checked_ray(False), checked_ray("10.0.0.1:6379")
    ('', None, '10.0.0.1:6379')
    """
    if ray is None or ray is False:
        return None
    if ray is True:
        return ""
    if not isinstance(ray, str):
        raise AlnicoError(
            f"ray is {ray!r}; expected True, or the address of a cluster such as '10.0.0.1:6379'. Leave it out to compute on this "
            "machine."
        )
    return ray.strip()


def checked_folder(folder: str | os.PathLike[str] | None, option: str) -> Path | None:
    """Return the path of a folder that must be on this machine. Errors: OutputError for a URL, which is not shown: it may hold secrets."""
    if folder is None:
        return None
    if URL.match(os.fspath(folder)):
        raise OutputError(
            f"{option}: is a URL; expected a folder of this machine. Give the path of a folder here."
        )
    return Path(folder)


def checked_count(number: Any, name: str) -> int:
    """Return a number of threads or processes; more than 1,024 become 1,024. Errors: AlnicoError if it is not 1 or more."""
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise AlnicoError(
            f"{name} is {number!r}; expected a whole number of 1 or more. Leave it out for the default."
        )
    count = int(number)
    if count < 1:
        raise AlnicoError(
            f"{name} is {max(count, -(10**9))}; expected a whole number of 1 or more. Leave it out for the default."
        )
    return min(count, MOST_THREADS)


SHARED_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "memory": "Memory budget of the whole process, such as 2GiB; a number is bytes.",
        "threads": "Number of threads; default: one per processor.",
        "device": "Where to compute: auto, cpu, cuda, cuda:1 or cuda:all. auto scores and tunes on a GPU if there is one, and merges "
        "on the processor, so that the bits of a merge never depend on it.",
        "dtype": "What models are loaded in to be scored: auto, float32, bfloat16 or float16. auto is float32 on the processor, and "
        "the model's own dtype on a GPU.",
        "ray": "Compute on a Ray cluster: --ray alone takes the one at RAY_ADDRESS, or starts one on this machine; or give an "
        "address, such as --ray 10.0.0.1:6379.",
        "stream": "Read models of the hub by ranges while they are merged, and keep no weights on the disk.",
        "download_cache": "Folder that keeps the parts of remote models that were read, for later runs; default: nothing is kept.",
        "download_cache_size": "Largest size of the folder of download_cache, such as 50GB; parts used least recently are removed.",
        "offline": "Use no network; read models of the hub from its local cache.",
        "factor_cache": "Folder that keeps decompositions of matrices in files, for later merges of the same models by any weights "
        "and scales; the bytes of a merge are the same with it. Remove the folder to empty it.",
        "work_dir": "Folder of this machine that keeps what is unfinished of an output at a URL; default: in alnico's cache.",
        "allow_code": "Allow files to run code: functions and task folders of a tasks file, the storage of a search. Use it "
        "only if you trust their authors.",
        "overwrite": "Replace the output when the new one is complete, if alnico wrote it or it is a model.",
        "overwrite_anything": "Replace the output whatever it holds, except inputs, mount points and devices.",
        "restart": "Discard an unfinished earlier run instead of resuming it.",
        "max_shard_size": "Largest size of one output file, such as 5GB; a number is bytes.",
        "strict_license": "Refuse models whose licenses conflict, are not stated, or are not known.",
        "verify_inputs": "Public key (a PEM file) that must verify the signature of every input; may be repeated.",
        "allow_unsigned": "With verify_inputs: an input that needs no signature, named as in the recipe or by its path; "
        "may be repeated.",
        "require_signed": "With verify_inputs: every input must be signed; allow_unsigned is refused.",
        "unrelated": "What to do with models that were not tuned from one base: error or allow.",
        "requantise": "Write the output in the format that the base is stored in, with new scales: fp8. The report says how much of each "
        "tensor's change survived rounding.",
        "top_share": "Share of the entries that count as a model's largest parameters, in (0, 1].",
        "inputs": "Where an input is now: NAME=PATH, with its name as in the lock; may be repeated.",
    }
)
"""The help of options that mean the same for every function. A function's docstring wins; see :func:`option_texts`."""


def option_texts(function: Any) -> dict[str, str]:
    """Return the help of a function's parameters, by name: from its docstring's ``Options:``, else from :data:`SHARED_OPTIONS`.

    In a docstring, ``Options:`` has the docstring's indentation, ``name: text`` is indented by 4, its further lines by 8. The
    entries end at the next line that is not indented. ``watch`` is not an option. A parameter without a text is absent.

    >>> def example(models, *, memory=None):
    ...     '''Do something.
    ...
    ...     Options:
    ...         models: directories, files,
    ...             or owner/name.
    ...     Errors: none.
    ...     '''
    >>> option_texts(example)["models"]
    'directories, files, or owner/name.'
    """
    section = re.search(r"^Options:\n((?: +.*\n?|\n)*)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.split(r"^    (\w+): ", section[1] if section else "", flags=re.MULTILINE)
    own = {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}
    texts = {n: own.get(n) or SHARED_OPTIONS.get(n) for n in inspect.signature(function).parameters}
    return {name: text for name, text in texts.items() if text and name != "watch"}
