"""Nodes of a cluster extract the adapter that one machine does, to the last bit."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import made
from alnico.cluster import units
from alnico.devices import made_gpus
from alnico.errors import AlnicoError, MismatchError, NonFiniteError, ResourceError, RunError
from alnico.events import Advanced, Event
from alnico.lora import extract, extract_on_nodes, folded_distances
from alnico.numerics.blas import one_blas_thread
from made_cluster import RayNodes, ThreadCluster
from made_gpus import MADE

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nodes that are threads share BLAS: the first that is done must not give it more threads again."""
    with one_blas_thread():
        yield


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    base, tuned = made.family(tmp_path, 1, dtype="F32", hidden=160, vocabulary=200, tied=False, shards=2)
    return tuned[0], base


def adapter(pair: Pair, out: Path, **options: Any) -> dict[str, bytes]:
    extract(*pair, out, **{"rank": 8, **options})
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": None, "energy": 0.6, "max_rank": 40},
        {"rank": None, "size": 150_000},
        {"exact": True, "dtype": "bfloat16", "others": "leave"},
        {"embeddings": "save", "include": ["mlp", "embed"], "threads": 1, "seed": 3},
        {"verify": False},
    ],
    ids=str,
)
def test_the_adapter_is_that_of_one_machine(
    options: dict[str, Any], pair: Pair, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    there = adapter(pair, tmp_path / "there", ray=True, **options)
    assert there == adapter(pair, tmp_path / "here", **options)
    assert thread_cluster.addresses == [""]
    assert sum(node.done for node in thread_cluster.nodes) > 8


def test_what_is_lost_is_measured_over_all_runs_of_a_tensor(
    pair: Pair, tmp_path: Path, thread_cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded_distances, "CHECKED_ELEMENTS", 1_000)
    there = adapter(pair, tmp_path / "there", ray=True)
    assert there == adapter(pair, tmp_path / "here")
    assert thread_cluster.addresses == [""]


def test_triples_are_those_of_one_machine(pair: Pair, thread_cluster: ThreadCluster) -> None:
    here, there = (extract(*pair, rank=8, ray=ray) for ray in (False, True))
    assert here.keys() == there.keys()
    for name, triple in here.items():
        for one, other in zip(triple, there[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert thread_cluster.addresses == [""]


@pytest.mark.parametrize("after", [False, True])
def test_a_lost_nodes_matrices_are_factorised_by_others(
    after: bool, pair: Pair, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    thread_cluster.dies_at, thread_cluster.after = {0: 2, 2: 9}, after
    assert adapter(pair, tmp_path / "there", ray=True) == adapter(pair, tmp_path / "here")
    assert [node.done for node in thread_cluster.nodes][::2] == [2, 9]


@pytest.mark.usefixtures("thread_cluster")
def test_results_that_arrive_together_fit_the_budget(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_on_nodes, "MOST_RESULT_BYTES", 1)
    monkeypatch.setattr(units, "UNITS_A_NODE", 1)
    matrices: list[int] = []
    real = extract_on_nodes.FactorisingWorker.do

    def do(worker: Any, unit: Any) -> Any:
        matrices.append(sum(target.treatment == "factors" for target in unit))
        return real(worker, unit)

    monkeypatch.setattr(extract_on_nodes.FactorisingWorker, "do", do)
    adapter(pair, tmp_path / "out", ray=True)
    assert max(matrices) == 1
    assert sum(matrices) == 16


def test_the_memory_that_an_error_asks_for_is_enough(
    pair: Pair, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    memory, messages = "1MiB", list[str]()
    while True:
        try:
            adapter(pair, tmp_path / "out", rank=100, ray=True, threads=1, memory=memory)
            break
        except ResourceError as error:
            messages.append(str(error))
            memory = re.findall(r"Raise --memory to (\d+MiB)", messages[-1])[0]
            assert len(messages) < 3
    assert [message.partition(":")[0] for message in messages] == ["extract", "nodes node0, node1, node2"]
    assert len(thread_cluster.addresses) == 2


@pytest.mark.usefixtures("thread_cluster")
def test_an_extraction_goes_on_here_from_what_nodes_factorised_and_there_from_what_was_made_here(
    pair: Pair, tmp_path: Path
) -> None:
    whole = adapter(pair, tmp_path / "whole")
    for first, then in (({"ray": True}, {}), ({}, {"ray": True})):
        out, done = tmp_path / f"out{len(first)}", list[str]()

        def interrupt(event: Event, done: list[str] = done) -> None:
            if isinstance(event, Advanced):
                done.append(event.tensor)
                if len(done) == 5:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            adapter(pair, out, watch=interrupt, **first)
        found = extract(*pair, out, rank=8, **then)
        assert found.resumed >= 4
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.mark.usefixtures("thread_cluster")
def test_a_value_that_is_not_finite_is_named_as_here(pair: Pair, tmp_path: Path) -> None:
    path = pair[0] / "model-00002-of-00002.safetensors"
    tensors = made.read_file(path)
    name = sorted(n for n in tensors if "mlp" in n)[0]
    dtype, values = tensors[name]
    values = values.copy()
    values[3, 2] = np.inf
    made.save_file(path, {**tensors, name: (dtype, values)})
    messages = []
    for ray in (None, True):
        with pytest.raises(NonFiniteError) as caught:
            adapter(pair, tmp_path / "out", ray=ray)
        messages.append(str(caught.value))
        assert not list(tmp_path.glob("*out*"))
    assert messages[0] == messages[1]
    assert f"{name}[3, 2] is inf in {pair[0]}" in messages[0]


def test_nodes_that_differ_models_in_memory_and_gpus_are_refused(
    pair: Pair, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    with pytest.raises(AlnicoError, match=r"^tuned is in memory, and nodes of a cluster"):
        adapter((made.read_model(pair[0]), pair[1]), tmp_path / "out", ray=True)  # type: ignore[arg-type]
    with made_gpus([MADE]), pytest.raises(AlnicoError, match="and nodes of a cluster compute on their"):
        adapter(pair, tmp_path / "out", ray=True, device="cuda")
    assert not thread_cluster.addresses
    thread_cluster.infos = ({}, {"blas": "Another 1.0"}, {})
    with pytest.raises(MismatchError, match=r"^extract: computes on whole matrices.*node1: .*Another 1\.0"):
        adapter(pair, tmp_path / "out", ray=True)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("thread_cluster")
def test_nodes_that_do_not_see_the_adapter_say_so_and_what_was_factorised_stays(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapter(pair, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(extract_on_nodes.os.path, "isdir", lambda _: False)
        with pytest.raises(RunError) as caught:
            adapter(pair, tmp_path / "out", ray=True)
    assert str(caught.value) == (
        f"nodes node0, node1, node2: {tmp_path}/.out.alnico-part/model: no such directory there, and nodes verify the adapter; expected a "
        "folder that all nodes see. Write the adapter to one, or leave out the verification (--no-verify)."
    )
    assert extract(*pair, tmp_path / "out", rank=8, ray=True).resumed
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def kill_after(ray_nodes: RayNodes, tensors: int) -> Callable[[Event], None]:
    """Kill a node when so many tensors are done."""
    done: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Advanced):
            done.append(event.tensor)
            if len(done) == tensors:
                ray_nodes.kill(random.choice(ray_nodes.nodes))

    return watch


@pytest.mark.slow
def test_three_ray_nodes_of_which_one_is_killed_extract_the_adapter_of_one_machine(
    pair: Pair, tmp_path: Path, ray_nodes: RayNodes
) -> None:
    watch = kill_after(ray_nodes, 4)
    there = adapter(pair, tmp_path / "there", ray=ray_nodes.address, watch=watch)
    assert there == adapter(pair, tmp_path / "here")
    assert len(ray_nodes.nodes) == 2


@pytest.mark.nightly
def test_five_kills_of_nodes_change_no_bit_of_an_adapter(
    pair: Pair, tmp_path: Path, ray_nodes: RayNodes
) -> None:
    here = adapter(pair, tmp_path / "here")
    for kill in range(5):
        ray_nodes.repair()
        watch = kill_after(ray_nodes, random.randint(1, 40))
        assert adapter(pair, tmp_path / f"there{kill}", ray=ray_nodes.address, watch=watch) == here
        assert len(ray_nodes.nodes) == 2


KILLED = """
import os, signal, sys
from alnico.events import Advanced
from alnico.lora import extract

tuned, base, out, address, tensors = sys.argv[1:]
done = []

def watch(event):
    if isinstance(event, Advanced):
        done.append(event.tensor)
        if len(done) == int(tensors):
            os.kill(os.getpid(), signal.SIGKILL)

extract(tuned, base, out, rank=8, ray=address, watch=watch)
"""


@pytest.mark.nightly
def test_kills_of_the_driver_change_no_bit(pair: Pair, tmp_path: Path, ray_nodes: RayNodes) -> None:
    here, out = adapter(pair, tmp_path / "here"), tmp_path / "out"
    for tensors in (6, 4, 30):
        command = [sys.executable, "-c", KILLED, *map(str, pair), str(out), ray_nodes.address, str(tensors)]
        ended = subprocess.run(command, capture_output=True, timeout=120)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert not out.exists()
    assert extract(*pair, out, rank=8, ray=ray_nodes.address).resumed > 8
    assert {path.name: path.read_bytes() for path in out.iterdir()} == here
