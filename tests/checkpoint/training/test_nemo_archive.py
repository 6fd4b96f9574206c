"""NeMo archives: the checkpoint in a tar file is read in its place."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from shards_of_ranks import assert_same_model

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.errors import ModelError


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    whole = torch.randn(6, 5)
    return {"encoder.weight": whole, "turned": whole.t(), "decoder.bias": torch.randn(7).to(torch.bfloat16)}


def save(path: Path, *, mode: str = "w", name: str = "./model_weights.ckpt", seed: int = 0) -> Path:
    made = io.BytesIO()
    torch.save(weights(seed), made)
    with tarfile.open(path, mode) as archive:
        for member, data in (("./model_config.yaml", b"target: x\n"), (name, made.getvalue())):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ["./model_weights.ckpt", "model_weights.ckpt"])
def test_the_checkpoint_inside_is_read(tmp_path: Path, name: str) -> None:
    with open_model(save(tmp_path / "m.nemo", name=name)) as model:
        assert_same_model(model, weights())


def test_archives_are_averaged(tmp_path: Path) -> None:
    models = [str(save(tmp_path / f"{seed}.nemo", seed=seed)) for seed in (0, 1)]
    alnico.merge(
        {"merge_method": "linear", "models": models, "unrelated": "allow"},
        tmp_path / "out.safetensors",
        memory="1GiB",
    )
    with open_model(tmp_path / "out.safetensors") as model:
        mean = (weights(0)["turned"].double() + weights(1)["turned"].double()) / 2
        assert torch.allclose(torch.from_numpy(model.read("turned")).double(), mean, rtol=1e-6)


def test_compressed_archives_and_those_of_several_devices_are_refused(tmp_path: Path) -> None:
    assert "it is no plain tar file" in refusal(save(tmp_path / "m.nemo", mode="w:gz"))
    assert "mp_rank_00/model_weights.ckpt" in refusal(
        save(tmp_path / "m.nemo", name="mp_rank_00/model_weights.ckpt")
    )


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.nemo")
    path.write_bytes(path.read_bytes()[:3_000])
    assert "is not a readable torch checkpoint" in refusal(path)
