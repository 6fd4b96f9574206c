"""Safetensors files of all ranks that torch's HuggingFaceStorageWriter leaves; torch writes them in four ranks, and is the referee."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from shards_of_ranks import assert_same_model, written_shards
from test_distributed_checkpoint import WAYS
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from write_shards import RANKS

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError
from made_shards import put_files, storage_name, storage_shard

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAME = "shard-{:05d}-model-00001-of-00002.safetensors"


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A copy of the files of four ranks."""
    shutil.copytree(written_shards() / "rows-storage", tmp_path / "rows")
    return tmp_path / "rows"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_four_ranks_are_what_torch_loads(way: str) -> None:
    expected, has_plain = WAYS[way]
    expected = expected | ({"plain": torch.arange(5.0), "number": torch.tensor(7.0)} if has_plain else {})
    folder = written_shards() / f"{way}-storage"
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(folder)))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items()), "torch itself differs"
    with open_model(folder) as model:
        assert_same_model(model, expected)
        assert f"put together of the files of {RANKS} ranks" in " ".join(model.notes)


@pytest.mark.slow
def test_a_network_that_fsdp_divides_is_read() -> None:
    with open_model(written_shards() / "fsdp-storage") as model:
        assert_same_model(model, torch.load(written_shards() / "fsdp-whole.pt"))


def test_one_rank_and_the_folder_of_a_consolidation_are_read(tmp_path: Path) -> None:
    """The folder ``sharded`` is left where the consolidation did not happen."""
    state = {"w": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    writer = HuggingFaceStorageWriter(str(tmp_path / "run" / "sharded"), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model_type": "x"}))
    for path in (tmp_path / "run", tmp_path / "run" / "sharded"):
        with open_model(path) as model:
            assert_same_model(model, state)
            assert model.config == {"model_type": "x"}
    file = next((tmp_path / "run" / "sharded").iterdir())
    assert f"Give the folder that it is in: {file.parent}." in refusal(file)


def test_a_file_that_one_process_wrote_is_an_ordinary_model(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 4)}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    with open_model(tmp_path) as model:
        assert_same_model(model, state)


def test_consolidated_files_go_before_those_of_ranks(tmp_path: Path) -> None:
    put_files(tmp_path / "sharded", {storage_name(0): storage_shard({"w": ((0,), (2,))})})
    save_file({"v": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    with open_model(tmp_path) as model:
        assert set(model.tensors) == {"v"}


@pytest.mark.slow
def test_checkpoints_are_merged_as_whole_models_are(rows: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    with open_model(rows) as model:
        tensors = {n: t for n, t in WAYS["rows"][0].items() if t.dtype != torch.int64}
        assert set(tensors) < set(model.tensors)
    expected = WAYS["rows"][0] | {"plain": torch.arange(5.0), "number": torch.tensor(7.0)}
    save_file({n: t.contiguous() for n, t in expected.items()}, whole / "model.safetensors")
    for kind in ("rows", "whole"):
        recipe = {"merge_method": "linear", "models": [str(tmp_path / kind), str(whole)]}
        alnico.merge(recipe, tmp_path / f"out-{kind}.safetensors")
    with (
        open_model(tmp_path / "out-rows.safetensors") as a,
        open_model(tmp_path / "out-whole.safetensors") as b,
    ):
        assert set(a.tensors) == set(b.tensors)
        assert all((a.read(n) == b.read(n)).all() for n in a.tensors)


@pytest.mark.slow
def test_a_missing_rank_leaves_a_gap(rows: Path) -> None:
    (rows / NAME.format(2)).unlink()
    assert "leave a gap or overlap; expected parts of one dtype that cover the tensor once" in refusal(rows)


@pytest.mark.slow
def test_files_of_another_run_are_refused(rows: Path) -> None:
    shutil.copy(written_shards() / "grid-storage" / NAME.format(2), rows)
    assert "A rank is missing, or files are of different runs: copy the checkpoint again." in refusal(rows)


def test_parts_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    for rank, dtype in enumerate((torch.float32, torch.bfloat16)):
        places = json.dumps({"w": {"saved_offsets": [2 * rank]}})
        save_file(
            {"w": torch.ones(2, dtype=dtype)}, tmp_path / storage_name(rank), {"DCP_SHARDING_INFO": places}
        )
    assert "(F32 [2] at [0], BF16 [2] at [2]) leave a gap or overlap" in refusal(tmp_path)


def test_a_part_that_two_files_have_is_refused(tmp_path: Path) -> None:
    data = storage_shard({"w": ((0,), (2,))})
    put_files(tmp_path, {storage_name(0): data, storage_name(1): data})
    assert "(F32 [2] at [0], F32 [2] at [0]) leave a gap or overlap" in refusal(tmp_path)


def test_quantised_weights_in_them_are_refused(tmp_path: Path) -> None:
    put_files(tmp_path, {storage_name(0): storage_shard({"w.weight_scale": ((0,), (2,))})})
    assert (
        "its weights are quantised (it has 'w.weight_scale'), in shards of a trainer; expected floating-point values"
        in refusal(tmp_path)
    )
