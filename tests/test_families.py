"""Families of models, each made small with transformers: merged, loaded back, and the forward pass compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import alnico
from alnico.errors import MismatchError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and torch

LAYERS = 4
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """``model`` and ``config`` are names in transformers; ``stack`` is the module that holds the layers."""

    model: str
    config: str
    stack: str
    options: dict[str, Any]
    after: tuple[str, ...] = ("model.norm", "lm_head")
    """Modules after the layers."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", "model.layers", GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", "model.layers", GROUPED),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", "model.layers", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", "model.layers", {**GROUPED, "head_dim": 8}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", "model.layers", {**GROUPED, "head_dim": 8}, ("model.norm",)),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", "model.layers", {**GROUPED, "pad_token_id": 0}),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", "transformer.h",
        {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}, ("transformer.ln_f",),
    ),
    "bert": Family("BertModel", "BertConfig", "encoder.layer", {**SMALL, "max_position_embeddings": 32}, ("pooler",)),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", "model.layers", {**GROUPED, "num_local_experts": 2}),
}  # fmt: skip


def made(family: Family, folder: Path, seed: int) -> Any:
    """A model of its own random weights, every one of them random: norms and biases too."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**copy.deepcopy(family.options))
    model = getattr(transformers, family.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def loaded(family: Family, folder: Path) -> Any:
    import transformers

    model, report = getattr(transformers, family.model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def output(model: Any, **more: Any) -> Any:
    import torch

    tokens = torch.arange(24).reshape(2, 12) % 60
    with torch.no_grad():
        found = model(tokens, **({} if model.config.model_type == "bert" else {"use_cache": False}), **more)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def averaged(models: list[Any]) -> Any:
    import torch

    result = copy.deepcopy(models[0])
    states = [m.state_dict() for m in models]
    mean = {
        n: torch.stack([s[n].double() for s in states]).mean(0).float() if t.is_floating_point() else t
        for n, t in states[0].items()
    }
    result.load_state_dict(mean)
    return result


def stacked(family: Family, layers: list[tuple[Any, int]], last: Any) -> Any:
    """The model a person would put together by hand: modules moved, not names."""
    import torch

    result = copy.deepcopy(layers[0][0])
    moved = torch.nn.ModuleList(copy.deepcopy(model.get_submodule(family.stack)[i]) for model, i in layers)
    for place, layer in enumerate(moved):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    parent, _, name = family.stack.rpartition(".")
    setattr(result.get_submodule(parent), name, moved)
    for after in family.after:
        parent, _, name = after.rpartition(".")
        setattr(
            result.get_submodule(parent) if parent else result, name, copy.deepcopy(last.get_submodule(after))
        )
    if getattr(result.config, "layer_types", None):
        result.config.layer_types = [model.config.layer_types[i] for model, i in layers]
    for key in ("num_hidden_layers", "n_layer"):
        if key in result.config.to_dict():
            setattr(result.config, key, len(layers))
    return result


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Path, list[Any]]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return family, folder, [made(family, folder / name, seed) for seed, name in enumerate("ab")]


def test_an_average_computes_what_the_average_of_the_parameters_does(
    pair: tuple[Family, Path, list[Any]], tmp_path: Path
) -> None:
    import torch

    family, folder, models = pair
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(folder / n), "parameters": {"weight": 1.0}} for n in "ab"],
    }
    alnico.merge({**recipe, "unrelated": "allow"}, tmp_path / "out")
    torch.testing.assert_close(
        output(loaded(family, tmp_path / "out")), output(averaged(models)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "slices",
    [[("a", 0, 3), ("b", 1, 4)], [("a", 0, 4), ("a", 2, 4)], [("b", 0, 1), ("a", 1, 2)]],
    ids=["stacked", "repeated", "pruned"],
)
def test_layers_put_together_compute_what_the_modules_put_together_do(
    pair: tuple[Family, Path, list[Any]], slices: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    import torch

    family, folder, models = pair
    of = dict(zip("ab", models, strict=True))
    sources = [
        {"sources": [{"model": str(folder / name), "layer_range": [low, high]}]} for name, low, high in slices
    ]
    alnico.merge({"merge_method": "passthrough", "slices": sources}, tmp_path / "out")
    layers = [(of[name], i) for name, low, high in slices for i in range(low, high)]
    expected = stacked(family, layers, of[slices[-1][0]])
    assert torch.equal(output(loaded(family, tmp_path / "out")), output(expected))


VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "projection_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    import transformers as t

    folder = tmp_path_factory.mktemp("llava")
    text, vision = t.LlamaConfig(**GROUPED), t.CLIPVisionConfig(**VISION)
    family = Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        "",
        {"text_config": text, "vision_config": vision, "image_token_index": 63},
    )
    return folder, [made(family, folder / name, seed) for seed, name in enumerate("ab")]


def seen(model: Any) -> Any:
    import torch

    torch.manual_seed(5)
    pixels = torch.randn(1, 3, 8, 8)
    tokens = torch.tensor([[1, *[63] * 4, 5, 6, 7]])
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels, use_cache=False).logits


def test_modules_of_a_vision_language_model_are_merged_each_by_itself(
    seeing: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    import torch

    folder, models = seeing
    a, b = str(folder / "a"), str(folder / "b")
    both = [{"model": a, "parameters": {"weight": 1.0}}, {"model": b, "parameters": {"weight": 1.0}}]
    sources = [
        {"sources": [{"model": a, "layer_range": [0, 3]}]},
        {"sources": [{"model": b, "layer_range": [2, 4]}]},
    ]
    recipe = {
        "merge_method": "linear",
        "unrelated": "allow",
        "base_model": a,
        "modules": {
            "text_decoder": {"slices": [{**s, "merge_method": "passthrough"} for s in sources]},
            "vision_tower": {"models": both},
        },
    }
    alnico.merge(recipe, tmp_path / "out")
    expected = copy.deepcopy(models[0])
    expected.model.vision_tower = averaged([m.model.vision_tower for m in models])
    chosen = [models[0].model.language_model.layers[i] for i in range(3)] + [
        models[1].model.language_model.layers[i] for i in (2, 3)
    ]
    expected.model.language_model.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in chosen)
    expected.model.language_model.config.num_hidden_layers = len(chosen)
    expected.model.language_model.norm = copy.deepcopy(models[1].model.language_model.norm)
    expected.lm_head = copy.deepcopy(models[1].lm_head)
    family = Family("LlavaForConditionalGeneration", "LlavaConfig", "", {})
    torch.testing.assert_close(seen(loaded(family, tmp_path / "out")), seen(expected), rtol=1e-5, atol=1e-6)


def test_a_text_model_is_merged_into_the_text_decoder_of_a_vision_language_model(
    seeing: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    import torch

    folder, models = seeing
    text = made(FAMILIES["llama"], tmp_path / "text", 7)
    entries = [
        {"model": str(folder / "a"), "parameters": {"weight": 1.0}},
        {"model": str(tmp_path / "text"), "parameters": {"weight": 3.0}},
    ]
    recipe = {
        "merge_method": "linear",
        "unrelated": "allow",
        "base_model": str(folder / "a"),
        "modules": {"text_decoder": {"models": entries}},
    }
    alnico.merge(recipe, tmp_path / "out")
    expected = copy.deepcopy(models[0])
    own, theirs = expected.model.language_model.state_dict(), text.model.state_dict()
    expected.model.language_model.load_state_dict({n: own[n] * 0.25 + theirs[n] * 0.75 for n in own})
    expected.lm_head.weight.data = expected.lm_head.weight.data * 0.25 + text.lm_head.weight.data * 0.75
    found = loaded(Family("LlavaForConditionalGeneration", "LlavaConfig", "", {}), tmp_path / "out")
    torch.testing.assert_close(seen(found), seen(expected), rtol=1e-5, atol=1e-6)


def test_dense_and_sparse_layers_are_not_put_on_top_of_one_another(tmp_path: Path) -> None:
    made(FAMILIES["mistral"], tmp_path / "dense", 0)
    made(FAMILIES["mixtral"], tmp_path / "sparse", 1)
    slices = [
        {"sources": [{"model": str(tmp_path / name), "layer_range": bounds}]}
        for name, bounds in (("dense", [0, 2]), ("sparse", [2, 4]))
    ]
    with pytest.raises(MismatchError, match=r"model\.layers\.2\.(block_sparse_moe|mlp)"):
        alnico.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_a_slice_may_move_layers_only_where_the_pattern_of_the_config_stays_true(tmp_path: Path) -> None:
    options = {
        **GROUPED,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 2,
    }
    family = Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "model.layers", options)
    made(family, tmp_path / "a", 0)
    recipe: Callable[[list[int]], dict[str, Any]] = lambda bounds: {  # noqa: E731
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(tmp_path / "a"), "layer_range": r}]} for r in ([0, 2], bounds)],
    }
    alnico.merge(recipe([2, 4]), tmp_path / "even")
    loaded(family, tmp_path / "even")
    with pytest.raises(MismatchError, match="decoder_sparse_step is 2"):
        alnico.merge(recipe([1, 3]), tmp_path / "odd")
