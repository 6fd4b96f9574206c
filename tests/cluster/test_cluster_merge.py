"""A merge on nodes has the bytes of the merge on one machine, for each class of methods, whatever nodes are lost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.engine import cluster_merge, node_merge
from alnico.errors import MismatchError, NonFiniteError, OutputError, RunError
from alnico.events import Event, Measuring, Started, TensorDone
from alnico.methods import registry
from engine.simulated_merges import Merges, cases
from engine.test_stages import CHAIN, PAIR
from made import family, model_bytes, save_model
from made_cluster import ThreadCluster, ThreadNode
from made_tokenizers import save_family

MADE_OF = {
    "linear": "merge_method: linear\nmodels: [tuned-0, tuned-1]\n",
    "slerp": "merge_method: slerp\nbase_model: tuned-0\nmodels: [tuned-0, tuned-1]\nparameters: {t: [0, 0.5, 1]}\n",
    "dare": "merge_method: dare_ties\nbase_model: base\nmodels: [tuned-0, tuned-1]\nparameters: {density: 0.5}\n",
    "over the model": "merge_method: ties\nbase_model: base\nmodels: [tuned-0, tuned-1]\nparameters: {density: 0.3, scope: model}\n",
    "weights from norms": "merge_method: task_arithmetic\nbase_model: base\nmodels: [tuned-0, tuned-1]\n"
    "parameters: {weight: {from: l2_norm}}\n",
    "weights by layer": "merge_method: task_arithmetic\nbase_model: base\nmodels: [tuned-0, tuned-1]\n"
    "parameters: {weight: {from: l2_norm, per: layer}}\n",
    "layers": "merge_method: passthrough\nslices:\n- sources: [{model: tuned-0, layer_range: [0, 2]}]\n"
    "- sources: [{model: tuned-1, layer_range: [1, 2]}]\n",
    "whole matrices": "merge_method: tsv\nbase_model: base\nmodels: [tuned-0, tuned-1]\n",
    "rules": "merge_method: linear\nbase_model: base\nmodels: [tuned-0, tuned-1]\n"
    "methods: [{filter: mlp, merge_method: ties, parameters: {density: 0.4, scope: model}}]\n",
}


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster_merge, "LEAST_UNIT_BYTES", 1)
    monkeypatch.chdir(tmp_path)


def merged(recipe: Any, out: str, **options: Any) -> dict[str, bytes]:
    alnico.merge(recipe, out, max_shard_size="40KB", **options)
    return model_bytes(Path(out))


def assert_equal(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MADE_OF)
def test_nodes_make_the_bytes_of_one_machine(kind: str, tied: bool, thread_cluster: ThreadCluster) -> None:
    family(Path(), 2, tied=tied)
    Path("recipe.yml").write_text(MADE_OF[kind] + "dtype: bfloat16\n")
    expected = merged("recipe.yml", "alone")
    thread_cluster.dies_at = {0: 2, 1: 4}
    assert_equal(merged("recipe.yml", "out", ray=True), expected)
    assert all(node.done > 1 for node in thread_cluster.nodes)
    assert not list(Path().glob(".out*"))


@pytest.mark.usefixtures("thread_cluster")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in sorted(registry())])
def test_every_method_makes_the_same_bytes_on_nodes(name: str, tmp_path: Path) -> None:
    for i, (_, case, dtype) in enumerate(cases(name)):
        merges = Merges(case, dtype, tmp_path / str(i))
        expected = merged(merges.recipe, f"alone-{i}")
        assert_equal(merged(merges.recipe, f"out-{i}", ray=True), expected)


def test_stages_are_merged_on_nodes(thread_cluster: ThreadCluster) -> None:
    family(Path(), 3, layers=1)
    for name, text in (("chain", CHAIN), ("pair", PAIR)):
        Path(f"{name}.yml").write_text(text)
        alnico.api.merge_documents(f"{name}.yml", f"{name}-alone")
        thread_cluster.dies_at = {2: 3}
        alnico.api.merge_documents(f"{name}.yml", f"{name}-out", ray="auto")
        parts = [p.relative_to(f"{name}-alone") for p in Path(f"{name}-alone").rglob("*") if p.is_file()]
        assert parts
        for part in parts:
            assert (Path(f"{name}-out") / part).read_bytes() == (Path(f"{name}-alone") / part).read_bytes()
    assert thread_cluster.addresses == ["auto", "auto"]


@pytest.mark.usefixtures("thread_cluster")
def test_vocabularies_are_united_on_nodes() -> None:
    save_family(Path())
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "other"}],
        "tokenizer": {"source": "union"},
        "unrelated": "allow",
    }
    assert_equal(merged(recipe, "out", ray=True), merged(recipe, "alone"))


def test_one_file_is_made_by_several_nodes(thread_cluster: ThreadCluster) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["over the model"])
    alnico.merge("recipe.yml", "alone.safetensors")
    alnico.merge("recipe.yml", "out.safetensors", ray=True)
    assert Path("out.safetensors").read_bytes() == Path("alone.safetensors").read_bytes()
    assert sum(node.done > 0 for node in thread_cluster.nodes) > 1


def test_a_slow_node_takes_fewer_units(
    thread_cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one does nothing before the others have done half of the tensors."""
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    half = threading.Event()
    done: list[Event] = []
    real = ThreadNode._do

    def wait_first(node: ThreadNode, unit: bytes) -> Any:
        if node.info.name == "node1":
            half.wait()
        return real(node, unit)

    def watch(event: Event) -> None:
        done.append(event)
        if sum(isinstance(e, TensorDone) for e in done) >= 10:
            half.set()

    monkeypatch.setattr(ThreadNode, "_do", wait_first)
    expected = merged("recipe.yml", "alone")
    assert_equal(merged("recipe.yml", "out", ray=True, watch=watch), expected)
    first, slow, third = (node.done for node in thread_cluster.nodes)
    assert 0 < slow < first + third


