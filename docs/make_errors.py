"""Writes docs/errors.md from src/alnico/errors.py: ``python docs/make_errors.py``. A test says when it is out of date."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from alnico import errors

PAGE = Path(__file__).with_name("errors.md")

START = """# Exit codes and errors

Made from `src/alnico/errors.py` by `python docs/make_errors.py`.

The command line prints one message to standard error and ends with an exit code.
A message says where, what was found, what was expected and what to do.

In Python, the same message is an exception.
All classes are in `alnico.errors`; [the Python API](api/errors.md) shows each in full.
Catch `AlnicoError` to catch all of them, and read its `exit_code`.

| exit code | class | kind of | when |
|---|---|---|---|
"""

OTHERS = """
## Other exit codes

| exit code | meaning |
|---|---|
"""


def page() -> str:
    """The whole page: a table of the classes, and a table of the other exit codes."""
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.AlnicoError)]
    rows = [
        f"| {c.exit_code} | `{c.__name__}` | `{c.__base__.__name__}` | {_cell(_first(c))} |"
        for c in classes
        if c is not errors.AlnicoError and c.__base__ is not None
    ]
    others = (inspect.getdoc(errors) or "").partition("Other exit codes:")[2]
    other_rows = [
        f"| {m[1]} | {_cell(m[2])} |" for m in re.finditer(r"^    (\d+) +(.+)$", others, re.MULTILINE)
    ]
    return START + "\n".join(rows) + "\n" + OTHERS + "\n".join(other_rows) + "\n"


def _first(error: type[errors.AlnicoError]) -> str:
    return " ".join((inspect.getdoc(error) or "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
