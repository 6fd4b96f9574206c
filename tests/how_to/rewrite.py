"""Runs how-to pages and writes what their commands really print: ``python tests/how_to/rewrite.py [--times] [PAGE...]``.

A part that agrees stays as it is, with its ``...``; any other part is written in full. With ``--times``, parts without ``...`` get
the times of this run, too. Read the result before you keep it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from how_to.page_blocks import PAGES, blocks_of
from how_to.page_models import SCORED, SCORING, prepared
from how_to.page_session import Outcome, forking, session


def rewritten(page: str, outcomes: list[Outcome], *, has_new_times: bool = False) -> str:
    """The page with what was printed, where it does not agree."""
    lines = page.split("\n")
    blocks = blocks_of(page)
    for outcome in reversed(outcomes):
        if outcome.is_equal and not (has_new_times and "..." not in outcome.shown):
            continue
        index = next(i for i, b in reversed(list(enumerate(blocks))) if b.line <= outcome.page_line)
        block = blocks[index]
        indent = block.indent
        printed = [f"{indent}{line}".rstrip() for line in outcome.printed.split("\n")]
        printed = printed if outcome.printed else []
        if block.kind == "console":
            start = outcome.page_line - 1 + outcome.typed.count("\n") + 1
            end = start
            while not lines[end].startswith((f"{indent}$ ", f"{indent}```")):
                end += 1
            lines[start:end] = printed
        elif index + 1 < len(blocks) and blocks[index + 1].kind == "output":
            start = blocks[index + 1].line - 1
            end = start + blocks[index + 1].text.count("\n")
            lines[start:end] = printed
        elif printed:
            end = block.line - 1 + block.text.count("\n") + 1
            lines[end:end] = ["", f"{indent}```text", *printed, f"{indent}```"]
    return "\n".join(lines)


def rewrite(page: Path, server: subprocess.Popen[str], folder: Path, *, has_new_times: bool) -> None:
    """Run a page, and write into it what was printed otherwise."""
    text = page.read_text("utf-8")
    with prepared(page.stem, folder) as environment, session(folder, server, environment) as running:
        outcomes = list(running.run(blocks_of(text)))
    for outcome in outcomes:
        if outcome.problem() is not None:
            print(f"{page.name}, {outcome.problem()}\n")
    page.write_text(rewritten(text, outcomes, has_new_times=has_new_times), "utf-8")


if __name__ == "__main__":
    chosen = [Path(word).resolve() for word in sys.argv[1:] if word != "--times"] or PAGES
    for imported in ((), SCORING):
        pages = [page for page in chosen if (page.stem in SCORED) is bool(imported)]
        if pages:
            with forking(*imported) as server, tempfile.TemporaryDirectory() as made:
                for page in pages:
                    rewrite(
                        page, server, Path(made) / page.stem / "merges", has_new_times="--times" in sys.argv
                    )
