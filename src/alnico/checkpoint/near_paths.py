"""Finds the existing path that a misspelt path most resembles."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

MAX_ENTRIES = 5_000
"""Most entries of a folder that are compared."""
MAX_FOLDERS = 50
"""Most folders that are searched for one path."""
MAX_PART = 255
"""Longest name that is compared: difflib takes time that is quadratic in it."""
BRANCHES = 3
"""Most similar names of each folder that are followed."""
LEAST_RATIO = 0.66
"""Similarity of names from which on one is suggested for another."""


def near_path(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] = ".",
    accepts: Callable[[Path], bool] = os.path.exists,
) -> str | None:
    """Return the existing path that resembles ``path`` most; None if none does, or the path exists.

    ``path`` is relative to ``folder``, as is the result. Misspelt folders on the way count too; a missing or
    wrong ending (``recipe`` for ``recipe.yml``) and an absolute path without its first slash are recognised.
    ``accepts`` says which entries are what is looked for.
    """
    written = os.fspath(path)
    if "\\" in written:  # a path as Windows writes it
        forward = written.replace("\\", "/")
        is_there = os.path.exists(os.path.join(folder, forward))
        return forward if is_there else near_path(forward, folder, accepts)
    with suppress(OSError, RuntimeError, ValueError):
        given = Path(os.path.expanduser(written))
        start = Path(given.anchor) if given.is_absolute() else Path(folder)
        parts = given.relative_to(start).parts if given.is_absolute() else given.parts
        if not parts or (start / given).exists():
            return None
        if (
            not given.is_absolute()
            and len(parts) > 1
            and accepts(rooted := Path("/", *parts))
            and rooted.exists()
        ):
            return os.fspath(rooted)
        visits = iter(range(MAX_FOLDERS))
        if (found := next(_search(start, parts, accepts, visits), None)) is not None:
            return _shown(found, start, is_absolute=given.is_absolute())
        if len(parts) == 1:  # a name without its folder
            for inner in _folders(start):
                if (inner / parts[0]).exists() and accepts(inner / parts[0]):
                    return _shown(inner / parts[0], start, is_absolute=given.is_absolute())
    return None


def suggestion(
    path: str | os.PathLike[str],
    otherwise: str,
    folder: str | os.PathLike[str] = ".",
    accepts: Callable[[Path], bool] = os.path.exists,
    *,
    only_misspellings: bool = False,
) -> str:
    """Return "Did you mean PATH?" for a path that resembles an existing one; else ``otherwise``."""
    near = near_path(path, folder, accepts)
    if near is None or (only_misspellings and not is_misspelling(os.fspath(path), near)):
        return otherwise
    return f"Did you mean {near}?"


def is_misspelling(path: str, near: str) -> bool:
    """Is a path a misspelling of another one, so that it can hardly mean anything else?

    Names that differ in a number, as those of versions do, are no misspellings of each other.

    >>> is_misspelling("models/sree", "models/sre"), is_misspelling("Models/s_re", "models/s-re")
    (True, True)
    >>> is_misspelling("org/model-v2", "org/model-v1"), is_misspelling("org/base", "org/tuned")
    (False, False)
    """
    parts, others = Path(os.path.expanduser(path)).parts, Path(near).parts
    return len(parts) == len(others) and all(
        a == b or _is_same_word(a, b) for a, b in zip(parts, others, strict=True)
    )


def _is_same_word(a: str, b: str) -> bool:
    if re.findall(r"\d+", a) != re.findall(r"\d+", b):
        return False
    a, b = _plain(a), _plain(b)
    shorter = min(len(a), len(b))
    return a == b or _distance(a[:MAX_PART], b[:MAX_PART]) <= (0 if shorter < 3 else 1 if shorter < 8 else 2)


def _distance(a: str, b: str) -> int:
    """Count the letters to add, leave out, replace or swap with their neighbour to get from one word to another."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.casefold())


def _search(
    folder: Path, parts: tuple[str, ...], accepts: Callable[[Path], bool], visits: Iterator[int]
) -> Iterator[Path]:
    """Yield the paths below a folder whose parts resemble ``parts``, the most similar first.

    ``visits`` ends the search after so many folders.
    """
    if next(visits, None) is None:
        return
    part, rest = parts[0], parts[1:]
    if part in (".", "..") or (rest and (folder / part).is_dir()):
        candidates = [part]
    else:
        candidates = _similar(
            part, [p.name for p in _entries(folder) if (p.is_dir() if rest else accepts(p))]
        )
    for name in candidates:
        if not rest:
            yield folder / name
        else:
            yield from _search(folder / name, rest, accepts, visits)


def _similar(name: str, names: list[str]) -> list[str]:
    """Return the names most similar to a name: the same but for case, separators or ending first."""
    name, plain = name[:MAX_PART], _plain(name)
    names = [n for n in names if n.startswith(".") == name.startswith(".")]
    same = [n for n in names if _plain(n) == plain]
    of_stem: dict[str, list[str]] = {}
    for n in names:
        of_stem.setdefault(_stem(n), []).append(n)
    close = difflib.get_close_matches(_stem(name), list(of_stem), BRANCHES, LEAST_RATIO)
    return list(dict.fromkeys((*same, *(n for stem in close for n in of_stem[stem]))))[:BRANCHES]


def _stem(name: str) -> str:
    """Return a file's name without its ending, which has letters: ``v1.5`` has none."""
    return re.sub(r"(?<=.)\.[A-Za-z]\w{0,11}$", "", name)


def _entries(folder: Path) -> list[Path]:
    return sorted(itertools.islice(folder.iterdir(), MAX_ENTRIES))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder)[:100] if path.is_dir() and not path.name.startswith(".")]


def _shown(found: Path, start: Path, *, is_absolute: bool) -> str:
    return os.fspath(found) if is_absolute else os.fspath(found.relative_to(start))
