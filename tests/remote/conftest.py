"""A counting folder in the place of those at URLs, for tests of what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from counting_folder import Elsewhere


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Folders at ``s3://bucket``; see counting_folder.py."""
    from alnico.checkpoint.remote import open_remote_model

    (tmp_path / "bucket").mkdir()
    made = Elsewhere(tmp_path / "bucket")
    monkeypatch.setattr(open_remote_model, "open_remote_folder", made.open)
    return made
