"""Keeps the merge methods that a test or an example of a page makes from all other tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def only_methods_made_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave a test those made methods that its own module defines, and none that it makes to the next test."""
    base = sys.modules.get("alnico.methods.base")
    if base is None:
        yield
        base = sys.modules.get("alnico.methods.base")
        if base is not None:
            base.MADE_HERE.clear()
        return
    module = getattr(getattr(request.node, "module", None), "__name__", None)
    before = dict(base.MADE_HERE)
    base.MADE_HERE.clear()
    base.MADE_HERE.update({n: m for n, m in before.items() if m.factory.__module__ == module})
    yield
    base.MADE_HERE.clear()
    base.MADE_HERE.update(before)
