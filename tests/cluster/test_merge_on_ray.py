"""Merges on three Ray nodes of this machine, which are lost, and whose driver is killed: every byte is that of one machine."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import alnico
from alnico.engine import cluster_merge
from alnico.errors import MismatchError, RunError
from alnico.events import Event, Started, TensorDone
from made import family, model_bytes
from made_cluster import RayNodes

RECIPE = """\
merge_method: ties
base_model: base
models: [tuned-0, tuned-1]
parameters: {density: 0.3, scope: model}
dtype: bfloat16
"""

DRIVER = """
import os, signal, sys, time
import alnico
from alnico.engine import cluster_merge
from alnico.events import TensorDone

cluster_merge.LEAST_UNIT_BYTES = 1 << 12
seen = []

def watch(event):
    if isinstance(event, TensorDone):
        seen.append(event)
        if len(seen) == int(sys.argv[2]):
            while '"tensor"' not in open(".out.alnico-part/journal.jsonl").read():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

result = alnico.merge("recipe.yml", "out", ray=sys.argv[1], watch=watch, max_shard_size="40KB")
print(result.resumed)
"""
"""Kills itself with its n-th tensor, when the first ones are in the journal."""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_merge, "LEAST_UNIT_BYTES", 1 << 12)
    monkeypatch.chdir(tmp_path)
    family(tmp_path, 2)
    Path("recipe.yml").write_text(RECIPE)
    alnico.merge("recipe.yml", "alone", max_shard_size="40KB")


def driver(address: str, tensors: int) -> subprocess.CompletedProcess[str]:
    """Merge in a process that is killed with a tensor."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER, address, str(tensors)], capture_output=True, text=True
    )


@pytest.mark.slow  # starting the nodes takes most of its time, so it is one test
def test_a_killed_driver_and_a_lost_node_cost_no_byte(
    ray_nodes: RayNodes, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = driver(ray_nodes.address, 9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("out").exists()
    lost: list[Event] = []
    resumed: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            resumed.append(event.resumed)
        if isinstance(event, TensorDone) and not lost:
            lost.append(event)
            ray_nodes.kill(ray_nodes.nodes[0])

    capfd.readouterr()
    alnico.merge("recipe.yml", "out", ray=ray_nodes.address, watch=watch, max_shard_size="40KB")
    assert capfd.readouterr() == ("", "")
    assert 0 < resumed[0] <= 10  # the last one may be in the journal before the kill
    assert lost
    assert model_bytes(Path("out")) == model_bytes(Path("alone"))


@pytest.mark.nightly
def test_a_node_with_another_version_is_named(ray_nodes: RayNodes, tmp_path: Path) -> None:
    other = tmp_path / "older" / "alnico"
    other.mkdir(parents=True)
    for path in Path(alnico.__file__).parent.iterdir():
        (other / path.name).symlink_to(path)
    (other / "_version.py").unlink()
    (other / "_version.py").write_text('__version__ = "0.0.1"\n')
    older = ray_nodes.add(PYTHONPATH=str(other.parent))
    try:
        with pytest.raises(MismatchError) as caught:
            alnico.merge("recipe.yml", "out", ray=ray_nodes.address)
    finally:
        ray_nodes.kill(older)
    assert f"has alnico 0.0.1 (arithmetic {alnico.kernels.constants.ARITHMETIC}) on Python" in str(
        caught.value
    )
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("out").exists()


def merged_with_kills(
    ray_nodes: RayNodes, kill: Callable[[], None], at: float, attempts: int = 5
) -> tuple[int, int]:
    """Merge, and kill ``at`` seconds after the first tensors began; returns resumed tensors and attempts."""
    timer: list[threading.Timer] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started) and not timer:
            timer.append(threading.Timer(at, kill))
            timer[0].start()

    for attempt in range(attempts):
        try:
            result = alnico.merge("recipe.yml", "out", ray=ray_nodes.address, watch=watch)
            timer[0].join()
            return result.resumed, attempt + 1
        except RunError:  # the last node, too
            ray_nodes.repair()
    raise AssertionError("no attempt finished")


@pytest.mark.nightly
def test_twenty_kills_of_nodes_and_five_of_drivers_differ_in_no_byte(
    ray_nodes: RayNodes, tmp_path: Path
) -> None:
    family(tmp_path, 2, hidden=256, layers=12)
    alnico.merge("recipe.yml", "alone", overwrite=True)
    expected = model_bytes(Path("alone"))
    draw = random.Random(24)
    seconds = []
    differing = 0
    for count in range(22):  # the first two say how long a merge takes
        began: list[float] = []

        def watch(event: Event, began: list[float] = began) -> None:
            if isinstance(event, Started):
                began.append(time.monotonic())

        if count < 2:
            alnico.merge("recipe.yml", "out", ray=ray_nodes.address, watch=watch)
            seconds.append(time.monotonic() - began[0])
        else:
            ray_nodes.repair()
            victim = draw.choice(ray_nodes.nodes)
            at = draw.uniform(0, min(seconds))
            merged_with_kills(ray_nodes, lambda victim=victim: ray_nodes.kill(victim), at)  # type: ignore[misc]
        differing += model_bytes(Path("out")) != expected
        subprocess.run(["rm", "-r", "out"], check=True)
    ray_nodes.repair()
    command = [sys.executable, "-m", "alnico", "merge", "recipe.yml", "out", "--ray", ray_nodes.address, "-q"]
    journal = Path(".out.alnico-part/journal.jsonl")
    for _ in range(5):
        started = subprocess.Popen(command)
        while not journal.exists() and started.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, min(seconds)))
        started.kill()
        started.wait()
        subprocess.run(command, check=True)
        differing += model_bytes(Path("out")) != expected
        subprocess.run(["rm", "-r", "out"], check=True)
    print(
        f"20 kills of nodes, 5 of drivers: {differing} with differing bytes; a merge takes {min(seconds):.1f} s"
    )
    assert differing == 0
