"""Partitions of DeepSpeed's ZeRO optimizer, written here from the description of the format, with names of its classes."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shards_of_ranks import assert_same_model

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError

Group = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes under the names of DeepSpeed's, which its checkpoints hold; the reader never sees them."""
    for module, name in (
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ):
        parts = module.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made = types.ModuleType(module)
        setattr(made, name, type(name, (), {"__module__": module}))
        monkeypatch.setitem(sys.modules, module, made)


def named(module: str, name: str, **fields: Any) -> Any:
    made = getattr(sys.modules[module], name)()
    made.__dict__.update(fields)
    return made


def groups(seed: int = 0) -> list[Group]:
    """Two groups of parameters, as with and without weight decay."""
    torch.manual_seed(seed)
    return [
        {
            "embed.weight": torch.randn(13, 4),
            "layer.weight": torch.randn(5, 4),
            "wide.weight": torch.randn(3, 2, 2),
        },
        {"layer.bias": torch.randn(5), "norm.weight": torch.randn(4), "scale": torch.randn(())},
    ]


BUFFERS = {"rotary.inv_freq": torch.arange(4.0), "count": torch.tensor(7)}
FROZEN = {"vision.weight": torch.arange(21.0).reshape(3, 7).to(torch.bfloat16)}


def shapes(made: list[Group]) -> list[OrderedDict[str, torch.Size]]:
    return [OrderedDict((name, t.shape) for name, t in group.items()) for group in made]


