"""The place of an output: can it be written and published there, and may what stands there be replaced?

An output is built beside its name and renamed when it is complete. So its place must be one that a rename can fill. All of this is
checked before anything is downloaded or merged, since a rename that fails at the end fails again with every further attempt.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from alnico.checkpoint.durable import rename_new, write_file
from alnico.checkpoint.files import entries_below
from alnico.checkpoint.overwrite import foreign
from alnico.errors import AlnicoError, ModelError, OutputError, ResourceError

Replace = bool | Literal["anything"]
"""What may be replaced: nothing; what alnico or another writer of models made; or ``"anything"``."""

PART = ".alnico-part"
TWINS = (
    PART,
    f"{PART}-gone",
    ".alnico-old",
    ".alnico-stages",
    ".alnico-stages-gone",
    ".alnico-analysis",
    ".alnico-analysis-gone",
)
"""What alnico appends to the name of an output, after a dot before it, for what it keeps beside the output."""

SHOWN = 3
"""Entries of a folder that a message names."""

_GET_FLAGS, _IMMUTABLE, _APPEND_ONLY = 0x80086601, 0x10, 0x20
"""``FS_IOC_GETFLAGS`` of Linux on most processors; on others the call fails and nothing is known."""

IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST)
FULL = (errno.ENOSPC, errno.EDQUOT)


def replacing(overwrite: bool, overwrite_anything: bool) -> Replace:
    """What a caller allows who gives both options; the second implies the first."""
    return "anything" if overwrite_anything else overwrite


def check_place(out: Path, needed: Iterable[Path] = (), overwrite: Replace = False) -> None:
    """Refuse a place that an output cannot get by a rename, that holds what the output is made of, or that is occupied.

    ``needed`` are the files that the output is made of, those that are not downloaded yet included.
    What stands there may be replaced if ``overwrite`` allows it. Errors: OutputError.
    """
    check_needed(out, needed)
    with _explained(out):
        _check_name(out, f"{PART}-gone")
        _check_parent(out)
        check_replaceable(out, overwrite)


def check_publishable(out: Path, *, twin: str = f"{PART}-gone", is_tried: bool = True) -> None:
    """Refuse a place that no output can get, whatever the recipe says: before a model is opened.

    ``twin`` is the longest that is appended to the name. ``is_tried`` makes a folder of that name and removes it, which
    is what finds quotas, full tables of inodes and names that the file system does not take.
    Errors: OutputError; ResourceError where the disk or a quota is full.
    """
    with _explained(out):
        _check_name(out, twin)
        _check_kind(out)
        folder = _check_parent(out)
        if is_tried:
            _try_twin(out, folder, twin)


def check_replaceable(out: Path, overwrite: Replace) -> None:
    """Refuse a place where something stands that may not be replaced. Errors: OutputError; OSError."""
    _check_kind(out)
    if not overwrite:
        check_empty(out)
    if not _is_occupied(out):
        return
    _check_movable(out)
    if overwrite != "anything" and (found := foreign(out)):
        shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        what = f"holds {shown}, which no model" if out.is_dir() else "is a file that no model"
        raise OutputError(
            f"{out}: {what} consists of; --overwrite replaces models and what alnico wrote. "
            "Choose another output, or say --overwrite-anything to remove all that is there."
        )


def check_empty(out: Path) -> None:
    """Refuse a place where something stands. Errors: OutputError; OSError."""
    if _is_occupied(out):
        raise OutputError(
            f"{out}: exists and is not empty; expected a new or empty directory. Choose another output, or say --overwrite."
        )


def _is_occupied(out: Path) -> bool:
    return os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))


def existing_folder(out: Path) -> Path:
    """The nearest thing above ``out`` that is there: the disk the output will be on."""
    return next(p for p in out.absolute().parents if p.exists())


def check_twin(out: Path, twin: str) -> None:
    """Refuse a name that is too long for what is made beside it. Errors: OutputError."""
    with _explained(out):
        _check_length(out.name, existing_folder(out), twin, out)


def check_new_file(out: Path) -> None:
    """Refuse a place for a new small file: one that is there, or whose folder is not there or cannot be written to. Errors: OutputError."""
    with _explained(out):
        _check_text(out)
        if not out.parent.is_dir():
            raise OutputError(
                f"{out}: its folder is not there; expected one to write into. Make it, or choose another."
            )
        if os.path.lexists(out):
            raise OutputError(
                f"{out}: exists already; expected a new file. Choose another name, or remove it."
            )
        _check_length(out.name, out.parent, "", out)
        check_writable(out.parent, out)


def is_stream(out: Path) -> bool:
    """Is it a pipe or a terminal, as ``/dev/stdout`` is, which is written to and not replaced?"""
    try:
        mode = out.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def write_new_file(out: Path, text: str) -> None:
    """Write a small file where nothing stands, all at once. Errors: OutputError if something does by now; RunError."""
    temporary = out.with_name(f".{out.name[:200]}.alnico-new")
    write_file(temporary, text, is_new=True)
    try:
        rename_new(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{out}: cannot be written ({error.strerror}). Choose another name.") from None


def check_written_into(out: Path) -> None:
    """Refuse a folder that files cannot be written into, or that cannot be made. It may be a link, a mount point or the working
    directory, since it is not renamed. Errors: OutputError."""
    with _explained(out):
        _check_text(out)
        if out.exists():
            if not out.is_dir():
                raise OutputError(
                    f"{out}: is no folder; expected a new folder, or an empty one. Choose another output."
                )
            check_writable(out, out)
            return
        folder = _check_parent(out)
        for part in out.absolute().relative_to(folder).parts:
            _check_length(part, folder, "", out)


def check_writable(folder: Path, out: Path) -> None:
    """Refuse a folder that nothing can be made in. Errors: OutputError."""
    if not _may_write(folder):
        why = (
            "is on a read-only disk" if _is_read_only(folder) else "cannot be written to (Permission denied)"
        )
        raise OutputError(f"{out}: {folder} {why}. Choose another output.")


class _explained:
    """Names the place in errors of the system, and of names that are no paths."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, AlnicoError):
            raise OutputError(
                f"{self.out}: cannot be looked at ({error.strerror}). Choose another output."
            ) from None


