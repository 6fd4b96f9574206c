"""Makes what a how-to page takes for granted in its folder: models, adapters, data. Pages do not show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREPARED: dict[str, Callable[[Path], None]] = {}
"""By the name of the page."""


@contextmanager
def prepared(page: str, folder: Path) -> Iterator[dict[str, str]]:
    """A page's folder, filled; yields variables for its commands."""
    folder.mkdir(parents=True, exist_ok=True)
    if page in PREPARED:
        PREPARED[page](folder)
    yield {}
