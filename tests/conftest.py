"""What all tests share: made models on the path, and the command line called in this process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from made_tasks import Made

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does; else torch's threads wait busily
pytest_plugins = ["durations", "made_methods", "remote_fixtures", "made_cluster"]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background with interrupts ignored, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _take(folder: Path) -> None:
    """Make a folder a package of its name, without its neighbours on the path: benchmarks/analysis.py would hide tests/analysis."""
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


for _name in ("quality", "quality_decoder"):
    _take(Path(__file__).parents[1] / "benchmarks" / _name)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What tests share is imported by those that need it, and not for doctests."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call ``alnico WORDS``; gives its exit code, standard output and standard error, as with all kernels in the cache."""
    from alnico.cli.main import main
    from compiling import without_compiling

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alnico", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), *map(without_compiling, output)

    return call


@pytest.fixture
def compiled() -> Iterator[None]:
    """All kernels are compiled, also for tensors so small that numpy would run them."""
    from alnico.kernels.choice import forced

    with forced("compiled"):
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Base, specialists and tasks, made once for all tests of evaluation and tuning. Tests write to folders of their own."""
    from made_tasks import make_tasks  # loads torch and transformers

    return make_tasks(tmp_path_factory.mktemp("tasks"))
