"""Distributed checkpoints of torch, read without torch; torch writes them, alone and in four ranks, and is the referee."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from shards_of_ranks import assert_same_model, written_shards
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from write_shards import EVEN_SHAPES, GRID_SHAPES, RANKS, SHAPES, tensors

import alnico
from alnico.checkpoint.open_model import open_model
from alnico.checkpoint.training.sharded_model import ShardedModel
from alnico.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONFIG = {"model_type": "llama", "vocab_size": 13}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(13, 4),
        "model.layers.0.mlp.weight": torch.randn(6, 4).to(torch.bfloat16),
        "lm_head.weight": torch.randn(13, 4),
    }


def save(folder: Path, seed: int = 0, **more: object) -> dict[str, torch.Tensor]:
    """A checkpoint of one process, as Accelerate saves it; returns the model."""
    dcp.save({"model": state(seed), **more}, checkpoint_id=folder)
    return state(seed)


def loaded_by_torch(
    folder: Path, expected: dict[str, torch.Tensor], key: str = "model"
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as torch puts them together, in one process."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load({key: empty}, checkpoint_id=folder)
    return empty


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


WAYS = {
    "rows": (tensors(SHAPES), True),
    "columns": ({n: t for n, t in tensors(SHAPES).items() if t.ndim > 1}, True),
    "grid": (tensors(GRID_SHAPES), True),
    "turned": (tensors(GRID_SHAPES), True),
    "twice": (tensors(SHAPES), True),
    "replicas": (tensors(SHAPES), True),
    "strided": (tensors(EVEN_SHAPES), False),
    "sharded": ({n: t for n, t in tensors(SHAPES).items() if len(torch.arange(t.shape[0]).chunk(RANKS)) == RANKS}, False),
}  # fmt: skip
"""What each way divides, and whether there are tensors that are not divided, too."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_four_ranks_are_those_that_torch_loads(way: str) -> None:
    expected, has_plain = WAYS[way]
    expected = expected | ({"plain": torch.arange(5.0), "number": torch.tensor(7.0)} if has_plain else {})
    for name, tensor in loaded_by_torch(written_shards() / way, expected).items():
        assert torch.equal(tensor, expected[name]), f"torch itself reads {name} differently"
    with open_model(written_shards() / way) as model:
        assert isinstance(model, ShardedModel)
        assert len(model.shards) == RANKS
        assert_same_model(model, expected)


@pytest.mark.slow
def test_a_network_that_fsdp_divides_is_read_and_its_optimizer_is_named() -> None:
    whole = torch.load(written_shards() / "fsdp-whole.pt")
    with open_model(written_shards() / "fsdp") as model:
        assert_same_model(model, whole)
        assert any("the tensors are those under model." in note for note in model.notes)
        assert any(
            "left out, as they are not tensors of the model: optimizer (" in note for note in model.notes
        )


@pytest.mark.slow
def test_what_is_no_tensor_is_named() -> None:
    with open_model(written_shards() / "rows") as model:
        notes = " ".join(model.notes)
    assert "left out, as they are no tensors: lr_scheduler, step." in notes


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int32, torch.complex64,
     torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16],
    ids=str,
)  # fmt: skip
def test_every_dtype_and_view_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (torch.arange(60).reshape(6, 10) % 7).to(dtype)
    views = {
        "whole": whole,
        "turned": whole.t(),
        "rows": whole[1:3],
        "columns": whole[:, 2:5],
        "one": whole[0, 0],
    }
    dcp.save(views, checkpoint_id=tmp_path / "c")
    with open_model(tmp_path / "c") as model:
        assert_same_model(model, views)