def stop_after(count: int, seen: list[Event]) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        seen.append(event)
        if sum(isinstance(e, TensorDone) for e in seen) == count:
            raise KeyboardInterrupt

    return watch


@pytest.mark.usefixtures("thread_cluster")
@pytest.mark.parametrize("kind", ["over the model", "weights from norms", "whole matrices"])
@pytest.mark.parametrize("first", [None, True], ids=["here first", "nodes first"])
def test_a_merge_goes_on_where_the_other_place_left_it(kind: str, first: bool | None) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF[kind])
    expected = merged("recipe.yml", "alone")
    with pytest.raises(KeyboardInterrupt):
        merged("recipe.yml", "out", ray=first, watch=stop_after(6, []), threads=1)
    events: list[Event] = []
    assert_equal(merged("recipe.yml", "out", ray=not first, watch=events.append), expected)
    started = next(e for e in events if isinstance(e, Started))
    assert started.resumed >= 6
    assert not [e for e in events if isinstance(e, Measuring)]
    done = [e.tensor for e in events if isinstance(e, TensorDone)]
    assert len(done) == len(set(done)) == len(started.plan.jobs) - started.resumed


@pytest.mark.usefixtures("thread_cluster")
def test_wrong_values_remove_the_output_and_are_named() -> None:
    import numpy as np

    values = np.ones((8, 8), np.float32)
    broken = values.copy()
    broken[3, 4] = np.nan
    save_model(Path("a"), {"x": ("F32", values)})
    save_model(Path("b"), {"x": ("F32", broken)})
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    messages = []
    for ray in (None, True):
        with pytest.raises(NonFiniteError) as caught:
            merged(recipe, "out", ray=ray)
        messages.append(str(caught.value))
        assert not list(Path().glob(".out*"))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("thread_cluster")
