"""Checks whether an output can be written to a path, and may replace what is already there.

An output is built next to its final path and renamed when it is complete, so the path must be one that a
rename can fill. All checks run before anything is downloaded or merged: a rename that fails at the end would
fail again at every further attempt.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

from alnico.checkpoint.durable import rename_new, write_file
from alnico.checkpoint.files import entries_below
from alnico.checkpoint.overwrite import foreign_entries
from alnico.errors import AlnicoError, ModelError, OutputError, ResourceError
from alnico.folders import CACHE_KINDS, cache_path

Replace = bool | Literal["anything"]
"""What may be replaced: nothing (False); models and outputs of alnico (True); or ``"anything"``."""

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
"""Endings of the folders ``.NAME.alnico-...`` that alnico makes next to an output NAME."""

SINGLE_FILES = (".safetensors", ".gguf")
"""Endings of outputs of a merge that are one file."""

OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5")
"""Endings of files of models in formats that alnico does not write, but for merges into GGUF."""

SHOWN = 3
"""Entries of a folder that a message names at most."""

_GET_FLAGS, _IMMUTABLE, _APPEND_ONLY = 0x80086601, 0x10, 0x20
"""``FS_IOC_GETFLAGS`` of Linux on most processors; on others the call fails and no flag is known."""

URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}(?=[^/])")
"""How a path begins that was made of a URL, such as ``s3:/bucket``."""

TARGET_EXISTS = (errno.ENOTEMPTY, errno.EEXIST)
FULL = (errno.ENOSPC, errno.EDQUOT)


def replace_mode(overwrite: bool, overwrite_anything: bool) -> Replace:
    """Combine both options into one value; the second implies the first."""
    return "anything" if overwrite_anything else overwrite


def check_place(out: Path, inputs: Iterable[Path] = (), overwrite: Replace = False) -> None:
    """Refuse a path that a rename cannot fill, that holds an input, or that may not be replaced.

    ``inputs`` are the files that the output is made of, also those that are not downloaded yet. ``overwrite``
    says what may be replaced. Errors: OutputError.
    """
    check_inputs(out, inputs)
    with _output_errors(out):
        _check_name(out, f"{PART}-gone", may_be_gguf=True)
        _check_parent(out)
        check_replaceable(out, overwrite)


def check_publishable(
    out: Path, *, twin: str = f"{PART}-gone", is_tried: bool = True, may_be_gguf: bool = False
) -> None:
    """Refuse a path that no output can get, whatever the recipe, before a model is opened.

    ``twin`` is the longest ending of a folder made next to the output. ``is_tried`` makes such a folder and
    removes it, which detects quotas, full inode tables and names that the file system refuses. ``may_be_gguf``: the output is a merge.
    Errors: OutputError; ResourceError if the disk or a quota is full.
    """
    with _output_errors(out):
        _check_name(out, twin, may_be_gguf=may_be_gguf)
        _check_kind(out)
        folder = _check_parent(out)
        if is_tried:
            _try_twin(out, folder, twin)


def check_replaceable(out: Path, overwrite: Replace) -> None:
    """Refuse a path that is occupied by something that may not be replaced. Errors: OutputError; OSError."""
    _check_kind(out)
    if not overwrite:
        check_empty(out)
    if not _is_occupied(out):
        return
    _check_movable(out)
    if overwrite != "anything" and (names := foreign_entries(out)):
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        problem = (
            f"holds {shown}, not part of a model" if out.is_dir() else "is a file that is not part of a model"
        )
        raise OutputError(
            f"{out}: {problem}; --overwrite replaces only models and alnico's own output. "
            "Choose another output, or use --overwrite-anything (in Python overwrite_anything=True) to remove everything there."
        )


def check_empty(out: Path) -> None:
    """Refuse a path that is occupied. Errors: OutputError; OSError."""
    if _is_occupied(out):
        raise OutputError(
            f"{out}: exists and is not empty; expected a new or empty directory. "
            "Choose another output, or use --overwrite (in Python overwrite=True)."
        )


def _is_occupied(out: Path) -> bool:
    return os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))


def is_single_file(out: Path) -> bool:
    """Is an output one file, by its name? An existing folder is none."""
    return out.suffix in SINGLE_FILES and not (out.suffix == ".gguf" and out.is_dir())


def existing_folder(out: Path) -> Path:
    """Return the nearest existing parent of ``out``, which is on the disk that the output will be on."""
    return next(p for p in out.absolute().parents if p.exists())


def check_twin(out: Path, twin: str) -> None:
    """Refuse a name that is too long for the folder made next to it. Errors: OutputError."""
    with _output_errors(out):
        _check_length(out.name, existing_folder(out), twin, out)


def check_new_file(out: Path) -> None:
    """Refuse a path for a new small file that exists, or whose folder does not exist or is not writable.

    Errors: OutputError.
    """
    with _output_errors(out):
        _check_text(out)
        if not out.parent.is_dir():
            raise OutputError(
                f"{out}: its folder does not exist; expected one to write into. Create it, or choose another."
            )
        if os.path.lexists(out):
            raise OutputError(
                f"{out}: already exists; expected a new file. Choose another name, or remove it."
            )
        _check_length(out.name, out.parent, "", out)
        check_writable(out.parent, out)


def is_stream(out: Path) -> bool:
    """Is it a pipe or a terminal, such as ``/dev/stdout``, which is written to and not replaced?"""
    try:
        mode = out.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def write_new_file(out: Path, text: str) -> None:
    """Write a new small file atomically. Errors: OutputError if the path exists by now; RunError."""
    temporary = out.with_name(f".{out.name[:200]}.alnico-new")
    write_file(temporary, text, is_new=True)
    try:
        rename_new(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{out}: cannot be written ({error.strerror}). Choose another name.") from None


def check_target_folder(out: Path) -> None:
    """Refuse a folder that cannot be created or written into.

    It may be a link, a mount point or the working directory, since it is not renamed. Errors: OutputError.
    """
    with _output_errors(out):
        _check_text(out)
        if out.exists():
            if not out.is_dir():
                raise OutputError(
                    f"{out}: is not a folder; expected a new or empty folder. Choose another output."
                )
            check_writable(out, out)
            return
        folder = _check_parent(out)
        for part in out.absolute().relative_to(folder).parts:
            _check_length(part, folder, "", out)


def check_writable(folder: Path, out: Path) -> None:
    """Refuse a folder in which nothing can be created. Errors: OutputError."""
    if not _may_write(folder):
        reason = (
            "is on a read-only disk" if _is_read_only(folder) else "cannot be written to (Permission denied)"
        )
        raise OutputError(f"{out}: {folder} {reason}. Choose another output.")


def result_folder(out: str | os.PathLike[str], what: str, is_ours: Callable[[Path], bool]) -> Path:
    """Create the folder for the files of ``what``, such as ``an analysis``, or reuse one that ``is_ours``.

    Errors: OutputError for a file of that name, a folder with other files, and one that cannot be written.
    """
    folder = Path(out)
    _check_text(folder)
    try:
        if folder.exists() and not folder.is_dir():
            kind = what.partition(" ")[2]
            raise OutputError(f"{folder}: is a file; expected a folder for the {kind}. Choose another name.")
        if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
            raise OutputError(
                f"{folder}: contains files that are not from {what}. Choose a new folder, or empty it."
            )
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({error.strerror}). Choose another folder.") from None
    return folder


class _output_errors:
    """Turns OSError in its block into an OutputError that names the output."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, AlnicoError):
            raise OutputError(
                f"{self.out}: cannot be accessed ({error.strerror}). Choose another output."
            ) from None


