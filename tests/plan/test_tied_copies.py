"""Tied weights that one model stores once and another under each of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import alnico
import architectures
from alnico.errors import MismatchError


def saved_twice(name: str) -> Any:
    """Write a model once as transformers does, and a tuned one with its tied copies, as ``torch.save`` of its state does."""
    model = architectures.make(name).eval()
    model.save_pretrained("a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    Path("b").mkdir()
    torch.save(model.state_dict(), "b/pytorch_model.bin")
    model.config.save_pretrained("b")
    return model


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]], ids=["stored once first", "copies first"])
@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "BartForConditionalGeneration",
                "WhisperForConditionalGeneration",
                "MambaForCausalLM",
                "ModernBertForMaskedLM",
                "BloomForCausalLM",
                "BertForMaskedLM",
                "OPTForCausalLM",
                "XLNetLMHeadModel",
                "ElectraForMaskedLM",
            )
        ),
    ],
)
def test_tied_copies_are_dropped_by_name_and_the_output_loads(
    name: str, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved_twice(name)
    once = {n: v.astype(np.float64) for n, v in load_file("a/model.safetensors").items()}
    result = alnico.merge({"merge_method": "linear", "models": order}, "out")
    got = load_file("out/model.safetensors")
    assert set(got) == set(once)
    copies = {d.name for d in result.plan.dropped}
    assert copies == {n for n in model.state_dict() if n not in once}
    assert all("a tied copy of" in d.why or "tied to" in d.why for d in result.plan.dropped)
    for tensor, value in once.items():
        if (
            value.dtype == np.float64
            and got[tensor].dtype == np.float32
            and tensor in dict(model.named_parameters())
        ):
            np.testing.assert_allclose(got[tensor], value + 0.0625, atol=1e-6)
    loaded, told = type(model).from_pretrained("out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert isinstance(loaded, transformers.PreTrainedModel)


HIDDEN, VOCABULARY = 8, 12


def written(name: str, config: str = "{}", **tensors: np.ndarray) -> None:
    Path(name).mkdir()
    Path(name, "config.json").write_text(config)
    save_file(tensors, Path(name) / "model.safetensors")


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def refused(*names: str) -> str:
    with pytest.raises(MismatchError) as caught:
        alnico.plan({"merge_method": "linear", "models": list(names)})
    return str(caught.value)


def test_a_head_of_its_own_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written("a", **{"wte.weight": table(0)})
    written("b", **{"wte.weight": table(1), "head.weight": table(2)})
    assert "head.weight: b has it, a lacks it" in refused("a", "b")


def test_norms_that_are_equal_by_chance_are_no_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    norms = {"first.weight": np.ones(HIDDEN, np.float32)}
    ones = {"m.weight": np.ones((4, HIDDEN), np.float32)}
    written("a", **norms, **ones, **{"w.weight": table(0)})
    twice = {"second.weight": np.ones(HIDDEN, np.float32), "n.weight": np.ones((4, HIDDEN), np.float32)}
    written("b", **norms, **ones, **twice, **{"w.weight": table(0)})
    assert "second.weight: b has it, a lacks it" in refused("a", "b")
    assert "n.weight: b has it, a lacks it" in refused("a", "b")


def test_a_config_that_unties_the_head_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    untied = '{"tie_word_embeddings": false}'
    written("a", untied, **{"wte.weight": table(0)})
    written("b", untied, **{"wte.weight": table(1), "lm_head.weight": table(1)})
    assert "lm_head.weight: b has it, a lacks it" in refused("a", "b")


# ---- heads of their own -----------------------------------------------------------------------------------------------


def base_and_tuned(name: str) -> Any:
    """Write a tied model, and one tuned from it whose head was trained by itself; returns the tuned one."""
    base = architectures.make(name, tie_word_embeddings=True).eval()
    base.save_pretrained("base")
    tuned = architectures.make(name, tie_word_embeddings=False).eval()
    tied = dict(base.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for place, parameter in tuned.named_parameters():
            parameter.copy_(tied[place] + 0.01 * torch.randn(parameter.shape))
    tuned.save_pretrained("tuned")
    return tuned


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_a_head_that_a_fine_tune_unties_is_in_the_output_and_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = base_and_tuned(name)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["tuned"],
        "parameters": {"weight": 1.0},
    }
    plan = alnico.merge(recipe, "out").plan
    assert not plan.dropped
    loaded = type(tuned).from_pretrained("out").eval()
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens).logits, tuned(tokens).logits)
    alnico.merge({"merge_method": "linear", "models": ["base", "tuned"]}, "mean")
    base, own, got = (load_file(f"{folder}/model.safetensors") for folder in ("base", "tuned", "mean"))
    assert got.keys() == own.keys()
    (head,) = own.keys() - base.keys()
    (embedding,) = (n for n, v in base.items() if v.shape == own[head].shape and ("embed" in n or "wte" in n))
    expected = (base[embedding].astype(np.float64) + own[head]) / 2
    np.testing.assert_array_equal(got[head], expected.astype(np.float32))


LLAMA = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": %s}'


def test_an_untied_head_with_the_bytes_of_its_embedding_stays_tied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written("a", LLAMA % "true", **{"model.embed_tokens.weight": table(0)})
    same = {"model.embed_tokens.weight": table(1), "lm_head.weight": table(1)}
    written("b", LLAMA % "false", **same)
    plan = alnico.plan({"merge_method": "linear", "models": ["a", "b"]})
    assert [job.name for job in plan.jobs] == ["model.embed_tokens.weight"]
    assert [d.name for d in plan.dropped] == ["lm_head.weight"]
    assert plan.config["tie_word_embeddings"] is True
    assert not [note for note in plan.notes if "lm_head" in note]


def test_a_head_of_its_own_unties_a_donor_that_stores_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written("a", LLAMA % "true", **{"model.embed_tokens.weight": table(0), "lm_head.weight": table(0)})
    written("b", LLAMA % "false", **{"model.embed_tokens.weight": table(1), "lm_head.weight": table(2)})
    plan = alnico.plan({"merge_method": "linear", "models": ["a", "b"]})
    assert {job.name for job in plan.jobs} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert plan.config["tie_word_embeddings"] is False


def test_values_of_a_head_that_its_own_config_ties_are_named_when_they_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written("a", LLAMA % "true", **{"model.embed_tokens.weight": table(0)})
    written("b", LLAMA % "true", **{"model.embed_tokens.weight": table(1), "lm_head.weight": table(2)})
    plan = alnico.plan({"merge_method": "linear", "models": ["a", "b"]})
    assert [d.name for d in plan.dropped] == ["lm_head.weight"]
    assert (
        "lm_head.weight: b stores values that differ from model.embed_tokens.weight, but its config ties the two, so "
        "they are left out, as programs that follow the config ignore them. If this head was trained, set "
        "tie_word_embeddings to false in the config.json of b."
    ) in plan.notes
