"""What every fuzz target shares: a folder to read from, a watch on what the reader does, and mutations of JSON.

A target fails for any exception that is no AlnicoError, for a path outside its folder, for code or a process that is started,
for memory beyond the size of its input, and for taking longer than libFuzzer's timeout.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alnico.errors import AlnicoError

FIXED_BYTES = 16 << 20
BYTES_A_BYTE = 256
"""Memory that a reader may take: a fixed part, and so much for each byte of its input (a JSON ``[]`` takes 64 bytes in Python)."""

MAX_DATA_BYTES = 1 << 20
"""Most bytes of tensors that stand behind a made header."""

STARTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "ctypes.dlopen",
)
TOUCHES = (
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.copyfile",
    "shutil.rmtree",
)

MAX_MADE_BYTES = 1 << 16
"""Most that a mutation makes of repeating a value."""

Files = Mapping[str, Any]
"""File names to what they hold: text as it is, a mapping of a ``.safetensors`` as its header, other values as JSON."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed: ``read`` takes the input and the folder it may use, ``seeds`` are inputs to begin with, ``words`` what the
    format is made of. ``prepare`` fills the folder once."""

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[str] = ()
    prepare: Callable[[Path], None] = lambda _: None
    mutate: Callable[[bytes, random.Random, Sequence[str]], bytes] | None = None


class Watch:
    """Notes what a reader must not do, by Python's audit events; a reader cannot hide it by catching an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.libraries = tuple(
            {
                os.path.realpath(p)
                for p in (sys.prefix, sys.base_prefix, *sys.path, Path(__file__).parents[2] / "src")
                if p
            }
        )
        self.is_on = False
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event.startswith(STARTS):
            self.found.append(f"{event} {arguments!r:.200}")
        elif event in ("exec", "compile"):
            code = arguments[0] if event == "exec" else arguments[1]
            file = getattr(code, "co_filename", code)
            if not isinstance(file, str) or not self._is_library(file):
                self.found.append(f"{event} {file!r:.200}")
        elif event in TOUCHES:
            for path in arguments[: 2 if event in ("os.rename", "shutil.copyfile", "os.link") else 1]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self.is_on = False  # looking at the path is no deed of the reader
                    place = os.path.realpath(os.fsdecode(path))
                    self.is_on = True
                    if not (
                        place == self.folder
                        or place.startswith(self.folder + os.sep)
                        or self._is_library(place)
                    ):
                        self.found.append(f"{event} {place}")

    def _is_library(self, path: str) -> bool:
        return os.path.isabs(path) and any(
            os.path.realpath(path).startswith(root + os.sep) for root in self.libraries
        )


class Run:
    """One target, with its folder, ready to be given inputs."""

    def __init__(self, target: Target) -> None:
        self.target = target
        memory = "/dev/shm"
        self.folder = Path(
            tempfile.mkdtemp(prefix="alnico-fuzz-", dir=memory if os.path.isdir(memory) else None)
        )
        target.prepare(self.folder)
        self.watch = Watch(self.folder)
        for seed in target.seeds():  # all that is imported on the way is imported before the watch begins
            self._read(seed)
        tracemalloc.start(1)

    def __call__(self, data: bytes) -> None:
        """Give the reader one input. Raises what the target must not do."""
        self.watch.found.clear()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        self.watch.is_on = True
        try:
            self._read(data)
        finally:
            self.watch.is_on = False
        taken = tracemalloc.get_traced_memory()[1] - before
        if self.watch.found:
            raise AssertionError(f"the reader did what it must not: {self.watch.found[:3]}")
        if taken > FIXED_BYTES + BYTES_A_BYTE * len(data):
            raise AssertionError(f"the reader took {taken} bytes for an input of {len(data)}")

    def _read(self, data: bytes) -> None:
        try:
            self.target.read(data, self.folder)
        except AlnicoError as error:
            str(error).encode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Remove the folder. The hook stays, as Python has it, and hears nothing."""
        tracemalloc.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def files_of(data: bytes) -> Files:
    """An input that stands for several files; none if it is no JSON object."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def put(folder: Path, files: Files, names: Sequence[str]) -> None:
    """Write those of ``names`` that ``files`` has, and remove the others."""
    for name in names:
        path = folder / name
        if name not in files:
            path.unlink(missing_ok=True)
        elif isinstance(files[name], dict) and name.endswith(".safetensors"):
            put_header(path, files[name])
        else:
            value = files[name]
            path.write_bytes(
                value.encode("utf-8", "surrogatepass") if isinstance(value, str) else as_bytes(value)
            )


