"""Models in one file per rank, as FSDP trainers save them: distributed tensors of four ranks of torch, read without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards_of_ranks import assert_same_model, written_shards
from test_distributed_checkpoint import WAYS
from write_shards import RANKS

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A copy of the files of four ranks."""
    shutil.copytree(written_shards() / "rows-ranks", tmp_path / "rows")
    return tmp_path / "rows"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_four_ranks_are_put_together(way: str) -> None:
    expected, has_plain = WAYS[way]
    expected = expected | ({"plain": torch.arange(5.0), "number": torch.tensor(7.0)} if has_plain else {})
    with open_model(written_shards() / f"{way}-ranks") as model:
        assert_same_model(model, expected)
        assert any("optim_world_size_4_rank_0.pt and 3 more files" in note for note in model.notes)


@pytest.mark.slow
def test_a_network_that_fsdp_divides_is_read() -> None:
    with open_model(written_shards() / "fsdp-ranks") as model:
        assert_same_model(model, torch.load(written_shards() / "fsdp-whole.pt"))


def test_one_rank_that_has_everything_is_a_model(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    torch.save({"model": tensors, "step": 3}, tmp_path / "model_world_size_1_rank_0.pt")
    with open_model(tmp_path) as model:
        assert_same_model(model, tensors)


@pytest.mark.slow
def test_config_and_tokenizer_are_those_of_the_folder_inside(rows: Path, tmp_path: Path) -> None:
    (rows / "huggingface").mkdir()
    (rows / "huggingface" / "config.json").write_text(json.dumps({"model_type": "x"}))
    (rows / "huggingface" / "tokenizer_config.json").write_text("{}")
    expected = WAYS["rows"][0] | {"plain": torch.arange(5.0), "number": torch.tensor(7.0)}
    (tmp_path / "whole").mkdir()
    save_file({n: t.contiguous() for n, t in expected.items()}, tmp_path / "whole" / "model.safetensors")
    recipe = {"merge_method": "linear", "models": [str(rows), str(tmp_path / "whole")]}
    alnico.merge(recipe, tmp_path / "out", memory="1GiB")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".json") == [
        "alnico.lock.json",
        "config.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_a_missing_rank_is_named(rows: Path) -> None:
    (rows / "model_world_size_4_rank_2.pt").unlink()
    assert "has no file of rank 2; expected model_world_size_4_rank_R.pt for each of 4 ranks" in refusal(rows)


@pytest.mark.slow
def test_ranks_of_different_runs_are_refused(rows: Path) -> None:
    shutil.copy(rows / "model_world_size_4_rank_0.pt", rows / "model_world_size_2_rank_0.pt")
    assert "has files of runs with 2 and 4 ranks" in refusal(rows)
    (rows / "model_world_size_2_rank_0.pt").unlink()
    shutil.copy(written_shards() / "grid-ranks" / "model_world_size_4_rank_3.pt", rows)
    told = refusal(rows)
    assert "in model_world_size_4_rank_0.pt and" in told
    assert "The files are of different runs" in told


@pytest.mark.slow
def test_two_files_of_one_rank_leave_a_gap(rows: Path) -> None:
    shutil.copy(rows / "model_world_size_4_rank_1.pt", rows / "model_world_size_4_rank_2.pt")
    told = refusal(rows)
    assert "leave a gap or overlap" in told or "differs" in told


def test_a_plain_tensor_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.full((20_000,), 1.0 + rank)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    assert "w is a plain tensor that differs between rank 0 and rank 1" in refusal(tmp_path)


@pytest.mark.slow
def test_one_file_of_many_is_refused_with_its_folder(rows: Path) -> None:
    assert f"Give the folder that it is in: {rows}." in refusal(rows / "model_world_size_4_rank_2.pt")


@pytest.mark.slow
def test_a_tensor_that_waits_for_a_sum_is_refused(tmp_path: Path) -> None:
    for rank in range(RANKS):
        shutil.copy(
            written_shards() / "partial" / f"{rank}.pt", tmp_path / f"model_world_size_4_rank_{rank}.pt"
        )
    assert "is a torch.distributed.tensor.DTensor that is not understood" in refusal(tmp_path)
