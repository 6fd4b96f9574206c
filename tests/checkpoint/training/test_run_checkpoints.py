"""The checkpoints of a run are found by the steps in their names, as trainers write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alnico.checkpoint.training.run_checkpoints import find_checkpoints, step_in, step_of_reference
from alnico.errors import ModelError

NAMES = {
    "checkpoint-500": (500, "checkpoint-#"),  # transformers
    "checkpoint_500": (500, "checkpoint_#"),
    "step_500": (500, "step_#"),
    "step500": (500, "step#"),
    "step-500": (500, "step-#"),  # torchtitan
    "global_step500": (500, "global_step#"),  # DeepSpeed
    "global_step_500": (500, "global_step_#"),  # verl
    "iter_0000500": (500, "iter_#"),  # Megatron
    "500": (500, "#"),  # folders of .distcp files
    "epoch=3-step=500.ckpt": (500, "epoch=N-step=#.ckpt"),  # Lightning
    "epoch=3-step=500-val_loss=0.25.ckpt": (500, "epoch=N-step=#-val_loss=N.ckpt"),
    "epoch=3-step=500-EMA.ckpt": (500, "epoch=N-step=#-EMA.ckpt"),  # NeMo
    "epoch=3.ckpt": (3, "epoch=#.ckpt"),
    "ep0-ba500-rank0": (500, "epN-ba#-rankN"),  # Composer
    "checkpoint3.pt": (3, "checkpoint#.pt"),  # fairseq
    "checkpoint_3_500.pt": (500, "checkpoint_N_#.pt"),
    "3epoch.pth": (3, "#epoch.pth"),  # ESPnet
    "ema_0.9999_000500.pt": (500, "ema_N_#.pt"),  # guided diffusion
    "model000500.pt": (500, "model#.pt"),
    "name-step00000500.safetensors": (500, "name-step#.safetensors"),  # kohya
    "name-000010.safetensors": (10, "name-#.safetensors"),
    "stage1-step1000-tokens3B": (1000, "stageN-step#-tokensNB"),  # revisions of OLMo
}
WITHOUT = (
    "last.ckpt", "best_model.pt", "model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors", "__0_0.distcp",
    "model.safetensors.index.json", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "v1.5", "logs",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_read_from_a_name(name: str) -> None:
    named = step_in(name)
    assert named is not None
    assert named[:2] == NAMES[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_name_without_a_step_has_none(name: str) -> None:
    assert step_in(name) is None


def test_the_step_of_a_reference_is_in_its_last_name_that_has_one() -> None:
    steps = {"runs/500/global_step_7/actor": 7, "EleutherAI/pythia-70m@step1000": 1000, "run/best": None}
    assert {reference: step_of_reference(reference) for reference in steps} == steps


def make(root: Path, *names: str) -> Path:
    """Write files, and the folders around them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(run: str, **options: bool) -> list[str]:
    return [checkpoint.reference for checkpoint in find_checkpoints(run, **options).checkpoints]


def test_checkpoints_are_in_the_order_of_their_steps(here: Path) -> None:
    make(here / "run", *(f"checkpoint-{step}/model.safetensors" for step in (1000, 500, 20000, 9000)))
    assert found("run") == [f"run/checkpoint-{step}" for step in (500, 1000, 9000, 20000)]
    assert found("run/") == found("run")
    assert found("run/checkpoint-?000") == ["run/checkpoint-1000", "run/checkpoint-9000"]


@pytest.mark.parametrize(
    "files",
    [
        [
            "global_step{}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "global_step{}/mp_rank_00_model_states.pt",
        ],
        ["{}/.metadata", "{}/__0_0.distcp"],
        ["checkpoint-{}/pytorch_model_fsdp_0/.metadata", "checkpoint-{}/optimizer_0/.metadata"],
        ["step_{}/model_world_size_1_rank_0.pt"],
        ["iter_{:07}/model.safetensors", "iter_{:07}/optimizer.pt"],
        ["epoch=1-step={}.ckpt"],
        ["step{}.gguf"],
        ["checkpoints/step{}.safetensors"],
    ],
    ids=lambda files: files[0],
)
def test_checkpoints_of_every_trainer_are_found(here: Path, files: list[str]) -> None:
    make(here / "run", "config.json", "latest", "events.out", "logs/step_1.txt")
    make(here / "run", *(file.format(step) for file in files for step in (8, 16, 24)))
    assert [c.step for c in find_checkpoints("run").checkpoints] == [8, 16, 24]


def test_a_run_seen_from_the_folder_of_a_recipe_has_the_references_that_lead_there(here: Path) -> None:
    make(here / "recipes" / "run", "step_1/model.safetensors", "step_2/model.safetensors")
    for run in ("run", "run/step_*"):
        checkpoints = find_checkpoints(run, "recipes").checkpoints
        assert [c.reference for c in checkpoints] == ["run/step_1", "run/step_2"]


def test_other_files_of_the_trainer_are_left_out_by_name(here: Path) -> None:
    make(
        here / "run",
        *(f"{name}_{step}.pt" for name in ("model", "optimizer", "scheduler") for step in (1, 2)),
    )
    make(
        here / "run",
        "last.ckpt",
        "best/model.safetensors",
        "wandb/log.txt",
        "opt000002.pt",
        "step_2_images/a.png",
    )
    checkpoints, notes = find_checkpoints("run")
    assert [c.reference for c in checkpoints] == ["run/model_1.pt", "run/model_2.pt"]
    assert notes == (
        "run: left out, as their names have no step or are not those of a model: run/best, run/last.ckpt, run/opt000002.pt and 5 more.",
    )