def check_needed(out: Path, needed: Iterable[Path]) -> None:
    """Refuse a place that is, or holds, what an output is made of, by whatever name; or what is made beside it. Errors: OutputError."""
    _check_text(out)
    needed = list(needed)
    check_twins(out, needed, (PART, f"{PART}-gone", ".alnico-old"))
    target, own = Path(os.path.realpath(out)), _identity(out)
    folders: dict[Path, bool] = {}

    def holds(folder: Path) -> bool:
        if folder not in folders:
            folders[folder] = folder == target or (own is not None and _identity(folder) == own)
            folders[folder] = folders[folder] or (folder != folder.parent and holds(folder.parent))
        return folders[folder]

    for path in needed:
        named = Path(os.path.abspath(path))
        if holds(named) or holds(Path(os.path.realpath(path))):
            raise OutputError(
                f"{out}: is one of the inputs or holds it; expected a place of its own. Choose another output."
            )
    for cache in _caches():
        if target == cache or target in cache.parents:
            raise OutputError(
                f"{out}: is alnico's cache of kernels or holds it ({cache}); expected a place of its own. "
                f"Choose another output, such as {_free(Path('.'), out)}."
            )


def check_twins(out: Path, needed: Iterable[Path], twins: Iterable[str]) -> None:
    """Refuse inputs that lie in what alnico makes beside an output, and removes again. Errors: OutputError."""
    for twin in () if out.name in ("", "..") else twins:
        beside = out.with_name(f".{out.name}{twin}")
        if os.path.isdir(beside) and not beside.is_symlink() and any(_is_in(path, beside) for path in needed):
            raise OutputError(
                f"{out}: one of the inputs lies in {beside}, where alnico keeps what is unfinished of this output, and which it removes. "
                "Choose another output, or give the input another name."
            )


def _is_in(path: Path, folder: Path) -> bool:
    place = Path(os.path.realpath(folder))
    return any(Path(found).is_relative_to(place) for found in (os.path.abspath(path), os.path.realpath(path)))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _caches() -> Iterator[Path]:
    chosen = os.environ.get("ALNICO_CACHE_DIR")
    with suppress(RuntimeError):  # there is no home
        parent = (
            Path(chosen)
            if chosen
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alnico"
        )
        yield from (Path(os.path.realpath(place)) for place in (parent / "kernels", parent))


