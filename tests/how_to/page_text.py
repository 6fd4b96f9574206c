"""Compares what a page says is printed with what was printed."""

from __future__ import annotations

import difflib
import re

FOLDER = "/home/you/merges"
"""How pages write the folder that they run in."""

_NUMBER = r"\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]\d+)?"
_VARYING = [
    (
        re.compile(
            r"^(?:compiling kernels for this processor|took .* compiling kernels ).*\n?", re.MULTILINE
        ),
        "",
    ),
    (re.compile(rf" \+ {_NUMBER} s compiling kernels \([^)\n]*\)"), ""),
    (re.compile(rf"\b{_NUMBER} (?:ms|s|min|h|seconds|minutes|hours)\b(?: {_NUMBER} (?:s|min)\b)?"), "# s"),
    (re.compile(rf"\b{_NUMBER} [kMGT]B/s"), "# GB/s"),
    (re.compile(rf"\b{_NUMBER} [kMGT]B free\b"), "# GB free"),
    # Progress, which is printed where a step takes long.
    (re.compile(r"^(?:tasks|experts|tensors|batches) \d+/\d+\n?", re.MULTILINE), ""),
    # How far an interrupted run came.
    (re.compile(r"\b\d+ tensors? done\b"), "# done"),
    (re.compile(r"\b\d+ of them kept from before\b"), "# of them kept from before"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?\b"), "#date"),
]


def comparable(text: str, *, numbers: bool = True) -> str:
    """Text without what differs between two runs; without ``numbers``, without any number."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    if not numbers:
        text = re.sub(rf"[-+]?{_NUMBER}\*?", "#", text)
        text = re.sub(r"#(?: *#)*", "#", text)
        text = re.sub(r" +", " ", text)
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


def agrees(shown: str, printed: str, *, numbers: bool = True) -> bool:
    """Is this what was printed? ``...`` in ``shown`` stands for anything, as a line for any number of lines."""
    shown, printed = (comparable(text, numbers=numbers) for text in (shown, printed))
    pattern = "".join(
        "(?:[^\n]*\n)*?" if line == "..." else ".*?".join(map(re.escape, line.split("..."))) + "\n"
        for line in shown.split("\n")
    )
    return re.fullmatch(pattern, printed + "\n", re.DOTALL) is not None


def difference(shown: str, printed: str) -> str:
    """The lines in which they differ, for a failing test."""
    lines = difflib.unified_diff(shown.split("\n"), printed.split("\n"), "the page", "printed", lineterm="")
    return "\n".join(lines)
