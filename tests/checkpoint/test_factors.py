"""Adapters are never merged factor by factor: they are told by their names, which PEFT writes here, or the tools' files have."""

import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import alnico
import made
from alnico.checkpoint.factors import adapter_factors, is_factor
from alnico.cli.commands.diff import difference_text
from alnico.errors import MismatchError, ModelError
from alnico.evaluation.tasks import Score


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 8)
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return self.q(self.emb(x))


CONFIGS = {
    "lora": peft.LoraConfig(target_modules=["q", "emb"], r=2),
    "dora": peft.LoraConfig(target_modules=["q"], r=2, use_dora=True),
    "adalora": peft.AdaLoraConfig(target_modules=["q"], init_r=2, target_r=1, total_step=9),
    "saved": peft.LoraConfig(target_modules=["q"], r=2, modules_to_save=["emb"]),
    "loha": peft.LoHaConfig(target_modules=["q"], r=2),
    "lokr": peft.LoKrConfig(target_modules=["q"], r=2),
    "ia3": peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
    "oft": peft.OFTConfig(target_modules=["q"], oft_block_size=2),
    "boft": peft.BOFTConfig(target_modules=["q"], boft_block_size=2),
    "hra": peft.HRAConfig(target_modules=["q"], r=2),
    "vera": peft.VeraConfig(target_modules=["q"], r=2),
    "fourierft": peft.FourierFTConfig(target_modules=["q"], n_frequency=4),
    "randlora": peft.RandLoraConfig(target_modules=["q"], r=2),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each adapter, and the state of the module that has it."""
    folder = tmp_path_factory.mktemp("adapters")
    states = {}
    for name, config in CONFIGS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Net(), config)
            model.save_pretrained(folder / name)
        states[name] = list(model.state_dict())
    return folder, states


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_that_peft_writes_are_told_from_the_model_that_has_them(saved, kind):
    folder, states = saved
    path = folder / kind / "adapter_model.safetensors"
    with safe_open(path, "np") as file:
        assert adapter_factors(file.keys())
    assert any(map(is_factor, states[kind]))
    assert not adapter_factors(states[kind])
    assert not any(map(is_factor, Net().state_dict()))
    recipe = {"merge_method": "linear", "models": [str(path)]}
    with pytest.raises(ModelError, match="is an adapter") as caught:
        alnico.plan(recipe)
    assert str(caught.value).startswith(f"{path}: is an adapter (")
    assert "lora" not in kind or "alnico lora combine" in str(caught.value)


FILES = {
    "LyCORIS GLoRA": [f"lora_unet_q.{n}.weight" for n in ("a1", "a2", "b1", "b2")],
    "kohya": ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight", "lora_unet_down_blocks_0_attn1_to_q.alpha"),
    "kohya_dora": ("lora_te_q.lora_down.weight", "lora_te_q.lora_up.weight", "lora_te_q.dora_scale", "lora_te_q.alpha"),
    "loha": ("lora_unet_q.hada_w1_a", "lora_unet_q.hada_w1_b", "lora_unet_q.hada_w2_a", "lora_unet_q.hada_w2_b", "lora_unet_q.alpha"),
    "lokr": ("lora_unet_q.lokr_w1", "lora_unet_q.lokr_w2_a", "lora_unet_q.lokr_w2_b", "lora_unet_q.lokr_t2"),
    "diffusers": ("unet.mid_block.attn1.to_q.lora.down.weight", "unet.mid_block.attn1.to_q.lora.up.weight"),
    "diffusers_old": ("mid_block.attn1.processor.to_q_lora.down.weight", "mid_block.attn1.processor.to_q_lora.up.weight"),
    "diffusers_text": ("text_model.q_proj.lora_linear_layer.down.weight", "text_model.q_proj.lora_linear_layer.up.weight"),
    "diffusers_peft": ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q.lora_B.weight"),
    "comfyui": ("diffusion_model.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_B.weight", "diffusion_model.blocks.0.q.alpha"),
    "xlabs": ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
    "onetrainer": ("lora_transformer_blocks_0_q.lora_down.weight", "lora_transformer_blocks_0_q.lora_up.weight", "bundle_emb.x.string_to_param"),
    "mlx": ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"),
    "litgpt": ("transformer.h.0.attn.attn.lora_A", "transformer.h.0.attn.attn.lora_B"),
    "nemo": ("model.layers.0.adapter_layer.lora_kqv_adapter.linear_in.weight", "model.layers.0.adapter_layer.lora_kqv_adapter.linear_out.weight"),
    "prompt_tuning": ("prompt_embeddings",),
}  # fmt: skip
MODELS = {
    "deepseek": ("model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
    "rwkv7": ("model.layers.0.attn.w_lora.lora.0.weight", "model.layers.0.attn.w_lora.lora.2.weight", "model.layers.0.attn.w_lora.lora.2.bias"),
    "rwkv7_plain": ("blocks.0.att.w1", "blocks.0.att.w2", "blocks.0.att.a1"),
    "zamba2": ("model.layers.6.shared_transformer.feed_forward.linear_fc1_lora_A_list.0.weight", "model.layers.6.self_attn.linear_q_adapter_list.0.0.weight"),
    "snake": ("activations.0.act.alpha", "activations.0.act.beta"),
    "named_so": ("lora.weight", "explorations.lora.bias", "flora_A.weight"),
}  # fmt: skip


def file_of(path, names, seed=0):
    random = np.random.default_rng(seed)
    return str(made.save_file(path, {n: ("F32", random.standard_normal((8, 8))) for n in names}))


@pytest.mark.parametrize("tool", FILES)
def test_adapters_of_other_tools_are_refused_as_models(tmp_path, tool):
    models = [file_of(tmp_path / f"{i}.safetensors", FILES[tool], i) for i in (1, 2)]
    with pytest.raises(ModelError, match="is an adapter"):
        alnico.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with alnico.open_model(models[0]) as opened:  # what one looks at is no merge
        assert set(opened.tensors) == set(FILES[tool])


@pytest.mark.parametrize("family", MODELS)
def test_models_with_low_rank_layers_of_their_own_are_merged(tmp_path, family):
    models = [file_of(tmp_path / f"{i}.safetensors", MODELS[family], i) for i in (1, 2)]
    alnico.merge(
        {"merge_method": "linear", "models": models, "unrelated": "allow"}, tmp_path / "out.safetensors"
    )
    with (
        alnico.open_model(tmp_path / "out.safetensors") as out,
        alnico.open_model(models[0]) as one,
        alnico.open_model(models[1]) as two,
    ):
        for name in MODELS[family]:
            np.testing.assert_allclose(
                out.read(name), (one.read(name).astype(float) + two.read(name)) / 2, rtol=1e-6, atol=1e-7
            )


class Constant:
    """A task on which all models are equal."""

    name, goal, weight, size = "constant", "max", 1.0, 0

    def evaluate(self, subject, examples=None):
        subject.state()
        return Score(1.0)

    def pooled(self, scores):
        return scores[0]

    def digests(self):
        return frozenset()


def stages(one, two, base):
    """A recipe of two stages, as text."""
    return f"name: s\nmerge_method: linear\nmodels: [{one}, {two}]\n---\nmerge_method: linear\nmodels: [{base}, s]\n"


def every_command(base, one, two, folder):
    recipe = {"merge_method": "linear", "models": [one, two]}
    return {
        "merge": lambda: alnico.merge(recipe, folder / "out"),
        "as base": lambda: alnico.plan(
            {"merge_method": "task_arithmetic", "base_model": one, "models": [base]}
        ),
        "as a base of an adapter": lambda: alnico.plan(
            {"merge_method": "linear", "models": [f"{one}+{folder}"]}
        ),
        "in a slice": lambda: alnico.plan(
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": one, "layer_range": [0, 1]}]}]}
        ),
        "in a stage": lambda: alnico.plan_documents(stages(one, two, base)),
        "analyze": lambda: alnico.analyze([one], base=base),
        "analyze base": lambda: alnico.analyze([base], base=one),
        "compare": lambda: alnico.compare([one, two], base, base=base),
        "weights": lambda: alnico.norm_weights([one, two], base=base),
        "suggest": lambda: alnico.suggest([one, two], base=base),
        "soup": lambda: alnico.soup([one, two], [Constant()]),
        "task vector": lambda: alnico.TaskVector(one, base).norm(),
        "paths in memory": lambda: alnico.merge_state_dicts([one, two]),
    }


COMMANDS = list(every_command("", "", "", None))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_adapter_as_a_model(tmp_path, command):
    base = file_of(tmp_path / "base.safetensors", ["model.layers.0.q.weight"])
    pair = ("base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight")
    one, two = (file_of(tmp_path / f"{i}.safetensors", pair, i) for i in (1, 2))
    with pytest.raises(ModelError, match="is an adapter"):
        every_command(base, one, two, tmp_path)[command]()


def test_factors_beside_the_weights_of_a_model_are_not_merged_but_may_be_taken_from_one(tmp_path):
    names = [
        "layers.0.q.base_layer.weight",
        "layers.0.q.lora_A.speech.weight",
        "layers.0.q.lora_B.speech.weight",
    ]
    one, two = (file_of(tmp_path / f"{i}.safetensors", names, i) for i in (1, 2))
    recipe = {"merge_method": "linear", "models": [one, two], "unrelated": "allow"}
    with pytest.raises(MismatchError) as caught:
        alnico.plan(recipe)
    assert str(caught.value) == (
        f"layers.0.q.lora_A.speech.weight: is a factor of an adapter's update and would be merged on its own (2 such tensors of {one}, {two}); "
        "merging factors does not merge their products. Expected models without adapters, or with adapters merged into their weights. "
        "Merge each model's adapter into it first (PEFT: merge_and_unload), or copy the factors from one model with a rule under `methods` with "
        "merge_method: passthrough."
    )
    alnico.merge(
        {**recipe, "methods": [{"filter": "lora_", "merge_method": "passthrough", "model": one}]},
        tmp_path / "out.safetensors",
    )
    with alnico.open_model(tmp_path / "out.safetensors") as out, alnico.open_model(one) as opened:
        assert all(out.read(n).tobytes() == opened.read(n).tobytes() for n in names[1:])


def test_dicts_of_factors_are_refused():
    states = [{"q.lora_A.weight": torch.randn(2, 8), "q.lora_B.weight": torch.randn(8, 2)} for _ in range(2)]
    with pytest.raises(ModelError, match="factors of an adapter"):
        alnico.merge_state_dicts(states)


def test_a_difference_of_adapters_says_what_is_compared(tmp_path):
    one, two = (file_of(tmp_path / f"{i}.safetensors", FILES["kohya"], i) for i in (1, 2))
    text = difference_text(alnico.diff(one, two), 0)
    assert (
        "The factors of adapters are compared by themselves: other factors may make the same update." in text
    )