def check_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is or contains an input, under any name, and inputs inside its temporary folders.

    Errors: OutputError.
    """
    _check_text(out)
    inputs = list(inputs)
    check_twins(out, inputs, (PART, f"{PART}-gone", ".alnico-old"))
    target, own = Path(os.path.realpath(out)), _identity(out)
    results: dict[Path, bool] = {}

    def is_in_output(folder: Path) -> bool:
        if folder not in results:
            results[folder] = folder == target or (own is not None and _identity(folder) == own)
            results[folder] = results[folder] or (folder != folder.parent and is_in_output(folder.parent))
        return results[folder]

    for path in inputs:
        absolute = Path(os.path.abspath(path))
        if is_in_output(absolute) or is_in_output(Path(os.path.realpath(path))):
            raise OutputError(
                f"{out}: is one of the inputs or contains it; expected a separate folder. Choose another "
                "output."
            )
    for cache in _caches():
        if target == cache or target in cache.parents:
            raise OutputError(
                f"{out}: is alnico's cache or contains it ({cache}); expected a separate folder. "
                f"Choose another output, such as {_free_path(Path('.'), out)}."
            )


def check_twins(out: Path, inputs: Iterable[Path], twins: Iterable[str]) -> None:
    """Refuse inputs inside the folders that alnico makes next to an output and removes.

    Errors: OutputError.
    """
    for twin in () if out.name in ("", "..") else twins:
        folder = out.with_name(f".{out.name}{twin}")
        if os.path.isdir(folder) and not folder.is_symlink() and any(_is_in(path, folder) for path in inputs):
            raise OutputError(
                f"{out}: one of the inputs is in {folder}, where alnico keeps this output while it is "
                "unfinished, and which it removes. Choose another output, or rename the input."
            )


def _is_in(path: Path, folder: Path) -> bool:
    real = Path(os.path.realpath(folder))
    return any(Path(name).is_relative_to(real) for name in (os.path.abspath(path), os.path.realpath(path)))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _caches() -> Iterator[Path]:
    with suppress(RuntimeError):  # no home directory
        folders = [cache_path(kind) for kind in CACHE_KINDS]
        yield from (Path(os.path.realpath(path)) for path in (*folders, folders[0].parent))


def refuse_url(url: str) -> NoReturn:
    """Refuse a URL as an output that must be on this machine. Errors: OutputError."""
    raise OutputError(
        f"{url}: is a URL, and this output must be on this machine; expected a path. Use a folder here, and copy it from or to "
        "the URL; merges are written to URLs, and `alnico verify` checks them there."
    )


def refuse_url_path(out: Path) -> None:
    """Refuse a path that was made of a URL. Errors: OutputError."""
    if (found := URL_AS_PATH.match(str(out))) is not None:
        refuse_url(f"{found[0].rstrip('/')}//{str(out)[found.end() :]}")


def _check_text(out: Path) -> None:
    refuse_url_path(out)
    if "\0" in str(out):
        raise OutputError(
            f"{str(out)!r}: contains a zero byte; a name cannot have one. Choose another output."
        )
    try:
        os.fsencode(out)
    except UnicodeEncodeError:
        raise OutputError(
            f"{str(out)!r}: contains half a character; a name cannot have one. Choose another output."
        ) from None


def _check_name(out: Path, twin: str, *, may_be_gguf: bool = False) -> None:
    """Refuse a name that is not possible, is that of another format, or leads to a folder that must not be replaced."""
    _check_text(out)
    is_gguf = may_be_gguf and out.suffix == ".gguf"
    if out.suffix.casefold() in OTHER_FORMATS and not out.is_dir() and not is_gguf:
        formats, endings = (
            ("safetensors and GGUF", ".safetensors or .gguf")
            if may_be_gguf
            else ("safetensors only", ".safetensors")
        )
        raise OutputError(
            f"{out}: ends in {out.suffix}, but alnico writes {formats}; expected a folder or a name that ends in {endings}. "
            f"Write {out.with_suffix('')} or {out.with_suffix('.safetensors')}."
        )
    target = Path(os.path.realpath(out))
    if target == target.parent:
        raise OutputError(
            f"{out}: is the root of the file system, which cannot be replaced. "
            f"Choose a new folder, such as {_free_path(Path('.'), out)}."
        )
    working = Path(os.path.realpath("."))
    if target == working or target in working.parents:
        problem = "is the working directory" if target == working else "contains the working directory"
        raise OutputError(
            f"{out}: {problem}; a complete output gets its name by a rename, which cannot replace that "
            f"folder. Choose a new folder in it, such as {_free_path(out, out)}."
        )
    with suppress(RuntimeError):  # no home directory
        home = Path(os.path.realpath(Path.home()))
        if target == home or target in home.parents:
            problem = "is your home directory" if target == home else "contains your home directory"
            raise OutputError(
                f"{out}: {problem}, which is never replaced. "
                f"Choose a new folder in it, such as {_free_path(out, out)}."
            )
    if out.name in ("", ".."):
        raise OutputError(
            f"{out}: does not end in a name; expected the name of the output. "
            f"Write the folder as {target}, or choose another."
        )
    if out.name.startswith(".") and out.name.endswith(TWINS):
        raise OutputError(f"{out}: is a name that alnico uses for unfinished outputs. Choose another output.")
    folder = existing_folder(out)
    for part in out.absolute().relative_to(folder).parts[:-1]:
        _check_length(part, folder, "", out)
    _check_length(out.name, folder, twin, out)


def _check_length(name: str, folder: Path, twin: str, out: Path) -> None:
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # unknown on this system or file system
        limit = 255
    limit -= len(twin) + bool(twin)
    size = len(os.fsencode(name))
    if size > limit:
        reason = f", since .NAME{twin} is created next to it" if twin else ""
        raise OutputError(
            f"{out}: a name in it has {size} bytes; at most {limit} are allowed here{reason}. "
            f"Choose a shorter name, such as {_free_path(folder, out)}."
        )


def _check_kind(out: Path) -> None:
    """Refuse a path that a rename cannot or must not replace, such as a link or a device."""
    try:
        status = out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(status.st_mode):
        target = Path(os.path.realpath(out))
        is_free = (not target.exists() and target.parent.is_dir()) or (
            target.is_dir() and not any(target.iterdir())
        )
        advice = (
            f"Use the folder itself: {target}"
            if is_free
            else f"Choose another output, such as {_free_path(out.parent, out)}"
        )
        raise OutputError(
            f"{out}: is a link to {target}; a complete output gets its name by a rename, which would replace "
            f"the link and not its target. {advice}."
        )
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise OutputError(
            f"{out}: is a device, a pipe or a socket, which is never replaced. "
            f"Choose another output, such as {_free_path(out.parent, out)}."
        )
    _check_flags(out, out)
    if os.path.ismount(out) or os.path.realpath(out) in _mounts():
        path = _free_path(out if stat.S_ISDIR(status.st_mode) else out.parent, out)
        raise OutputError(
            f"{out}: is a mount point, which cannot be renamed or replaced. "
            f"Choose a new {'folder in it' if out.is_dir() else 'name'}, such as {path}."
        )


def _check_parent(out: Path) -> Path:
    """Refuse a path in whose folder nothing can be created; returns the nearest existing folder."""
    folder = existing_folder(out)
    absolute = out.absolute()
    for path in (*reversed(absolute.parents), absolute):
        if os.path.islink(path) and not path.exists():
            raise OutputError(
                f"{out}: {path} is a link to {os.readlink(path)}, which does not exist. "
                "Create it, or choose another output."
            )
    if not folder.is_dir():
        raise OutputError(f"{out}: {folder} is not a directory. Choose another output.")
    check_writable(folder, out)
    _check_flags(folder, out)
    return folder


def _check_movable(out: Path) -> None:
    """Refuse an existing output that cannot be moved away at the end."""
    if any(mount.startswith(os.path.realpath(out) + os.sep) for mount in _mounts()):
        raise OutputError(f"{out}: contains a mount point, which is never removed. Choose another output.")
    if not out.is_dir():
        return
    try:
        entries = list(entries_below(out))
    except ModelError as error:  # nested too deep for Python to remove
        raise OutputError(f"{error} Or choose another output.") from None
    for path, is_folder in entries:
        _check_flags(path, out)
        if is_folder and not _may_write(path):
            raise OutputError(
                f"{out}: cannot be replaced: {path} cannot be written to "
                f"({'read-only disk' if _is_read_only(path) else 'Permission denied'}). Choose another "
                "output."
            )
    if _file_system(out) == "overlay":
        _try_rename(out)


def _check_flags(path: Path, out: Path) -> None:
    """Refuse a path whose flags forbid removing and renaming it, even for root (``chattr +i`` and ``+a``)."""
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
            flag = "immutable" if flags[0] & _IMMUTABLE else "append-only"
            raise OutputError(
                f"{out}: {path} is marked {flag} and cannot be renamed or removed. "
                "Choose another output, or use chattr."
            )


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _is_read_only(folder: Path) -> bool:
    with suppress(OSError, AttributeError):
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    return False


def _try_twin(out: Path, folder: Path, twin: str) -> None:
    """Create the folder that will be next to the output, and remove it again."""
    if os.path.lexists(out.with_name(f".{out.name}{PART}")):
        return  # an unfinished output was already created here
    trial = folder / f".{out.name}{twin}"
    try:
        trial.mkdir()
    except FileExistsError:  # from a run that was killed
        pass
    except OSError as error:
        if error.errno in FULL:
            inodes = " or no inodes" if error.errno == errno.ENOSPC else ""
            raise ResourceError(
                f"{folder}: nothing can be created there ({error.strerror}): no room is left{inodes}. "
                "Make room, or choose another disk."
            ) from None
        raise OutputError(
            f"{out}: nothing of that name can be created in {folder} ({error.strerror}). Choose another "
            "output."
        ) from None
    with suppress(OSError):
        trial.rmdir()


def _try_rename(out: Path) -> None:
    """Refuse a folder that its file system cannot rename, such as one of a lower layer of an overlay.

    This renames onto a folder that is not empty: a file system that could rename the folder refuses for that
    reason, and changes nothing.
    """
    trial = out.with_name(f".{out.name}{PART}-gone")
    try:
        trial.mkdir(mode=0o700)
    except FileExistsError:  # from a run that was killed, or another user's: do not rename onto it
        return
    try:
        (trial / "not-empty").mkdir()
        os.rename(out, trial)
    except OSError as error:
        if error.errno not in TARGET_EXISTS:
            raise OutputError(
                f"{out}: its file system cannot rename this folder ({error.strerror}), because it is part of "
                f"a lower layer. Choose another output, such as {_free_path(out.parent, out)}."
            ) from None
    finally:
        for path in (trial / "not-empty", trial):
            with suppress(OSError):
                path.rmdir()


def _mounts() -> frozenset[str]:
    """Return all mount points, bind mounts too; empty if the system does not list them."""
    return frozenset(path for path, _ in _read_mounts())


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path is on; empty if the system does not state it."""
    real = os.path.realpath(path)
    matches = [
        (len(mount), kind)
        for mount, kind in _read_mounts()
        if real == mount or real.startswith(mount.rstrip("/") + "/")
    ]
    return max(matches)[1] if matches else ""


def _read_mounts() -> list[tuple[str, str]]:
    """Return (path, file system) of each mount point."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        words = line.split(b" ")
        path = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), words[4])
        mounts.append((os.fsdecode(path), os.fsdecode(words[words.index(b"-") + 1])))
    return mounts


def _free_path(folder: Path, out: Path) -> str:
    """Return a path in a folder that an output could use, as a suggestion in a message."""
    ending = out.suffix if out.suffix in SINGLE_FILES else ""
    names = (f"merged{f'-{n}' if n > 1 else ''}{ending}" for n in range(1, 1000))
    path = next(
        (folder / name for name in names if not os.path.lexists(folder / name)), folder / f"merged{ending}"
    )
    return f"./{path}" if not path.is_absolute() and len(path.parts) == 1 else str(path)