def test_averaged_weights_are_taken_where_they_are_asked_for(here: Path) -> None:
    make(here / "run", *(f"epoch=1-step={step}{kind}.ckpt" for step in (1, 2) for kind in ("", "-EMA")))
    assert found("run") == ["run/epoch=1-step=1.ckpt", "run/epoch=1-step=2.ckpt"]
    assert find_checkpoints("run").notes == (
        "run: averaged weights (EMA) are left out: run/epoch=1-step=1-EMA.ckpt, run/epoch=1-step=2-EMA.ckpt. To take those, set ema.",
    )
    assert found("run", ema=True) == ["run/epoch=1-step=1-EMA.ckpt", "run/epoch=1-step=2-EMA.ckpt"]
    make(here / "other", "epoch=1-step=1.ckpt")
    assert found("other", ema=True) == ["other/epoch=1-step=1.ckpt@ema"]
    make(here / "third", "step_1/model.safetensors")
    with pytest.raises(ModelError) as caught:
        find_checkpoints("third", ema=True)
    assert str(caught.value) == (
        "third: no checkpoint is named as averaged weights (EMA), and third/step_1 cannot have them inside; expected names with ema, or "
        "checkpoints in .ckpt files or shards. Leave out ema."
    )


def test_a_checkpoint_that_its_trainer_is_writing_is_left_out_by_its_name(here: Path) -> None:
    make(here / "run", "checkpoint-1/model.safetensors", "tmp-checkpoint-2/model.safetensors")
    checkpoints, notes = find_checkpoints("run")
    assert [c.reference for c in checkpoints] == ["run/checkpoint-1"]
    assert notes == ("run: left out, as its trainer has not finished it: run/tmp-checkpoint-2.",)


EXPECTED = "checkpoint-500, step_500 or epoch=3-step=500.ckpt"
WRONG = {
    "a run without steps": (
        ["run/best/model.safetensors", "run/last/model.safetensors"],
        f"run: nothing in it has a step in its name; expected the folder of a training run, with checkpoints such as {EXPECTED}. Give that "
        "folder, or list the models in their order, as in other merges.",
    ),
    "a model": (
        ["run/model.safetensors", "run/config.json"],
        f"run: is a model, and no part of it has a step in its name; expected the folder of a training run, with checkpoints such as {EXPECTED}. "
        "Give that folder, or list the models in their order, as in other merges.",
    ),
    "a file": (
        ["run"],
        f"run: is a file; expected the folder of a training run, with checkpoints such as {EXPECTED}. Give the folder.",
    ),
    "nothing": (
        ["rum/step_1/model.safetensors"],
        f"run: no such folder; expected that of a training run, with checkpoints such as {EXPECTED}. Did you mean rum?",
    ),
    "names of two kinds": (
        [
            "run/checkpoint-1/model.safetensors",
            "run/checkpoint-2/model.safetensors",
            "run/epoch_1/model.safetensors",
        ],
        "run: its checkpoints have names of several kinds: checkpoint-# (2), epoch_# (1); expected one kind. Choose by a glob, such as "
        "run/checkpoint-*.",
    ),
    "one step twice": (
        ["run/epoch=1-step=5.ckpt", "run/epoch=2-step=5.ckpt"],
        "run: run/epoch=1-step=5.ckpt and run/epoch=2-step=5.ckpt are both of step 5; expected one checkpoint of each step. Choose by a glob "
        "that matches one of them, or list the models in their order, as in other merges.",
    ),
    "weights further inside": (
        ["run/global_step_1/actor/model.safetensors", "run/global_step_2/actor/model.safetensors"],
        "run: run/global_step_2 has no weights that can be read; models are in its actor; expected checkpoints with weights. Write a glob: "
        "run/global_step_*/actor.",
    ),
    "no weights": (
        ["run/step_1/notes.txt"],
        "run: run/step_1 has no weights that can be read; expected checkpoints with weights. Give the folder of the run, or a glob that leads "
        "to the folders with the weights.",
    ),
    "only one that is being written": (
        ["run/tmp-step_1/model.safetensors"],
        f"run: has no finished checkpoint, only run/tmp-step_1; expected checkpoints such as {EXPECTED}. Wait until one is written.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_run_is_one_message(here: Path, case: str) -> None:
    files, message = WRONG[case]
    make(here, *files)
    with pytest.raises(ModelError) as caught:
        find_checkpoints("run")
    assert caught.value.args == (message,)


def test_a_glob_that_matches_no_checkpoint_says_so(here: Path) -> None:
    make(here / "run", "best/model.safetensors")
    for pattern, message in {
        "run/step*": f"run/step*: matches nothing; expected checkpoints such as {EXPECTED}. Check the glob.",
        "run/b*": f"run/b*: matches run/best, without a step in the name; expected checkpoints such as {EXPECTED}. List the models in their "
        "order, as in other merges.",
    }.items():
        with pytest.raises(ModelError) as caught:
            find_checkpoints(pattern)
        assert caught.value.args == (message,)
    make(here / "run", "global_step_1/actor/model.safetensors", "global_step_2/actor/model.safetensors")
    assert found("run/global_step_*/actor") == ["run/global_step_1/actor", "run/global_step_2/actor"]
