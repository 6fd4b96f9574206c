"""Nodes send a merge to a URL without seeing a folder of the driver, and the bytes are those of one machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.checkpoint.remote.open_folder import open_remote_folder
from alnico.cluster.pool import NodeLost, WorkerHost
from alnico.engine import cluster_merge
from alnico.errors import HubError, NonFiniteError, OutputError, ResourceError
from alnico.events import Event, Started, TensorDone
from alnico.output import disk_space, remote_target, shard_uploads
from cluster.test_cluster_merge import MADE_OF, stop_after
from disk_folder import DiskStore
from killing import is_killed
from made import family, save_model
from made_cluster import ThreadCluster
from made_tokenizers import save_family
from small_merges import everything
from web_server import WebServer

URL = "s3://bucket/models/out"
SHARD = "2KB"

hidden: list[str] = []
"""Folders that nodes do not see."""
on_node = threading.local()


def _hide(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir") and getattr(on_node, "is_true", False):
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and any(os.path.abspath(path).startswith(f) for f in hidden):
            raise FileNotFoundError(2, "No such file or directory", str(path))


sys.addaudithook(_hide)  # it stays, and does nothing where nothing is hidden


class Place:
    """A store at a URL, three nodes, and a folder of the driver that they do not see."""

    def __init__(self, tmp_path: Path, cluster: ThreadCluster) -> None:
        self.store = DiskStore(tmp_path / "store")
        self.out = tmp_path / "store/models/out"
        self.work, self.temporary = tmp_path / "driver", tmp_path / "node"
        self.cluster = cluster

    def merge(self, recipe: Any, ray: bool | None = True, **options: Any) -> Any:
        return alnico.merge(
            recipe, URL, ray=ray, work_dir=self.work, max_shard_size=SHARD, overwrite=True, **options
        )

    def check(self, recipe: Any) -> None:
        """The output is that of one machine, and nothing is left."""
        alnico.merge(recipe, "alone", max_shard_size=SHARD, overwrite=True)
        assert everything(self.out) == everything(Path("alone"))
        assert len(list(self.out.glob("*.safetensors"))) > 3
        self.is_empty()

    def is_empty(self) -> None:
        assert not list(self.work.iterdir())
        assert not list(self.temporary.glob("alnico-*/*.safetensors*"))
        assert not any(list(upload.iterdir()) for upload in self.store.uploads() if upload.is_dir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread_cluster: ThreadCluster) -> Iterator[Place]:
    made = Place(tmp_path, thread_cluster)
    made.temporary.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(made.temporary))
    monkeypatch.setattr(remote_target, "open_remote_folder", made.store.open)
    monkeypatch.setattr(shard_uploads, "PART_BYTES", 512)
    monkeypatch.setattr(cluster_merge, "LEAST_UNIT_BYTES", 1)
    for name in ("begin", "do"):
        monkeypatch.setattr(WorkerHost, name, _as_a_node(getattr(WorkerHost, name)))
    hidden.append(str(made.work))
    yield made
    hidden.clear()


def _as_a_node(call: Any) -> Any:
    def called(self: WorkerHost, given: bytes) -> Any:
        on_node.is_true = True
        try:
            return call(self, given)
        finally:
            on_node.is_true = False

    return called


def parts(place: Place) -> list[str]:
    return [name for operation, name in place.store.done if operation == "part"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["over the model", "weights from norms", "whole matrices"])
def test_models_and_output_at_urls_need_no_folder_of_all_nodes(
    kind: str, place: Place, web_server: WebServer
) -> None:
    family(web_server.folder, 2, tied=kind == "over the model")
    text = MADE_OF[kind]
    for name in ("base", "tuned-0", "tuned-1"):
        text = text.replace(f": {name}\n", f": {web_server.url}/{name}\n")
        text = text.replace(f"model: {name},", f"model: {web_server.url}/{name},")
    text = text.replace("[tuned-0, tuned-1]", f"[{web_server.url}/tuned-0, {web_server.url}/tuned-1]")
    Path("recipe.yml").write_text(text + "dtype: bfloat16\n")
    place.cluster.dies_at = {0: 2}
    place.merge("recipe.yml")
    assert sum(node.done > 0 for node in place.cluster.nodes) == 3
    place.check("recipe.yml")


def test_vocabularies_are_united_on_nodes_that_see_no_folder(place: Place) -> None:
    save_family(Path())
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "other"}],
        "tokenizer": {"source": "union"},
        "unrelated": "allow",
    }
    place.merge(recipe)
    alnico.merge(recipe, "alone", max_shard_size=SHARD)
    assert everything(place.out) == everything(Path("alone"))


def linear() -> str:
    family(Path(), 2, layers=1)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    return "recipe.yml"


def test_a_node_lost_in_the_middle_of_a_shard_costs_its_parts(place: Place) -> None:
    count = 0

    def before(operation: str, _name: str) -> None:
        nonlocal count
        count += operation == "part"
        if operation == "part" and count == 5:
            raise NodeLost("pulled out")

    recipe = linear()
    place.store.before = before
    place.merge(recipe)
    begun = [name for operation, name in place.store.done if operation == "start"]
    assert len(begun) == len(set(begun))
    assert len(parts(place)) > len(begun)
    place.check(recipe)


def test_a_late_answer_of_a_lost_node_changes_nothing(place: Place) -> None:
    recipe = linear()
    place.cluster.dies_at, place.cluster.after = {0: 1, 1: 1}, True
    place.merge(recipe)
    place.check(recipe)


@pytest.mark.slow
def test_a_killed_driver_is_taken_up_on_nodes_or_on_one_machine(place: Place) -> None:
    recipe = linear()
    place.merge(recipe)
    operations = len(place.store.done)
    resumed = []
    for number in range(2, operations, 8):
        shutil.rmtree(place.out)
        count = 0

        def before(*_: str, at: int = number) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        place.store.before = before
        assert is_killed(lambda: place.merge(recipe))
        for left in place.temporary.iterdir():  # by a kill between making a file and taking its name
            shutil.rmtree(left)
        place.store.before = None
        resumed.append(place.merge(recipe, ray=True if number % 16 == 2 else None).resumed)
        place.check(recipe)
        shutil.rmtree(place.store.root / ".uploads")
        (place.store.root / ".uploads").mkdir()
    print(operations, resumed)
    assert resumed[0] == 0
    assert max(resumed) > 3


@pytest.mark.parametrize("first", [None, True], ids=["here first", "nodes first"])
def test_whole_shards_of_the_other_place_are_kept(first: bool | None, place: Place) -> None:
    recipe = linear()
    with pytest.raises(KeyboardInterrupt):
        place.merge(recipe, first, watch=stop_after(8, []), threads=1)
    events: list[Event] = []
    place.merge(recipe, not first, watch=events.append)
    started = next(e for e in events if isinstance(e, Started))
    assert started.resumed > 3
    done = [e.tensor for e in events if isinstance(e, TensorDone)]
    assert len(done) == len(set(done)) == len(started.plan.jobs) - started.resumed
    place.check(recipe)


def test_a_wrong_value_discards_the_uploads(place: Place) -> None:
    import numpy as np

    values = np.ones((64, 32), np.float32)
    broken = values.copy()
    broken[3, 4] = np.nan
    save_model(Path("a"), {"x": ("F32", values), "y": ("F32", values)})
    save_model(Path("b"), {"x": ("F32", values), "y": ("F32", broken)})
    with pytest.raises(NonFiniteError, match="y"):
        place.merge({"merge_method": "linear", "models": ["a", "b"]})
    assert not everything(place.out)
    place.is_empty()


def test_a_node_without_room_for_a_shard_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = linear()
    real = shutil.disk_usage

    def full(path: Any) -> Any:
        usage = real(path)
        return usage._replace(free=1000) if str(path) == str(place.temporary) else usage

    monkeypatch.setattr(disk_space.shutil, "disk_usage", full)
    with pytest.raises(ResourceError) as caught:
        place.merge(recipe)
    assert str(caught.value).startswith(
        f"nodes node0, node1, node2: {place.temporary}: a shard of the output, which is made there and then sent, needs 16."
    )
    assert str(caught.value).endswith(
        "Make room, start Ray there with another TMPDIR, or choose a smaller --max-shard-size."
    )
    place.is_empty()


def test_a_node_that_the_server_refuses_is_named(place: Place) -> None:
    recipe = linear()

    def before(operation: str, name: str) -> None:
        if operation == "state" and getattr(on_node, "is_true", False):
            raise HubError(f"{URL}/{name}: access is denied.")

    place.store.before = before
    with pytest.raises(HubError, match=r"^nodes node0, node1, node2: .*access is denied"):
        place.merge(recipe)
    assert not parts(place)


def test_schemes_that_take_files_whole_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_target, "open_remote_folder", open_remote_folder)
    message = r"^memory://x/out: such a URL takes each file whole, from one machine"
    with pytest.raises(OutputError, match=message):
        alnico.merge(linear(), "memory://x/out", ray=True, work_dir=place.work)
    assert not place.work.exists()
