"""Flat parameters of FSDP (LOCAL_STATE_DICT) are refused by name, wherever they are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FLAT = {"_flat_param": torch.ones(12), "layers.0._flat_param": torch.ones(8)}


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_rank{}.bin", "pytorch_model_fsdp_1_rank{}.bin"])
def test_files_of_ranks_of_accelerate_are_refused(tmp_path: Path, name: str) -> None:
    for rank in range(2):
        torch.save(FLAT, tmp_path / name.format(rank))
    for path in (tmp_path, tmp_path / name.format(1)):
        assert refusal(path) == (
            f"{path}: holds the flat parameters of each rank of FSDP (LOCAL_STATE_DICT), which do not say what they are made of; expected "
            "tensors by name. Save the model with SHARDED_STATE_DICT or FULL_STATE_DICT."
        )


def test_a_whole_model_of_accelerate_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model_fsdp.bin")
    with open_model(tmp_path) as model:
        assert set(model.tensors) == {"w"}


@pytest.mark.parametrize("form", ["distributed", "rank", "file"])
def test_flat_parameters_under_other_names_of_files_are_refused(tmp_path: Path, form: str) -> None:
    path = {"file": tmp_path / "model.pt", "rank": tmp_path / "model_world_size_1_rank_0.pt"}.get(form)
    if path is None:
        dcp.save({"model": FLAT}, checkpoint_id=tmp_path)
    else:
        torch.save(FLAT, path)
    told = refusal(tmp_path / "model.pt" if form == "file" else tmp_path)
    assert (
        "_flat_param is a flat parameter of FSDP, all tensors of a module in one (LOCAL_STATE_DICT)" in told
    )
    assert told.endswith("Save the model with SHARDED_STATE_DICT or FULL_STATE_DICT.")