def save_stage_2(
    folder: Path, made: list[Group], ranks: int, *, frozen: Group | None = None, shared: dict[str, str] | None = None,
    is_lean: bool = True, prefix: str = "", step: int = 7,
) -> None:  # fmt: skip
    """Stages 1 and 2: each group flat, filled up to a multiple of twice the ranks, and cut into equal runs."""
    folder.mkdir(parents=True, exist_ok=True)
    partitions: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    slices: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    for group in made:
        flat = torch.cat([t.reshape(-1) for t in group.values()])
        filling = -len(flat) % (2 * ranks)
        size = (len(flat) + filling) // ranks
        padded = torch.cat([flat, torch.full((filling,), float("nan"))])
        begins = {}
        begin = 0
        for name, t in group.items():
            begins[name] = (begin, begin + t.numel())
            begin += t.numel()
        for rank in range(ranks):
            part = padded[rank * size : (rank + 1) * size].clone()
            partitions[rank].append(
                part[: max(0, min(size, len(flat) - rank * size))].clone() if is_lean else part
            )
            own = {}
            for name, (first, last) in begins.items():
                first, last = max(first, rank * size), min(last, (rank + 1) * size)
                if first < last:
                    own[name] = named(
                        "deepspeed.utils.tensor_fragment",
                        "fragment_address",
                        start=first - rank * size,
                        numel=last - first,
                    )
            slices[rank].append(OrderedDict(own))
    for rank in range(ranks):
        state = {
            "loss_scaler": named("deepspeed.runtime.fp16.loss_scaler", "LossScaler", cur_scale=1.0),
            "base_optimizer_state": {
                "state": {0: {"exp_avg": torch.ones(3), "step": 7}},
                "param_groups": [{"lr": 0.1}],
            },
            "single_partition_of_fp32_groups": partitions[rank],
            "partition_count": [ranks] * len(made),
            "zero_stage": named("deepspeed.runtime.zero.config", "ZeroStageEnum"),
            "group_paddings": [0, 0],
            "param_slice_mappings": slices[rank],
        }
        torch.save(
            {"optimizer_state_dict": state, "ds_version": "0.16.0"},
            folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    module = (
        {name: t.to(torch.bfloat16) for group in made for name, t in group.items()} | BUFFERS | (frozen or {})
    )
    module |= {alias: module[name] for alias, name in (shared or {}).items()}
    torch.save(
        {
            "module": module, "buffer_names": list(BUFFERS), "param_shapes": shapes(made), "shared_params": shared or {},
            "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in frozen.items()) if frozen else None,
            "frozen_param_fragments": OrderedDict(frozen) if frozen else None, "global_steps": step, "ds_config": {"train": 1}, "optimizer": None,
        },
        folder / "mp_rank_00_model_states.pt",
    )  # fmt: skip


def save_stage_3(
    folder: Path,
    made: list[Group],
    ranks: int,
    *,
    frozen: Group | None = None,
    subgroups: int = 2,
    step: int = 7,
) -> None:
    """Stage 3: each parameter cut into as many runs as there are ranks, the last filled up."""
    folder.mkdir(parents=True, exist_ok=True)

    def cut(t: torch.Tensor) -> list[torch.Tensor]:
        share = -(-t.numel() // ranks)
        flat = torch.cat([t.reshape(-1), torch.zeros(share * ranks - t.numel(), dtype=t.dtype)])
        return [flat[r * share : (r + 1) * share].clone() for r in range(ranks)]

    parts = [cut(t) for group in made for t in group.values()]
    bounds = [len(parts) * i // subgroups for i in range(subgroups + 1)]
    for rank in range(ranks):
        flat = [torch.cat([p[rank] for p in parts[a:b]]) for a, b in itertools.pairwise(bounds)]
        state = {
            "fp32_flat_groups": flat,
            "partition_count": ranks,
            "zero_stage": 3,
            "optimizer_state_dict": {"state": {}},
        }
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        module = {name: torch.empty(0) for group in made for name in group} | BUFFERS
        torch.save(
            {
                "module": module, "buffer_names": list(BUFFERS), "param_shapes": shapes(made), "shared_params": {}, "global_steps": step,
                "frozen_param_shapes": {n: t.shape for n, t in frozen.items()} if frozen else None,
                "frozen_param_fragments": {n: cut(t)[rank] for n, t in frozen.items()} if frozen else None,
            },
            folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )  # fmt: skip


def whole(made: list[Group], **more: torch.Tensor) -> Group:
    return {name: t for group in made for name, t in group.items()} | BUFFERS | more


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("is_lean", [True, False], ids=["lean", "filled up"])
def test_partitions_of_stages_1_and_2_are_the_parameters(tmp_path: Path, ranks: int, is_lean: bool) -> None:
    save_stage_2(tmp_path, groups(), ranks, is_lean=is_lean)
    with open_model(tmp_path) as model:
        assert_same_model(model, whole(groups()))
        assert {model.tensors[n].dtype for group in groups() for n in group} == {"F32"}
        notes = " ".join(model.notes)
    assert f"the master weights that {ranks} ranks of ZeRO 1 or 2 keep" in notes
    assert "read as the file of the model has them: rotary, count" in notes
    assert "left out, as they are not tensors of the model: the optimizer's states, " in notes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("subgroups", [1, 3])
def test_partitions_of_stage_3_are_the_parameters(tmp_path: Path, ranks: int, subgroups: int) -> None:
    save_stage_3(tmp_path, groups(), ranks, frozen=FROZEN, subgroups=subgroups)
    with open_model(tmp_path) as model:
        assert_same_model(model, whole(groups(), **FROZEN))
        assert "ZeRO 3" in " ".join(model.notes)


def test_frozen_and_shared_parameters_are_read(tmp_path: Path) -> None:
    shared = {"lm_head.weight": "embed.weight"}
    save_stage_2(tmp_path, groups(), 3, frozen=FROZEN, shared=shared)
    with open_model(tmp_path) as model:
        expected = whole(groups(), **FROZEN)
        assert_same_model(model, expected | {"lm_head.weight": expected["embed.weight"]})


def test_a_tied_weight_that_is_not_stated_has_the_master_weights(tmp_path: Path) -> None:
    """Older versions do not list shared parameters; the file of the model has one storage for both."""
    save_stage_2(tmp_path, groups(), 2, shared={"lm_head.weight": "embed.weight"})
    path = tmp_path / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    del state["shared_params"]
    torch.save(state, path)
    with open_model(tmp_path) as model:
        expected = whole(groups())
        assert_same_model(model, expected | {"lm_head.weight": expected["embed.weight"]})


def test_the_step_that_latest_names_is_read_with_the_config_above_it(tmp_path: Path) -> None:
    save_stage_2(tmp_path / "global_step7", groups(), 2, prefix="bf16_")
    save_stage_2(tmp_path / "global_step5", groups(1), 2)
    (tmp_path / "latest").write_text("global_step7\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    for path, seed in ((tmp_path, 0), (tmp_path / "global_step5", 1)):
        with open_model(path) as model:
            assert_same_model(model, whole(groups(seed)))
            assert model.config == {"model_type": "x"}
    (tmp_path / "latest").write_text("../global_step7")
    assert "expected a model" in refusal(tmp_path)


def test_lightnings_names_are_those_of_the_model(tmp_path: Path) -> None:
    made = [{f"_forward_module.{n}": t for n, t in group.items()} for group in groups()]
    save_stage_3(tmp_path, made, 2)
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"] = {n: t for n, t in state["module"].items() if n not in BUFFERS}
    torch.save(state, path)
    with open_model(tmp_path) as model:
        assert_same_model(model, {name: t for group in groups() for name, t in group.items()})


def test_checkpoints_are_averaged_as_whole_models_are(tmp_path: Path) -> None:
    for step in (1, 2):
        save_stage_3(tmp_path / f"run-{step}", groups(step), 3, frozen=FROZEN)
        (tmp_path / f"whole-{step}").mkdir()
        save_file(whole(groups(step), **FROZEN), tmp_path / f"whole-{step}" / "model.safetensors")
    for kind in ("run", "whole"):
        models = [str(tmp_path / f"{kind}-{step}") for step in (1, 2)]
        alnico.merge(
            {"merge_method": "linear", "models": models, "unrelated": "allow"},
            tmp_path / f"out-{kind}",
            memory="1GiB",
        )
    out, expected = (tmp_path / f"out-{kind}" / "model.safetensors" for kind in ("run", "whole"))
    with open_model(out) as a, open_model(expected) as b:
        assert set(a.tensors) == set(b.tensors)
        assert all((a.read(n) == b.read(n)).all() for n in a.tensors)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save_stage_2(tmp_path, groups(), 4)
    (tmp_path / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert "has no file of rank 2; expected one *_optim_states.pt for each of 4 ranks" in refusal(tmp_path)


def test_a_missing_file_of_the_model_is_named(tmp_path: Path) -> None:
    save_stage_3(tmp_path, groups(), 2)
    (tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt is missing" in refusal(tmp_path)


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    save_stage_2(tmp_path / "a", groups(), 2)
    save_stage_2(tmp_path / "b", groups(), 4)
    shutil.copy(tmp_path / "b" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tmp_path / "a")
    assert "expected one *_optim_states.pt for each of 4 ranks" in refusal(tmp_path / "a")
    save_stage_2(tmp_path / "c", [{"other": torch.ones(99)}, {"more": torch.ones(2)}], 2)
    shutil.copy(tmp_path / "c" / "mp_rank_00_model_states.pt", tmp_path / "b")
    assert "The files are of different runs" in refusal(tmp_path / "b")
    save_stage_3(tmp_path / "d", groups(), 2)
    shutil.copy(tmp_path / "d" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tmp_path / "c")
    assert "1 groups of master weights" in refusal(
        tmp_path / "c"
    ) or "2 groups of master weights of ZeRO 3" in refusal(tmp_path / "c")


def test_ranks_of_different_steps_are_refused(tmp_path: Path) -> None:
    save_stage_3(tmp_path / "a", groups(), 2)
    save_stage_3(tmp_path / "b", groups(), 2, step=9)
    shutil.copy(tmp_path / "b" / "zero_pp_rank_1_mp_rank_00_model_states.pt", tmp_path / "a")
    assert "is of step 9 and zero_pp_rank_0_mp_rank_00_model_states.pt of step 7" in refusal(tmp_path / "a")


def set_step(place: str, file: dict[str, Any], step: int) -> None:
    """State a step in a rank's file, as optimizers, their wrappers and DeepSpeed do."""
    state = file["optimizer_state_dict"]
    if place == "stage 3":
        state["optimizer_state_dict"]["state"] = {0: {"step": torch.tensor(step), "exp_avg": torch.ones(3)}}
        return
    base = state["base_optimizer_state"]
    if place == "a number":
        base["state"][0]["step"] = step
    elif place == "a tensor":
        base["state"][0]["step"] = torch.tensor(float(step))
    elif place == "a group":
        base["param_groups"][0]["step"] = step
    elif place == "the rate":
        base["param_groups"][0]["lr"] = 0.1 / step
    elif place == "a lean state":
        state["base_optimizer_state"] = [{"step": step, "exp_avg": torch.ones(3)}]
    elif place == "the loss scaler":
        state["loss_scaler"].cur_iter = step
    else:
        file["ds_version"] = f"0.{step}.0"


STEP_PLACES = ("a number", "a tensor", "a group", "the rate", "a lean state", "the loss scaler", "the version", "stage 3")  # fmt: skip


@pytest.mark.parametrize("place", STEP_PLACES)
def test_optimizers_of_different_steps_with_equal_shapes_are_refused(tmp_path: Path, place: str) -> None:
    (save_stage_3 if place == "stage 3" else save_stage_2)(tmp_path, groups(), 3)
    for steps, message in (((8, 8, 8), ""), ((8, 8, 9), "expected the ranks of one step")):
        for rank, step in enumerate(steps):
            path = tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            file = torch.load(path, weights_only=False)
            set_step(place, file, step)
            torch.save(file, path)
        if message:
            assert message in refusal(tmp_path)
        else:
            open_model(tmp_path).close()


def test_the_message_names_what_the_ranks_state(tmp_path: Path) -> None:
    save_stage_2(tmp_path, groups(), 2)
    path = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file = torch.load(path, weights_only=False)
    set_step("a number", file, 9)
    torch.save(file, path)
    assert refusal(tmp_path) == (
        f"{tmp_path}: {path.name} has optimizer_state_dict.base_optimizer_state.state.0.step 9, zero_pp_rank_0_mp_rank_00_optim_states.pt 7; "
        "expected the ranks of one step. Copy the checkpoint again."
    )


def test_another_order_of_the_parameters_is_noticed(tmp_path: Path) -> None:
    save_stage_2(tmp_path, groups(), 2)
    path = tmp_path / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["param_shapes"] = [OrderedDict(reversed(group.items())) for group in state["param_shapes"]]
    torch.save(state, path)
    assert "says that " in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["zero_pp_rank_0_mp_rank_01_optim_states.pt", "mp_rank_01_model_states.pt", "layer_00-model_00-model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"],
)  # fmt: skip
def test_models_that_are_divided_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    save_stage_2(tmp_path, groups(), 2)
    shutil.copy(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / name)
    assert f"has {name}, so the model is divided into layers, experts or parts of matrices, too" in refusal(
        tmp_path
    )
