"""Servers on loopback for tests of models that live elsewhere; web_server.py and s3_server.py show how they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3Server
    from web_server import WebServer


@pytest.fixture(scope="session")
def running_s3() -> Iterator[S3Server]:
    from s3_server import serving_s3  # loads moto

    with serving_s3() as server:
        yield server


@pytest.fixture
def s3_server(running_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3-compatible server with an empty folder, ``url``, and its settings in the environment."""
    from s3_server import set_aws

    running_s3.forget()
    running_s3.prefix = f"{tmp_path.parent.name}-{tmp_path.name}/"
    set_aws(monkeypatch, running_s3.endpoint)
    return running_s3


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[WebServer]:
    """A web server of an empty folder, ``folder``, at ``url``."""
    from web_server import serving_folder

    (tmp_path / "served").mkdir()
    with serving_folder(tmp_path / "served") as web:
        yield web


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts of half a second, and almost no waiting for a server that is busy."""
    monkeypatch.setenv("ALNICO_HUB_TIMEOUT", "0.5")
    monkeypatch.setenv("ALNICO_HUB_WAIT", "0.3")
