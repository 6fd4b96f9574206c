"""Reads the fenced blocks of a how-to page: files, commands with what they print, and Python with what it prints.

A page is a session in one folder, block by block:

- ``yaml title="recipe.yml"`` (any language with a title) is a file of that name;
- ``console`` has lines that begin with ``$ ``, which are commands, and below each what it prints. A command that ends in ``\\``
  continues on the next line. It must succeed, unless the printed lines have an error, which begins with ``alnico: ``, or begin
  with ``^C``, which interrupts a merge after its first tensor;
- ``python`` runs in one namespace per page. As in a notebook, the value of a last expression is printed;
- ``text`` right after ``python`` is what that block prints.

In printed text ``...`` stands for anything, also for lines. Times, speeds, free disk space and the path of the folder are compared
after :func:`page_text.comparable`. A comment before a block, ``<!-- numbers vary: REASON -->``, leaves its numbers out of the
comparison, and ``<!-- not run: REASON -->`` leaves the block out; the reasons are listed in test_how_to.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / "docs").glob("first-merge.md"), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
"""Every page whose blocks the suite runs."""

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?: +title=\"(?P<title>[^\"]+)\")? *\n(?P<text>.*?)^(?P=indent)``` *$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"<!-- (not run|numbers vary): ([^\n]+?) -->\s*$")


def programs_of(folder: Path) -> Path:
    """Where the programs are that a page in this folder finds first."""
    return folder.parent / f"{folder.name}.bin"


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is where its first line of text is in the page, counted from 1."""

    kind: str
    """``file``, ``console``, ``python``, ``output``, ``marked`` (not run), or ``unknown``."""
    text: str
    line: int
    title: str | None = None
    reason: str | None = None
    """Why it is not run, or why its numbers vary."""
    indent: str = ""


def blocks_of(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(page):
        between = page[end : match.start()]
        mark = _MARK.search(between)
        kind = _kind(match["language"], match["title"])
        if mark and mark[1] == "not run":
            kind = "marked"
        elif match["language"] == "text" and not match["title"]:
            follows = found and found[-1].kind == "python" and not _MARK.sub("", between).strip()
            kind = "output" if follows else "unknown"
        indent = match["indent"]
        text = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        line = page.count("\n", 0, match.start("text")) + 1
        found.append(Block(kind, text, line, match["title"], mark[2] if mark else None, indent))
        end = match.end()
    return found


def _kind(language: str, title: str | None) -> str:
    return "file" if title else language if language in ("console", "python") else "unknown"


@dataclass(frozen=True)
class Command:
    """A command of a ``console`` block, and the text below it."""

    typed: str
    printed: str
    line: int


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a ``console`` block. Text before the first is an error."""
    lines = block.text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    if not starts or starts[0]:
        raise ValueError(f"line {block.line}: a console block begins with `$ `")
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        last = start
        while lines[last].endswith("\\"):
            last += 1
        typed = "\n".join(lines[start : last + 1]).removeprefix("$ ")
        printed = "\n".join(lines[last + 1 : end]).strip("\n")
        yield Command(typed, printed, block.line + start)
