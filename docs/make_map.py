"""Writes the map of the source in docs/design.md: one line per file, from the first line of its docstring.

python docs/make_map.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "alnico"
PAGE = ROOT / "docs" / "design.md"
BEGIN = "<!-- The map below is written by docs/make_map.py -->\n"
END = "<!-- End of the map -->\n"


def rooms(text: str) -> list[str]:
    """Return the rooms in their order, as the list in section 2 of the page has them."""
    block = text.partition("    src/alnico/\n")[2].partition("    tests/")[0]
    return re.findall(r"(?m)^ {6}(\w+(?:/|\.py)) ", block)


def summary(path: Path) -> str:
    """Return the first line of a file's docstring, without a full stop."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def lines(path: Path, depth: int) -> list[str]:
    """List a file, or a folder with its files."""
    space = "  " * depth
    if path.is_file():
        return [f"{space}{path.name:<{26 - len(space)}} {summary(path)}"]
    inside = sorted(
        p
        for p in path.iterdir()
        if (p.suffix == ".py" and p.name != "__init__.py") or (p / "__init__.py").exists()
    )
    head = f"{space}{path.name + '/':<{26 - len(space)}} {summary(path / '__init__.py')}"
    return [head, *(line for p in inside for line in lines(p, depth + 1))]


def source_map(text: str) -> str:
    """Return the map of all rooms that exist."""
    listed = []
    for room in rooms(text):
        if (SOURCE / room).exists():
            listed += lines(SOURCE / room, 1)
    return "```text\nsrc/alnico/\n" + "\n".join(line.rstrip() for line in listed) + "\n```\n"


def page(text: str) -> str:
    """Return the page with its map written again."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + source_map(text) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
