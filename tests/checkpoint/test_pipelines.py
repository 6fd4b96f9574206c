"""Pipelines of diffusers as one model: each part is merged or copied, in the folders and files that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import alnico
from alnico.errors import MismatchError, ModelError
from made_pipelines import FILES, INDEX, TEXT, UNET, pipeline, weights

RECIPE: dict[str, Any] = {"merge_method": "linear", "unrelated": "allow"}


def test_a_pipeline_is_one_model_with_the_files_of_its_parts(tmp_path: Path) -> None:
    models = [pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    alnico.merge({**RECIPE, "models": models, "dtype": "float16"}, tmp_path / "out")
    written = {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert written >= {f"{part}/{file}" for part, file in FILES.items()}
    assert written >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "vae/config.json",
    }
    assert not any(name.endswith(".safetensors") and "/" not in name for name in written)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == INDEX
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text()) == UNET
    text = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert text == {**TEXT, "torch_dtype": "float16"}
    a, b, out = (weights(tmp_path / name) for name in ("a", "b", "out"))
    assert out.keys() == a.keys()
    for name, value in out.items():
        assert np.array_equal(value, ((a[name].astype(np.float64) + b[name]) / 2).astype(np.float16))
    assert "library_name: diffusers\n" in (tmp_path / "out" / "README.md").read_text()
    with alnico.open_model(tmp_path / "out") as again:
        assert set(again.tensors) == set(out)
    alnico.verify(tmp_path / "out", against_inputs=True)
    alnico.reproduce(tmp_path / "out")


def test_the_vae_of_another_model_is_taken_by_a_rule(tmp_path: Path) -> None:
    models = [pipeline(tmp_path / name, seed) for seed, name in enumerate("abc")]
    rule = {"filter": "re:^vae/", "merge_method": "passthrough", "model": models[2]}
    alnico.merge({**RECIPE, "models": models[:2], "methods": [rule]}, tmp_path / "out")
    a, b, c, out = (weights(tmp_path / name) for name in ("a", "b", "c", "out"))
    assert np.array_equal(out["vae/block.0.weight"], c["vae/block.0.weight"])
    mean = (a["unet/block.0.weight"].astype(np.float64) + b["unet/block.0.weight"]) / 2
    assert np.array_equal(out["unet/block.0.weight"], mean.astype(np.float32))


def test_parts_are_cut_into_files_that_diffusers_and_transformers_look_for(tmp_path: Path) -> None:
    models = [pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for model in models:
        save_file(
            {f"block.{i}.weight": np.full((4, 4), i, np.float32) for i in range(3)},
            Path(model) / "unet" / FILES["unet"],
        )
    alnico.merge({**RECIPE, "models": models}, tmp_path / "out", max_shard_size=100)
    unet = sorted(p.name for p in (tmp_path / "out" / "unet").iterdir())
    assert unet == [
        "config.json",
        *(f"diffusion_pytorch_model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")),
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    with alnico.open_model(tmp_path / "out") as again:
        assert np.array_equal(again.read("unet/block.2.weight"), np.full((4, 4), 2, np.float32))


def test_a_checkpoint_beside_the_parts_is_no_part_and_is_named(tmp_path: Path) -> None:
    models = [pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    save_file({"block.0.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a" / "v1-5-pruned.safetensors")
    plan = alnico.plan({**RECIPE, "models": models})
    assert {job.name.split("/")[0] for job in plan.jobs} == {"unet", "vae", "text_encoder"}
    assert any("v1-5-pruned.safetensors" in note for note in plan.notes)


def _lose_a_folder(folder: Path) -> None:
    for path in (folder / "vae").iterdir():
        path.unlink()
    (folder / "vae").rmdir()


def _list_no_parts(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_folder, r"model_index.json lists the part 'vae', which has no folder; expected all parts"),
        (
            lambda f: (f / "vae" / FILES["vae"]).unlink(),
            r"vae: has config.json and no .safetensors or .bin file",
        ),
        (_list_no_parts, "model_index.json lists no part of a pipeline that has weights"),
        (lambda f: (f / "model_index.json").write_text("[1"), "model_index.json: is not JSON"),
    ],
)
def test_a_pipeline_without_a_part_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    models = [pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    damage(tmp_path / "b")
    with pytest.raises(ModelError, match=message):
        alnico.plan({**RECIPE, "models": models})


def test_rows_of_different_tokens_are_not_merged(tmp_path: Path) -> None:
    models = [pipeline(tmp_path / "a", 0), pipeline(tmp_path / "b", 1, {"b": 0, "a": 1})]
    with pytest.raises(MismatchError, match=r"text_encoder: .* have different vocabularies"):
        alnico.plan({**RECIPE, "models": models})


# Pipelines made with diffusers


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip(kind: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=32,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        shift_factor=0.1,
        scaling_factor=0.4,
        sample_size=16,
    )


def stable_diffusion(folder: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae(4), text_encoder=clip("CLIPTextModel"), tokenizer=clip_tokenizer(folder), unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip("CLIPTextModel"), text_encoder_2=clip("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(folder), tokenizer_2=clip_tokenizer(folder), unet=unet, scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def flux(folder: Path) -> Any:
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    second = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(1), text_encoder=clip("CLIPTextModel"),
        tokenizer=clip_tokenizer(folder), text_encoder_2=t5, tokenizer_2=second, transformer=transformer,
    )  # fmt: skip


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [stable_diffusion, sdxl, flux])
def test_a_merged_pipeline_draws_what_modules_merged_by_hand_draw(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    made = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        made.append(make(tmp_path / "words"))
        made[-1].save_pretrained(tmp_path / name)
    alnico.merge({**RECIPE, "models": [str(tmp_path / n) for n in "ab"]}, tmp_path / "out")
    loaded = type(made[0]).from_pretrained(tmp_path / "out")
    first, second = made
    compared = 0
    for part, module in first.components.items():
        if isinstance(module, torch.nn.Module):
            other, merged = second.components[part].state_dict(), loaded.components[part].state_dict()
            state = module.state_dict()
            by_hand = {
                n: ((v.double() + other[n].double()) / 2).to(v.dtype) if v.is_floating_point() else v
                for n, v in state.items()
            }
            assert merged.keys() == by_hand.keys()
            assert all(torch.equal(merged[n], v) for n, v in by_hand.items())
            module.eval().load_state_dict(by_hand)
            compared += len(by_hand)
    assert compared > 100
    drawn = [
        pipe(
            prompt="a cat", num_inference_steps=2, height=16, width=16, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipe in (first, loaded)
    ]  # fmt: skip
    assert np.isfinite(drawn[0]).all()
    np.testing.assert_allclose(
        drawn[0], drawn[1], atol=1e-4
    )  # the order of sums depends on the place in memory