def test_chunks_in_safetensors_files_are_read(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "c", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({"model": state()}, storage_writer=writer)
    with open_model(tmp_path / "c") as model:
        assert_same_model(model, state())


def test_a_file_for_each_tensor_is_read(tmp_path: Path) -> None:
    dcp.save({"model": state()}, storage_writer=FileSystemWriter(tmp_path / "c", single_file_per_rank=False))
    with open_model(tmp_path / "c") as model:
        assert len(model.shards) == 3
        assert_same_model(model, state())


@pytest.mark.slow
def test_ranks_that_saved_by_themselves_are_put_together(tmp_path: Path) -> None:
    """Each rank has metadata of its own then; here they are divided by hand."""
    folder = tmp_path / "c"
    shutil.copytree(written_shards() / "rows", folder)
    whole = pickle.loads((folder / ".metadata").read_bytes())
    for rank in range(RANKS):
        own = pickle.loads((folder / ".metadata").read_bytes())
        own.storage_data = {
            k: v for k, v in whole.storage_data.items() if v.relative_path.startswith(f"__{rank}_")
        }
        for name, entry in list(own.state_dict_metadata.items()):
            kept = [
                c
                for c in getattr(entry, "chunks", ())
                if any(k.fqn == name and k.offset == c.offsets for k in own.storage_data)
            ]
            if kept:
                entry.chunks = kept
            else:
                del own.state_dict_metadata[name]
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(own))
    (folder / ".metadata").unlink()
    with open_model(folder) as model:
        assert_same_model(model, WAYS["rows"][0] | {"plain": torch.arange(5.0), "number": torch.tensor(7.0)})
    (folder / "__2.metadata").unlink()
    assert "leave a gap or overlap" in refusal(folder)


def flat(seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"layers.{n}": t for n, t in state(seed).items()}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"app": {"model": state(), "optim": {"m": torch.ones(3)}}}, state()),
        ({"state": {"model": state()}, "rng": torch.ones(2)}, state()),
        ({"module": state(), "optimizer": {"state": {"m": torch.ones(3)}}, "epoch": torch.tensor(3)}, state()),
        (state() | {"optimizer": {"m": torch.ones(2)}}, state()),
        ({f"module.{n}": t for n, t in state().items()}, state()),
        ({f"model.{n}": t for n, t in state().items()}, state()),
        ({f"model.{n}": t for n, t in flat().items()}, {f"model.{n}": t for n, t in flat().items()}),
        ({"model": {"encoder": flat(), "decoder": flat(1)}}, {f"{part}.{n}": t for part, seed in (("encoder", 0), ("decoder", 1)) for n, t in flat(seed).items()}),
    ],
    ids=["app", "state", "module", "no key", "a wrapper's name", "a key in the name", "a model's own name", "a model of parts"],
)  # fmt: skip
def test_keys_of_the_trainer_are_no_part_of_names(tmp_path: Path, saved: dict, expected: dict) -> None:
    dcp.save(saved, checkpoint_id=tmp_path / "c")
    with open_model(tmp_path / "c") as model:
        assert_same_model(model, expected)


def test_of_several_models_one_is_named(tmp_path: Path) -> None:
    save(tmp_path / "c", ema=state(1), teacher={"net": {"w": torch.ones(2)}})
    dcp.save({"actor": state(), "critic": state(2)}, checkpoint_id=tmp_path / "two")
    with open_model(tmp_path / "c") as model:
        assert_same_model(model, state())
        assert any("left out" in note and "ema (3)" in note for note in model.notes)
    with open_model(f"{tmp_path}/c@ema") as model:
        assert_same_model(model, state(1))
    assert "has tensors under actor, critic; expected one model. Name the one to read: PATH@KEY." in refusal(
        tmp_path / "two"
    )
    assert "expected one model under the key judge" in refusal(f"{tmp_path}/two@judge")
    with open_model(f"{tmp_path}/two@critic") as model:
        assert_same_model(model, state(2))


def test_the_config_is_found_beside_the_shards_or_said_to_be_missing(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-7" / "pytorch_model_fsdp_0")
    place = tmp_path / "checkpoint-7"
    with open_model(place) as model:
        assert model.directory is None
        assert any("has no config.json" in note for note in model.notes)
    (place / "config.json").write_text(json.dumps(CONFIG))
    for path in (place, place / "pytorch_model_fsdp_0"):
        with open_model(path) as model:
            assert model.directory == place
            assert model.config == CONFIG
            assert_same_model(model, state())
    inner = place / "pytorch_model_fsdp_0" / "huggingface"
    inner.mkdir()
    (inner / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 1}))
    with open_model(place / "pytorch_model_fsdp_0") as model:
        assert model.directory == inner


