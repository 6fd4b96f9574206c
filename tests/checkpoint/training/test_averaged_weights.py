"""Checkpoints with averaged weights (EMA): the weights themselves by default, the average by ``PATH@ema``, and a note on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shards_of_ranks import assert_same_model

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "model.conv.weight": torch.randn(4, 3),
        "model.conv.bias": torch.randn(4),
        "model.bn.running_mean": torch.full((4,), float(seed)),
    }


LAST, MEAN = weights(0), weights(1)
TRAINED = {n: t for n, t in MEAN.items() if "bn" not in n}
BARE = {n.removeprefix("model."): t for n, t in TRAINED.items()}
STATE = {
    "epoch": 3,
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    "hyper_parameters": {"ema_decay": 0.99},
}
FILLED = TRAINED | {"model.bn.running_mean": LAST["model.bn.running_mean"]}

FORMS = {
    "a callback's": (STATE | {"state_dict": LAST, "callbacks": {"EMACallback": {"ema_state_dict": TRAINED, "decay": 0.9}}}, FILLED),
    "a callback's, without the prefix": (STATE | {"state_dict": LAST, "callbacks": {"EMA": {"ema_weights": BARE}}}, FILLED),
    "a key": (STATE | {"state_dict": LAST, "ema_state_dict": TRAINED}, FILLED),
    "timm's": ({"state_dict": LAST, "state_dict_ema": MEAN, "arch": "x"}, MEAN),
    "DataParallel's": ({"state_dict": LAST, "model_ema": {f"module.{n}": t for n, t in MEAN.items()}}, MEAN),
    "a dict in a key": ({"model": LAST, "ema": {"model": MEAN, "updates": 3}}, MEAN),
    "a module of the model": (
        {"state_dict": LAST | {f"ema.ema_model.{n.removeprefix('model.')}": t for n, t in TRAINED.items()} | {"ema.step": torch.tensor(3)}},
        FILLED,
    ),
    "latent diffusion's": (
        {"state_dict": LAST | {f"model_ema.{n.removeprefix('model.').replace('.', '')}": t for n, t in TRAINED.items()} | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}},
        FILLED,
    ),
    "Lightning's": (STATE | {"state_dict": MEAN, "current_model_state": LAST, "averaging_state": {"n_averaged": torch.tensor(3)}}, MEAN),
}  # fmt: skip
"""Checkpoints by who writes them so, and what their averaged weights are."""


def save(folder: Path, value: object) -> Path:
    torch.save(value, folder / "last.ckpt")
    return folder / "last.ckpt"


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_the_average_is_read_where_it_is_named(tmp_path: Path, form: str) -> None:
    saved, expected = FORMS[form]
    path = save(tmp_path, saved)
    with open_model(f"{path}@ema") as model:
        assert_same_model(model, expected)
        assert any("average" in note for note in model.notes)


@pytest.mark.parametrize("form", FORMS)
def test_by_default_the_state_dict_is_read_and_the_average_is_told(tmp_path: Path, form: str) -> None:
    saved, _ = FORMS[form]
    path = save(tmp_path, saved)
    with open_model(path) as model:
        assert_same_model(model, saved.get("state_dict", saved.get("model")))
        told = " ".join(model.notes)
        assert (
            ("its state_dict is the running average" in told)
            if form == "Lightning's"
            else "To read those: PATH@ema." in told
        )


def test_values_without_an_average_are_those_of_the_last_step_and_named(tmp_path: Path) -> None:
    path = save(tmp_path, FORMS["a key"][0])
    with open_model(f"{path}@ema") as model:
        assert "model.bn.running_mean have no average, and are those of the last step." in " ".join(
            model.notes
        )


def test_any_key_may_be_named(tmp_path: Path) -> None:
    path = save(tmp_path, FORMS["Lightning's"][0])
    with open_model(f"{path}@current_model_state") as model:
        assert_same_model(model, LAST)
    path = save(tmp_path, FORMS["a callback's"][0])
    with open_model(f"{path}@callbacks.EMACallback.ema_state_dict") as model:
        assert_same_model(model, TRAINED)


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    path = save(tmp_path, {"state_dict": LAST, "epoch": 3})
    assert "averaged weights (EMA): none; expected them under one key. Leave out @ema" in refusal(
        f"{path}@ema"
    )
    assert (
        "has nothing like a state dict under teacher; expected one of its keys: state_dict, epoch."
        in refusal(f"{path}@teacher")
    )
    path = save(tmp_path, {"state_dict": LAST, "ema_fast": MEAN, "ema_slow": MEAN})
    told = refusal(f"{path}@ema")
    assert "ema_fast" in told
    assert "Name the one to read: PATH@KEY." in told
    with open_model(f"{path}@ema_slow") as model:
        assert_same_model(model, MEAN)


def test_a_merge_takes_averages_and_weights_of_one_file(tmp_path: Path) -> None:
    """A recipe finds them next to it, and they are two models."""
    save(tmp_path, FORMS["timm's"][0])
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [last.ckpt, last.ckpt@ema]\nunrelated: allow\n"
    )
    plan = alnico.plan(tmp_path / "recipe.yml")
    assert not [note for note in plan.notes if "the same model" in note]
    alnico.merge(tmp_path / "recipe.yml", tmp_path / "out", memory="1GiB")
    with open_model(tmp_path / "out") as model:
        for name in LAST:
            mean = (LAST[name].double() + MEAN[name].double()) / 2
            assert torch.allclose(torch.from_numpy(model.read(name)).double(), mean, rtol=1e-6)


def test_a_path_with_the_whole_text_wins(tmp_path: Path) -> None:
    save(tmp_path, FORMS["a key"][0])
    torch.save({"w": torch.ones(2)}, tmp_path / "last.ckpt@ema.pt")
    with open_model(tmp_path / "last.ckpt@ema.pt") as model:
        assert set(model.tensors) == {"w"}


def test_names_that_only_contain_the_letters_are_no_average(tmp_path: Path) -> None:
    saved = {"state_dict": LAST, "schema": {"w": torch.ones(2)}, "remainder": {"w": torch.ones(2)}}
    with open_model(save(tmp_path, saved)) as model:
        assert not [note for note in model.notes if "EMA" in note]
