"""Parts of pipelines: the files of an output have the names under which diffusers looks for them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alnico
from made import save_file as save_any

UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1"}
TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
RECIPE = {"merge_method": "linear", "unrelated": "allow"}


def values(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {f"block.{i}.weight": random.standard_normal((8, 8)).astype(np.float32) for i in range(4)}


def part(folder: Path, seed: int, name: str, config: dict | None) -> str:
    """A part of a pipeline: one file, or two with an index where ``name`` has ``{}`` for their numbers."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    held = values(seed)
    if "{}" not in name:
        save_file(held, folder / name)
        return str(folder)
    names = sorted(held)
    files = {name.format(f"{i + 1:05d}-of-00002"): names[2 * i : 2 * i + 2] for i in range(2)}
    for file, inside in files.items():
        save_file({n: held[n] for n in inside}, folder / file)
    index = name.replace("-{}", "") + ".index.json"
    (folder / index).write_text(
        json.dumps({"weight_map": {n: file for file, inside in files.items() for n in inside}})
    )
    return str(folder)


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (UNET, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        (UNET, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model"),
        (UNET, "diffusion_pytorch_model-{}.safetensors", "diffusion_pytorch_model"),
        (UNET, "model.safetensors", "diffusion_pytorch_model"),
        (None, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        (TEXT, "model.safetensors", "model"),
        (TEXT, "model.fp16.safetensors", "model"),
        (None, "v1-5-pruned.safetensors", "model"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_files_have_the_names_that_the_library_of_the_config_looks_for(
    tmp_path, config, name, expected, is_sharded
):
    models = [part(tmp_path / "ab"[i] / "unet", i, name, config) for i in range(2)]
    size = 600 if is_sharded else 10**9
    alnico.merge({**RECIPE, "models": models}, tmp_path / "out", max_shard_size=size)
    weights = sorted(p.name for p in (tmp_path / "out").iterdir() if "safetensors" in p.name)
    count = 2 if is_sharded else 1
    named = [f"{expected}-{i + 1:05d}-of-00002.safetensors" for i in range(2)] + [
        f"{expected}.safetensors.index.json"
    ]
    assert weights == (named if is_sharded else [f"{expected}.safetensors"])
    found = {n: t for file in weights[:count] for n, t in load_file(tmp_path / "out" / file).items()}
    for tensor, value in found.items():
        np.testing.assert_allclose(value, (values(0)[tensor] + values(1)[tensor]) / 2, rtol=1e-6, atol=1e-7)
    assert len(found) == 4
    with alnico.open_model(tmp_path / "out") as out:  # and again, with another variant beside it
        assert set(out.tensors) == set(found)
    save_file(values(5), tmp_path / "out" / f"{expected}.fp16.safetensors")
    with alnico.open_model(tmp_path / "out") as out:
        assert np.array_equal(out.read("block.0.weight"), found["block.0.weight"])


def test_the_config_and_the_card_are_those_of_diffusers(tmp_path):
    models = [part(tmp_path / n, i, "diffusion_pytorch_model.safetensors", UNET) for i, n in enumerate("ab")]
    alnico.merge({**RECIPE, "models": models, "dtype": "bfloat16"}, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text()) == UNET
    )  # diffusers warns of keys that it does not know
    assert "library_name: diffusers\n" in (tmp_path / "out" / "README.md").read_text()


def test_variants_and_their_indices_are_not_carried(tmp_path):
    folder = Path(part(tmp_path / "a", 0, "diffusion_pytorch_model.safetensors", UNET))
    for name in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ):
        (folder / name).write_bytes(b"{}")
    alnico.merge({**RECIPE, "models": [str(folder)]}, tmp_path / "out")
    assert not [p.name for p in (tmp_path / "out").iterdir() if "fp16" in p.name]


PLACES = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def checkpoint(path: Path, seed: int, places: str | None, updates: tuple[str, int], decay: float) -> str:
    """A checkpoint of Stable Diffusion, as its trainers leave it."""
    random = np.random.default_rng(seed)
    held = {"model.diffusion_model.out.weight": ("F32", random.standard_normal((8, 8)))}
    if places is not None:
        held[PLACES] = (places, np.arange(77).reshape(1, 77))
    held["model_ema.num_updates"] = (updates[0], np.array(updates[1]))
    held["model_ema.decay"] = ("F32", np.array(decay))
    return str(save_any(path, held))


@pytest.mark.parametrize(
    "kinds", [("I64", "I32"), ("I64", "F16"), ("F32", "I64"), ("F16", "F32"), ("I64", None), ("F16", None)]
)
def test_positions_of_another_dtype_and_counters_are_the_donors_and_said(tmp_path, kinds):
    a = checkpoint(tmp_path / "a.safetensors", 0, kinds[0], ("I64", 10), 0.9999)
    b = checkpoint(tmp_path / "b.safetensors", 1, kinds[1], ("I32", 20), 0.99)
    plan = alnico.plan({**RECIPE, "models": [a, b]})
    stored = f" (stored as {kinds[0]}, {kinds[1]})"
    expected = [
        f"model_ema.num_updates: a count of updates (stored as I64, I32), not a weight; it is copied from {a}.",
        f"model_ema.decay: a setting of the moving average, not a weight; it is copied from {a}.",
    ]
    assert set(expected) <= set(plan.notes)
    assert (
        f"{PLACES}: numbers of positions{stored}, not a weight; it is copied from {a}." in plan.notes
    ) == (kinds[1] is not None)
    alnico.merge({**RECIPE, "models": [a, b]}, tmp_path / "out.safetensors")
    out, one, two = (load_file(p) for p in (tmp_path / "out.safetensors", a, b))
    for name in (PLACES, "model_ema.num_updates", "model_ema.decay"):
        assert (out[name].dtype, out[name].tolist()) == (one[name].dtype, one[name].tolist())
    mean = (one["model.diffusion_model.out.weight"] + two["model.diffusion_model.out.weight"]) / 2
    np.testing.assert_allclose(out["model.diffusion_model.out.weight"], mean, rtol=1e-6, atol=1e-7)


def test_positions_of_one_dtype_must_be_equal_as_before(tmp_path):
    models = [checkpoint(tmp_path / f"{i}.safetensors", i, "I64", ("I64", 10), 0.9999) for i in range(2)]
    plan = alnico.plan({**RECIPE, "models": models})
    assert [(j.kind, j.why) for j in plan.jobs if j.name == PLACES] == [
        ("equal", "I64, must be equal in all models")
    ]


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_diffusers_loads_a_merged_part(tmp_path, kind):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    if kind == "unet":
        make = lambda: diffusers.UNet2DModel(  # noqa: E731
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    else:
        make = lambda: diffusers.AutoencoderKL(block_out_channels=(32,), sample_size=8)  # noqa: E731
    models = []
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        models.append(make())
        models[i].save_pretrained(tmp_path / name / kind, variant="fp16" if i else None)
    recipe = {**RECIPE, "models": [str(tmp_path / n / kind) for n in "ab"]}
    for out, size in (("one", "5GB"), ("several", "200kB")):
        alnico.merge(recipe, tmp_path / out / kind, max_shard_size=size)
        loaded = type(models[0]).from_pretrained(tmp_path / out, subfolder=kind)
        state, others = loaded.state_dict(), [m.state_dict() for m in models]
        for name, value in state.items():
            torch.testing.assert_close(
                value.double(),
                (others[0][name].double() + others[1][name].double()) / 2,
                rtol=1e-6,
                atol=1e-7,
            )
