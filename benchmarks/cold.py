"""Merges of models that are read from the disk: the limit (`cat` of the inputs, and the output written and synced), and alnico.

    python benchmarks/cold.py --work /tmp/bench                             # 0.6 G parameters, bf16, a base and 3 models
    python benchmarks/cold.py --work /tmp/bench --parameters 3e9 --runs 3
    python benchmarks/cold.py --work /tmp/bench --memory 2                  # in 2 GiB, page cache included
    python benchmarks/cold.py --work /tmp/bench --before OLD/src            # beside another version

Before each program the inputs leave the page cache, which is checked; one output is on the disk at a time. The programs run in turn. Where
memory is limited, they run in a control group; where none can be made, the inputs leave the page cache whenever it has more of them.
`read` is what alnico read from the disk.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from merge_speed import LAYOUTS, make, merging, write_recipe
from processes import LIMITS, Failed, Run, alternating, beside, cpu, limits, seconds, wall

GROUPS = Path("/sys/fs/cgroup")
MARGIN = 1 << 30
POLL_SECONDS = 0.1


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache. Errors: Failed if some of their pages stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if left := cached_bytes(file):
            raise Failed(
                f"{file}: {left} bytes stay in the page cache; expected none. End programs that use the file."
            )


def cached_bytes(file: Path) -> int:
    """How many bytes of a file are in the page cache."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        address = [ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)]
        status = libc.mincore(*address, ctypes.c_void_p(pages.ctypes.data))
        del view
        if status:
            raise Failed(f"{file}: mincore failed ({os.strerror(ctypes.get_errno())})")
        return int((pages & 1).sum()) * mmap.PAGESIZE


class Limit:
    """At most so many bytes for programs and the pages that they read and write. ``how`` says by which means. Close it at the end."""

    def __init__(self, byte_size: int, files: Sequence[Path]) -> None:
        self._byte_size = byte_size
        self._files = files
        self._group, self._home = _made_group(byte_size)
        self.how = "a control group" if self._group else "dropping inputs from the page cache"

    @contextmanager
    def held(self) -> Iterator[None]:
        """What starts in this block has no more memory."""
        if self._group is not None and self._home is not None:
            _enter(self._group)
            try:
                yield
            finally:
                _enter(self._home)
            return
        is_over = threading.Event()

        def forget() -> None:
            while not is_over.wait(POLL_SECONDS):
                if sum(map(cached_bytes, self._files)) > self._byte_size:
                    with suppress(Failed):  # pages on their way
                        drop(self._files)

        thread = threading.Thread(target=forget)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def close(self) -> None:
        if self._group is not None:
            self._group.rmdir()


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _made_group(byte_size: int) -> tuple[Path, Path] | tuple[None, None]:
    """Make a control group below that of this process; returns both, or nothing where that is not possible."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, place = line.split(":", 2)
        root, name = (GROUPS, "memory.max") if number == "0" else (GROUPS / "memory", "memory.limit_in_bytes")
        home = root / place.lstrip("/")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        group = home / f"alnico-cold-{os.getpid()}"
        try:
            if number == "0":
                (home / "cgroup.subtree_control").write_text("+memory")
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(byte_size))
            _enter(group)
            _enter(home)
        except OSError:
            group.rmdir()
            continue
        return group, home
    return None, None


def check_room(work: Path, needed: int) -> None:
    """Refuse a disk without room. Errors: Failed."""
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < needed + MARGIN:
        raise Failed(
            f"{work}: {free / 1e9:.1f} GB are free; expected {(needed + MARGIN) / 1e9:.1f} GB for the models that are not made yet, "
            "an output and 1 GiB. Make room, or merge fewer --parameters."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models and one output; models are kept"
    )
    parser.add_argument("--parameters", type=float, default=0.6e9)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--memory", type=float, help="GiB for each program, with its page cache")
    parser.add_argument("--alnico", default=shutil.which("alnico") or "alnico")
    parser.add_argument(
        "--before", type=Path, help="the src of another version, which runs in turn with this one"
    )
    chosen = parser.parse_args()
    layout = LAYOUTS["llama"](chosen.parameters)
    size = 2 * sum(int(np.prod(s)) for s in layout.values())
    home = chosen.work / f"llama-BF16-{size // 2}"
    folders = [home / f"m{i}" for i in range(chosen.models + 1)]
    check_room(chosen.work, size * (1 + sum(not (f / "config.json").exists() for f in folders)))
    for i, folder in enumerate(folders):
        beside(make, folder, layout, i, "BF16", max(size // 3, 1))
    out, written = home / "out", home / "limit"
    files = sorted(home.glob("m*/*.safetensors"))
    limit = Limit(round(chosen.memory * 2**30), files) if chosen.memory else None
    memory = f"{chosen.memory:g} GiB of memory by {limit.how}" if limit else "memory not limited"

    def cold(program: Callable[[], Run]) -> Callable[[], Run]:
        def run() -> Run:
            shutil.rmtree(out, ignore_errors=True)
            drop(files)
            if limit is None:
                return program()
            with limit.held():
                return program()

        return run

    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {size / 2e9:.2f} G parameters, BF16, {chosen.models} models, {memory}\n"
    )
    old = "before s | x limit | " if chosen.before else ""
    print(f"| method | limit s | {old}alnico s | x limit | CPU s | read GB | peak MiB |")
    print("|---" * (7 + 2 * bool(chosen.before)) + "|")
    try:
        for method in chosen.methods.split(","):
            recipe, read = write_recipe(home, method, folders[0], folders[1:], "BF16")
            command = [chosen.alnico, "merge", str(recipe), str(out), "--quiet"]
            programs = {"limit": cold(limits(read, size, written)[LIMITS[1]])}
            if chosen.before:
                programs["before"] = cold(merging(command, out, chosen.before))
            programs["alnico"] = cold(merging(command, out))
            found = alternating(programs, chosen.runs)
            ours, least = found["alnico"], wall(found["limit"])
            before = f"{seconds(found['before'])} | {wall(found['before']) / least:.2f} | " if old else ""
            print(
                f"| {method} | {seconds(found['limit'])} | {before}{seconds(ours)} | {wall(ours) / least:.2f} | {cpu(ours):.2f} "
                f"| {max(r.disk_read for r in ours) / 1e9:.2f} | {max(r.peak for r in ours) >> 20} |",
                flush=True,
            )
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if limit is not None:
            limit.close()


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