def _check_text(out: Path) -> None:
    if "\0" in str(out):
        raise OutputError(f"{str(out)!r}: has a zero byte, which no name can have. Choose another output.")
    try:
        os.fsencode(out)
    except UnicodeEncodeError:
        raise OutputError(
            f"{str(out)!r}: has half a character, which no name can have. Choose another output."
        ) from None


def _check_name(out: Path, twin: str) -> None:
    """Refuse the name, by itself and for what it stands."""
    _check_text(out)
    place = Path(os.path.realpath(out))
    if place == place.parent:
        raise OutputError(
            f"{out}: is the root of the file system, which cannot be replaced. Choose a new folder, such as {_free(Path('.'), out)}."
        )
    here = Path(os.path.realpath("."))
    if place == here or place in here.parents:
        what = "is the working directory" if place == here else "holds the working directory"
        raise OutputError(
            f"{out}: {what}; an output gets its name by a rename when it is complete, which cannot replace that. "
            f"Choose a new folder in it, such as {_free(out, out)}."
        )
    with suppress(RuntimeError):  # there is no home
        home = Path(os.path.realpath(Path.home()))
        if place == home or place in home.parents:
            what = "is your home directory" if place == home else "holds your home directory"
            raise OutputError(
                f"{out}: {what}, which is never replaced. Choose a new folder in it, such as {_free(out, out)}."
            )
    if out.name in ("", ".."):
        raise OutputError(
            f"{out}: ends in no name; expected the name of the output. Write the folder as {place}, or choose another."
        )
    if out.name.startswith(".") and out.name.endswith(TWINS):
        raise OutputError(
            f"{out}: is a name that alnico gives to what it has not finished. Choose another output."
        )
    folder = existing_folder(out)
    for part in out.absolute().relative_to(folder).parts[:-1]:
        _check_length(part, folder, "", out)
    _check_length(out.name, folder, twin, out)


def _check_length(name: str, folder: Path, twin: str, out: Path) -> None:
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # not on this system, or of this file system
        most = 255
    most -= len(twin) + bool(twin)
    size = len(os.fsencode(name))
    if size > most:
        beside = f" here, since .NAME{twin} is made beside it" if twin else " here"
        raise OutputError(
            f"{out}: a name in it has {size} bytes; at most {most} are allowed{beside}. Choose a shorter name, such as {_free(folder, out)}."
        )


def _check_kind(out: Path) -> None:
    """Refuse what a rename cannot replace, and what it must not."""
    try:
        status = out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(status.st_mode):
        target = Path(os.path.realpath(out))
        is_free = (not target.exists() and target.parent.is_dir()) or (
            target.is_dir() and not any(target.iterdir())
        )
        raise OutputError(
            f"{out}: is a link to {target}; an output is renamed to its name, which would replace the link and not what it leads to. "
            + (
                f"Give the place itself: {target}"
                if is_free
                else f"Choose another output, such as {_free(out.parent, out)}"
            )
            + "."
        )
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise OutputError(
            f"{out}: is a device, a pipe or a socket, which is never replaced. Choose another output, such as {_free(out.parent, out)}."
        )
    _check_flags(out, out)
    if os.path.ismount(out) or os.path.realpath(out) in _mounts():
        place = _free(out if stat.S_ISDIR(status.st_mode) else out.parent, out)
        raise OutputError(
            f"{out}: is a mount point, which cannot be renamed or replaced. Choose a new {'folder in it' if out.is_dir() else 'name'}, "
            f"such as {place}."
        )


def _check_parent(out: Path) -> Path:
    """Refuse a place above which nothing can be made; returns the nearest folder that is there."""
    folder = existing_folder(out)
    absolute = out.absolute()
    for path in (*reversed(absolute.parents), absolute):
        if os.path.islink(path) and not path.exists():
            raise OutputError(
                f"{out}: {path} is a link to {os.readlink(path)}, which is not there. Make it, or choose another output."
            )
    if not folder.is_dir():
        raise OutputError(f"{out}: {folder} is not a directory. Choose another output.")
    check_writable(folder, out)
    _check_flags(folder, out)
    return folder


