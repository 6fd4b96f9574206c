"""Writes the rules of docs/choosing.md from the code: ``python docs/make_choosing.py``. A test fails when it is out of date."""

from __future__ import annotations

import re
from pathlib import Path

from alnico.analysis.suggest_rules import RULES

PAGE = Path(__file__).with_name("choosing.md")


def page(written: str) -> str:
    """Return the page with a new table and list of evidence."""
    rows = [f"| {r.name} | {r.when} | {r.then} |" for r in RULES]
    evidence = [f"- **{r.name}**: {r.evidence}" for r in RULES]
    table = ["| rule | condition | suggestion |", "| --- | --- | --- |", *rows]
    lines = "\n".join([*table, "", "The evidence for and against each rule:", "", *evidence, ""])
    return re.sub(
        r"<!-- rules -->\n.*?<!-- /rules -->",
        lambda _: f"<!-- rules -->\n{lines}\n<!-- /rules -->",
        written,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
