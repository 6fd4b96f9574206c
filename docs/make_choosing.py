"""Writes the table of rules of docs/choosing.md from the code: ``python docs/make_choosing.py``. A test says when it is out of date."""

from __future__ import annotations

import re
from pathlib import Path

from alnico.analysis.suggest_rules import RULES

PAGE = Path(__file__).with_name("choosing.md")


def page(written: str) -> str:
    """The page with its table made anew."""
    rows = [f"| {r.name} | {r.when} | {r.then} | {r.evidence} |" for r in RULES]
    table = "\n".join(["| rule | when | what | for and against |", "|---|---|---|---|", *rows])
    return re.sub(
        r"<!-- rules -->\n.*?<!-- /rules -->",
        lambda _: f"<!-- rules -->\n{table}\n<!-- /rules -->",
        written,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
