"""Says what is wrong with text that is not YAML, in the words of the person who wrote it."""

from __future__ import annotations

import re

import yaml

QUOTED = 40
"""Most characters of a line that a message shows."""


def yaml_hint(error: yaml.MarkedYAMLError, text: str) -> str | None:
    """Return what to do about a common slip in YAML; None for others.

    >>> def hint(text):
    ...     try:
    ...         yaml.compose(text)
    ...     except yaml.MarkedYAMLError as error:
    ...         return yaml_hint(error, text)
    >>> hint("models:\\n\\t- a")
    'A tab indents line 2; YAML allows only spaces there. Replace the tab with spaces.'
    >>> hint("merge_method:linear\\nmodels: [a]")
    "A space is missing after the colon in line 1 ('merge_method:linear')."
    """
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return None
    lines = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text)
    number = mark.line
    line = lines[number] if number < len(lines) else ""
    problem = error.problem or ""
    if "'\\t'" in problem:
        where = "indents" if line[: mark.column].strip() == "" else "is in"
        return f"A tab {where} line {number + 1}; YAML allows only spaces there. Replace the tab with spaces."
    if match := re.search(r"found character '(.)' that cannot start any token", problem):
        return f"Text in line {number + 1} begins with {match[1]}, which has a meaning in YAML. Put the text in quotes."
    if "escape" in problem:
        return (
            f"In double quotes a backslash begins an escape (line {number + 1}). "
            "Use single quotes, or / between the parts of a path."
        )
    if "quoted scalar" in (error.context or "") and error.context_mark is not None:
        return f"A quotation mark opens in line {error.context_mark.line + 1} and is not closed. Close it."
    if "expected ',' or" in problem and error.context_mark is not None:
        return (
            f"A bracket opens in line {error.context_mark.line + 1} and is not closed, or a comma is missing. "
            "Check the brackets."
        )
    if "mapping values are not allowed" in problem or "could not find expected ':'" in problem:
        return _colon(lines, number)
    if "expected <block end>" in problem:
        return (
            f"Line {number + 1} is not indented as the lines that it belongs with. "
            "Give all items of a list, and all keys of a mapping, the same number of spaces."
        )
    return None


def _no_break_space(index: int) -> str:
    return (
        f"Line {index + 1} has a no-break space (U+00A0), as copying from a page leaves. "
        "Replace it with a plain space."
    )


def _colon(lines: list[str], number: int) -> str | None:
    """Say which colon, or which space after it, is missing, or that a line is indented too far."""
    if "\u00a0" in "".join(lines[: number + 1]):
        return _no_break_space(next(i for i, line in enumerate(lines) if "\u00a0" in line))
    before = next((i for i in range(number - 1, -1, -1) if _content(lines[i])), None)
    if before is None:
        return None
    previous = _content(lines[before])
    shown = previous if len(previous) <= QUOTED else f"{previous[:QUOTED]}..."
    key = previous.removeprefix("- ")
    if re.match(r"[A-Za-z_]+:\S", key) and "://" not in key:
        return f"A space is missing after the colon in line {before + 1} ({shown!r})."
    if not re.search(r":(\s|$)", key) and not previous.startswith("-"):
        return f"A colon is missing in line {before + 1} ({shown!r})."
    if _indent(lines[number]) > _indent(lines[before]):
        return (
            f"Line {number + 1} is indented further than line {before + 1}, which has a value already. "
            "Give the keys of one mapping the same number of spaces."
        )
    return None


def _content(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).strip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