def test_checkpoints_are_averaged_as_whole_models_are(tmp_path: Path) -> None:
    """The shards and safetensors files of the same tensors give the same bytes, with config and tokenizer."""
    for step in (1, 2, 3):
        place = tmp_path / f"checkpoint-{step}"
        save(place / "pytorch_model_fsdp_0", step, optimizer={"m": torch.ones(4)})
        (place / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / f"whole-{step}").mkdir()
        (tmp_path / f"whole-{step}" / "config.json").write_text(json.dumps(CONFIG))
        save_file(state(step), tmp_path / f"whole-{step}" / "model.safetensors")
    for kind in ("checkpoint", "whole"):
        recipe = {
            "merge_method": "linear",
            "models": [str(tmp_path / f"{kind}-{step}") for step in (1, 2, 3)],
        }
        alnico.merge(recipe | {"unrelated": "allow"}, tmp_path / f"out-{kind}", memory="1GiB")
    found, expected = (
        load_file(tmp_path / f"out-{kind}" / "model.safetensors") for kind in ("checkpoint", "whole")
    )
    assert found.keys() == expected.keys() == state().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    mean = torch.stack([state(step)["lm_head.weight"].double() for step in (1, 2, 3)]).mean(0)
    assert torch.allclose(found["lm_head.weight"].double(), mean, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "out-checkpoint" / "config.json").read_text())["model_type"] == "llama"
    assert not list((tmp_path / "out-checkpoint").glob("*.distcp"))


def test_other_commands_read_shards(tmp_path: Path, run) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", 1)
    code, output, _ = run("inspect", str(tmp_path / "a"))
    assert code == 0
    assert "__0_0.distcp" in output
    assert len(alnico.diff(tmp_path / "a", tmp_path / "b").tensors) == 3
    with alnico.open_model(tmp_path / "a") as model:
        assert repr(model) == f"<model {tmp_path / 'a'}: 3 tensors in 3 pieces, 1 files>"


@pytest.mark.slow
def test_a_missing_rank_a_truncated_file_and_one_of_another_run_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(written_shards() / "rows", folder)
    (folder / "__2_0.distcp").rename(folder / "kept")
    assert "__2_0.distcp is missing" in refusal(folder)
    data = (folder / "kept").read_bytes()
    (folder / "__2_0.distcp").write_bytes(data[: len(data) // 8])
    assert "The file is truncated, or of another run" in refusal(folder)
    shutil.copy(written_shards() / "turned" / "__2_0.distcp", folder)
    assert any(t in refusal(folder) for t in ("of another run", "is not a readable torch checkpoint"))


def test_one_file_of_many_is_refused_with_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "c")
    assert f"Give the folder that it is in: {tmp_path / 'c'}." in refusal(tmp_path / "c" / "__0_0.distcp")
    (tmp_path / "c" / ".metadata").unlink()
    assert "It has __0_0.distcp, a shard of a distributed checkpoint of torch" in refusal(tmp_path / "c")


def test_shards_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "c")
    with open_model(tmp_path / "c") as model:
        with (tmp_path / "c" / "__0_0.distcp").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ModelError, match="changed after its header was read"):
            model.read("lm_head.weight")


def test_whole_safetensors_go_before_shards(tmp_path: Path) -> None:
    save(tmp_path / "c")
    save_file({"w": torch.ones(2)}, tmp_path / "c" / "model.safetensors")
    with open_model(tmp_path / "c") as model:
        assert set(model.tensors) == {"w"}


def test_a_folder_of_steps_is_answered_with_their_names(tmp_path: Path) -> None:
    for step in (100, 200):
        save(tmp_path / f"step-{step}")
    assert "Models are in its folders step-100, step-200: give the path of one." in refusal(tmp_path)
