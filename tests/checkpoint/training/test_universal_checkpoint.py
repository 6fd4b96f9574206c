"""Universal checkpoints of DeepSpeed, written here from the description of the format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from shards_of_ranks import assert_same_model
from test_optimizer_partitions import (
    BUFFERS,
    FROZEN,
    Group,
    deepspeed,  # noqa: F401  (a fixture of all tests)
    groups,
    refusal,
    save_stage_2,
    save_stage_3,
    whole,
)

from alnico.checkpoint.open_model import open_model


def save_universal(folder: Path, made: list[Group], *, stage: int = 2, **more: object) -> None:
    """Write a folder for each parameter, next to the model states of the ranks."""
    save = save_stage_3 if stage == 3 else save_stage_2
    save(folder, made, 3, **more)  # type: ignore[arg-type]
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    for name, tensor in (entry for group in made for entry in group.items()):
        place = folder / "zero" / name
        place.mkdir(parents=True)
        torch.save(tensor.reshape(-1) if stage == 3 else {"param": tensor, "cat_dim": 0}, place / "fp32.pt")
        torch.save({"param": torch.ones(tensor.shape)}, place / "exp_avg.pt")
    torch.save({"state": {}}, folder / "zero" / "optimizer_state.pt")


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_frozen_parameters_and_buffers_are_read(tmp_path: Path, stage: int) -> None:
    save_universal(tmp_path, groups(), stage=stage, frozen=FROZEN)
    with open_model(tmp_path) as model:
        assert_same_model(model, whole(groups(), **FROZEN))
        assert {model.tensors[n].dtype for group in groups() for n in group} == {"F32"}
        notes = " ".join(model.notes)
    assert "6 tensors are the master weights of a universal checkpoint of DeepSpeed, in float32" in notes
    assert "left out, as they are not tensors of the model: the optimizer's states" in notes


def test_shared_parameters_are_read(tmp_path: Path) -> None:
    save_universal(tmp_path, groups(), shared={"lm_head.weight": "embed.weight"})
    with open_model(tmp_path) as model:
        expected = whole(groups())
        assert_same_model(model, expected | {"lm_head.weight": expected["embed.weight"]})


def test_the_newest_is_named_by_a_file_of_its_own(tmp_path: Path) -> None:
    save_universal(tmp_path / "global_step7_universal", groups())
    (tmp_path / "latest_universal").write_text("global_step7_universal")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    with open_model(tmp_path) as model:
        assert_same_model(model, whole(groups()))
        assert model.config == {"model_type": "x"}


def test_a_missing_parameter_and_one_of_another_run_are_named(tmp_path: Path) -> None:
    save_universal(tmp_path, groups())
    (tmp_path / "zero" / "other").mkdir()
    shutil.copy(tmp_path / "zero" / "scale" / "fp32.pt", tmp_path / "zero" / "other")
    assert refusal(tmp_path) == (
        f"{tmp_path}: zero/other is of no parameter of the model states; expected the weights of the 6 parameters that the model states name. "
        "Copy the checkpoint again."
    )
    (tmp_path / "zero" / "scale" / "fp32.pt").unlink()
    assert "zero/scale/fp32.pt is missing; expected the weights of the 6 parameters" in refusal(tmp_path)


def test_a_parameter_of_another_size_is_refused(tmp_path: Path) -> None:
    save_universal(tmp_path, groups())
    path = tmp_path / "zero" / "norm.weight" / "fp32.pt"
    for value, found in (({"param": torch.ones(5)}, "a tensor of [5]"), ({"param": None}, "no tensor")):
        torch.save(value, path)
        assert refusal(tmp_path) == (
            f"{path}: holds {found}; expected norm.weight [4]. The files are of different runs; copy the checkpoint again."
        )


def test_missing_model_states_and_models_that_are_divided_otherwise_are_refused(tmp_path: Path) -> None:
    save_universal(tmp_path, groups(), stage=3)
    (tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt").rename(tmp_path / "kept")
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt is missing" in refusal(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "mp_rank_01_model_states.pt")
    assert "has mp_rank_01_model_states.pt, so the model is divided" in refusal(tmp_path)


def test_buffers_are_among_what_the_file_of_the_model_has(tmp_path: Path) -> None:
    save_universal(tmp_path, groups())
    with open_model(tmp_path) as model:
        assert set(BUFFERS) < set(model.tensors)
        assert "read as the file of the model has them: rotary, count" in " ".join(model.notes)
