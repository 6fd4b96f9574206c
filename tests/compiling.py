"""What commands print about compiling, which depends on the kernels that earlier tests have left in the cache."""

from __future__ import annotations

import re

from alnico.cli.command import COMPILING

LINES = re.compile(rf"^(?:{re.escape(COMPILING)}|took .* compiling kernels .*)\n", re.MULTILINE)
PART = re.compile(r" \+ [\d.]+ s compiling kernels \([^)]*\)")


def without_compiling(text: str) -> str:
    """Return what a command prints once its kernels are in the cache."""
    return PART.sub("", LINES.sub("", text))
