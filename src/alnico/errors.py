"""Defines every error that alnico raises on purpose, and the exit code of each.

    AlnicoError
    ├── RecipeError        3   the recipe is wrong
    │   └── MethodError    3   an option of a merge method is wrong
    ├── ModelError         4   a model cannot be read, or its headers do not describe its files
    ├── MismatchError      5   models that do not fit together
    ├── NonFiniteError     6   a NaN or an infinity in an input or in the output
    ├── ResourceError      7   the memory budget or the disk is too small; refused before running
    ├── OutputError        8   the output exists or is busy
    ├── RunError           9   reading or writing failed while running; can be resumed
    ├── VerificationError 10   the output does not match the plan, its lock, its inputs or its signature
    ├── UncheckedError    11   a requested check could not be made, which never counts as passed
    ├── EvaluationError   12   a task cannot be read, or a model cannot be scored on it
    └── HubError          13   the network or the hub: not found, no access, no connection, not in the cache

Other exit codes:

    0     success
    1     a bug in alnico, with a traceback
    2     a wrong command line
    14    not an error: ``alnico diff --exit-code`` found a difference
    129   interrupted by SIGHUP; the same command resumes
    130   interrupted by Ctrl-C; the same command resumes
    143   interrupted by SIGTERM; the same command resumes

A message says where, what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Invisible characters that Unicode classifies as letters or marks."""


def visible(text: str) -> str:
    """Return ``text`` on one line, with everything that a terminal would obey or hide written as an escape.

    Names, tokens and values come from files of strangers. This escapes control characters (C0, DEL, C1, so
    newlines, tabs and escape sequences too), direction marks, zero-width characters, line and paragraph
    separators, surrogates and unassigned code points. A backslash stays as it is, so that escaping twice
    changes nothing.

    >>> visible("model\\x1b[2K.weight\\nalnico: done")
    'model\\\\x1b[2K.weight\\\\nalnico: done'
    >>> visible("Größe 模型 🤗")
    'Größe 模型 🤗'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_visible(character: str) -> bool:
    if character in INVISIBLE:
        return False
    return character.isprintable() or unicodedata.category(character) == "Zs"


SECRETS = re.compile(
    r"""\b([A-Za-z][A-Za-z0-9+.-]*:/{1,2}|(?:s3|https?):)(?:[^\s/?'"]*@|[^\s/?'"]*:[^\s'"]*@|[^\s?'"]*\?[^\s='"]*=)[^\s'"]*"""
)
"""A URL, or the path that was made of one, with a user or a password before its host, or with a query."""


def without_secrets(text: str) -> str:
    """Return ``text`` without what may be a secret in URLs: users, passwords and queries, with all that follows.

    >>> without_secrets("s3://key:secret@bucket/model: is not there; see https://example.org/m?token=1")
    's3://...: is not there; see https://...'
    >>> without_secrets("s3://bucket/base+org/adapter@main")
    's3://bucket/base+org/adapter@main'
    """
    return SECRETS.sub(_hidden, text) if ":" in text else text


def _hidden(url: re.Match[str]) -> str:
    return f"{url[1]}...{':' if url[0].endswith(':') else ''}"


LONGEST_WORD = 600


def _shortened(text: str) -> str:
    """Cut the middle out of words (paths, names, values) of more than 600 characters.

    >>> len(_shortened("/a" * 2000)), _shortened("a b")
    (403, 'a b')
    """
    if len(text) <= LONGEST_WORD:
        return text
    return re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: f"{word[0][:200]}...{word[0][-200:]}", text)


class AlnicoError(Exception):
    """Base of all errors meant for the user. ``exit_code`` is what the command line returns.

    Each argument is one line of the message. :func:`visible` escapes each line, newlines included, so that no
    name from a file can add a line: ``RecipeError(*problems)``, never ``RecipeError("\\n".join(problems))``.
    Passwords and queries in URLs are not shown, whoever wrote them where no URL is expected.
    """

    exit_code = 1

    def __init__(self, *lines: object) -> None:
        super().__init__(*(_shortened(without_secrets(visible(str(line)))) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class RecipeError(AlnicoError):
    """The recipe is wrong. The message has one line for each mistake in the file."""

    exit_code = 3


class MethodError(RecipeError):
    """An option given to a merge method is outside its range or does not fit the others."""


class ModelError(AlnicoError):
    """A model cannot be read, or its headers do not describe its files."""

    exit_code = 4


class MismatchError(AlnicoError):
    """Models cannot be merged with one another: names, shapes, values or vocabularies differ."""

    exit_code = 5


class NonFiniteError(AlnicoError):
    """A NaN or an infinity in a merged input or in the output."""

    exit_code = 6


class ResourceError(AlnicoError):
    """The memory budget or the disk is too small for the plan. Raised before a tensor is read."""

    exit_code = 7


class OutputError(AlnicoError):
    """The output already exists, or another process is writing it."""

    exit_code = 8


class RunError(AlnicoError):
    """Reading or writing failed while running. The unfinished output is kept; the same command resumes it."""

    exit_code = 9


class VerificationError(AlnicoError):
    """The finished output does not match the plan, its lock, its inputs or its signature."""

    exit_code = 10


class UncheckedError(AlnicoError):
    """A requested check could not be made: a hash, an input or a key is missing.

    ``result`` holds the checks that could be made.
    """

    exit_code = 11

    def __init__(self, *lines: object, result: Any = None) -> None:
        super().__init__(*lines)
        self.result = result


class EvaluationError(AlnicoError):
    """A task cannot be read, or an evaluation raised an error or did not return a finite number."""

    exit_code = 12


class HubError(AlnicoError):
    """A model on the hub was not found, could not be accessed or reached, or is not cached while offline."""

    exit_code = 13


INTERRUPTED = 130
"""Exit code after Ctrl-C; the unfinished output is kept."""

DIFFERENT = 14
"""Exit code of ``alnico diff --exit-code`` for models that differ.

Not 1 as in git: that is a bug in alnico.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of an error of a library that says something; its class if none does.

    >>> first_line(ValueError("Failed in nopython mode:\\n  no such name.")), first_line(KeyError())
    ('no such name', 'KeyError')
    >>> first_line(ValueError("Error at driver init:\\nCUDA disabled by user:"))
    'CUDA disabled by user'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" :")]
    found = next((line for line in lines if not line.endswith(":")), "")
    return (found or (lines[-1] if lines else type(error).__name__))[:300].rstrip(".: ")


SUGGESTED = 0.6
"""Similarity from which on a name is suggested for another."""
LONGEST_NAME = 60
"""Characters of a name that are compared: the time grows with their square."""


def near_name(name: str, candidates: Iterable[str], least: float = SUGGESTED) -> str | None:
    """Return the candidate closest to ``name``, regardless of case, hyphens, underscores and spaces.

    >>> near_name("baseModel", ["base_model", "models"]), near_name("x", ["models"])
    ('base_model', None)
    """
    import difflib  # only where a name is wrong

    of_plain: dict[str, str] = {}
    for candidate in candidates:
        of_plain.setdefault(_plain(candidate), candidate)
    near = difflib.get_close_matches(_plain(name[:LONGEST_NAME]), of_plain, 1, least)
    return of_plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.casefold())
