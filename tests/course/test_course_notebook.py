"""The notebook of examples/ runs from its first cell to its last, and its results draw themselves."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from course.rewrite import NOTEBOOK, run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of jupyter's packages
def test_the_notebook_runs_and_shows_what_it_holds(tmp_path: Path) -> None:
    stored = [kinds_of(cell) for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    cells = run(tmp_path).cells
    assert [kinds_of(cell) for cell in cells] == stored, (
        "run tests/course/rewrite.py and look at the notebook"
    )
    assert sum("image/png" in kinds for kinds in stored) >= 5
    assert sum("text/html" in kinds for kinds in stored) >= 2
    assert not any("stderr" in kinds for kinds in stored)
    assert list(tmp_path.iterdir()) == []


def kinds_of(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell shows: the kinds of its results, and the names of its streams."""
    outputs = cell.get("outputs", [])
    return [kind for o in outputs for kind in sorted(o.get("data", {o.get("name", "error"): ""}))]
