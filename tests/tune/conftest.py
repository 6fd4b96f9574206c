"""The made tasks, written once for all tests of tuning."""

from __future__ import annotations

import pytest
from made_tasks import Made, make_tasks


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Base, specialists and tasks. Read only: what a test writes goes to its own folder."""
    return make_tasks(tmp_path_factory.mktemp("tasks"))