def test_a_node_that_sees_other_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    family(Path(), 2)
    check = node_merge.NodeMerge._check_fingerprint
    begun: list[int] = []

    def other_files(self: node_merge.NodeMerge, plan: Any) -> None:
        if not begun:
            begun.append(1)
            os.utime("tuned-0/model.safetensors", ns=(1, 1))
            plan = alnico.plan("recipe.yml")
        check(self, plan)

    Path("recipe.yml").write_text(MADE_OF["linear"])
    monkeypatch.setattr(node_merge.NodeMerge, "_check_fingerprint", other_files)
    with pytest.raises(MismatchError) as caught:
        merged("recipe.yml", "out", ray=True)
    assert "plans another merge than the driver; what differs: " in str(caught.value)
    assert "tuned-0: model.safetensors" in str(caught.value)
    assert str(caught.value).startswith("node")
    assert not list(Path().glob("*out*"))


@pytest.mark.usefixtures("thread_cluster")
def test_a_node_that_does_not_see_the_output_is_named_and_finished_work_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    expected = merged("recipe.yml", "alone")
    with pytest.raises(KeyboardInterrupt):
        merged("recipe.yml", "out", watch=stop_after(5, []), threads=1)
    real = cluster_merge.StartMerge
    with monkeypatch.context() as patch:
        patch.setattr(
            cluster_merge,
            "StartMerge",
            lambda *words: real(*words[:5], "/nowhere/.out.alnico-part", *words[6:]),
        )
        with pytest.raises(OutputError) as caught:
            merged("recipe.yml", "out", ray=True)
    assert str(caught.value) == (
        "nodes node0, node1, node2: /nowhere/.out.alnico-part: is not seen there (No such file or directory), and the merge was begun in "
        "it; expected a file system that all nodes see. Choose an output on one, or, for stages of an output at a URL, --work-dir."
    )
    events: list[Event] = []
    assert_equal(merged("recipe.yml", "out", watch=events.append), expected)
    assert next(e for e in events if isinstance(e, Started)).resumed >= 5


@pytest.mark.usefixtures("thread_cluster")
def test_a_node_of_an_earlier_run_writes_no_more() -> None:
    """The files are opened before the pass is read, so a file that a later run made is never written."""
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    seen: list[Event] = []

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            (Path(".out.alnico-part") / node_merge.PASS).write_text("another run's")
        seen.append(event)

    with pytest.raises(
        RunError, match=r"another run has begun to write it\. Wait for it, or choose another output\."
    ):
        merged("recipe.yml", "out", ray=True, watch=watch)
    assert not [e for e in seen if isinstance(e, TensorDone)]


def test_the_journal_of_nodes_has_each_tensor_once(thread_cluster: ThreadCluster) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    thread_cluster.dies_at, thread_cluster.after = {0: 1, 1: 2}, True
    with pytest.raises(KeyboardInterrupt):
        merged("recipe.yml", "out", ray=True, watch=stop_after(15, []))
    lines = (Path(".out.alnico-part") / "journal.jsonl").read_text().splitlines()[1:]
    entries = [entry for line in map(json.loads, lines) for entry in line.get("tensors", [line])]
    names = [entry["tensor"] for entry in entries if "tensor" in entry]
    assert len(names) == len(set(names)) >= 15


def test_what_nodes_cannot_do_is_refused(thread_cluster: ThreadCluster) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["whole matrices"])
    thread_cluster.infos = ({}, {"processor": "Other"}, {})
    with pytest.raises(
        MismatchError, match=r"^tsv: computes on whole matrices, and the nodes differ in what decides"
    ):
        merged("recipe.yml", "out", ray=True)
    assert not list(Path().glob("*out*"))


def test_nodes_with_another_version_are_refused(thread_cluster: ThreadCluster) -> None:
    family(Path(), 2)
    Path("recipe.yml").write_text(MADE_OF["linear"])
    thread_cluster.infos = ({}, {"alnico": "0.0.9"})
    with pytest.raises(MismatchError, match=r"^node node1 has alnico 0\.0\.9"):
        merged("recipe.yml", "out", ray=True)
    assert not list(Path().glob("*out*"))
