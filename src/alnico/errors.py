"""Every error alnico raises on purpose, as one tree; each class carries its exit code.

    AlnicoError
    ├── RecipeError        3   the recipe is wrong
    │   └── MethodError    3   an option of a merge method is wrong
    ├── ModelError         4   a model cannot be read, or its files lie
    ├── MismatchError      5   models that do not fit together
    ├── NonFiniteError     6   a NaN or an infinity in an input or in the output
    ├── ResourceError      7   the memory budget or the disk is too small; refused before running
    ├── OutputError        8   the output exists or is busy
    ├── RunError           9   reading or writing failed while running; can be resumed
    ├── VerificationError 10   what was written is not what was planned, or not what its lock or signature says
    ├── UncheckedError    11   something could not be checked, which is never a pass
    ├── EvaluationError   12   a task cannot be read, or a model cannot be scored on it
    └── HubError          13   the network or the hub: not found, no access, not reached, not in the cache

0 is success, 1 a mistake of ours (with a traceback), 2 a wrong command line, 130 an interrupt (can be resumed), 143 and 129 the same by SIGTERM
and SIGHUP.
14 is no error: ``alnico diff --exit-code`` found a difference. Without the option it exits with 0, as a difference is what it was asked for.
A message says where, what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Characters that Unicode counts among letters and marks, and that nobody sees."""


def visible(text: str) -> str:
    """Return ``text`` on one line, with everything that a terminal would obey or hide written as an escape.

    Names, tokens and values come from files of strangers. Escaped are control characters (C0, DEL, C1, and with them newlines, tabs and
    escape sequences), marks of direction, characters without width, separators of lines and paragraphs, surrogates and what Unicode has not
    assigned. A backslash stays as it is, so that escaping twice changes nothing.

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


LONGEST_WORD = 600


def _shortened(text: str) -> str:
    """Text without the middle of words (paths, names, values) of more than 600 characters.

    >>> len(_shortened("/a" * 2000)), _shortened("a b")
    (403, 'a b')
    """
    if len(text) <= LONGEST_WORD:
        return text
    return re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda found: f"{found[0][:200]}...{found[0][-200:]}", text)


class AlnicoError(Exception):
    """Base of all errors meant for the user. ``exit_code`` is what the command line returns.

    Each argument is one line of the message. Lines are escaped by :func:`visible`, newlines in them included, so that no name from a file
    can make a line of its own: ``RecipeError(*problems)``, never ``RecipeError("\\n".join(problems))``.
    """

    exit_code = 1

    def __init__(self, *lines: object) -> None:
        super().__init__(*(_shortened(visible(str(line))) for line in lines))

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
    """Models that cannot be merged with one another: names, shapes, values or vocabularies differ."""

    exit_code = 5


class NonFiniteError(AlnicoError):
    """A NaN or an infinity in a merged input or in the output."""

    exit_code = 6


class ResourceError(AlnicoError):
    """The memory budget or the disk is too small for the plan. Raised before a tensor is read."""

    exit_code = 7


class OutputError(AlnicoError):
    """The output exists already, or another process is writing it."""

    exit_code = 8


class RunError(AlnicoError):
    """Reading or writing failed while running. The unfinished output is kept; the same command takes it up."""

    exit_code = 9


class VerificationError(AlnicoError):
    """The finished output does not match the plan, its lock, its inputs or its signature."""

    exit_code = 10


class UncheckedError(AlnicoError):
    """Something that was asked for could not be checked: a hash, an input or a key is missing. ``found`` is what was checked."""

    exit_code = 11

    def __init__(self, *lines: object, found: Any = None) -> None:
        super().__init__(*lines)
        self.found = found


class EvaluationError(AlnicoError):
    """A task cannot be read, or an evaluation raised, or gave something else than a finite number."""

    exit_code = 12


class HubError(AlnicoError):
    """A model on the hub is not there, not to be had, not reached, or not in the cache while offline."""

    exit_code = 13


INTERRUPTED = 130
"""Exit code after Ctrl-C; the unfinished output is kept."""

DIFFERENT = 14
"""Exit code of ``alnico diff --exit-code`` for models that are not equal. Not git's 1, which is a mistake of ours."""
