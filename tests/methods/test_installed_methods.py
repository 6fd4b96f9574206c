"""The methods that are installed: ours by their files, others by entry points, which are read when they are needed."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest

from alnico.errors import MethodError
from alnico.methods import InstalledMethods, find


@pytest.fixture(name="packages")
def fixture_packages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the entry points of other packages lead to."""
    found: list[Any] = []
    entries = [SimpleNamespace(name="theirs", value="package:theirs", load=lambda: found[0])]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: entries)
    return found


def test_a_broken_package_stops_no_method_of_ours(packages: list[Any]) -> None:
    installed = InstalledMethods()
    assert "ties" in installed
    assert installed["ties"].name == "ties"
    packages.append("no method")
    with pytest.raises(MethodError, match=r"entry point theirs .* is not a Method, or its name is taken"):
        list(installed)


def test_a_package_cannot_take_the_name_of_a_method_of_ours(packages: list[Any]) -> None:
    packages.append(find("ties"))
    with pytest.raises(MethodError, match="its name is taken"):
        "halfway" in InstalledMethods()  # noqa: B015
