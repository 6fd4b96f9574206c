"""Nodes of a cluster give an analysis the numbers of one machine, to the last bit, and read each tensor once."""

from __future__ import annotations

import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import alnico
import made
from alnico.checkpoint.file_model import FileModel
from alnico.checkpoint.open_model import open_model
from alnico.cluster.node_models import NodeModels
from alnico.devices import made_gpus
from alnico.errors import AlnicoError, MismatchError, ModelError, NonFiniteError
from alnico.events import Advanced, Event, Reading
from alnico.numerics.blas import one_blas_thread
from alnico.run_options import RunOptions
from made_cluster import RayNodes, ThreadCluster
from made_gpus import MADE

if TYPE_CHECKING:
    from s3_server import S3Server

Models = tuple[Path, list[Path]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nodes that are threads share BLAS: the first that is done must not give it more threads again."""
    with one_blas_thread():
        yield


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and pictures are drawn from the numbers, and take seconds."""
    monkeypatch.setattr(importlib.import_module("alnico.analysis.analyze"), "write_pages", lambda *_: None)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A base and three fine-tunes, one of which lacks a tensor, while another has one of another dtype."""
    base, tuned = made.family(tmp_path, 3, shards=2)
    for folder, change in ((tuned[0], "lacks"), (tuned[1], "float32")):
        path = folder / "model-00002-of-00002.safetensors"
        tensors = made.read_file(path)
        name = sorted(tensors)[-1]
        _, values = tensors.pop(name)
        if change == "float32":
            tensors[name] = ("F32", values + 1e-3)
        made.save_file(path, tensors)
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        if change == "lacks":
            del data["weight_map"][name]
        index.write_text(json.dumps(data))
    return base, tuned


def contents(folder: Path) -> dict[str, Any]:
    """The files of a report, without the one number that says how long it took."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found[str(path.relative_to(folder))] = path.read_bytes()
    summary = json.loads(found.pop("summary.json"))
    assert summary.pop("seconds") > 0
    return {**found, "summary.json": json.dumps(summary)}


def analyzed(models: Models, out: Path, **options: Any) -> dict[str, Any]:
    alnico.analyze(models[1][: options.pop("count", 3)], base=models[0], out=out, **options)
    return contents(out)


@pytest.mark.parametrize(
    "options",
    [{}, {"subspace_side": 0}, {"top_share": 0.01, "threads": 1}, {"count": 1}, {"names": ["a", "b", "c"]}],
    ids=str,
)
def test_files_are_those_of_one_machine(
    options: dict[str, Any], models: Models, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    here = analyzed(models, tmp_path / "here", **options)
    there = analyzed(models, tmp_path / "there", ray="some:1", **options)
    assert thread_cluster.addresses == ["some:1"]
    assert len(here) > 4
    assert there == here
    assert sum(node.done for node in thread_cluster.nodes) > 8


def test_adapters_and_paths_relative_to_the_working_directory_are_found_by_nodes(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread_cluster: ThreadCluster
) -> None:
    alnico.lora.extract(models[1][1], models[0], tmp_path / "adapter", rank=2)
    monkeypatch.chdir(tmp_path)
    given = [f"{models[0].name}+0.5*adapter", f"./{models[1][2].name}"]
    found = [alnico.analyze(given, base=models[0].name, ray=ray).data() for ray in (False, True)]
    assert all(data.pop("seconds") > 0 for data in found)
    assert found[0] == found[1]
    assert sum(node.done for node in thread_cluster.nodes) > 8


@pytest.mark.slow
def test_models_at_urls_are_read_by_nodes(
    models: Models, s3_server: S3Server, thread_cluster: ThreadCluster
) -> None:
    places = []
    for folder in (models[0], models[1][1]):
        for path in folder.iterdir():
            s3_server.put(f"{folder.name}/{path.name}", path.read_bytes())
        places.append(f"{s3_server.url}/{folder.name}")
    found = [
        alnico.analyze([model], base=base, ray=ray).data()["tensors"]
        for base, model, ray in ((models[0], models[1][1], False), (*places, True))
    ]
    assert found[0] == found[1]
    assert sum(node.done for node in thread_cluster.nodes) > 8


@pytest.mark.parametrize("after", [False, True])
def test_a_lost_nodes_tensors_are_measured_by_others(
    after: bool, models: Models, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    thread_cluster.dies_at, thread_cluster.after = {0: 2, 2: 1}, after
    measured: list[str] = []
    there = analyzed(models, tmp_path / "there", ray=True, watch=named(measured))
    assert [node.done for node in thread_cluster.nodes][::2] == [2, 1]
    assert len(measured) == len(set(measured)) > 10
    assert there == analyzed(models, tmp_path / "here")


def named(names: list[str]) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, Advanced):
            names.append(event.tensor)

    return watch


def test_each_tensor_is_read_once(
    models: Models, monkeypatch: pytest.MonkeyPatch, thread_cluster: ThreadCluster
) -> None:
    read: Counter[tuple[str, str]] = Counter()
    real = FileModel.read_into

    def read_into(model: FileModel, name: str, offset: int, buffer: memoryview) -> None:
        read[model.label, name] += len(buffer)
        real(model, name, offset, buffer)

    monkeypatch.setattr(FileModel, "read_into", read_into)
    reading: list[Reading] = []
    alnico.analyze(
        models[1],
        base=models[0],
        subspace_side=0,  # which reads matrices again
        ray=True,
        watch=lambda event: reading.append(event) if isinstance(event, Reading) else None,
    )
    assert len(thread_cluster.nodes) == 3
    with open_model(models[0]) as base:
        assert {name: n for (label, name), n in read.items() if label == str(models[0])} == {
            name: tensor.byte_size for name, tensor in base.tensors.items()
        }
    assert [event.total_bytes for event in reading] == [sum(read.values())]


@pytest.mark.usefixtures("thread_cluster")
def test_an_analysis_goes_on_here_from_what_nodes_measured_and_there_from_what_was_measured_here(
    models: Models, tmp_path: Path
) -> None:
    whole = analyzed(models, tmp_path / "whole")
    for first, then in (({"ray": True}, {}), ({}, {"ray": True})):
        out, begun, rest = tmp_path / f"out{len(first)}", list[str](), list[str]()

        def interrupt(event: Event, begun: list[str] = begun) -> None:
            named(begun)(event)
            if len(begun) == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            analyzed(models, out, watch=interrupt, **first)
        assert analyzed(models, out, watch=named(rest), **then) == whole
        assert len(set(rest)) < len(set(begun) | set(rest))
        assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("thread_cluster")
def test_a_value_that_is_not_finite_is_named_as_here(models: Models, tmp_path: Path) -> None:
    path = models[1][2] / "model-00001-of-00002.safetensors"
    tensors = made.read_file(path)
    name = sorted(tensors)[0]
    dtype, values = tensors[name]
    made.save_file(path, {**tensors, name: (dtype, np.full_like(values, np.nan))})
    messages = []
    for ray in (None, True):
        with pytest.raises(NonFiniteError) as caught:
            alnico.analyze(models[1], base=models[0], out=tmp_path / "out", ray=ray)
        messages.append(str(caught.value))
        assert not list(tmp_path.glob(".*"))
    assert messages[0] == messages[1]
    assert str(models[1][2]) in messages[0]


def test_singular_vectors_are_refused_where_nodes_differ(
    models: Models, tmp_path: Path, thread_cluster: ThreadCluster
) -> None:
    thread_cluster.infos = ({}, {"processor": "Another One"}, {})
    with pytest.raises(MismatchError, match=r"singular vectors.*node1: Another One"):
        analyzed(models, tmp_path / "out", ray=True)
    assert analyzed(models, tmp_path / "out", ray=True, subspace_side=0) == analyzed(
        models, tmp_path / "here", subspace_side=0
    )
    assert analyzed(models, tmp_path / "one", ray=True, count=1)  # nothing to compare


def test_models_in_memory_and_gpus_are_refused(models: Models, thread_cluster: ThreadCluster) -> None:
    values = made.read_model(models[1][0])
    with pytest.raises(AlnicoError) as caught:
        alnico.analyze([models[1][1], values], base=models[0], ray=True)
    assert str(caught.value) == (
        "models[1] is in memory, and nodes of a cluster read models themselves; expected a path, an id of the hub or a URL. Save the "
        "model, or leave out ray."
    )
    with made_gpus([MADE]), pytest.raises(AlnicoError) as caught:
        alnico.analyze(models[1], base=models[0], ray=True, device="cuda")
    assert str(caught.value) == (
        f"the device is {MADE}, and nodes of a cluster compute on their processors. Leave out --device, or --ray."
    )
    assert not thread_cluster.addresses


def test_a_node_without_the_files_or_with_others_says_so(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = os.path.relpath(models[0], tmp_path)
    with open_model(reference) as base:
        described = NodeModels.of([base], RunOptions())
    monkeypatch.chdir("/")
    for source in described.open():
        assert source.label == reference
        source.close()
    os.utime(models[0] / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(ModelError) as caught:
        described.open()
    assert str(caught.value) == (
        f"{reference}: is another model there: names, sizes, times or headers of its files differ; expected the files that the command "
        "sees. Use a file system that all nodes see, or the model's URL."
    )
    models[0].rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError) as caught:
        described.open()
    assert str(caught.value) == (
        f"{reference}: no such directory or file there; expected one path for all nodes. Use a file system that all nodes see, or the "
        "model's URL."
    )


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
def test_three_ray_nodes_of_which_one_is_killed_give_the_files_of_one_machine(
    models: Models, tmp_path: Path, ray_nodes: RayNodes
) -> None:
    watch = kill_after(ray_nodes, 4)
    assert analyzed(models, tmp_path / "there", ray=ray_nodes.address, watch=watch) == analyzed(
        models, tmp_path / "here"
    )
    assert len(ray_nodes.nodes) == 2


@pytest.mark.nightly
def test_five_kills_of_nodes_change_no_bit(models: Models, tmp_path: Path, ray_nodes: RayNodes) -> None:
    here = analyzed(models, tmp_path / "here")
    for kill in range(5):
        ray_nodes.repair()
        watch = kill_after(ray_nodes, random.randint(1, 15))
        assert analyzed(models, tmp_path / f"there{kill}", ray=ray_nodes.address, watch=watch) == here
        assert len(ray_nodes.nodes) == 2
