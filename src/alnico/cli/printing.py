"""Prints results to stdout and lines for people to stderr.

A failure to print never fails a command that wrote something.
"""

from __future__ import annotations

import codecs
import errno
import json
import sys
from collections.abc import Iterable
from typing import Any, NewType, TextIO

import click

from alnico.errors import INTERRUPTED, AlnicoError, RunError, visible

Page = NewType("Page", str)
"""Text whose newlines are ours, from :func:`page` or :func:`json_page`. Names in it cannot start lines of their own."""

EXIT_CODE = "the exit code says what was found"
"""What says the result of a command that checks something, besides its page."""

_state: dict[str, Any] = {}
"""Of the running command: why stdout did not take everything (``failure``), where the result also is (``besides``), and whether
an interrupt was reported (``is_reported``)."""


def begin() -> None:
    """Forget the last command of this process."""
    _state.clear()


def page(lines: Iterable[str]) -> Page:
    """Lines as one text, each with everything escaped that a terminal would obey or hide, newlines included."""
    return Page("\n".join(map(visible, lines)))


def recipe_page(text: str) -> Page:
    """A recipe that reads back as the same after printing, whatever characters its names have and stdout accepts.

    If a character cannot be printed as it is, the recipe is rewritten in ASCII, with YAML's own escapes; its comments come first.
    """
    lines = text.rstrip().split("\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    plain = page(lines)
    if plain == "\n".join(lines) and (plain.isascii() or codecs.lookup(encoding).name == "utf-8"):
        return plain
    import yaml

    comments = [
        visible(line).encode("ascii", "backslashreplace").decode()
        for line in lines
        if line.lstrip().startswith("#")
    ]
    return Page(
        "\n".join([*comments, yaml.safe_dump(yaml.safe_load(text), sort_keys=False, width=10**6).rstrip()])
    )


def json_page(data: Any, indent: int | None = 1) -> Page:
    """Data as JSON in printable ASCII."""
    return Page(json.dumps(data, indent=indent))


def show_result(text: Page, besides: object = None) -> None:
    """Write a result to stdout.

    A reader that has left (``| head``) is not an error. :func:`verdict` reports a closed or full stream when the command ends.
    ``besides`` is where the result also is, or what else states it.
    """
    _state["besides"] = besides
    failure = _written(f"{text}\n", sys.stdout)
    if failure is not None:
        _state["failure"] = failure


def say(line: str, quiet: bool = False) -> None:
    """Write a line for people, to stderr. A stream that does not take it is not an error."""
    if not quiet:
        _written(f"{visible(line)}\n", sys.stderr)


def say_page(text: Page, quiet: bool = False) -> None:
    """Write several lines for people, to stderr."""
    if not quiet:
        _written(f"{text}\n", sys.stderr)


def say_error(error: AlnicoError) -> None:
    """Write an error's message to stderr."""
    say_page(page([f"alnico: {error.args[0] if error.args else ''}", *error.args[1:]]))


def is_terminal(stream: Any) -> bool:
    """Does a stream, which may be None or any object, lead to a terminal?"""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def interrupted(what: str | None) -> click.exceptions.Exit:
    """Say that a signal ended a command, and what the same command resumes; click would say nothing."""
    _state["is_reported"] = True
    say("alnico: interrupted." + (f" The same command resumes the {what}." if what else ""))
    return click.exceptions.Exit(INTERRUPTED)


def is_reported() -> bool:
    """Has the interrupt been reported?"""
    return "is_reported" in _state


def verdict(code: int) -> int:
    """The exit code of a command that would end with ``code``: another if stdout was closed or full and the result is nowhere else."""
    failure = _failure()
    if failure is None or code != 0 or getattr(failure, "errno", None) == errno.EPIPE:
        return code
    why = getattr(failure, "strerror", None) or str(failure)
    if (besides := _state.get("besides")) is not None:
        say(
            f"alnico: note: standard output cannot be written ({why}); {'' if besides == EXIT_CODE else 'the work is done: '}{besides}."
        )
        return code
    error = RunError(
        f"standard output: cannot be written ({why}); expected a file, a pipe or a terminal that takes all of the result. "
        "Free space, or send it elsewhere."
    )
    say_error(error)
    return error.exit_code


def _failure() -> Exception | None:
    descriptor = getattr(sys.stdout, "descriptor", None)
    if descriptor is not None:  # alnico.cli.streams
        sys.stdout.flush()
        return descriptor.failure  # type: ignore[no-any-return]
    return _state.get("failure")


def _written(text: str, stream: TextIO | Any) -> Exception | None:
    """Write to a stream, which may be None or any object with ``write``. Returns what went wrong."""
    if stream is None:
        return OSError(errno.EBADF, "it is closed")
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        if hasattr(stream, "flush"):
            stream.flush()
    except (OSError, ValueError, AttributeError) as error:
        return error
    return None