def put_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write a safetensors file of a header, with data as far as its entries say, zeros and no more than a mebibyte."""
    text = as_bytes(header)
    ends = [0]
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list):
            ends += [end for end in offsets if type(end) is int and 0 <= end <= MAX_DATA_BYTES]
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + max(ends))


def header_of(tensors: Mapping[str, tuple[str, Sequence[int]]], widths: Mapping[str, int]) -> dict[str, Any]:
    """The header of tensors (dtype, shape) that lie one after the other."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = widths[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header


def as_bytes(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"{}"


NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65536, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63),
           10**30, 10**400, 0.5, 1.5, -0.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"))  # fmt: skip
TEXTS = ("", " ", "0", "a", ".", "..", "../x", "/etc/passwd", "/", "a/b", "a\\b", "a\0b", "\ud800", "é", "\U0001f9f2", "\n", "~", "~root",
         "x" * 300, "x" * 5000, "(a+)+$", "(", "{{ 1 }}", "!!python/name:os.system", "*a", "&a", "__metadata__")  # fmt: skip


def mutated_json(data: bytes, draw: random.Random, words: Sequence[str]) -> bytes | None:
    """Change a few values of a JSON text; None if it is none."""
    try:
        value = json.loads(data)
        for _ in range(1 + draw.randrange(3)):
            value = _changed(value, draw, words)
        return json.dumps(value, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each value below ``value`` as (what holds it, its key), at most some thousands."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5000:
        holder = waiting.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found


def _other(value: Any, draw: random.Random, words: Sequence[str]) -> Any:
    """A value in place of another."""
    kind = draw.randrange(9)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice(TEXTS)
    if kind == 2 and words:
        return draw.choice(words)
    if kind == 3:
        return draw.choice((None, True, False, [], {}, [[]], {"a": {}}))
    if kind == 4:
        times = draw.choice((0, 1, 2, 3, 65, 1000))
        return [value] * (times if times * len(as_bytes(value)) < MAX_MADE_BYTES else 1)
    if kind == 5:
        for _ in range(draw.choice((1, 2, 40, 400))):
            value = [value] if draw.random() < 0.5 else {draw.choice(TEXTS[:6]): value}
        return value
    if isinstance(value, bool) or value is None:
        return draw.choice((0, 1, "true"))
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, value - 1, value * 2, -value, str(value)))
    if isinstance(value, str):
        at = draw.randrange(len(value) + 1)
        part = draw.choice((*TEXTS, *words)) if draw.random() < 0.7 else chr(draw.randrange(0xD800))
        return value[:at] + part + value[at + draw.randrange(3) :]
    return copy.deepcopy(value)


def _changed(value: Any, draw: random.Random, words: Sequence[str]) -> Any:
    places = _places(value)
    if not places or draw.random() < 0.02:
        return _other(value, draw, words)
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, at = draw.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif kind == 2:
        if isinstance(holder, dict):
            holder[draw.choice([*words, *TEXTS[:12], *(k for h, k in places[:50] if isinstance(k, str))])] = (
                copy.deepcopy(holder[key])
            )
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 3 and isinstance(holder, dict):
        holder[draw.choice([*words, *TEXTS])] = holder.pop(key)
    else:
        holder[key] = _other(holder[key], draw, words)
    return value