def _check_movable(out: Path) -> None:
    """Refuse what stands under ``out`` if it cannot be taken away at the end."""
    if any(mount.startswith(os.path.realpath(out) + os.sep) for mount in _mounts()):
        raise OutputError(
            f"{out}: has another disk mounted in it, which is never removed. Choose another output."
        )
    if not out.is_dir():
        return
    try:
        entries = list(entries_below(out))
    except ModelError as error:  # a folder that Python could not remove
        raise OutputError(f"{error} Or choose another output.") from None
    for path, is_folder in entries:
        _check_flags(path, out)
        if is_folder and not _may_write(path):
            raise OutputError(
                f"{out}: cannot be replaced, since {path} cannot be written to "
                f"({'read-only disk' if _is_read_only(path) else 'Permission denied'}). Choose another output."
            )
    if _file_system(out) == "overlay":
        _try_rename(out)


def _check_flags(path: Path, out: Path) -> None:
    """Refuse what its file system keeps from being removed and renamed, for root too (``chattr +i`` and ``+a``)."""
    if sys.platform.startswith("linux") and stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFDIR, stat.S_IFREG):
        import fcntl

        flags = bytearray(8)
        with suppress(OSError):  # a file system without flags
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.ioctl(descriptor, _GET_FLAGS, flags)
            finally:
                os.close(descriptor)
        if flags[0] & (_IMMUTABLE | _APPEND_ONLY):
            what = "immutable" if flags[0] & _IMMUTABLE else "append-only"
            raise OutputError(
                f"{out}: {path} is marked {what} and cannot be renamed or removed. Choose another output, or use chattr."
            )


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _is_read_only(folder: Path) -> bool:
    with suppress(OSError, AttributeError):
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    return False


def _try_twin(out: Path, folder: Path, twin: str) -> None:
    """Make the folder that will stand beside the output, and remove it again."""
    if os.path.lexists(out.with_name(f".{out.name}{PART}")):
        return  # an unfinished output was taken here before
    trial = folder / f".{out.name}{twin}"
    try:
        trial.mkdir()
    except FileExistsError:  # of a run that was killed
        pass
    except OSError as error:
        if error.errno in FULL:
            inodes = " or no inodes" if error.errno == errno.ENOSPC else ""
            raise ResourceError(
                f"{folder}: nothing can be made there ({error.strerror}): no room is left{inodes}. Make room, or choose another disk."
            ) from None
        raise OutputError(
            f"{out}: nothing of that name can be made in {folder} ({error.strerror}). Choose another output."
        ) from None
    with suppress(OSError):
        trial.rmdir()


def _try_rename(out: Path) -> None:
    """Does the file system rename this folder? An overlay refuses it for folders of its lower layers.

    A rename onto a folder that is not empty is refused for that reason by a file system that can do it, and changes nothing.
    """
    trial = out.with_name(f".{out.name}{PART}-gone")
    try:
        trial.mkdir(mode=0o700)
    except FileExistsError:  # of a run that was killed, or another's: nothing is renamed onto it
        return
    try:
        (trial / "kept").mkdir()
        os.rename(out, trial)
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise OutputError(
                f"{out}: its file system cannot rename this folder ({error.strerror}), as it is part of a lower layer. "
                f"Choose another output, such as {_free(out.parent, out)}."
            ) from None
    finally:
        for path in (trial / "kept", trial):
            with suppress(OSError):
                path.rmdir()


def _mounts() -> frozenset[str]:
    """All mount points, those of one disk in itself too. Empty where the system does not list them."""
    return frozenset(place for place, _ in _listed_mounts())


def _file_system(path: Path) -> str:
    """The type of the file system that a path is on; empty where the system does not say."""
    place = os.path.realpath(path)
    found = [
        (len(at), kind)
        for at, kind in _listed_mounts()
        if place == at or place.startswith(at.rstrip("/") + "/")
    ]
    return max(found)[1] if found else ""


def _listed_mounts() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split(b" ")
        place = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), words[4])
        found.append((os.fsdecode(place), os.fsdecode(words[words.index(b"-") + 1])))
    return found


def _free(folder: Path, out: Path) -> str:
    """A place that works, for a message: a new name in a folder."""
    ending = out.suffix if out.suffix == ".safetensors" else ""
    names = (f"merged{f'-{n}' if n > 1 else ''}{ending}" for n in range(1, 1000))
    found = next(
        (folder / name for name in names if not os.path.lexists(folder / name)), folder / f"merged{ending}"
    )
    return f"./{found}" if not found.is_absolute() and len(found.parts) == 1 else str(found)
